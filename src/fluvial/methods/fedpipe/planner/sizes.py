"""A base model in numbers: what a format codes, and what activations follow from."""

from dataclasses import dataclass

from fluvial.models.hf import PreTrainedModel
from fluvial.models.pretrained import hidden_width, num_embeddings
from fluvial.models.split import decoder_layers
from fluvial.models.targets import linear_modules


@dataclass(frozen=True)
class Sizes:
    """A base model in numbers."""

    linear: int
    """Parameters of the linear layers of the decoder, which a format codes."""
    other: int
    """All other parameters, in the type of the model."""
    largest: int
    """Parameters of the largest of these linear layers, which is decoded as a whole."""
    hidden: int
    """Width d of a token's hidden state."""
    layers: int
    heads: int
    vocabulary: int
    width: int
    """Bytes of a value in the type of the model."""

    @property
    def parameters(self) -> int:
        """Return all parameters."""
        return self.linear + self.other


def sizes_of(base: PreTrainedModel, width: int) -> Sizes:
    """Return the sizes of a base, which may be on the meta device, with values of `width` bytes.

    Raises `ConfigError` for a model whose decoder layers are not one list.
    """
    path, layers = decoder_layers(base)
    linear = [
        module.weight.numel()
        for name, module in linear_modules(base).items()
        if name.startswith(f"{path}.")
    ]
    config = base.config.get_text_config()
    return Sizes(
        linear=sum(linear),
        other=sum(parameter.numel() for parameter in base.parameters()) - sum(linear),
        largest=max(linear),
        hidden=hidden_width(base),
        layers=len(layers),
        heads=config.num_attention_heads,
        vocabulary=num_embeddings(base),
        width=width,
    )
