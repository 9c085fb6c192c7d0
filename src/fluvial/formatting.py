"""Numbers, texts and tables as a person reads them."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text


def human_bytes(count: float) -> str:
    """Three digits and a unit; 1 kB is 1000 bytes."""
    if count < 1000:
        return f"{count:.0f} B"

    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5 or unit == "TB":
            break

    return f"{count:.{2 if count < 9.995 else 1 if count < 99.95 else 0}f} {unit}"


def human_ratio(ratio: float | None) -> str:
    """A ratio of bytes as 1/57; three decimals where little or nothing is saved."""
    if ratio is None:
        return "-"
    if not 0 < ratio < 0.7:
        return f"{ratio:.3f}"
    return f"1/{1 / ratio:.{0 if ratio < 0.1 else 1}f}"


def human_seconds(seconds: float) -> str:
    """Seconds, or minutes and hours once there are many."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return human_minutes(seconds)


def human_minutes(seconds: float) -> str:
    """Return `seconds` as whole minutes, or as hours and minutes from 100 minutes on."""
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def plain(text: str) -> str:
    """`text` without control characters, which could drive a terminal, and with long runs of
    newlines counted."""
    text = "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text
    )
    return re.sub(r"\n{3,}", lambda run: f" [⏎ x {len(run[0])}] ", text)


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str,
    left: int = 1,
    caption: str = "",
) -> Table:
    """A table of plain texts; the first `left` columns are set to the left, the others are
    numbers."""
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        caption=caption or None,
        caption_justify="left",
        collapse_padding=True,
        pad_edge=False,
    )
    label = min(
        18, max((len(row[0]) for row in rows), default=0)
    )  # rather a heading in two lines than a label

    for number, heading in enumerate(headings):
        justify: Literal["left", "right"] = "left" if number < left else "right"
        table.add_column(
            heading, justify=justify, overflow="fold", min_width=0 if number else label
        )

    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


NOT_MEASURED = "not measured"


def figure(value: float | None, form: str = ".4f") -> str:
    """Return `value` in `form`; what is unknown or no finite number is "not measured"."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return format(value, form) if known else NOT_MEASURED


def percent(share: float | None) -> str:
    """Return a share in per cent with two decimals; "not measured" where it is not known."""
    known = isinstance(share, int | float) and math.isfinite(share)
    return f"{100 * share:.2f} %" if share is not None and known else NOT_MEASURED


def privacy_words(report: Mapping[str, Any]) -> str:
    """Return what the privacy of a run cost, and what it leaves out, as one line."""
    where = "by the server" if report["placement"] == "aggregate" else "at the site"
    counted = (
        f"epsilon {report['epsilon']:.3g} at delta {report['delta']:g} after "
        f"{report['releases']} releases of a site, noise added {where}"
    )

    return "; ".join([counted, *report["outside"]])
