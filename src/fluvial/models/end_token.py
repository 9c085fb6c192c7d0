"""Output row of the end token, beside those of other tokens that no text ends with."""

import torch
from torch import Tensor, nn

NEAR = 0.05
"""Distance of two rows, over the middle norm of a row, below which they are nearly equal: ours."""
LEAST_ALIKE = 4
"""Other rows that are nearly equal to that of the end token, from which it is remarked."""
_ROWS = 4096
"""Rows that are compared at a time, in float32."""


def end_remarks(model: nn.Module, token: int | None, name: str) -> list[str]:
    """Return a remark where the model cannot tell its end token from others, or nothing.

    `token` is its id and `name` its text. Equal rows of the head have equal logits, so an adapter
    that leaves the head as it is can never make the end the likeliest.
    """
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    tuned = hasattr(head, "lora_A") or (weight is not None and weight.requires_grad)
    if token is None or weight is None or weight.dim() != 2 or tuned or token >= len(weight):
        return []
    if not weight.is_floating_point() or weight.is_meta:
        return []

    alike = alike_rows(weight, token) - 1
    if alike < LEAST_ALIKE:
        return []
    return [
        f"the end of an answer was never trained in this model: the output row of its end token "
        f"{name!r} is nearly equal to those of {alike} of {len(weight)} tokens, and an adapter "
        "does not tune them, so written answers do not end and exact match stays near 0; tune all "
        'weights (tune = "full"), or take a model that was trained with this token'
    ]


@torch.no_grad()
def alike_rows(weight: Tensor, row: int) -> int:
    """Return how many rows of `weight` (rows, width) are nearly equal to one of them, itself
    included."""
    own = weight[row].float()
    parts = torch.split(weight, _ROWS)
    norms = torch.cat([part.float().norm(dim=1) for part in parts])
    apart = torch.cat([(part.float() - own).norm(dim=1) for part in parts])
    return int((apart < NEAR * norms.median()).sum())
