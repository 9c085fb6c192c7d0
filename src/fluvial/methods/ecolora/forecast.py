"""Predicted bytes of a round of EcoLoRA."""

from fluvial.codecs.golomb import SparseFrames
from fluvial.methods.ecolora.config import EcoLoraConfig
from fluvial.methods.ecolora.segments import Slice, Sparsifier, segment
from fluvial.methods.interface import Given
from fluvial.methods.traffic import FULL_LOSS, Bytes, Traffic, answer, envelope
from fluvial.wire.payload import Value


def predict(config: EcoLoraConfig, given: Given, round: int) -> Traffic:
    """Bound the bytes of a round by the least and the largest shares.

    Values that did not change are left out, so a download may have fewer. A site that was away gets
    all that changed, which may be everything.
    """
    layout = given.layout
    sparsifier = Sparsifier(layout)
    whole = Slice(0, layout.numel)
    frames = SparseFrames(layout, config.values)
    all_sites = config.cohort(given.sites) == given.sites
    changed = layout.numel
    if round == 1:
        changed = 0
    elif all_sites:
        changed = sparsifier.count(whole, config.most, config.most)

    long: list[Value] = [0.1234, 0.1234]
    values: dict[str, Value] = {"round": round, "segment": 0, "share": [0.1, 0.1], "since": 0}
    largest_values: dict[str, Value] = {
        **values,
        "segment": config.segments - 1,
        "share": long,
        "since": round,
    }
    uploads = []

    for number in range(config.segments):
        span = segment(number, config.segments, layout.numel)
        coded = SparseFrames(layout, config.values, span.start, span.stop)
        fewest = sparsifier.count(span, config.least_a, config.least_b)
        most = sparsifier.count(span, config.most, config.most)
        uploads.append(Bytes(*coded.sizes(fewest, most)) + answer(loss=FULL_LOSS, segment=number))

    up = Bytes(min(size.least for size in uploads), max(size.most for size in uploads))
    return Traffic(Bytes(*frames.sizes(0, changed)) + envelope(values, largest_values), up)
