"""Digests of a model's folder: which weights were used, for a site, a report or a card."""

import hashlib
from pathlib import Path

from fluvial.storage.inputs import content_digest


def weights_digest(folder: Path) -> str:
    """Return 32 hexadecimal digits over the weights and the configuration of a model's folder."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        digest.update(bytes.fromhex(content_digest(path)))

    return digest.hexdigest()[:32]
