"""Greedy generation through the three parts of a cut model, with keys and values kept in each.

The prompt goes through once; then each token is one hidden state (1, 1, hidden) to the server and
one back (FL-GLM's inference, without its repeated prefix).
"""

from collections.abc import Callable, Container, Generator

import torch
from torch import Tensor

from fluvial.errors import ConfigError, WireError
from fluvial.models.encoding import Encoder, Prompt
from fluvial.models.ends import answer_text, end_of
from fluvial.models.generation import Continuation
from fluvial.models.hf import PreTrainedTokenizerBase
from fluvial.models.layer_lists import text_config
from fluvial.models.span_cache import SpanCache
from fluvial.models.split import Part

LENGTH = 8
"""Tokens with which a part's cache is checked."""


class SiteGeneration:
    """Generation at a site: it has the tokens, and asks for the hidden states of the middle."""

    def __init__(
        self, part: Part, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int
    ) -> None:
        """Raise `ConfigError` where the model cannot generate in parts."""
        check_generation(part)
        self._part = part
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens

    def answer(self, prompt: Prompt) -> Generator[Tensor, Tensor, Continuation]:
        """Yield A's hidden states and take B's; return the continuation of `prompt` as text.

        It has neither the prompt nor its end, as that of `continuations`.
        """
        tokens = Encoder.of(self._tokenizer).asked(prompt)
        end = end_of(self._tokenizer, self._part.model, prompt)
        new = yield from generate(
            self._part, tokens, max_new_tokens=self._max_new_tokens, stops=end.ids
        )
        text, ended = answer_text(self._tokenizer, new, end)
        return Continuation(text, cut=bool(new) and not ended)


def generate(
    part: Part, prompt: list[int], *, max_new_tokens: int, stops: Container[int]
) -> Generator[Tensor, Tensor, list[int]]:
    """Yield A's hidden states and take B's, both (1, tokens, hidden); return the new tokens.

    The first exchange has the tokens of `prompt`, each other one token. The new tokens are those of
    greedy decoding with the whole model, up to and with the first of `stops`. Raises `WireError`
    where B's hidden states have another shape or are not finite. The caches go when the generator
    ends or is closed.
    """
    first = part.new_cache()
    last = part.new_cache()
    tokens = torch.tensor([prompt], device=part.device)
    new: list[int] = []

    try:
        while len(new) < max_new_tokens:
            with torch.no_grad():
                hidden = _step(part.embed, tokens, first)
            received = yield hidden
            _check(received, tuple(hidden.shape))
            with torch.no_grad():
                logits = _step(part.logits, received.to(hidden), last)

            token = int(logits[0, -1].argmax())
            new.append(token)
            if token in stops:
                break
            tokens = torch.tensor([[token]], device=part.device)
    finally:
        first.free()
        last.free()

    return new


class ServerGeneration:
    """Generation at the server, of one session: hidden states in, hidden states out."""

    def __init__(self, part: Part, *, max_tokens: int) -> None:
        """Start without tokens; at most `max_tokens` of the prompt and the answer are taken.

        Raises `ConfigError` where the model cannot generate in parts.
        """
        check_generation(part)
        self.cache = part.new_cache()
        self._part = part
        self._max_tokens = max_tokens

    @torch.no_grad()
    def step(self, hidden: Tensor) -> Tensor:
        """Return B's hidden states of A's, both (1, tokens, hidden), which continue the session.

        Raises `WireError` for another shape, a type that is no float, values that are not finite,
        and more tokens than the session may have.
        """
        tokens = hidden.shape[1] if hidden.dim() == 3 else 0
        most = self._max_tokens - self.cache.tokens
        if not 1 <= tokens <= most:
            raise WireError(
                f"hidden states of a session: shape {tuple(hidden.shape)}, expected (1, tokens, "
                f"hidden) with 1 to {most} tokens"
            )

        _check(hidden, (1, tokens, self._part.width))
        return _step(self._part.middle, hidden.to(self._part.device, self._part.dtype), self.cache)

    def close(self) -> None:
        """Free the cache."""
        self.cache.free()


def has_cache(part: Part) -> bool:
    """Return whether a part continues with what it keeps of earlier tokens, as `check_generation`
    finds out."""
    try:
        check_generation(part)
    except ConfigError:
        return False
    return True


@torch.no_grad()
def check_generation(part: Part) -> None:
    """Raise `ConfigError` unless tokens one by one, with a cache, get the values of a single pass.

    A part is checked once.
    """
    if part.generates:
        return

    config = text_config(part.model)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, LENGTH, part.width, generator=draw).to(part.device, part.dtype)
    ids = torch.arange(LENGTH, device=part.device).unsqueeze(0) % config.vocab_size
    passes: list[tuple[Callable[..., Tensor], Tensor]] = [(part.middle, hidden)]
    if not part.server:
        passes = [(part.embed, ids), (part.logits, hidden)]

    sizes = [LENGTH // 2] + [1] * (LENGTH - LENGTH // 2)
    for run, inputs in passes:
        whole = run(inputs, _ones(1, LENGTH, inputs.device))[:, -1].float()
        cache = part.new_cache()
        try:
            for piece in torch.split(inputs, sizes, dim=1):
                last = _step(run, piece, cache)[:, -1].float()
        except Exception as error:
            raise ConfigError(
                f"{type(part.model).__name__} cannot generate in parts: {error!s:.200}"
            ) from error

        tolerance = 1e-4 if part.dtype == torch.float32 else 0.05
        if not float((last - whole).norm()) <= tolerance * float(whole.norm()):
            raise ConfigError(
                f"{type(part.model).__name__} cannot generate in parts: its layers give other "
                "values with a cache than without; generate with the whole model"
            )

    part.generates = True


def _step(run: Callable[..., Tensor], inputs: Tensor, cache: SpanCache) -> Tensor:
    """Run tokens (1, tokens, ...) through one span behind those that its cache has."""
    mask = _ones(1, cache.tokens + inputs.shape[1], inputs.device)
    return run(inputs, mask, cache)


def _ones(rows: int, tokens: int, device: torch.device) -> Tensor:
    return torch.ones(rows, tokens, dtype=torch.int64, device=device)


def _check(hidden: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(hidden.shape) != shape or not hidden.is_floating_point():
        raise WireError(
            f"hidden states of a session: {hidden.dtype} of shape {tuple(hidden.shape)}, expected "
            f"floats of shape {shape}"
        )

    if not bool(hidden.isfinite().all()):
        raise WireError("hidden states of a session: NaN or Inf among the values")
