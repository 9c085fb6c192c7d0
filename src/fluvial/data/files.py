"""The text of a file in its encoding, or a fault that says what the file is instead."""

import codecs
import re
import sys
from pathlib import Path

from fluvial.data.faults import DataError
from fluvial.formatting import safe_line
from fluvial.storage.files import is_endless

UTF8 = "utf-8"
SPREADSHEET = "save it as CSV (UTF-8) in the program that made it"
UNPACK = "unpack it first"
FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive, such as an Excel file (xlsx)", f"{SPREADSHEET}, or unpack it"),
    (b"PK\x05\x06", "an empty zip archive", UNPACK),
    (b"\xd0\xcf\x11\xe0", "an old Office file, such as xls", SPREADSHEET),
    (b"\x1f\x8b", "compressed by gzip", UNPACK),
    (b"BZh", "compressed by bzip2", UNPACK),
    (b"\xfd7zXZ", "compressed by xz", UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"PAR1", "a parquet file", "give it the suffix .parquet"),
    (b"ARROW1", "an Arrow file", "write parquet or JSON lines"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"%PDF", "a PDF document", "write its text into a .txt or .jsonl file"),
    (
        b"version https://git-lfs",
        "a pointer of Git LFS",
        "fetch the file itself with `git lfs pull`",
    ),
)
"""First bytes of files that hold no text, their names, and the remedy."""
BOMS: tuple[tuple[bytes, tuple[str, ...]], ...] = (
    (codecs.BOM_UTF8, (UTF8, "utf-8-sig")),
    (codecs.BOM_UTF32_LE, ("utf-32", "utf-32-le")),
    (codecs.BOM_UTF32_BE, ("utf-32", "utf-32-be")),
    (codecs.BOM_UTF16_LE, ("utf-16", "utf-16-le")),
    (codecs.BOM_UTF16_BE, ("utf-16", "utf-16-be")),
)
"""Byte order marks, and the encodings of a file that begins with one, that to propose first."""
DOUBLE_BYTE = ("gb18030", "shift_jis", "euc_kr", "big5")
SINGLE_BYTE = ("cp1252", "latin-1")
SAMPLE = 2**20
"""Bytes that a proposal of an encoding is made from."""
NO_TEXT = {
    "idna",
    "punycode",
    "undefined",
    "unicode_escape",
    "raw_unicode_escape",
    "mbcs",
    "oem",
    "utf_7",
}


def known_encoding(name: str) -> bool:
    """Return true for an encoding of text that Python has, such as "cp1252"."""
    try:
        found = codecs.lookup(name)
        "a".encode(name).decode(name)
    except (LookupError, ValueError):
        return False

    return found.name.replace("-", "_") not in NO_TEXT


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file; raise `DataError` if it cannot be read or is empty."""
    name = safe_line(str(path))
    if is_endless(path):
        raise DataError(
            [
                f"{name}: is no regular file but a pipe, a device or a socket; copy its content "
                "into a file, and name that"
            ]
        )

    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError([f"{name}: cannot be read: {error.strerror}"]) from error

    if not data:
        raise DataError([f"{name}: is empty"])

    return data


def read_text(path: Path, encoding: str) -> str:
    """Return the text of a file, without a byte order mark.

    Raise `DataError`, naming file, line and byte, where the bytes are not text of `encoding`, with
    a proposal.
    """
    data = read_bytes(path)
    name = safe_line(str(path))

    for start, what, remedy in FORMATS:
        if data.startswith(start):
            raise DataError([f"{name}: is {what}, not text: {remedy}"])

    mark = next((fitting for start, fitting in BOMS if data.startswith(start)), None)
    codec = codecs.lookup(encoding).name
    if mark is not None and codec not in mark:
        raise DataError(
            [
                f"{name}: begins with the mark of {mark[-1].removesuffix('-sig')}, not "
                f'{encoding}; set data.encoding = "{mark[0]}"'
            ]
        )

    order = _wide(data) if mark is None and codec.startswith("utf-16") else None
    if order is not None and order != {"utf-16": f"utf-16-{sys.byteorder[0]}e"}.get(codec, codec):
        raise DataError(
            [f'{name}: its bytes have the order of {order}; set data.encoding = "{order}"']
        )

    text = _decoded(data, codec, encoding, name).removeprefix("\ufeff")
    windows = re.search("[\x80-\x9f]", text) if codec == "iso8859-1" else None
    if windows is not None:
        line = text.count("\n", 0, windows.start()) + 1
        byte = f"0x{ord(windows[0]):02x}"
        raise DataError(
            [
                f"{name}, line {line}: byte {byte} is no character of {encoding}; set "
                'data.encoding = "cp1252"'
            ]
        )

    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        proposal = _wide(data)
        remedy = (
            f'set data.encoding = "{proposal}"' if proposal else "remove it, or name another file"
        )
        raise DataError(
            [
                f"{name}, line {line}: holds a NUL character, so this is no text of {encoding}; "
                f"{remedy}"
            ]
        )

    return text


def _decoded(data: bytes, codec: str, encoding: str, name: str) -> str:
    try:
        return data.decode(codec)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte {error.start + 1} of the file is 0x{data[error.start]:02x}"
        remedy = _proposal(data, codec)
        raise DataError(
            [f"{name}, line {line} ({byte}: {error.reason}): is no text of {encoding}; {remedy}"]
        ) from None


def _proposal(data: bytes, codec: str) -> str:
    """Return the remedy for bytes that are no text of `codec`."""
    fitting = [
        candidate
        for candidate in _candidates(data)
        if codecs.lookup(candidate).name != codec and _fits(data, candidate)
    ]
    if not fitting:
        return "the file is damaged, or no text; save it anew as UTF-8"

    quoted = [f'"{candidate}"' for candidate in fitting]
    others = f" (or {', '.join(quoted[1:])})" if quoted[1:] else ""
    return (
        f"set data.encoding, for instance to {quoted[0]}{others}, and look at it with `fluvial "
        "preview`"
    )


def _candidates(data: bytes) -> tuple[str, ...]:
    wide = _wide(data)
    if wide:
        return (wide,)

    sample = data[:SAMPLE]
    high = [number for number, byte in enumerate(sample) if byte >= 0x80]
    pairs = sum(number + 1 < len(sample) and sample[number + 1] >= 0x80 for number in high)

    # Letters of a Latin alphabet beyond ASCII stand alone in a word, those of two bytes side by
    # side.
    return (*DOUBLE_BYTE, *SINGLE_BYTE) if high and pairs > len(high) / 2 else (UTF8, *SINGLE_BYTE)


def _fits(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False

    return True


def _wide(data: bytes) -> str | None:
    """Return the form of UTF-32 or UTF-16 if one half of each character, or every second byte, is
    NUL."""
    sample = data[:SAMPLE]
    first, second, third, fourth = (sample[start::4].count(0) for start in range(4))
    most = len(sample) * 0.45
    if third + fourth > most or first + second > most:
        return "utf-32-le" if third + fourth > most else "utf-32-be"

    even = first + third
    odd = second + fourth
    if max(even, odd) < len(sample) / 8:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"
