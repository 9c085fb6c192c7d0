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
) -> Iterator[str]:
    """Yield a greedy continuation of each prompt, without the prompt and special tokens."""
    encoder = Encoder.of(tokenizer)
    device = next(model.parameters()).device

    for prompt in prompts:
        tokens = torch.tensor([encoder.prompt(prompt)], device=device)
        output = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = output[0, tokens.shape[1] :]
        yield tokenizer.decode(new, skip_special_tokens=True)
