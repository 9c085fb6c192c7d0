"""Counts and ROUGE of a site's attacks as values of a message, and as the entry of a result."""

from collections.abc import Sequence

from fluvial.federation.replies import MOST_SAMPLES, MOST_TOKENS, fields
from fluvial.methods.flglm.leakage.attacks import ON_HIDDEN
from fluvial.methods.flglm.leakage.meter import GRADIENTS, Leakage, Reading
from fluvial.wire.payload import Payload, Value

_FIGURES = ("right", "rouge_1", "rouge_2", "rouge_l")


def values_of(leakage: Leakage) -> dict[str, Value]:
    """Return the values of a reply."""
    values: dict[str, Value] = {
        "texts": leakage.texts,
        "tokens": leakage.tokens,
        "uncounted": leakage.uncounted,
    }
    for reading in leakage.readings:
        values[reading.attack] = {
            "right": round(reading.accuracy * leakage.tokens),
            "rouge_1": reading.rouge_1,
            "rouge_2": reading.rouge_2,
            "rouge_l": reading.rouge_l,
        }

    return values


def read(_site: str, reply: Payload) -> Leakage:
    """Return the success of a site's attacks; raises `WireError`."""
    fields(reply, ("texts", "tokens", "uncounted", *ON_HIDDEN), optional=(GRADIENTS,))
    tokens = reply.whole("tokens", 1, MOST_TOKENS)
    names = [name for name in (*ON_HIDDEN, GRADIENTS) if name in reply.values]
    readings = []

    for name in names:
        figures = Payload(values=reply.value(name, dict))
        fields(figures, _FIGURES)
        right = figures.whole("right", 0, tokens)
        rouge = [figures.number(each, 0.0, 1.0) for each in _FIGURES[1:]]
        readings.append(Reading(name, right / tokens, *rouge))

    texts = reply.whole("texts", 1, MOST_SAMPLES)
    return Leakage(texts, tokens, reply.whole("uncounted", 0, MOST_TOKENS), tuple(readings))


def together(sites: Sequence[Leakage]) -> Leakage | None:
    """Return the success on the texts of all sites, of those attacks that all of them ran; None
    without any."""
    if not sites:
        return None

    texts = sum(each.texts for each in sites)
    tokens = sum(each.tokens for each in sites)
    uncounted = sum(each.uncounted for each in sites)
    by_site = [{reading.attack: reading for reading in each.readings} for each in sites]
    common = [name for name in by_site[0] if all(name in named for named in by_site)]

    def mean_of(name: str) -> Reading:
        rows = [(each, named[name]) for each, named in zip(sites, by_site, strict=True)]
        return Reading(
            name,
            sum(row.accuracy * each.tokens for each, row in rows) / tokens,
            sum(row.rouge_1 * each.texts for each, row in rows) / texts,
            sum(row.rouge_2 * each.texts for each, row in rows) / texts,
            sum(row.rouge_l * each.texts for each, row in rows) / texts,
        )

    return Leakage(texts, tokens, uncounted, tuple(mean_of(name) for name in common))
