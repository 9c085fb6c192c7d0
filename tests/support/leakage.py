"""The embedded model and short texts, for the attacks on hidden states."""

from functools import cache

from torch import Tensor, nn
from transformers import AutoTokenizer

from fluvial.data import stdlib
from fluvial.models.loading import load_base
from fluvial.models.pretrained import ModelConfig, source_of

CONFIG = ModelConfig(dtype="float32", device="cpu")
BOS = 1


@cache
def embedded() -> nn.Module:
    return load_base(CONFIG)


def heldout(count: int, tokens: int) -> list[Tensor]:
    """Return texts (tokens,) of the sites' held-out files."""
    names = stdlib.site_names()[:count]
    return encoded([stdlib.site_text(name).heldout[0].text for name in names], tokens)


def public(count: int, tokens: int) -> list[Tensor]:
    """Return texts (tokens,) of the public packages."""
    documents = [text for each in stdlib.public_packages().values() for text in each]
    step = max(1, len(documents) // count)
    return encoded([document.text for document in documents[::step][:count]], tokens)


def encoded(texts: list[str], tokens: int) -> list[Tensor]:
    """Return the first `tokens` ids of each text, the begin-of-text token included."""
    tokenizer = AutoTokenizer.from_pretrained(source_of(CONFIG))
    found = tokenizer([text[: 10 * tokens] for text in texts], return_tensors=None)["input_ids"]
    assert all(len(ids) >= tokens and ids[0] == BOS for ids in found)
    return [Tensor(ids[:tokens]).long() for ids in found]
