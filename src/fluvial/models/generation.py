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

    It ends where the model's `context` ends; that of a prompt that fills it is empty.
    """
    encoder = Encoder.of(tokenizer)
    device = next(model.parameters()).device

    for prompt in prompts:
        ids = encoder.prompt(prompt)
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
