"""Does the codec carry held-out updates? Measured before the first federated round, on snapshots of
later rounds.

Two verdicts. `reproduction` lists the criteria of the independent reproduction of CG-FedLLM
(innovation cosine 0.90 among them), which nothing is known to pass at 1/64. `failed` lists ours,
and these decide: finite; a contraction; output that depends on the input; and better than the zero,
the training-mean and the previous-round predictor by `MARGIN`, for A, for B and for the aggregate.

All errors are those of the *innovation*, the difference to the received adapter, whatever is sent:
a codec that always returns the training mean has a state error of 0.4 % and an innovation cosine
below zero.

Where no update may leave a site (`tgap.source = "sites-covariance"`), each site measures on its own
snapshots and sends a few sums; `fold` makes the report of them, with what they cannot tell left
open.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from fluvial.codecs.base import Codec, Snapshot
from fluvial.errors import WireError
from fluvial.exchange.weighting import weighted
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import (
    Layout,
    Named,
    WeightedMean,
    add,
    cosine,
    energy,
    factor,
    is_finite,
    norm,
    only,
    relative_error,
    subtract,
    zeros_like,
)

Representation = Literal["delta", "state"]
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


def coded_object(snapshot_received: Named, update: Named, representation: Representation) -> Named:
    """What a site codes: its update, or its whole adapter."""
    return update if representation == "delta" else add(snapshot_received, update)


def innovation(received: Named, decoded: Named, representation: Representation) -> Named:
    """What a decoded object says about the difference to the received adapter."""
    return decoded if representation == "delta" else subtract(decoded, received)


def measure(
    codec: Codec,
    training: Sequence[Snapshot],
    heldout: Sequence[Snapshot],
    representation: Representation,
) -> GateReport:
    """Code every held-out snapshot and compare; `training` gives the predictors. Both must not be
    empty."""
    assert training, "no training snapshots"
    assert heldout, "no held-out snapshots"
    frames = []
    decoded = []
    coded = []

    for number, snapshot in enumerate(heldout):
        coded.append(coded_object(snapshot.received, snapshot.update, representation))
        coder = weighted(codec, snapshot.received)
        frame, _ = coder.encode(coded[-1], seed=number)
        frames.append(frame)
        decoded.append(coder.decode(frame))

    finite = all(is_finite(tensors) for tensors in decoded)
    guesses = [
        innovation(snapshot.received, tensors, representation)
        for snapshot, tensors in zip(heldout, decoded, strict=True)
    ]
    # Rolling by one pairs each snapshot with another site's frame of the same round, where there is
    # one.
    shuffled = [
        innovation(snapshot.received, decoded[index - 1], representation)
        for index, snapshot in enumerate(heldout)
    ]
    predictors = {
        name: _errors(heldout, [predict(snapshot) for snapshot in heldout])
        for name, predict in _predictors(training, heldout, representation).items()
    }
    errors = _errors(heldout, guesses)
    mixed = _errors(heldout, shuffled).all
    lost = sum(energy(subtract(x, y)) for x, y in zip(coded, decoded, strict=True))
    signal = sum(energy(x) for x in coded)
    ratios = [
        norm(subtract(snapshot.update, guess)) / max(norm(snapshot.update), 1e-30)
        for snapshot, guess in zip(heldout, guesses, strict=True)
    ]
    b_true = math.sqrt(sum(energy(only(x, "B")) for x in coded))
    b_decoded = math.sqrt(sum(energy(only(y, "B")) for y in decoded))
    cosines = [
        cosine(snapshot.update, guess) for snapshot, guess in zip(heldout, guesses, strict=True)
    ]
    coded_a, coded_b = (_pooled(coded, decoded, which) for which in ("A", "B"))
    aggregate_cosine = aggregate(heldout, guesses, cosine)
    failed = _ours(finite, max(ratios), errors, predictors, mixed)
    ratio = b_decoded / b_true if b_true > 0 else 0.0

    return GateReport(
        snapshots=len(heldout),
        bytes_per_update=sum(map(len, frames)) / len(frames),
        raw_bytes=codec.layout.raw_bytes,
        errors=errors,
        predictors=predictors,
        shuffled_error=mixed,
        product_error=_product_error(heldout, guesses),
        coded_error_a=coded_a,
        coded_error_b=coded_b,
        cosine=sum(cosines) / len(cosines),
        aggregate_cosine=aggregate_cosine,
        b_norm_ratio=ratio,
        snr=signal / lost if lost > 0 else 1e30,
        snr_printed=signal * codec.layout.numel / lost if lost > 0 else 1e30,
        contraction=max(ratios),
        failed=failed,
        reproduction={
            "finite": finite,
            "A error < 1": coded_a < 1,
            "B error < 1": coded_b < 1,
            "innovation cosine >= 0.90": sum(cosines) / len(cosines) >= 0.90,
            "B norm ratio in [0.5, 2]": 0.5 <= ratio <= 2,
            "aggregate cosine >= 0.90": aggregate_cosine >= 0.90,
            "depends on the input": mixed > errors.all,
        },
    )


@dataclass(frozen=True)
class Probe:
    """What one site measured on its own held-out snapshots: sums, from which no update can be
    read."""

    count: int
    bytes: int
    lost_a: float
    """Squared error of the innovation, A factors."""
    lost_b: float
    energy_a: float
    """Squared norm of the update, A factors."""
    energy_b: float
    cosine: float
    """Sum over snapshots."""
    contraction: float
    """Largest ratio of the error's norm to the update's."""
    shuffled: float | None
    """Squared error when each snapshot is guessed by another's frame; None if there is only one."""

    @classmethod
    def of(
        cls, codec: Codec, heldout: Sequence[Snapshot], representation: Representation
    ) -> "Probe":
        """Code and decode `heldout`, which must not be empty."""
        assert heldout, "no held-out snapshots"
        frames = [
            codec.encode(coded_object(s.received, s.update, representation), seed=number)
            for number, s in enumerate(heldout)
        ]
        decoded = [codec.decode(frame) for frame in frames]
        pairs = [
            (s.update, innovation(s.received, y, representation))
            for s, y in zip(heldout, decoded, strict=True)
        ]
        lost = [subtract(update, guess) for update, guess in pairs]
        shuffled = [
            energy(subtract(s.update, innovation(s.received, decoded[index - 1], representation)))
            for index, s in enumerate(heldout)
        ]

        return cls(
            count=len(heldout),
            bytes=sum(map(len, frames)),
            lost_a=math.fsum(energy(only(each, "A")) for each in lost),
            lost_b=math.fsum(energy(only(each, "B")) for each in lost),
            energy_a=math.fsum(energy(only(update, "A")) for update, _ in pairs),
            energy_b=math.fsum(energy(only(update, "B")) for update, _ in pairs),
            cosine=math.fsum(cosine(update, guess) for update, guess in pairs),
            contraction=max(
                norm(x) / max(norm(s.update), 1e-30) for x, s in zip(lost, heldout, strict=True)
            ),
            shuffled=math.fsum(shuffled) if len(heldout) > 1 else None,
        )

    SIZES: ClassVar = ("mean length of an update", "contraction", "error with frames shuffled")

    @property
    def sizes(self) -> tuple[float, float, float]:
        """Return the numbers that `SIZES` names, which cannot differ much between sites."""
        length = math.sqrt((self.energy_a + self.energy_b) / self.count)
        return length, self.contraction, math.sqrt((self.shuffled or 0.0) / self.count)

    def payload(self) -> Payload:
        """On the wire."""
        return Payload(values=asdict(self))

    @classmethod
    def read(cls, payload: Payload, *, most: int) -> "Probe":
        """Inverse of `payload`, for at most `most` snapshots; raises `WireError` for what cannot be
        such sums."""
        count = payload.value("count", int)
        size = payload.value("bytes", int)

        if not 1 <= count <= most or not 1 <= size < 2**53:
            raise WireError(
                f"probe: {count} snapshots in {size} bytes, expected 1 to {most}, and at least a byte"
            )

        sums = {
            name: payload.value(name, float)
            for name in ("lost_a", "lost_b", "energy_a", "energy_b", "contraction")
        }
        known = {"count", "bytes", "cosine", "shuffled", *sums}
        if payload.tensors or set(payload.values) - known:
            raise WireError(
                f"probe: more than its sums: {sorted(set(payload.values) - known)!r:.80}"
            )

        cosine = payload.value("cosine", float)
        shuffled = (
            None if payload.values.get("shuffled") is None else payload.value("shuffled", float)
        )
        if (shuffled is None) != (count == 1):
            raise WireError(
                f"probe: shuffled={shuffled!r} with {count} snapshots; it needs two, and then is there"
            )

        # 1e100: the sum over sites must stay finite too.
        if not all(0 <= each < 1e100 for each in (*sums.values(), shuffled or 0.0)):
            raise WireError(f"probe: an energy below 0 or beyond 1e100 in {sums}")

        lost = sums["lost_a"] + sums["lost_b"]
        energy = sums["energy_a"] + sums["energy_b"]
        if lost > 1.001 * sums["contraction"] ** 2 * energy + 1e-20:
            raise WireError(
                f"probe: the codec lost {lost:.4g} of {energy:.4g}, more than its contraction allows"
            )

        if not abs(cosine) <= 1.001 * count:
            raise WireError(f"probe: cosines of {count} snapshots add up to {cosine}")

        return cls(count, size, **sums, cosine=cosine, shuffled=shuffled)


def fold(probes: Sequence[Probe], layout: Layout, representation: Representation) -> GateReport:
    """The report of what sites measured; at least one has.

    The only predictor is zero, because the others need updates of all sites. The error of the
    aggregate is not known; that of single updates stands in its place.
    """
    assert probes, "no site has measured"
    count = sum(probe.count for probe in probes)
    a = _Pair.sum([(probe.lost_a, probe.energy_a) for probe in probes])
    b = _Pair.sum([(probe.lost_b, probe.energy_b) for probe in probes])
    both = _Pair(a.lost + b.lost, a.energy + b.energy)
    errors = Errors(a.error, b.error, both.error, both.error)
    zero = Errors(*(float(pair.energy > 0) for pair in (a, b, both, both)))
    shuffled = [
        (each.shuffled, each.energy_a + each.energy_b)
        for each in probes
        if each.shuffled is not None
    ]
    mixed = _Pair.sum(shuffled).error if shuffled else None
    contraction = max(probe.contraction for probe in probes)
    mean_cosine = math.fsum(probe.cosine for probe in probes) / count
    # Of the state's own error only the sites know the reference, the norm of the adapter.
    known = representation == "delta"
    snr = (both.energy / both.lost if both.lost > 0 else 1e30) if known else None
    reproduction = {"finite": True, "innovation cosine >= 0.90": mean_cosine >= 0.90}

    if known:
        reproduction |= {"A error < 1": a.error < 1, "B error < 1": b.error < 1}
    if mixed is not None:
        reproduction["depends on the input"] = mixed > both.error

    return GateReport(
        snapshots=count,
        bytes_per_update=sum(probe.bytes for probe in probes) / count,
        raw_bytes=layout.raw_bytes,
        errors=errors,
        predictors={"zero": zero},
        shuffled_error=mixed,
        product_error=None,
        coded_error_a=a.error if known else None,
        coded_error_b=b.error if known else None,
        cosine=mean_cosine,
        aggregate_cosine=None,
        b_norm_ratio=None,
        snr=snr,
        snr_printed=None if snr is None else snr * layout.numel if both.lost > 0 else 1e30,
        contraction=contraction,
        failed=_ours(True, contraction, errors, {"zero": zero}, mixed),
        reproduction=reproduction,
    )


@dataclass(frozen=True)
class _Pair:
    lost: float
    energy: float

    @property
    def error(self) -> float:
        return self.lost / self.energy if self.energy > 0 else 0.0

    @classmethod
    def sum(cls, pairs: Sequence[tuple[float, float]]) -> "_Pair":
        return cls(math.fsum(lost for lost, _ in pairs), math.fsum(energy for _, energy in pairs))


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


def _ours(
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


def _predictors(
    training: Sequence[Snapshot], heldout: Sequence[Snapshot], representation: Representation
) -> dict[str, Callable[[Snapshot], Named]]:
    """Guesses that need no message."""
    average = _mean(
        [coded_object(snapshot.received, snapshot.update, representation) for snapshot in training]
    )
    by_round: dict[int, Named] = {
        round: _mean(
            [snapshot.update for snapshot in (*training, *heldout) if snapshot.round == round]
        )
        for round in {snapshot.round for snapshot in (*training, *heldout)}
    }

    def previous(snapshot: Snapshot) -> Named:
        earlier = [round for round in by_round if round < snapshot.round]
        return by_round[max(earlier)] if earlier else zeros_like(snapshot.update)

    return {
        "zero": lambda snapshot: zeros_like(snapshot.update),
        "training mean": lambda snapshot: innovation(snapshot.received, average, representation),
        "previous round": previous,
    }


def _mean(tensors: Sequence[Named]) -> Named:
    mean = WeightedMean()
    for each in tensors:
        mean.add(each, 1)
    return mean.mean()


def _errors(heldout: Sequence[Snapshot], guesses: Sequence[Named]) -> Errors:
    true = [snapshot.update for snapshot in heldout]
    return Errors(
        a=_pooled(true, guesses, "A"),
        b=_pooled(true, guesses, "B"),
        all=_pooled(true, guesses, None),
        aggregate=aggregate(heldout, guesses, relative_error),
    )


def _pooled(
    true: Sequence[Named], guesses: Sequence[Named], which: Literal["A", "B"] | None
) -> float:
    lost = signal = 0.0
    for x, y in zip(true, guesses, strict=True):
        names = [name for name in x if which is None or factor(name) == which]
        lost += energy({name: x[name] - y[name] for name in names})
        signal += energy({name: x[name] for name in names})

    return lost / signal if signal > 0 else 0.0


def aggregate(
    heldout: Sequence[Snapshot], guesses: Sequence[Named], measure: Callable[[Named, Named], float]
) -> float:
    """Mean over held-out rounds of a measure between the true and the guessed mean update."""
    found = []
    for round in sorted({snapshot.round for snapshot in heldout}):
        members = [index for index, snapshot in enumerate(heldout) if snapshot.round == round]
        found.append(
            measure(
                _mean([heldout[i].update for i in members]), _mean([guesses[i] for i in members])
            )
        )

    return sum(found) / len(found)


def _product_error(heldout: Sequence[Snapshot], guesses: Sequence[Named]) -> float:
    """Relative squared error of dM = dB A + (B + dB) dA, by Gram matrices of its 2r columns, never
    as d x d."""
    lost = signal = 0.0
    for snapshot, guess in zip(heldout, guesses, strict=True):
        for name_a in only(snapshot.received, "A"):
            name_b = name_a.replace(".lora_A.", ".lora_B.")
            a = snapshot.received[name_a].double()
            b = snapshot.received[name_b].double()

            def change(
                update: Named, a: Any = a, b: Any = b, name_a: str = name_a, name_b: str = name_b
            ) -> Any:
                d_b = update[name_b].double()
                d_a = (
                    update[name_a].double() if name_a in update else a.new_zeros(a.shape)
                )  # FFA freezes A
                return (d_b, b + d_b), (a, d_a)

            def product(left: Any, right: Any) -> float:
                return float(
                    sum(
                        ((p.T @ q) * (x @ y.T)).sum()
                        for p, x in zip(*left, strict=True)
                        for q, y in zip(*right, strict=True)
                    )
                )

            true = change(snapshot.update)
            guessed = change(guess)
            signal += product(true, true)
            lost += product(true, true) - 2 * product(true, guessed) + product(guessed, guessed)

    return lost / signal if signal > 0 else 0.0
