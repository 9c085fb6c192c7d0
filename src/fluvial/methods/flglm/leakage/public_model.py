"""The public base model in an attacker's hands: its front, with what a site is known to do to it.

The whole model is used, stopped behind the last layer of the front, so that masks, positions and
caches are those of the model's own code.
"""

import copy
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.methods.flglm.leakage.noise import NoiseConfig, clip_rows
from fluvial.methods.flglm.leakage.reached import tensor_at
from fluvial.models.span_cache import cache_argument
from fluvial.models.split import decoder_layers

LENGTH = 8
"""Tokens with which a model's cache is checked."""


class PublicModel:
    """A public causal model, of which a site runs the first `front` layers.

    `noise` is the site's mechanism: its settings are public, its noise is not.
    """

    def __init__(self, model: nn.Module, front: int, noise: NoiseConfig | None = None) -> None:
        """Take the whole model, or a site's part of it for attacks that need no `prior`."""
        _, layers = decoder_layers(model)
        self.model = model
        self.noise = noise
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        self.vocabulary: int = embeddings.num_embeddings
        self.device: torch.device = embeddings.weight.device
        self._dtype: torch.dtype = embeddings.weight.dtype
        self._last_layer = layers[front - 1]
        self._cache_name = cache_argument(self._inner)

    @torch.no_grad()
    def hidden(self, ids: Tensor, cache: "Prefixes | None" = None) -> Tensor:
        """Return what a site sends of `ids` (batch, tokens), without its noise.

        The result (batch, tokens, width) is clipped as the site clips, fp64 on the CPU. With
        `cache`, `ids` continue its prefixes, and are added to them.
        """
        past = cache.length if cache else 0
        mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.int64, device=self.device)
        options = (
            {self._cache_name: cache.states, "use_cache": True} if cache else {"use_cache": False}
        )
        run = partial(self._inner, input_ids=ids.to(self.device), attention_mask=mask, **options)
        hidden = tensor_at(self._last_layer, "output", run).cpu().double()
        return hidden if self.noise is None else clip_rows(hidden, self.noise.clip)

    @cached_property
    def continues(self) -> bool:
        """Return whether tokens behind a cached prefix get the values of a single pass.

        Models with recurrent layers keep other states than keys and values.
        """
        ids = (torch.arange(LENGTH) % self.vocabulary).unsqueeze(0)
        whole = self.hidden(ids)[:, -1]
        cache = Prefixes()
        try:
            for token in ids[:, :-1].T:
                self.hidden(token.unsqueeze(0), cache)
            last = self.hidden(ids[:, -1:].repeat(2, 1), cache.repeated(2))[:, -1]
        except Exception:  # each architecture has an error of its own for a cache that is not its
            return False

        tolerance = 1e-4 if self._dtype == torch.float32 else 0.05
        return bool((last - whole).norm() <= tolerance * whole.norm())

    @property
    def _inner(self) -> nn.Module:
        """Return the model without its head."""
        inner: nn.Module = self.model.base_model  # type: ignore[assignment]
        return inner

    @torch.no_grad()
    def prior(self, prefixes: Tensor) -> Tensor:
        """Return log-probabilities (batch, vocabulary) of the token after `prefixes`, fp64.

        They are those of the whole public model; after an empty prefix all tokens are alike.
        """
        if prefixes.shape[1] == 0:
            return torch.zeros(len(prefixes), self.vocabulary, dtype=torch.float64)

        ids = prefixes.to(self.device)
        output = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        logits: Tensor = output.logits[:, -1, : self.vocabulary]
        return logits.cpu().double().log_softmax(-1)


class Prefixes:
    """Keys and values of the front's layers for a batch of prefixes of equal length."""

    def __init__(self) -> None:
        from transformers import DynamicCache

        self.states: Any = DynamicCache()

    @property
    def length(self) -> int:
        """Return the tokens of each prefix."""
        return int(self.states.get_seq_length())

    def repeated(self, times: int) -> "Prefixes":
        """Return a copy in which each prefix stands `times` times in a row."""
        copied = copy.deepcopy(self)
        if copied.length:
            copied.states.batch_repeat_interleave(times)
        return copied

    def select(self, rows: Tensor) -> None:
        """Replace the batch by its `rows` (batch,)."""
        if self.length:
            self.states.reorder_cache(rows)
