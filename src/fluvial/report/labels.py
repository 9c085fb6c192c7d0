"""Labels of charts: their length in a wide font, and what fits of a long one."""

import unicodedata

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


def wrapped(label: str) -> list[str]:
    """Return a label as one line, or as two, which are cut where they do not hold it."""
    first = label[: LINE + 1]
    if len(label) <= LINE:
        return [label]
    at = max(first.rfind(sign) for sign in " -_.,/+")
    cut = min(at + 1, LINE) if at >= LINE // 2 else LINE
    return [label[:cut].rstrip(), short(label[cut:], LINE)]


def short(label: str, most: int) -> str:
    """Return a label, or its beginning where it has more than `most` characters."""
    return label if len(label) <= most else f"{label[: most - 1]}…"
