"""Formats of the frozen base, and rates of the wire: what each costs and what each loses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fluvial.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """A format of the base's linear weights, or one format of most layers and others of some."""

    name: str
    """Name of the format; where some layers have another one, of that of all other layers."""
    width: int | None
    """Bytes of a value; None for quantised weights, which compute in the type of the model."""
    error: float
    """Relative error of a layer's output, sqrt(E|W x - Q(W) x|^2 / E|W x|^2), for normal weights.

    It is that of the weights themselves, ||W - Q(W)|| / ||W||, where inputs are independent."""
    slowdown: float
    """Time of a pass, against that of the measured format, where this one was not measured."""
    layers: tuple[tuple[int, str], ...] = ()
    """Format by decoder layer, counted from 0, where they differ; layers that are left out have
    `name`."""

    @property
    def quantised(self) -> bool:
        """Return whether the weights of `name` are decoded before they are used."""
        return self.width is None

    def by_layer(self, count: int) -> list[str]:
        """Return the name of the format of each of `count` layers."""
        other = dict(self.layers)
        return [other.get(layer, self.name) for layer in range(count)]


FORMATS = {
    each.name: each
    for each in (
        Format("float32", 4, 0.0, 1.0),
        Format("bfloat16", 2, 0.00166, 1.0),
        Format("int8", None, 0.0087, 1.0),
        Format("nf4", None, 0.0920, 1.0),
        Format("nf4-double", None, 0.0920, 1.0),
    )
}
"""Formats by name, each for all layers. Errors are those of normal weights, which a test computes;
`models.quantisation.stored_bytes` has the bytes of the quantised ones."""


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


def layered(name: str, layers: tuple[tuple[int, str], ...]) -> Format:
    """Return the format `name` with other formats of some layers."""
    return replace(FORMATS[name], layers=layers)
