"""One seed for a run, an independent stream for every purpose.

A stream is named by what it is for, such as `(seed, "train", round, site)`, so a site that is
skipped, retried or run on another machine draws the same numbers.
"""

import hashlib

import numpy as np
import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for `purpose`; any change of any part gives an unrelated stream."""
    parts = [
        f"{type(part).__name__}:{part}".replace("/", "//") for part in purpose
    ]  # no part can pass for two
    text = "/".join([str(seed), *parts])

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(
    seed: int, *purpose: str | int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """A torch generator for `purpose`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *purpose))


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator for `purpose`."""
    return np.random.default_rng(derive(seed, *purpose))
