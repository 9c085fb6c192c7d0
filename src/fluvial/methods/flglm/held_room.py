"""Room for hidden states that the ends hold by sample, in the words of `fluvial check`."""

from fluvial.codecs.activations.samples import SAMPLE_BYTES
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.interface import Given
from fluvial.models.pretrained import hidden_width


def room_words(config: FlGlmConfig, given: Given) -> str:
    """Return the words about hidden states that the ends hold."""
    if not config.remembers:
        return "none held; the frozen front is sent in every pass, since memory_bytes = 0"

    words = []
    if config.caches_front:
        words.append("the frozen front is sent in a sample's first pass only")
    if config.sends_changes:
        words.append("first passes are exact, later ones changes")

    most = f"at most {config.memory_bytes:,} B (method.memory_bytes)"
    if not config.sends_changes:
        words.append(f"{most} for a site at the server and in its checkpoints")
    else:
        words.append(f"{most} for a site and direction at the server and in its checkpoints")
        ways = "down" if config.caches_front else "in each direction"
        words.append(f"as much {ways} at the site")

    if given.examples is None:
        return "; ".join(words)

    largest = _largest_epoch(given)
    words.append(f"an epoch of the largest site is {largest:,} B in a direction")
    if largest > config.memory_bytes:
        words.append("which has no room there, so that samples are dropped before they recur")
    return "; ".join(words)


def remarks(config: FlGlmConfig, given: Given) -> list[str]:
    """Return a remark where hidden states by sample have no room for an epoch."""
    if not config.remembers or given.examples is None:
        return []
    largest = _largest_epoch(given)
    if largest <= config.memory_bytes:
        return []
    return [
        f"method.memory_bytes={config.memory_bytes}: an epoch of the largest site takes {largest} "
        "bytes of hidden states, so samples are dropped before they recur, and little is saved; "
        "set it higher"
    ]


def _largest_epoch(given: Given) -> int:
    """Return the most bytes that all sequences of a site take where they are held in a direction;
    the sites' data is here."""
    assert given.examples is not None
    token_bytes = hidden_width(given.base) * given.width_bytes
    return max(
        sum(SAMPLE_BYTES + token_bytes * len(example.input_ids) for example in examples)
        for examples in given.examples().values()
    )
