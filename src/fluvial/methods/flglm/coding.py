"""Hidden states and their gradients on the wire: rows of real tokens, coded as configured."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fluvial.codecs.activations import ActivationCodec, build_activation
from fluvial.codecs.activations.floats import ExactRowsSettings
from fluvial.errors import WireError
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.models.split import Part

MOST_HIDDEN = 1e8
"""Upper bound on a hidden state's size; its square, summed over a token, is far from overflow, so
layers that begin with a norm keep it finite."""
MOST_GRADIENT = 1e8
"""Upper bound on the norm of a gradient of hidden states; as a mean over label tokens it is far
below, and layers that enlarge it a million times keep sums of squares finite."""


@dataclass(frozen=True)
class Coding:
    """The codecs of one end of a conversation."""

    hidden: ActivationCodec
    first: ActivationCodec
    """Codec of a sample's first hidden states, where later ones are changes."""
    gradient: ActivationCodec
    width: int
    device: torch.device
    rounding: torch.Generator
    """Randomness by which gradients are rounded without bias."""

    @classmethod
    def of(cls, config: FlGlmConfig, part: Part, rounding: torch.Generator) -> "Coding":
        """Return the codecs for `part`."""
        return cls(
            build_activation(config.hidden, part.dtype),
            build_activation(ExactRowsSettings(), part.dtype),
            build_activation(config.gradient, part.dtype),
            part.width,
            part.device,
            rounding,
        )

    @classmethod
    def exact(cls, part: Part) -> "Coding":
        """Return the codecs with which `part` is measured: the model as it is written, and not as a
        codec disturbs it."""
        return cls.of(FlGlmConfig(), part, torch.Generator())

    def encode_hidden(self, rows: Tensor) -> bytes:
        """Return the bytes of hidden states (tokens, width)."""
        return self.hidden.encode(rows.to(self.hidden.dtype))

    def decode_hidden(self, frame: bytes, tokens: int) -> Tensor:
        """Return hidden states (tokens, width); raises `WireError`."""
        rows = self.hidden.decode(frame, tokens, self.width, device=self.device)
        check_hidden(rows)
        return rows

    def encode_gradient(self, rows: Tensor) -> bytes:
        """Return the bytes of a gradient (tokens, width)."""
        return self.gradient.encode(rows.to(self.gradient.dtype), generator=self.rounding)

    def decode_gradient(self, frame: bytes, tokens: int) -> Tensor:
        """Return a gradient (tokens, width); raises `WireError`."""
        rows = self.gradient.decode(frame, tokens, self.width, device=self.device)
        norm = float(rows.norm(dtype=torch.float64))
        if norm > MOST_GRADIENT:
            raise WireError(
                f"gradient of hidden states: a norm of {norm:.3g}, at most {MOST_GRADIENT:.0e}"
            )
        return rows


def check_hidden(rows: Tensor) -> None:
    """Raise `WireError` for hidden states (tokens, width) that are too large."""
    largest = float(rows.abs().max()) if rows.numel() else 0.0
    if largest > MOST_HIDDEN:
        raise WireError(f"hidden states: a value of {largest:.3g}, at most {MOST_HIDDEN:.0e}")
