"""Settings and rules that all readers of text files share."""

import re
from dataclasses import dataclass

from fluvial.data.files import UTF8

LINE_END = re.compile(r"\r\n|\r|\n")
"""Ends of lines; not U+2028 and others, which may stand within a JSON text."""

MARK = "\ufeff"
"""Byte order mark, which only the beginning of a file may have."""
MARKED = "begins with a byte order mark, as in files that were joined; remove the mark"
"""Fault of a line within a file."""


@dataclass(frozen=True)
class Reading:
    """Settings by which a file is read."""

    encoding: str = UTF8
    delimiter: str | None = None
    """Delimiter of CSV; None for the comma, in a .tsv file the tab."""


def skipped(blank: int) -> tuple[str, ...]:
    """Return a note on `blank` lines, where there are some."""
    lines = "1 blank line was" if blank == 1 else f"{blank} blank lines were"
    return (f"{lines} skipped",) if blank > 0 else ()
