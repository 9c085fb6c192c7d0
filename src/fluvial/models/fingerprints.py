"""Fingerprints of everything that must be equal at the server and its sites."""

import hashlib
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path

from fluvial import __version__
from fluvial.models.loading import weights_folder
from fluvial.models.pool import ModelPool


def fingerprints(pool: ModelPool) -> dict[str, str]:
    """Return digests of package versions, base model, tokenizer, chat template and layout."""
    tokenizer = pool.tokenizer
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()

    return {
        "fluvial": __version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "base": _hash_of(weights_folder(pool.config)),
        "tokenizer": hashlib.sha256(vocabulary).hexdigest()[:32],
        "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:32],
        "layout": f"{pool.layout.fingerprint:08x}",
    }


def _hash_of(folder: Path) -> str:
    """Return a digest over the weights and the configuration of a model folder."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        state = path.stat()
        digest.update(_hash_of_file(path, state.st_mtime_ns, state.st_size))

    return digest.hexdigest()[:32]


# Time and size are keys of the cache, so that a changed file is read again.
@cache
def _hash_of_file(path: Path, changed: int, size: int) -> bytes:  # noqa: ARG001
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
