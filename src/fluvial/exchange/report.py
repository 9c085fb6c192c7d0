"""Report of the gate: what a codec does to held-out updates, and whether that is enough.

Two verdicts. `reproduction` lists the criteria of the independent reproduction of CG-FedLLM
(innovation cosine 0.90 among them), which nothing is known to pass at 1/64. `failed` lists ours,
and these decide: finite; a contraction; output that depends on the input; and better than the zero,
the training-mean and the previous-round predictor by `MARGIN`, for A, for B and for the aggregate.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

MARGIN = 0.05
"""A codec's squared error must be at most 1 - MARGIN of the best predictor's (ours)."""
SHUFFLE_MARGIN = 0.01
"""Decoding another site's frame must be worse by more than this share (spec g.8)."""


@dataclass(frozen=True)
class Errors:
    """Relative squared errors; 1 is what sending nothing gives."""

    a: float
    b: float
    all: float
    aggregate: float
    """Of the mean over the sites of a round. Where that is not known, `all` stands here: the error
    of single updates. The two differ, most of all for an unbiased codec, whose error falls with the
    number of sites."""


@dataclass(frozen=True)
class GateReport:
    """What was measured, and the two verdicts; None is what sites that keep their updates cannot
    tell."""

    snapshots: int
    bytes_per_update: float
    raw_bytes: int
    errors: Errors
    predictors: dict[str, Errors]
    shuffled_error: float | None
    """With frames of other updates decoded; None if no site has two held-out snapshots of its
    own."""
    product_error: float | None
    """Relative squared error of the change of the weights, s((B + dB)(A + dA) - BA)."""
    coded_error_a: float | None
    """Of what is coded: the state's own error under `state`, the same as `errors` under `delta`."""
    coded_error_b: float | None
    cosine: float
    """Innovation cosine, mean over held-out snapshots."""
    aggregate_cosine: float | None
    b_norm_ratio: float | None
    snr: float | None
    """sum G^2 / sum (G - G~)^2 of what is coded."""
    snr_printed: float | None
    """The paper's figure: sum G^2 / mean (G - G~)^2, larger by the number of values."""
    contraction: float
    """Largest ||u - D(E(u))|| / ||u|| over held-out snapshots; a contraction is below 1."""
    failed: list[str]
    reproduction: dict[str, bool]

    @property
    def snr_db(self) -> float | None:
        """10 log10 of `snr`."""
        if self.snr is None:
            return None
        return 10 * math.log10(self.snr) if self.snr > 0 else -math.inf

    def values(self) -> dict[str, Any]:
        """Plain values for messages and files."""
        return {**asdict(self), "snr_db": self.snr_db, "passed": not self.failed}


def shortcomings(
    finite: bool,
    contraction: float,
    errors: Errors,
    predictors: dict[str, Errors],
    shuffled: float | None,
) -> list[str]:
    failed = [] if finite else ["the output is not finite"]
    if not contraction < 1:
        failed.append(
            f"it is no contraction (error / update norm {contraction:.3f}, must be below 1)"
        )

    if shuffled is not None and not shuffled > (1 + SHUFFLE_MARGIN) * errors.all:
        failed.append(
            f"the output does not depend on the input (error {errors.all:.4f}, with frames shuffled {shuffled:.4f})"
        )

    for part in ("a", "b", "aggregate"):
        best = min(predictors, key=lambda name: float(getattr(predictors[name], part)))
        found = getattr(errors, part)
        bar = (1 - MARGIN) * getattr(predictors[best], part)

        if not found <= bar:
            label = {"a": "A", "b": "B", "aggregate": "the aggregate"}[part]
            failed.append(
                f"for {label} its error {found:.3f} is not below {bar:.3f}, {1 - MARGIN:g} of predictor {best!r}"
            )

    return failed


def explain(report: GateReport, codec: str) -> str:
    """Why a codec was refused and what to do, in a few lines."""
    other = "a richer codec.rate" if codec == "klt" else "codec.name='klt' or 'auto'"
    return (
        f"codec {codec!r} does not carry this model's updates: on {report.snapshots} held-out snapshots "
        + "; ".join(report.failed)
        + f". (Cosine to the true update {report.cosine:.3f}; error {report.errors.all:.3f}, where sending nothing "
        f"gives 1.) Choose {other}, method.name='fedavg' with a codec that needs no fit such as 'int4', or set "
        "method.gate='report' to go on anyway; --resume with the changed setting keeps the baselines that are done. "
        "Few or very similar records can make a simple predictor hard to beat."
    )
