"""Form of all tables on a terminal: texts to the left, numbers to the right."""

from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from fluvial.formatting import safe_text


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str,
    left: int = 1,
    caption: str = "",
    whole: bool = False,
) -> Table:
    """Return a table of texts that are not read as markup and cannot drive a terminal.

    The first `left` columns are set to the left; the others hold numbers and are set to the right.
    With `whole`, only the first column is folded where the table is too wide.
    """
    table = Table(
        title=_plain(title, "bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption=_plain(caption, "table.caption") if caption else None,
        caption_justify="left",
        collapse_padding=True,
        pad_edge=False,
    )
    # A heading takes two lines sooner than a label in the first column.
    label = min(18, max((len(row[0]) for row in rows), default=0))

    for number, heading in enumerate(headings):
        justify: Literal["left", "right"] = "left" if number < left else "right"
        table.add_column(
            _plain(heading),
            justify=justify,
            overflow="fold",
            min_width=0 if number else label,
            no_wrap=whole and number > 0,
        )

    for row in rows:
        table.add_row(*map(_plain, row))
    return table


def _plain(text: str, style: str = "") -> Text:
    return Text(safe_text(text), style)
