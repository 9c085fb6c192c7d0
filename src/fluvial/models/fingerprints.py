"""Fingerprints of everything that must be equal at the server and its sites."""

import hashlib
import json
from importlib.metadata import version

from fluvial import __version__
from fluvial.models.digests import weights_digest
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
        "base": weights_digest(weights_folder(pool.config)),
        "tokenizer": hashlib.sha256(vocabulary).hexdigest()[:32],
        "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:32],
        "layout": f"{pool.layout.fingerprint:08x}",
    }
