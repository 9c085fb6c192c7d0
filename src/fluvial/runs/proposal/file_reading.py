"""How files of records are read: encoding and delimiter, as far as their bytes tell."""

import codecs
from pathlib import Path

from fluvial.data.faults import DataError
from fluvial.data.files import UTF8, read_text
from fluvial.data.readers import READERS
from fluvial.data.sources import DELIMITED, is_saved

MARKS_OF_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
DELIMITERS = (",", ";", "\t", "|")


def usual_reading(path: Path) -> dict[str, str]:
    """Return encoding and delimiter of a file, or of the first file of a folder, where they are not
    the usual ones; they are proposals that the user sees."""
    if path.is_dir():
        if is_saved(path):
            return {}
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS)
        path = files[0] if files else path
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


def _delimiter(text: str, suffix: str) -> str | None:
    """Return the character between the columns, None for the usual one of the suffix."""
    if suffix not in DELIMITED:
        return None
    header = text.lstrip("\ufeff\r\n").splitlines()[:1] or [""]
    usual = "\t" if suffix == ".tsv" else ","
    best = max(DELIMITERS, key=lambda mark: (header[0].count(mark), mark == usual))
    return None if best == usual or not header[0].count(best) else best
