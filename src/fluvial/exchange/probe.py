"""Probe of a codec at the sites, where no update may leave them.

Under `tgap.source = "sites-covariance"` each site measures on its own snapshots and sends a few
sums; `fold` makes the report of them, with what they cannot tell left open.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from fluvial.codecs.base import Codec, Snapshot
from fluvial.errors import WireError
from fluvial.exchange.feedback import MOST_ERROR
from fluvial.exchange.recoding import Recoded, feedback_error
from fluvial.exchange.report import Errors, GateReport, shortcomings
from fluvial.exchange.representation import Representation
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, energy, only, subtract


@dataclass(frozen=True)
class Probe:
    """Measures of one site on its own held-out snapshots: sums that give away no update."""

    count: int
    """Number of held-out snapshots."""
    bytes: int
    """Bytes of all their frames."""
    lost_a: float
    """Squared error of the innovation, A factors."""
    lost_b: float
    """The same, B factors."""
    energy_a: float
    """Squared norm of the update, A factors."""
    energy_b: float
    """The same, B factors."""
    cosine: float
    """Sum of the innovation cosines."""
    contraction: float
    """Largest ratio of the error's norm to the update's."""
    shuffled: float | None
    """Squared error when each snapshot is guessed by another's frame; None if there is only one."""
    fed_back: float | None = None
    """Mean relative error after some rounds of error feedback, where codecs are compared by it."""

    @classmethod
    def of(
        cls,
        codec: Codec,
        heldout: Sequence[Snapshot],
        representation: Representation,
        *,
        fed_back: bool = False,
    ) -> "Probe":
        """Code and decode `heldout`, which must not be empty."""
        recoded = Recoded.of(codec, heldout, representation)
        updates = recoded.updates
        lost = recoded.lost
        shuffled = [energy(subtract(x, y)) for x, y in zip(updates, recoded.shuffled, strict=True)]

        return cls(
            count=len(heldout),
            bytes=sum(map(len, recoded.frames)),
            lost_a=math.fsum(energy(only(error, "A")) for error in lost),
            lost_b=math.fsum(energy(only(error, "B")) for error in lost),
            energy_a=math.fsum(energy(only(update, "A")) for update in updates),
            energy_b=math.fsum(energy(only(update, "B")) for update in updates),
            cosine=math.fsum(recoded.cosines),
            contraction=recoded.contraction,
            shuffled=math.fsum(shuffled) if len(heldout) > 1 else None,
            fed_back=feedback_error(codec, heldout, representation) if fed_back else None,
        )

    SIZES: ClassVar = ("mean length of an update", "contraction", "error with frames shuffled")

    @property
    def sizes(self) -> tuple[float, float, float]:
        """Return the numbers that `SIZES` names, which cannot differ much between sites."""
        length = math.sqrt((self.energy_a + self.energy_b) / self.count)
        return length, self.contraction, math.sqrt((self.shuffled or 0.0) / self.count)

    def payload(self) -> Payload:
        """Return the sums as a message."""
        return Payload(values=asdict(self))

    @classmethod
    def read(cls, payload: Payload, *, most: int, fed_back: bool = False) -> "Probe":
        """Return what `payload` made, for at most `most` snapshots, as `of` with `fed_back` does.

        Raises `WireError` for values that cannot be such sums.
        """
        count = payload.value("count", int)
        size = payload.value("bytes", int)

        if not 1 <= count <= most or not 1 <= size < 2**53:
            raise WireError(
                f"probe: {count} snapshots in {size} bytes, expected 1 to {most}, and at least a "
                "byte"
            )

        sums = {
            name: payload.value(name, float)
            for name in ("lost_a", "lost_b", "energy_a", "energy_b", "contraction")
        }
        known = {"count", "bytes", "cosine", "shuffled", "fed_back", *sums}
        excess = set(payload.values) - known
        if payload.tensors or excess:
            raise WireError(f"probe: more than its sums: {sorted(excess)!r:.80}")

        cosine = payload.value("cosine", float)
        shuffled = (
            None if payload.values.get("shuffled") is None else payload.value("shuffled", float)
        )
        if (shuffled is None) != (count == 1):
            raise WireError(
                f"probe: shuffled={shuffled!r} with {count} snapshots; it needs two, and then is "
                "there"
            )

        # 1e100: the sum over sites must stay finite too.
        if not all(0 <= value < 1e100 for value in (*sums.values(), shuffled or 0.0)):
            raise WireError(f"probe: an energy below 0 or beyond 1e100 in {sums}")

        lost = sums["lost_a"] + sums["lost_b"]
        energy = sums["energy_a"] + sums["energy_b"]
        if lost > 1.001 * sums["contraction"] ** 2 * energy + 1e-20:
            raise WireError(
                f"probe: the codec lost {lost:.4g} of {energy:.4g}, more than its contraction "
                "allows"
            )

        if not abs(cosine) <= 1.001 * count:
            raise WireError(f"probe: cosines of {count} snapshots add up to {cosine}")

        error = payload.number("fed_back", 0.0, MOST_ERROR) if fed_back else None
        if not fed_back and payload.values.get("fed_back") is not None:
            raise WireError("probe: fed_back was not asked for")

        return cls(count, size, **sums, cosine=cosine, shuffled=shuffled, fed_back=error)


def fold(probes: Sequence[Probe], layout: Layout, representation: Representation) -> GateReport:
    """Return the report of what sites measured; at least one has.

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
        (probe.shuffled, probe.energy_a + probe.energy_b)
        for probe in probes
        if probe.shuffled is not None
    ]
    mixed = _Pair.sum(shuffled).error if shuffled else None
    contraction = max(probe.contraction for probe in probes)
    mean_cosine = math.fsum(probe.cosine for probe in probes) / count
    fed_back = [(probe.fed_back, probe.count) for probe in probes if probe.fed_back is not None]
    # Of the state's own error only the sites know the reference, the norm of the adapter.
    is_delta = representation == "delta"
    snr = (both.energy / both.lost if both.lost > 0 else 1e30) if is_delta else None
    reproduction = {"finite": True, "innovation cosine >= 0.90": mean_cosine >= 0.90}

    if is_delta:
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
        coded_error_a=a.error if is_delta else None,
        coded_error_b=b.error if is_delta else None,
        cosine=mean_cosine,
        aggregate_cosine=None,
        b_norm_ratio=None,
        snr=snr,
        snr_printed=None if snr is None else snr * layout.numel if both.lost > 0 else 1e30,
        contraction=contraction,
        failed=shortcomings(True, contraction, errors, {"zero": zero}, mixed),
        reproduction=reproduction,
        feedback_error=math.fsum(error * n for error, n in fed_back) / count if fed_back else None,
    )


@dataclass(frozen=True)
class _Pair:
    """Squared error, and squared norm of what it is an error of."""

    lost: float
    energy: float

    @property
    def error(self) -> float:
        return self.lost / self.energy if self.energy > 0 else 0.0

    @classmethod
    def sum(cls, pairs: Sequence[tuple[float, float]]) -> "_Pair":
        return cls(math.fsum(lost for lost, _ in pairs), math.fsum(energy for _, energy in pairs))
