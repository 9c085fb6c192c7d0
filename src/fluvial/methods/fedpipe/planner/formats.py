"""Formats of the frozen base, and rates of the wire: what each costs and what each loses."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from fluvial.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """A format of the base's linear weights."""

    name: str
    bits: Fraction
    """Bits of a weight, with its share of the scales."""
    error: float
    """Relative error of a layer's output, sqrt(E|W x - Q(W) x|^2 / E|W x|^2), for normal weights.

    It is that of the weights themselves, ||W - Q(W)|| / ||W||, where inputs are independent."""
    quantised: bool
    """True where weights are decoded before they are used."""
    slowdown: float
    """Time of a pass, against that of the measured format, where this one was not measured."""


FORMATS = {
    each.name: each
    for each in (
        Format("float32", Fraction(32), 0.0, False, 1.0),
        Format("bfloat16", Fraction(16), 0.00166, False, 1.0),
        Format("int8", 8 + Fraction(32, 1024), 0.0087, True, 1.0),
        Format("nf4", Fraction(9, 2), 0.0920, True, 1.0),
        Format("nf4-double", 4 + Fraction(8, 64) + Fraction(32, 64 * 256), 0.0920, True, 1.0),
    )
}
"""Formats by name. "nf4" has an fp32 scale for 64 weights, in "nf4-double" of 8 bits in blocks of
256; "int8" has one for each row, counted as 1,024 weights. Errors are those of normal weights,
which a test computes."""


@dataclass(frozen=True)
class Wire:
    """A rate of the codec that carries an update."""

    rate: int
    """Bytes of the fp32 update for each byte of its frame; 1 is the update itself."""
    retained: float
    """Share of the update's energy that arrives."""

    @classmethod
    def of(cls, rate: int) -> "Wire":
        """Return a rate with Shannon's bound for a normal source: 1 - 2^(-2 bits) of the energy
        arrives (Cover and Thomas, "Elements of Information Theory", theorem 10.3.2).

        The bound favours no codec.
        """
        return cls(rate, round(1.0 - 2.0 ** (-64 / rate), 6))


def formats_named(names: Sequence[str]) -> tuple[Format, ...]:
    """Return formats by name; raises `ConfigError` for an unknown one."""
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"format {name!r:.40}: choose among {', '.join(FORMATS)}")
    return tuple(FORMATS[name] for name in names)
