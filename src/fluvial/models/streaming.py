"""Text of a model piece by piece, as it is generated."""

import threading
from collections.abc import Container, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluvial.models.behaviour import makes_cache
from fluvial.models.ends import end_of, until
from fluvial.models.generation import room_after
from fluvial.models.hf import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """Divisor of the logits before a token is drawn; 0 takes the most likely token."""
    seed: int = 0
    """Seed of the draws."""


class _SeededDraws:
    """Draw tokens by adding Gumbel noise to the logits, of which the largest is taken.

    That is a draw from their softmax. `generate` draws from the generator of the process, which two
    models that answer side by side would share.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = sampling.temperature
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        """Return scores (1, vocabulary) whose largest value is at the drawn token."""
        drawn = torch.rand(scores.shape, generator=self._generator, dtype=torch.float64)
        noise = -torch.log(-torch.log(drawn.clamp_min(1e-300)))
        return scores.float() / self._temperature + noise.to(scores.device, torch.float32)


def _streamer(tokenizer: PreTrainedTokenizerBase, dropped: Container[int]) -> Any:
    """Return an iterator over the text of generated tokens without those that are `dropped`."""
    from transformers import TextIteratorStreamer

    class Streamer(TextIteratorStreamer):  # type: ignore[misc]
        def put(self, value: Tensor) -> None:
            if self.next_tokens_are_prompt or int(value) not in dropped:
                super().put(value)

    return Streamer(tokenizer, skip_prompt=True)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    sampling: Sampling,
    context: int | None = None,
) -> Generator[str, None, None]:
    """Yield the continuation of a prompt's tokens in pieces, without its end (see `end_of`).

    A thread generates ahead. It stops when the iterator is closed, and what it raises is raised
    here. The text ends where the model's `context` ends.
    """
    room = room_after(prompt, sampling.max_new_tokens, context)
    if not room:
        return

    end = end_of(tokenizer, model, prompt)
    streamer = _streamer(tokenizer, {*end.ids, tokenizer.bos_token_id, tokenizer.pad_token_id})
    tokens = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    stopped = threading.Event()
    raised: list[BaseException] = []
    options: dict[str, Any] = {"stopping_criteria": [lambda *_, **__: stopped.is_set()]}
    if sampling.temperature:
        options["logits_processor"] = [_SeededDraws(sampling)]

    def generate() -> None:
        try:
            with torch.no_grad():
                model.generate(
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=room,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=list(end.ids) or None,
                    streamer=streamer,
                    use_cache=makes_cache(model),
                    **options,
                )
        except BaseException as error:
            raised.append(error)
        finally:
            streamer.end()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from until((piece for piece in streamer if piece), end)
    finally:
        stopped.set()
        thread.join()

    if raised:
        raise raised[0]
