"""A base model in numbers: what a format codes, and what activations follow from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, get_args

from fluvial.models.hf import PreTrainedModel
from fluvial.models.pretrained import hidden_width, num_embeddings
from fluvial.models.quantisation import Format, stored_bytes
from fluvial.models.quantised import layers_of_coded
from fluvial.models.split import decoder_layers
from fluvial.models.targets import features


@dataclass(frozen=True)
class Sizes:
    """A base model in numbers."""

    weights: tuple[tuple[tuple[int, int], ...], ...]
    """Shapes (out, in) of the linear weights of each decoder layer, which a format codes."""
    other: int
    """All other parameters, in the type of the model."""
    hidden: int
    """Width d of a token's hidden state."""
    heads: int
    vocabulary: int
    width: int
    """Bytes of a value in the type of the model."""
    correction_rank: int = 0
    """Rank of the frozen correction of each quantised weight; 0 for none."""

    @property
    def layers(self) -> int:
        """Return the decoder layers."""
        return len(self.weights)

    @cached_property
    def linear(self) -> tuple[int, ...]:
        """The parameters of each layer's linear weights."""
        return tuple(sum(rows * columns for rows, columns in layer) for layer in self.weights)

    @cached_property
    def largest(self) -> tuple[int, ...]:
        """The parameters of each layer's largest linear weight, which is decoded as a whole."""
        return tuple(
            max((rows * columns for rows, columns in layer), default=0) for layer in self.weights
        )

    @cached_property
    def corrections(self) -> tuple[int, ...]:
        """The parameters of the corrections of each layer, where it is quantised."""
        rank = self.correction_rank
        return tuple(
            sum(min(rank, *shape) * sum(shape) for shape in layer) for layer in self.weights
        )

    @cached_property
    def coded(self) -> dict[str, tuple[int, ...]]:
        """The bytes of each layer's linear weights by quantised format, without corrections."""
        return {
            kind: tuple(
                sum(stored_bytes(kind, *shape) for shape in layer) for layer in self.weights
            )
            for kind in get_args(Format)
        }

    @property
    def parameters(self) -> int:
        """Return all parameters, without corrections."""
        return sum(self.linear) + self.other

    def to_json(self) -> dict[str, Any]:
        """Return the sizes as JSON values, for the record of a run."""
        weights = [[[*shape] for shape in layer] for layer in self.weights]
        return {**asdict(self), "weights": weights}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Sizes":
        """Return the inverse of `to_json`; the record is the run's own."""
        weights = tuple(
            tuple((rows, columns) for rows, columns in layer) for layer in values["weights"]
        )
        return cls(**{**values, "weights": weights})


def sizes_of(base: PreTrainedModel, width: int, correction_rank: int = 0) -> Sizes:
    """Return the sizes of a base, which may be on the meta device, with values of `width` bytes.

    Raises `ConfigError` for a model whose decoder layers are not one list.
    """
    _, layers = decoder_layers(base)
    weights: list[list[tuple[int, int]]] = [[] for _ in layers]
    for name, layer in layers_of_coded(base).items():
        weights[layer].append(features(base.get_submodule(name)))

    linear = sum(rows * columns for shapes in weights for rows, columns in shapes)
    config = base.config.get_text_config()
    return Sizes(
        weights=tuple(map(tuple, weights)),
        other=sum(parameter.numel() for parameter in base.parameters()) - linear,
        hidden=hidden_width(base),
        heads=config.num_attention_heads,
        vocabulary=num_embeddings(base),
        width=width,
        correction_rank=correction_rank,
    )
