"""Kinds of files of records, and the settings of reading that hold for files of one kind only."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fluvial.storage.files import expanded

BY_KIND = ("encoding", "delimiter")
"""Settings of [data] that hold for files of one kind only."""
UTF8_ONLY = (".json", ".jsonl", ".ndjson", ".parquet")
"""Kinds whose text is UTF-8 by their standards, unless their own settings name an encoding."""


def kind_of(source: str | Path) -> str:
    """Return the suffix of a source's files, of a folder that of the first one; "" without one."""
    path = expanded(source)
    with suppress(OSError):  # a name that is too long, say, is refused where its file is read
        if path.is_dir():
            return next((file.suffix for file in sorted(path.iterdir()) if file.suffix), "").lower()
    return path.suffix.lower()


def taken_over(settings: Mapping[str, Any], kind: str, other: str) -> dict[str, Any]:
    """Return those of the `settings` for files of one kind that hold for files of another.

    Encoding and delimiter hold for files of the same kind; those that were written for no kind ("")
    hold for CSV and plain text.
    """
    same = kind == other if kind else other not in UTF8_ONLY
    return {key: value for key, value in settings.items() if same or key not in BY_KIND}
