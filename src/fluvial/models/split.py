"""A causal model cut between its decoder layers, for split learning: a process holds one part.

The model's own code runs, from outside: in a part the layers of other parts are passed over, and
the first layer of a span takes the hidden states that another part has computed. So masks, rotary
positions and layer types are those of the whole model, and no modelling code is copied. Weights of
other parts take no memory; they are NaN, so that a model that uses one of them is noticed.
"""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fluvial.errors import ConfigError
from fluvial.models.layer_lists import layer_lists, num_layers, text_config
from fluvial.models.pretrained import hidden_width
from fluvial.models.span_cache import SpanCache, cache_argument
from fluvial.models.tuning import (
    RECOMPUTED,
    checkpointed_layers,
    reseed_dropout,
    switch_dropout,
    tuned_parameters,
    with_same_dropout,
)
from fluvial.wire.tensors import Named


@dataclass(frozen=True)
class Cut:
    """The decoder layers of the three parts of a model of `layers` layers.

    A and C are a site's: A has the embedding and the layers from 0 to `front` - 1, C the layers
    from `layers` - `back` on, with the final norm and the head; both may be without a layer. B is
    the server's: the layers between them.
    """

    layers: int
    front: int
    back: int

    def __post_init__(self) -> None:
        if self.front < 0 or self.back < 0 or self.middle.start >= self.middle.stop:
            raise ConfigError(
                f"method.front={self.front} and method.back={self.back}: the model has "
                f"{self.layers} layers, and its middle has one layer at least; set both from 0, "
                f"with a sum of at most {self.layers - 1}"
            )

    @classmethod
    def of(cls, base: nn.Module, front: int = 1, back: int = 1) -> "Cut":
        """Return the cut of a model that may be on the meta device; FL-GLM has one layer at each
        end.

        Raises `ConfigError` for a model that cannot be cut, or cannot be cut there.
        """
        _, layers = decoder_layers(base)
        return cls(len(layers), front, back)

    @property
    def first(self) -> range:
        """The layers of A."""
        return range(self.front)

    @property
    def middle(self) -> range:
        """The layers of B."""
        return range(self.front, self.layers - self.back)

    @property
    def last(self) -> range:
        """The layers of C."""
        return range(self.layers - self.back, self.layers)

    def at_server(self, path: str, name: str) -> bool:
        """Return whether a tensor is B's, from its name and the path of the list of layers."""
        return name.startswith(tuple(f"{path}.{index}." for index in self.middle))


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the list of decoder layers and its path, as `model.layers`.

    Raises `ConfigError` for a model without exactly one list of `num_hidden_layers` modules.
    """
    lists = layer_lists(model)
    inner = [(path, module) for path, module in lists if path.count(".") == lists[0][0].count(".")]

    if len(inner) != 1:
        raise ConfigError(
            f"{type(model).__name__} has {len(inner)} lists of its {num_layers(model)} decoder "
            "layers, and one is needed to cut it; choose another model, or another method"
        )

    return inner[0]


class Part:
    """One process's part of a model: a site's, A and C together, or the server's, B.

    One thread uses it at a time. Between calls it has no state, so the graphs of several batches,
    and the caches of several sessions, may be alive at once.
    """

    def __init__(
        self, model: nn.Module, cut: Cut, *, server: bool, tuned: Collection[str] | None = None
    ) -> None:
        """Let the layers of `model` run span by span; its whole forward pass works as before.

        `tuned` names LoRA factors and weights that are tuned; by default they are the part's own
        ones of `tuned_parameters`.
        """
        self.model = model
        self._tuned = tuned
        self.cut = cut
        self.server = server
        path, layers = decoder_layers(model)
        assert len(layers) == cut.layers, "a cut of another model"
        self.path = path
        self._span: range | None = None
        self._cache: SpanCache | None = None
        self._received: Tensor | None = None
        """Hidden states of another part, for the first layer of the span."""
        self._entry: Any = None
        """Input of the first layer in this pass."""
        self._last: Tensor | None = None
        """Hidden states behind the last layer that this pass has reached."""
        self._next = 0
        """Index of the layer that this pass reaches next."""
        self._output: Any = None
        """Output of the span's last layer in this pass, in the form of the model's code."""
        self._inside: list[Callable[..., Any]] = [layer.forward for layer in layers]
        """The forward passes of the layers, without gates."""
        self._checkpointing = False
        self.generates = False
        """True once the cache of this part was checked (see `split_generation`)."""

        for index, layer in enumerate(layers):
            self._gate(index, layer)

    def embed(
        self, input_ids: Tensor, attention_mask: Tensor, cache: SpanCache | None = None
    ) -> Tensor:
        """Return A's hidden states (batch, tokens, hidden) of token ids (batch, tokens).

        With a `cache`, here and below, the tokens continue those that it has, and the mask (batch,
        all tokens) is that of both.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self._run(self._inner(), self.cut.first, inputs, cache)[1]

    def middle(
        self, hidden: Tensor, attention_mask: Tensor, cache: SpanCache | None = None
    ) -> Tensor:
        """Return B's hidden states of A's, both (batch, tokens, hidden)."""
        return self._continue(self._inner(), self.cut.middle, hidden, attention_mask, cache)[1]

    def logits(
        self, hidden: Tensor, attention_mask: Tensor, cache: SpanCache | None = None
    ) -> Tensor:
        """Return C's logits (batch, tokens, vocabulary) of B's hidden states.

        With a cache they are those of the last token alone (batch, 1, vocabulary), if the model can
        compute them so.
        """
        output, _ = self._continue(self.model, self.cut.last, hidden, attention_mask, cache)
        logits: Tensor = output.logits
        return logits

    def new_cache(self) -> SpanCache:
        """Return an empty cache, for one span of this part; raises `ConfigError` where the model
        has none."""
        return SpanCache(self.model, self.cut.layers)

    @cached_property
    def device(self) -> torch.device:
        """The device of the part's own weights."""
        return next(iter(self.own_weights().values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The float type of hidden states between the parts: that of the base."""
        kind: torch.dtype = self.model.dtype  # type: ignore[assignment]
        return kind

    @property
    def width(self) -> int:
        """The width of hidden states between the parts."""
        return hidden_width(self.model)

    def holds(self, name: str) -> bool:
        """Return whether a tensor of the model, or a LoRA factor, is this part's."""
        return self.cut.at_server(self.path, name) == self.server

    def own_weights(self) -> Named:
        """Return the part's own parameters by name, tied ones once."""
        return {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters()
            if self.holds(name)
        }

    def tuned(self) -> dict[str, nn.Parameter]:
        """Return the part's own LoRA factors and weights that are tuned, by name."""
        parameters = tuned_parameters(self.model)
        if self._tuned is None:
            return {name: parameter for name, parameter in parameters.items() if self.holds(name)}

        parameters = dict(self.model.named_parameters()) | parameters
        return {name: parameters[name] for name in self._tuned}

    def switch_dropout(self, active: bool) -> None:
        """Switch the dropout of LoRA on, for training, or off."""
        switch_dropout(self.model, active)

    def reseed_dropout(self, seed: int) -> None:
        """Give the part the masks that a whole model with this seed has."""
        reseed_dropout(self.model, seed)

    def switch_checkpointing(self, active: bool) -> None:
        """Switch gradient checkpointing of the part's layers on or off.

        Raises `ConfigError` where the architecture has no layers for it.
        """
        if active:
            checkpointed_layers(self.model)
        self._checkpointing = active

    def _inner(self) -> nn.Module:
        """Return the model without its head."""
        inner: nn.Module = self.model.base_model  # type: ignore[assignment]
        return inner

    def _continue(
        self,
        model: nn.Module,
        span: range,
        hidden: Tensor,
        attention_mask: Tensor,
        cache: SpanCache | None,
    ) -> tuple[Any, Tensor]:
        """Run a span from another part's hidden states; see `_run`."""
        width = self.model.get_input_embeddings().embedding_dim  # type: ignore[operator]
        # In place of embeddings, for the shapes of masks and positions; NaN, so that a model whose
        # later layers use embeddings is noticed.
        unknown = hidden.new_full((*hidden.shape[:2], width), torch.nan)
        self._received = hidden
        inputs = {"inputs_embeds": unknown, "attention_mask": attention_mask}
        return self._run(model, span, inputs, cache)

    def _run(
        self, model: nn.Module, span: range, inputs: dict[str, Tensor], cache: SpanCache | None
    ) -> tuple[Any, Tensor]:
        """Return what `model` returns, and the hidden states behind the last layer of the span."""
        options: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            options = _cache_options(model, cache)

        self._span = span
        self._cache = cache
        try:
            result = model(**inputs, **options)
            output = self._output if span.stop else self._entry
        finally:
            self._span = None
            self._cache = None
            self._received = None
            self._entry = None
            self._last = None
            self._next = 0
            self._output = None

        if output is None:
            raise self._unordered()

        hidden = _states(output)
        if cache is not None:
            cache.tokens += hidden.shape[1]

        return result, hidden

    def _follow(self, index: int, given: Tensor) -> None:
        """Raise `ConfigError` unless layer `index` gets what the layer before it has returned.

        The test is the memory's address, because code that takes `[0]` makes a view.
        """
        if index == 0:
            self._entry = given
        elif self._last is None or given.data_ptr() != self._last.data_ptr():
            raise self._unordered()

        if index != self._next:
            raise self._unordered()
        self._next += 1

    def _in_form(self, given: Tensor) -> Any:
        """Return the received hidden states as the output of a last layer that is passed over, to
        which the model's code has `given` what it takes of the output of the layer before."""
        takes_first = given.dim() < self._entry.dim()
        return (self._received,) if takes_first else self._received

    def _unordered(self) -> ConfigError:
        return ConfigError(
            f"{type(self.model).__name__} does not run its {self.cut.layers} layers once each, in "
            "order, on what the layer before has returned, so it cannot be cut; choose another "
            "model, or another method"
        )

    def _gate(self, index: int, layer: nn.Module) -> None:
        """Let `layer` run inside the span only."""
        inside = self._inside[index]
        name = next(iter(inspect.signature(inside).parameters))

        def forward(*args: Any, **options: Any) -> Any:
            span = self._span
            if span is None:
                return inside(*args, **options)

            given = args[0] if args else options[name]
            self._follow(index, given)
            if index not in span:
                if self._cache is not None:
                    batch, tokens = self._entry.shape[:2]
                    self._cache.pass_over(index, batch, tokens, self._entry.device)
                # What comes before the span has no use. Code that takes `[0]` of an output takes it
                # of a tensor too, so each layer gives the same one.
                passed = self._entry if index < span.start or not span else self._output
                if index == self.cut.layers - 1 and span.start > index:
                    passed = self._output = self._in_form(given)
                self._last = _states(passed)
                return passed

            if index == span.start and self._received is not None:
                given = self._received
            if args:
                args = (given, *args[1:])
            else:
                options = {**options, name: given}

            # Inside the gate, because layers run again in the backward pass, outside any span.
            run = inside
            if self._checkpointing:
                run = partial(checkpoint, with_same_dropout(layer, inside), **RECOMPUTED)
            output = run(*args, **options)
            self._last = _states(output)
            if index == span.stop - 1:
                self._output = output
            return output

        # An attribute of this one layer, which hides its class's `forward`.
        layer.forward = forward


def _states(output: Any) -> Tensor:
    """Return the hidden states of a layer's output."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def _cache_options(model: nn.Module, cache: SpanCache) -> dict[str, Any]:
    """Return the keywords with which `model` uses a cache."""
    names = inspect.signature(model.forward).parameters
    options = {cache_argument(model): cache.cache, "use_cache": True}
    return options | {"logits_to_keep": 1} if "logits_to_keep" in names else options


@torch.no_grad()
def check_part(part: Part) -> None:
    """Raise `ConfigError` where a part needs weights of another, or does not run by itself."""
    config = text_config(part.model)
    # So many rows that no code mistakes them for the items of a layer's output.
    shape = (7, 3)
    mask = torch.ones(shape, dtype=torch.int64, device=part.device)
    hidden = torch.linspace(-1, 1, 21 * part.width).view(*shape, part.width)
    hidden = hidden.to(part.device, part.dtype)

    try:
        if part.server:
            outputs = [part.middle(hidden, mask)]
        else:
            ids = torch.arange(21, device=part.device).view(shape) % config.vocab_size
            outputs = [part.embed(ids, mask), part.logits(hidden, mask)]
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{type(part.model).__name__} cannot be cut between its layers: {error!s:.200}"
        ) from error

    if not all(bool(output.isfinite().all()) for output in outputs):
        raise ConfigError(
            f"{type(part.model).__name__} cannot be cut: layers of one part use weights of "
            "another, or the embeddings"
        )
