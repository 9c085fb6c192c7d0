"""Random streams of a run: one seed, and an independent stream for each purpose.

A purpose names a stream, as in `(seed, "train", round, site)`, so a site that is skipped, retried
or run on another machine draws the same numbers.
"""

import hashlib

import numpy as np
import torch


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for `purpose`; a change of any word of it gives an unrelated stream."""
    # A slash inside a word is doubled, so that one word cannot equal two.
    words = [f"{type(word).__name__}:{word}".replace("/", "//") for word in purpose]
    text = "/".join([str(seed), *words])

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(
    seed: int, *purpose: str | int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Return a torch generator for `purpose` on `device`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *purpose))


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return a NumPy generator for `purpose`."""
    return np.random.default_rng(derive(seed, *purpose))
