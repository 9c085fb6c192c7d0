"""Numbers and texts from outside in the form that people read."""

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any


def human_bytes(count: float) -> str:
    """Return a number of bytes with three digits and a unit; 1 kB is 1000 bytes."""
    if count < 1000:
        return f"{count:.0f} B"

    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5 or unit == "TB":
            break

    decimals = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{decimals}f} {unit}"


def human_ratio(ratio: float | None) -> str:
    """Return a ratio of bytes as 1/57, or with three decimals where little or nothing is saved."""
    if ratio is None:
        return "-"
    if not 0 < ratio < 0.7:
        return f"{ratio:.3f}"
    return f"1/{1 / ratio:.{0 if ratio < 0.1 else 1}f}"


def human_seconds(seconds: float) -> str:
    """Return `seconds` with one decimal, as milliseconds below 0.1 s, as minutes with one decimal
    from 100 s on, or as hours and minutes from 100 minutes on."""
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = f"{seconds / 60:.1f}".removesuffix(".0")
    return f"{minutes} min" if seconds < 60 * 99.5 else human_minutes(seconds)


def human_minutes(seconds: float) -> str:
    """Return `seconds` as whole minutes, or as hours and minutes from 100 minutes on."""
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


_CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories that could drive a terminal, reorder a line or be no text at all."""
_JOINERS = ("\u200c", "\u200d")
"""Format characters that belong to the spelling of several scripts and to emoji."""


def is_blank(text: str) -> bool:
    """Return whether no character of a text can be seen: it has blanks and format characters only,
    such as U+200B."""
    return not text.strip() or all(
        c.isspace() or unicodedata.category(c) in _CONTROLS for c in text
    )


def safe_text(text: str) -> str:
    """Return `text` so that it cannot drive a terminal, with its newlines and tabs.

    Control and format characters and lone surrogates are written as escapes; three or more newlines
    in a row are counted.
    """
    text = "".join(char if char in "\n\t" else _escaped(char) for char in text)
    return re.sub(r"\n{3,}", lambda newlines: f" [⏎ x {len(newlines[0])}] ", text)


def shown_answer(text: str) -> str:
    """Return what a model wrote as `safe_text` does, and words in place of white space alone."""
    return safe_text(text) if text.strip() else "(empty answer)"


def safe_line(text: str) -> str:
    """Return `text` as `safe_text` does, with newlines and tabs written as escapes too."""
    return "".join(map(_escaped, text))


def _escaped(char: str) -> str:
    if char in _JOINERS or unicodedata.category(char) not in _CONTROLS:
        return char
    return char.encode("unicode_escape").decode()


NOT_MEASURED = "not measured"
"""Text in place of a value that is unknown or not finite."""


def figure(value: float | None, form: str = ".4f") -> str:
    """Return `value` in `form`, or "not measured" where it is unknown or not finite."""
    return NOT_MEASURED if value is None or not _is_number(value) else format(value, form)


def percent(share: float | None) -> str:
    """Return a share in per cent with two decimals, or "not measured" where it is unknown."""
    return NOT_MEASURED if share is None or not _is_number(share) else f"{100 * share:.2f} %"


def _is_number(value: object) -> bool:
    """Return True for a finite number; a file that was changed by hand may hold other values."""
    return isinstance(value, int | float) and math.isfinite(value)


def epsilon_words(epsilon: float | None) -> str:
    """Return epsilon with three digits; where it is 0, delta bounds all that is learned."""
    return "below 1e-09" if epsilon is not None and 0 <= epsilon < 1e-9 else figure(epsilon, ".3g")


def privacy_words(report: Mapping[str, Any]) -> str:
    """Return epsilon, delta and releases of a run as one line, and what epsilon does not count."""
    where = "by the server" if report["placement"] == "aggregate" else "at the site"
    counted = (
        f"epsilon {epsilon_words(report['epsilon'])} at delta {report['delta']:g} after "
        f"{report['releases']} releases of a site, noise added {where}"
    )

    return "; ".join([counted, *report["outside"]])
