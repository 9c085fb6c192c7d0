"""Report of the gate: what a codec does to held-out updates, and whether that is enough.

Two verdicts. `reproduction` lists the criteria of the independent reproduction of CG-FedLLM
(innovation cosine 0.90 among them), which nothing is known to pass at 1/64. `failed` lists ours,
and these decide: finite; a contraction; output that depends on the input; and better than the zero,
the training-mean and the previous-round predictor by `MARGIN`, for A, for B and for the aggregate.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from fluvial import caller

MARGIN = 0.05
"""Share of the best predictor's squared error by which a codec must be better (ours)."""
SHUFFLE_MARGIN = 0.01
"""Share by which decoding another site's frame must be worse (spec g.8)."""


@dataclass(frozen=True)
class Errors:
    """Relative squared errors; 1 is what sending nothing gives."""

    a: float
    """Error of all A factors."""
    b: float
    """Error of all B factors."""
    all: float
    """Error of single updates."""
    aggregate: float
    """Error of the mean over the sites of a round. Where that is not known, it is `all`. The two
    differ, most of all for an unbiased codec, whose error falls with the number of sites."""


@dataclass(frozen=True)
class GateReport:
    """Figures of a codec on held-out snapshots, and the two verdicts.

    A figure is None where it needs updates of all sites and these stay at the sites.
    """

    snapshots: int
    """Number of held-out snapshots."""
    bytes_per_update: float
    """Mean bytes of a frame."""
    raw_bytes: int
    """Bytes of an update in fp32."""
    errors: Errors
    """Errors of the innovation with this codec."""
    predictors: dict[str, Errors]
    """Errors of guesses that need no message, by name."""
    shuffled_error: float | None
    """Error with frames of other updates decoded; None if no site has two held-out snapshots of its
    own."""
    product_error: float | None
    """Relative squared error of the change of the weights, s((B + dB)(A + dA) - BA)."""
    coded_error_a: float | None
    """Error of the A factors as they are coded: the state's own under `state`, the same as in
    `errors` under `delta`."""
    coded_error_b: float | None
    """The same of the B factors."""
    cosine: float
    """Innovation cosine, mean over held-out snapshots."""
    aggregate_cosine: float | None
    """Cosine of the mean update of a round, mean over held-out rounds."""
    b_norm_ratio: float | None
    """Norm of the decoded B factors over that of the true ones."""
    snr: float | None
    """Signal to noise of what is coded, sum G^2 / sum (G - G~)^2."""
    snr_printed: float | None
    """Figure of the paper: sum G^2 / mean (G - G~)^2, larger by the number of values."""
    contraction: float
    """Largest ||u - D(E(u))|| / ||u|| over held-out snapshots; a contraction is below 1."""
    failed: list[str]
    """Reasons why the codec does not carry updates, by our criteria; empty where it does."""
    reproduction: dict[str, bool]
    """Criteria of the reproduction, and whether each is met."""
    feedback_error: float | None = None
    """Mean relative error after some rounds of error feedback, where `auto` compared codecs by
    it."""

    @property
    def snr_db(self) -> float | None:
        """Return 10 log10 of `snr`."""
        if self.snr is None:
            return None
        return 10 * math.log10(self.snr) if self.snr > 0 else -math.inf

    def values(self) -> dict[str, Any]:
        """Return plain values for messages and files."""
        return {**asdict(self), "snr_db": self.snr_db, "passed": not self.failed}


def shortcomings(
    finite: bool,
    contraction: float,
    errors: Errors,
    predictors: dict[str, Errors],
    shuffled: float | None,
) -> list[str]:
    """Return the reasons why a codec does not carry updates, by our criteria."""
    failed = [] if finite else ["the output is not finite"]
    if not contraction < 1:
        failed.append(
            f"it is no contraction (error / update norm {contraction:.3f}, must be below 1)"
        )

    if shuffled is not None and not shuffled > (1 + SHUFFLE_MARGIN) * errors.all:
        failed.append(
            f"the output does not depend on the input (error {errors.all:.4f}, with frames "
            f"shuffled {shuffled:.4f})"
        )

    by_predictor = {name: _decisive(guess) for name, guess in predictors.items()}
    for label, error in _decisive(errors).items():
        best = min(by_predictor, key=lambda name: by_predictor[name][label])
        bar = (1 - MARGIN) * by_predictor[best][label]

        if not error <= bar:
            failed.append(
                f"for {label} its error {error:.3f} is not below {bar:.3f}, {1 - MARGIN:g} of "
                f"predictor {best!r}"
            )

    return failed


def _decisive(errors: Errors) -> dict[str, float]:
    """Return the errors that decide, by what they are of."""
    return {"A": errors.a, "B": errors.b, "the aggregate": errors.aggregate}


def explain(report: GateReport, codec: str) -> str:
    """Return why a codec was refused and what to do, in a few lines."""
    trained = codec in ("resnet", "cnn", "vq")
    other = "codec.name='klt' or 'auto'" if trained else "a lower codec.rate"
    return (
        f"codec {codec!r} does not carry this model's updates: on {report.snapshots} held-out "
        "snapshots "
        + "; ".join(report.failed)
        + f". (Cosine to the true update {report.cosine:.3f}; error {report.errors.all:.3f}, where "
        f"sending nothing gives 1.) Choose {other}, method.name='fedavg' with a codec that needs "
        "no fit such as 'int4', or with method.name='cgfedllm' set method.gate='report' to go on "
        f"anyway; {caller.resume()} with the changed setting keeps the baselines that are done. "
        "Few or very similar records can make a simple predictor hard to beat."
    )
