"""How files of records are read: encoding and delimiter, as far as their bytes tell."""

import codecs
from pathlib import Path

from fluvial.data.faults import DataError
from fluvial.data.files import UTF8, read_text
from fluvial.data.readers import READERS
from fluvial.data.sources import DELIMITED, is_saved
from fluvial.storage.files import exists, expanded

MARKS_OF_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
DELIMITERS = (",", ";", "\t", "|")


def usual_reading(path: Path) -> dict[str, str]:
    """Return encoding and delimiter of a file, or of the first file of a folder, where they are not
    the usual ones; they are proposals that the user sees."""
    if not exists(path) or (path.is_dir() and is_saved(path)):
        return {}
    path = _first(path)
    if not path.is_file() or path.suffix.lower() == ".parquet":
        return {}

    with path.open("rb") as file:
        wide = file.read(2) in MARKS_OF_UTF16

    for encoding in (UTF8, "utf-16" if wide else "cp1252"):
        try:
            text = read_text(path, encoding)
        except DataError:
            continue

        found = {} if encoding == UTF8 else {"encoding": encoding}
        delimiter = _delimiter(text, path.suffix.lower())
        return found if delimiter is None else found | {"delimiter": delimiter}

    return {}  # the reader says what is wrong


def is_ascii(path: Path) -> bool:
    """Return whether a file, or the first file of a folder, reads the same in every encoding of
    one byte and in UTF-8."""
    path = _first(expanded(path))
    return path.is_file() and path.read_bytes().isascii()


def usual_delimiter(suffix: str) -> str:
    """Return the usual character between the columns of files with this suffix."""
    return "\t" if suffix == ".tsv" else ","


def _first(path: Path) -> Path:
    """Return a file itself, and the first file of records of a folder that has some."""
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
    return files[0] if files else path


def _delimiter(text: str, suffix: str) -> str | None:
    """Return the character between the columns, None for the usual one of the suffix."""
    if suffix not in DELIMITED:
        return None
    header = text.lstrip("\ufeff\r\n").splitlines()[:1] or [""]
    usual = usual_delimiter(suffix)
    best = max(DELIMITERS, key=lambda mark: (header[0].count(mark), mark == usual))
    return None if best == usual or not header[0].count(best) else best
