"""Greedy continuations of prompts, many at once, none of which depends on the others.

In half precision two tokens often have exactly one logit, and the rounding of a matrix product
depends on its shape. So a prompt is always computed in a batch of the same number of rows and of a
width that follows from the prompt alone, and every row of it has some padding, since models compute
without a mask where none has.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from fluvial.models.behaviour import makes_cache
from fluvial.models.encoding import Encoder, Prompt
from fluvial.models.ends import End, answer_text, end_of
from fluvial.models.hf import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

AT_ONCE = 8
"""Prompts that are computed at once."""
BLOCK = 16
"""Tokens by whose multiples batches are wide."""
SHORT = 8
"""New tokens up to which whole sequences are computed again, without keys and values."""


class Continuation(str):
    """A continuation of a prompt, without the prompt and its end."""

    cut: bool
    """True where the number of tokens that was asked for ended it, and no end of an answer."""

    def __new__(cls, text: str, *, cut: bool) -> Self:
        """Return a text that knows whether it was cut."""
        made = super().__new__(cls, text)
        made.cut = cut
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, bool]]:
        """Return what a copy is made of, also in another process."""
        return (str(self),), {"cut": self.cut}


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    context: int | None = None,
    at_once: int = AT_ONCE,
    of: str = "the model",
) -> list[Continuation]:
    """Return a greedy continuation of each prompt, without the prompt and its end (see `end_of`).

    It ends where the model's `context` ends; that of a prompt that fills it is empty. With the same
    `at_once`, a prompt has the same continuation among any others. A model that keeps a state in
    place of keys and values would read padding, and gets one prompt at a time. Messages about the
    progress name the model as `of`.
    """
    encoder = Encoder.of(tokenizer)
    rows = [encoder.asked(prompt) for prompt in prompts]
    rooms = [room_after(row, max_new_tokens, context) for row in rows]
    short = max_new_tokens <= SHORT
    stateful = model._is_stateful  # of transformers, and public by no other name
    alone = tokenizer.pad_token_id is None or (stateful and not short)
    ends = [end_of(tokenizer, model, prompt) for prompt in prompts]
    batches: dict[tuple[int, int, tuple[int, ...]], list[int]] = defaultdict(list)
    for number, (row, room) in enumerate(zip(rows, rooms, strict=True)):
        if room:
            width = len(row) if alone else _width(len(row) + (room if short else 1))
            batches[width, room, tuple(sorted(ends[number].ids))].append(number)

    new: dict[int, list[int]] = {}
    logged_s = time.monotonic()
    size = 1 if alone else at_once
    write = _recomputed if short and not alone else _stepwise

    for (width, room, stops), numbers in sorted(batches.items()):
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            filled = [*batch, *[batch[0]] * (size - len(batch))]
            asked = [rows[number] for number in filled]
            found = write(model, tokenizer, asked, width, room, stops)
            new |= dict(zip(batch, found, strict=False))

            if time.monotonic() - logged_s > 1:
                logged_s = time.monotonic()
                logger.info("greedy answers of %s: %d of %d", of, len(new), len(prompts))

    return [
        _continuation(tokenizer, new.get(number, []), end, max_new_tokens)
        for number, end in enumerate(ends)
    ]


def _continuation(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], end: End, max_new_tokens: int
) -> Continuation:
    text, ended = answer_text(tokenizer, tokens, end)
    return Continuation(text, cut=len(tokens) == max_new_tokens and not ended)


def _width(tokens: int) -> int:
    """Return the width of a batch whose rows need `tokens`: the next multiple of `BLOCK`."""
    return BLOCK * -(-tokens // BLOCK)


def _recomputed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    width: int,
    room: int,
    stops: Sequence[int],
) -> list[list[int]]:
    """Return the greedy continuation of each row, up to the first of `stops`, of `room` tokens at
    most.

    Rows are padded on the right, where a causal model does not look. For a few tokens a whole pass
    over many sequences takes less time than steps with keys and values.
    """
    device = next(model.parameters()).device
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id, device=device)
    mask = torch.zeros_like(tokens)
    ends = torch.tensor([len(row) for row in rows], device=device)
    every = torch.arange(len(rows), device=device)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row, device=device)
        mask[number, : len(row)] = 1

    written = torch.full((len(rows), room), tokenizer.pad_token_id, device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    last = torch.tensor(stops, device=device)
    for step in range(room):
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        chosen = logits[every, ends - 1 + step].float().argmax(-1)
        written[:, step] = chosen
        ended |= torch.isin(chosen, last)
        if ended.all() or step == room - 1:
            break
        tokens[every, ends + step] = chosen
        mask[every, ends + step] = 1

    return [_ended(row, stops) for row in written[:, : step + 1].tolist()]


def _stepwise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    width: int,
    room: int,
    stops: Sequence[int],
) -> list[list[int]]:
    """Return what `_recomputed` does, by steps with keys and values where the model has a cache of
    them; padding is on the left."""
    device = next(model.parameters()).device
    padding = [width - len(row) for row in rows]
    tokens = [
        [tokenizer.pad_token_id] * pad + list(row) for pad, row in zip(padding, rows, strict=True)
    ]
    mask = [[0] * pad + [1] * (width - pad) for pad in padding]
    output: Tensor = model.generate(
        input_ids=torch.tensor(tokens, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=room,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(stops) or None,
        use_cache=makes_cache(model),
    )
    return [_ended(row, stops) for row in output[:, width:].tolist()]


def _ended(row: list[int], stops: Sequence[int]) -> list[int]:
    """Return the tokens before the first of `stops`."""
    return row[: next((place for place, token in enumerate(row) if token in stops), None)]


def count_too_long(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    context: int | None,
) -> int:
    """Return the number of prompts after which the `context` ends before `max_new_tokens` more."""
    encoder = Encoder.of(tokenizer)
    rooms = (room_after(encoder.asked(prompt), max_new_tokens, context) for prompt in prompts)
    return sum(room < max_new_tokens for room in rooms)


def room_after(prompt: Sequence[int], max_new_tokens: int, context: int | None) -> int:
    """Return the number of tokens that may follow a prompt, 0 where it fills the `context`."""
    return max_new_tokens if context is None else max(0, min(max_new_tokens, context - len(prompt)))
