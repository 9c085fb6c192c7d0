"""The files of records in a folder; what may hold records there and is not read is refused."""

import os
import re
import shlex
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from fluvial.data.faults import listed, shown
from fluvial.data.readers import READERS
from fluvial.errors import ConfigError
from fluvial.storage.files import is_endless

KNOWN = ", ".join(READERS)
UNREADABLE = {
    *(".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".db", ".sqlite"),
    *(".gz", ".tgz", ".zip", ".tar", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar"),
    *(".arrow", ".feather", ".orc", ".avro"),
}
"""Suffixes of data that is not read; a folder with such a file is refused, so that no record is
lost unnoticed."""
COMPANIONS = {
    *(".md5", ".sha1", ".sha256", ".sha512", ".sig", ".asc"),
    *(".dvc", ".license", ".lock"),
}
"""Suffixes that other programs put after the whole name of a file that theirs is about."""
MOST_NAMED = 5
"""Folders that the command of a message names."""
LONGER = re.compile(f"({'|'.join(map(re.escape, READERS))})(?![a-z0-9])")
"""A known suffix, at the end of a name or within it."""


def files_within(folder: Path, where: str) -> list[Path]:
    """Return the files of records in a folder, which messages call `where`.

    Hidden files, and files of other kinds than data, may lie there. Raise `ConfigError` for
    anything else that is not read, with its name and the remedy.
    """
    try:
        within = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from error

    for file in within:
        fault = _unread(file)
        if fault is not None:
            raise ConfigError(f"{where} holds {shown(file.name)}, {fault}")

    files = [file for file in within if file.is_file() and file.suffix.lower() in READERS]
    if not files:
        raise ConfigError(f"{where} holds no {KNOWN} file{_below(within)}")

    kinds = {file.suffix.lower() for file in files}
    for inner in filter(Path.is_dir, within):
        below = _first_of(kinds, inner)
        if below is not None:
            raise ConfigError(
                f"{where} holds the folder {shown(inner.name)} with {shown(below)}, and a folder "
                "within it is not read; move its files up, or move it away"
            )

    return files


def _below(within: Sequence[Path]) -> str:
    """Return the folders of a folder that have files of records, with the remedy; "" for none."""
    inner = [path for path in within if path.is_dir() and _first_of(READERS.keys(), path)]
    if not inner:
        return ""
    names = listed([path.name for path in inner])
    each = " ".join(shlex.join(["--data", str(path)]) for path in inner[:MOST_NAMED])
    more = " ..." if len(inner) > MOST_NAMED else ""
    do = "does" if len(inner) == 1 else "do"
    return (
        f" itself, but {names} within it {do}; name such a folder, or each "
        f"as a site: fluvial init {each}{more}"
    )


def _unread(file: Path) -> str | None:
    """Return why data in a folder of records is not read, with the remedy; None for what is read,
    for a folder, and for what is no data."""
    suffix = file.suffix.lower()
    if file.is_symlink() and not file.exists():
        return "a link that leads to no file; mend it, or remove it"
    if is_endless(file):
        return "which is no regular file but a pipe, a device or a socket; move it away"
    if file.is_dir() or suffix in READERS or suffix in COMPANIONS:
        return None
    if suffix in UNREADABLE:
        return "which cannot be read; write it as CSV or JSON lines, or move it away"
    if LONGER.search(file.name.lower()):
        return f"whose name does not end in one of {KNOWN}; rename it, or move it away"

    return None


def _first_of(kinds: AbstractSet[str], folder: Path) -> str | None:
    """Return the name of a file of one of these kinds in a folder or in those below it."""
    for _, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if Path(name).suffix.lower() in kinds and not name.startswith("."):
                return name

    return None
