"""Labels of charts: their length in a wide font, and what fits of a long one."""

import unicodedata
from collections.abc import Sequence

FONT = 11.5
"""Size of the font of a chart's texts in the units of its view box, as the style sheet has it."""
LINE, ROW, COLUMN = 18, 32, 24
"""Characters of a line of a bar's label, and of the labels of a grid's rows and columns; a hover
has the whole label."""


def length(words: str) -> float:
    """Return the length of `words` in a wide font, so that no system's font needs more."""
    return FONT * sum(map(_width, words))


def _width(character: str) -> float:
    """Return the width of a character in a wide font, after DejaVu Sans, in font sizes."""
    if character in "fijlrtI ,.:;'|!()[]/-":
        return 0.46
    if character in "mwMW%@…" or unicodedata.east_asian_width(character) in "WF":
        return 1.0
    return 0.8 if character.isupper() or character in "+=<>~_" else 0.65


def wrapped(labels: Sequence[str]) -> list[list[str]]:
    """Return each label as one line, or as two, which are cut where they do not hold it; those of
    different labels differ."""
    halves = [_halves(label) for label in labels]
    rests = distinct([rest for _, rest in halves], LINE)
    return [
        [first, rest] if rest else [first] for (first, _), rest in zip(halves, rests, strict=True)
    ]


def _halves(label: str) -> tuple[str, str]:
    """Return the first line of a label and what does not fit there."""
    if len(label) <= LINE:
        return label, ""
    at = max(label[: LINE + 1].rfind(sign) for sign in " -_.,/+")
    cut = min(at + 1, LINE) if at >= LINE // 2 else LINE
    return label[:cut].rstrip(), label[cut:]


def distinct(labels: Sequence[str], most: int) -> list[str]:
    """Return labels of at most `most` characters: longer ones lose their end, or their middle where
    ends tell them apart, or get a number where neither does."""
    for cut in (_without_end, _without_middle):
        shown = [label if len(label) <= most else cut(label, most) for label in labels]
        if len(set(shown)) == len(set(labels)):
            return shown

    numbers = {label: f"… {number}" for number, label in enumerate(dict.fromkeys(labels), 1)}
    return [
        label if len(label) <= most else label[: most - len(numbers[label])] + numbers[label]
        for label in labels
    ]


def _without_end(label: str, most: int) -> str:
    return f"{label[: most - 1]}…"


def _without_middle(label: str, most: int) -> str:
    tail = (most - 1) // 2
    return f"{label[: most - 1 - tail]}…{label[-tail:]}"
