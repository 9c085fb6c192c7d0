"""The random draws of a site's round, equal at both ends and in a forecast."""

import torch

from fluvial.seeds import generator
from fluvial.training.train import drawn_seed


def draws_of_round(seed: int, round: int, site: str) -> tuple[int, torch.Generator]:
    """Return the seed of dropout in a site's round, and the generator of its permutations.

    They are those of `train` on the whole model, so that A, B and C have its masks.
    """
    draw = generator(seed, "train", round, site)
    return drawn_seed(draw), draw
