"""Keys and values of one span of layers, for one session of generation with a cut model.

It is transformers' own cache of a whole model, whose masks and positions ask layers that may lie
outside the span. There a token is one byte of no meaning, so that all layers have the same length.
"""

import inspect
from typing import Any

import torch
from torch import nn

from fluvial.errors import ConfigError
from fluvial.models.hf import PreTrainedModel


class SpanCache:
    """The cache of the layers of one span; it grows with each pass until it is freed."""

    def __init__(self, model: PreTrainedModel, layers: int) -> None:
        """Make an empty cache; raises `ConfigError` where the model's layers keep other states."""
        try:
            from transformers.cache_utils import (
                CacheLayerMixin,
                DummyLayer,
                DynamicCache,
                LinearAttentionCacheLayerMixin,
            )
        except ImportError as error:
            raise ConfigError(
                "this version of transformers has no cache that can be cut, which generation with "
                "a cut model needs; install a newer one"
            ) from error

        self.cache: Any = DynamicCache(config=model.config)
        self.tokens = 0
        """Tokens that went through."""
        self._without_states = DummyLayer
        kinds = [
            layer
            for layer in self.cache.layers
            if not isinstance(layer, CacheLayerMixin | DummyLayer)
            or isinstance(layer, LinearAttentionCacheLayerMixin)
        ]

        if kinds or len(self.cache.layers) != layers:
            raise ConfigError(
                f"{type(model).__name__} keeps other states than keys and values of each layer, so "
                "it cannot generate in parts; generate with the whole model"
            )

    def pass_over(self, index: int, batch: int, tokens: int, device: torch.device) -> None:
        """Count (batch, tokens) tokens in layer `index`, which is outside the span."""
        layer = self.cache.layers[index]
        if isinstance(layer, self._without_states):
            return

        byte = torch.zeros(batch, 1, tokens, 1, dtype=torch.uint8, device=device)
        layer.update(byte, byte)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        tensors = [
            tensor
            for layer in self.cache.layers
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        ]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def free(self) -> None:
        """Drop all keys and values; the cache cannot be used any more."""
        self.cache.layers.clear()


def cache_argument(model: nn.Module) -> str:
    """Return the keyword by which `model` takes a cache.

    Until transformers 5.24 it is the longer one; both are there for a while, for callers.
    """
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"
