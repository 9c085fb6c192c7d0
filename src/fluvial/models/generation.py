"""Greedy continuations of prompts."""

from collections.abc import Iterator, Sequence

import torch

from fluvial.models.encoding import Encoder
from fluvial.models.hf import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    context: int | None = None,
) -> Iterator[str]:
    """Yield a greedy continuation of each prompt, without the prompt and special tokens.

    It ends where the model's `context` ends; that of a prompt that fills it is empty. At most
    `SHORT` new tokens are computed for many prompts at once; see `short_continuations`.
    """
    encoder = Encoder.of(tokenizer)
    device = next(model.parameters()).device
    encoded = [encoder.prompt(prompt) for prompt in prompts]

    if max_new_tokens <= SHORT and tokenizer.pad_token_id is not None:
        rooms = [room_after(ids, max_new_tokens, context) for ids in encoded]
        for new in short_continuations(model, tokenizer, encoded, rooms):
            yield tokenizer.decode(new, skip_special_tokens=True)
        return

    for ids in encoded:
        room = room_after(ids, max_new_tokens, context)
        if not room:
            yield ""
            continue

        tokens = torch.tensor([ids], device=device)
        output = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = output[0, tokens.shape[1] :]
        yield tokenizer.decode(new, skip_special_tokens=True)


SHORT = 8
"""New tokens up to which whole sequences are computed again, many at once."""
AT_ONCE = 32
"""Sequences that are computed at once."""


def short_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    rooms: Sequence[int],
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, of at most as many tokens as its room.

    Prompts of like length share a batch and are padded on the right, where a causal model does not
    look. No keys and values are kept: for a few tokens a whole pass over many sequences takes less
    time than steps of one sequence. The end token belongs to a continuation.
    """
    device = next(model.parameters()).device
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))

    for start in range(0, len(order), AT_ONCE):
        going = [place for place in order[start : start + AT_ONCE] if rooms[place]]
        while going:
            rows = [[*prompts[place], *found[place]] for place in going]
            longest = max(map(len, rows))
            tokens = torch.full((len(rows), longest), tokenizer.pad_token_id)
            mask = torch.zeros((len(rows), longest), dtype=torch.int64)
            for number, row in enumerate(rows):
                tokens[number, : len(row)] = torch.tensor(row)
                mask[number, : len(row)] = 1

            logits = model(
                input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False
            ).logits
            last = torch.tensor([len(row) - 1 for row in rows], device=device)
            chosen = logits[torch.arange(len(rows), device=device), last].float().argmax(-1)

            for place, token in zip(going, chosen.tolist(), strict=True):
                found[place].append(token)
            going = [
                place
                for place in going
                if found[place][-1] != tokenizer.eos_token_id and len(found[place]) < rooms[place]
            ]

    return found


def count_too_long(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    context: int | None,
) -> int:
    """Return the number of prompts after which the `context` ends before `max_new_tokens` more."""
    encoder = Encoder.of(tokenizer)
    rooms = (room_after(encoder.prompt(prompt), max_new_tokens, context) for prompt in prompts)
    return sum(room < max_new_tokens for room in rooms)


def room_after(prompt: Sequence[int], max_new_tokens: int, context: int | None) -> int:
    """Return the number of tokens that may follow a prompt, 0 where it fills the `context`."""
    return max_new_tokens if context is None else max(0, min(max_new_tokens, context - len(prompt)))
