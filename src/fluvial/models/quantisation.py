"""Formats of a quantised base's linear weights, the format of each decoder layer, and their bytes.

Nothing here needs the library that quantises: settings, messages and plans are made without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from fluvial.errors import WireError
from fluvial.wire.payload import Value

Format = Literal["nf4", "nf4-double", "int8"]
"""Format of a frozen weight: NormalFloat with 4 bits and an fp32 scale for each block of 64 values
("nf4"), the same with scales of 8 bits in blocks of 256 ("nf4-double"; both QLoRA, Dettmers et al.,
NeurIPS 2023), or 8 bits with an fp32 scale for each row ("int8", as in LLM.int8())."""

Unquantised = Literal["none"]
"""Word for a layer that stays in the base's float type."""

LayerFormat = Format | Unquantised

BLOCK = 64
"""Values that share a scale in NF4."""
NESTED_BLOCK = 256
"""Scales that share a scale of their own in "nf4-double"."""

MOST_LAYERS = 10_000
"""Layers that a message may name at most."""


@dataclass(frozen=True)
class Quantisation:
    """The format of the linear weights of every decoder layer."""

    usual: Format | None = None
    """The format of layers that `layers` does not name; None for the base's float type."""
    layers: tuple[tuple[int, Format | None], ...] = ()
    """Other formats by layer, counted from 0, in order of the layers."""

    @classmethod
    def of(
        cls, usual: Format | None, layers: Mapping[LayerFormat, tuple[int, ...]]
    ) -> "Quantisation":
        """Return the quantisation with another format for some layers.

        Layers that have the usual format are left out, so that equal quantisations are equal.
        """
        named = {
            layer: None if kind == "none" else kind
            for kind, numbers in layers.items()
            for layer in numbers
        }
        return cls(usual, tuple(sorted((n, kind) for n, kind in named.items() if kind != usual)))

    def __bool__(self) -> bool:
        """Return true where some layer is quantised."""
        return self.usual is not None or any(kind is not None for _, kind in self.layers)

    def format(self, layer: int) -> Format | None:
        """Return the format of a layer, None for the base's float type."""
        return dict(self.layers).get(layer, self.usual)

    def by_format(self) -> dict[LayerFormat, tuple[int, ...]]:
        """Return the layers that differ from the usual format, by format."""
        numbers: dict[LayerFormat, list[int]] = {}
        for layer, kind in self.layers:
            numbers.setdefault(kind or "none", []).append(layer)

        return {kind: tuple(layers) for kind, layers in numbers.items()}

    def to_value(self) -> Value:
        """Return the value of a message: a format, or formats and their layers."""
        if not self.layers:
            return self.usual or "none"

        layers: dict[str, Value] = {kind: list(n) for kind, n in self.by_format().items()}
        return {"usual": self.usual or "none", "layers": layers}

    @classmethod
    def from_value(cls, value: Value, where: str) -> "Quantisation":
        """Return the inverse of `to_value`; raises `WireError` that names the wrong value."""
        if isinstance(value, str):
            return cls(_read_format(value, where))

        if not isinstance(value, dict) or value.keys() != {"usual", "layers"}:
            raise WireError(f"{where}: expected a format, or 'usual' and 'layers'")

        layers = value["layers"]
        if not isinstance(layers, dict) or not layers:
            raise WireError(f"{where}.layers: expected layers by format")

        numbers = [(kind, n) for kind in layers for n in _read_layers(layers[kind], where)]
        if len({n for _, n in numbers}) < len(numbers):
            raise WireError(f"{where}.layers: a layer is named twice")

        usual = _read_format(value["usual"], f"{where}.usual")
        named = [(n, _read_format(kind, f"{where}.layers")) for kind, n in numbers]
        return cls(usual, tuple(sorted((n, kind) for n, kind in named if kind != usual)))


FLOAT = Quantisation()
"""No layer is quantised."""


def _read_format(value: Value, where: str) -> Format | None:
    known = (*get_args(Format), "none")
    if value not in known:
        raise WireError(f"{where}: {value!r:.40} is none of {', '.join(known)}")
    return None if value == "none" else cast(Format, value)


def _read_layers(value: Value, where: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise WireError(f"{where}.layers: expected numbers of layers")

    for number in value:
        if type(number) is not int or not 0 <= number < MOST_LAYERS:
            raise WireError(f"{where}.layers: {number!r:.40} is no number of a layer")

    return cast(list[int], value)


def stored_bytes(kind: Format, rows: int, columns: int) -> int:
    """Return the bytes of a matrix (rows, columns) in a format: codes, and scales in fp32.

    NF4 has 4.5 bits for each value, with double quantisation 4.127 and 4 bytes for each matrix.
    """
    values = rows * columns
    if kind == "int8":
        return values + 4 * rows

    blocks = -(-values // BLOCK)
    codes = -(-values // 2)
    if kind == "nf4":
        return codes + 4 * blocks
    return codes + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4
