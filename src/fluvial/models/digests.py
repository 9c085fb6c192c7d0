"""Digests of a model's folder: which weights were used, for a site, a report or a card."""

import hashlib
from functools import cache
from pathlib import Path


def weights_digest(folder: Path) -> str:
    """Return 32 hexadecimal digits over the weights and the configuration of a model's folder."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        state = path.stat()
        digest.update(_digest_of_file(path, state.st_mtime_ns, state.st_size))

    return digest.hexdigest()[:32]


# Time and size are keys of the cache, so that a changed file is read again.
@cache
def _digest_of_file(path: Path, changed: int, size: int) -> bytes:  # noqa: ARG001
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
