"""Greedy continuations of many prompts at a time."""

import logging
import time
from collections.abc import Sequence

import torch

from fluvial.models.encoding import Encoder
from fluvial.models.hf import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@torch.no_grad()
def batched_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Return a greedy continuation of each prompt, without the prompt and special tokens.

    Prompts of like length share a batch, padded on the left. A model that keeps a state in place of
    keys and values would read the padding, and gets one prompt at a time. Every prompt leaves room
    for `max_new_tokens` in the model's context.
    """
    encoder = Encoder.of(tokenizer)
    device = next(model.parameters()).device
    rows = [encoder.prompt(prompt) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    size = 1 if getattr(model, "_is_stateful", False) else batch_size
    answers = [""] * len(rows)
    logged_s = time.monotonic()

    for start in range(0, len(order), size):
        batch = order[start : start + size]
        longest = max(len(rows[number]) for number in batch)
        padding = [longest - len(rows[number]) for number in batch]
        tokens = [
            [tokenizer.pad_token_id] * pad + list(rows[number])
            for pad, number in zip(padding, batch, strict=True)
        ]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        output = model.generate(
            input_ids=torch.tensor(tokens, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

        for number, row in zip(batch, output[:, longest:].tolist(), strict=True):
            ended = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None
            answers[number] = tokenizer.decode(row[:ended], skip_special_tokens=True)

        if time.monotonic() - logged_s > 1:
            logged_s = time.monotonic()
            logger.info("greedy answers: %d of %d", start + len(batch), len(order))

    return answers
