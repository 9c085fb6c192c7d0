"""Readers of JSON lines and JSON; a value keeps its type, with numbers as they are written."""

from collections.abc import Collection, Mapping, Sequence
from json.decoder import JSONDecodeError
from pathlib import Path
from typing import Any

from fluvial.data.faults import DataError, Faults, listed
from fluvial.data.files import read_text
from fluvial.data.forms import CONVERSATIONS, REQUIRED_FIELDS
from fluvial.data.json_document import DECODER, Items, document
from fluvial.data.reading import LINE_END, MARK, MARKED, Reading, skipped
from fluvial.data.rows import Place, Row, Table, columns_of, without_faults
from fluvial.formatting import safe_line

_STRICT = "; JSON has no comments, no comma after a last element, and texts in double quotes"


def read_lines(path: Path, reading: Reading) -> Table:
    """Read one record from each line that is not blank; raise `DataError` with all faults."""
    text = read_text(path, reading.encoding)
    return _json_lines(path, text)


def _json_lines(path: Path, text: str) -> Table:
    rows = list[Row]()
    faults = Faults()
    blank = 0

    for number, line in enumerate(LINE_END.split(text), start=1):
        place = Place(str(path), "line", number)
        if not line.strip():
            blank += 1
            continue
        if line.startswith(MARK):
            faults.add(f"{place}: {MARKED}", place)
            continue

        try:
            rows.append(Row(_record(_loads(line)), place))
        except ValueError as error:
            faults.add(f"{place} {_why(error)}", place)

    if faults.count and text.lstrip()[:1] in "[{" and _is_document(text):
        raise DataError(
            [
                f"{safe_line(str(path))}: is one JSON document, not one record on each line; "
                "write it so, or give it the suffix .json"
            ]
        )

    notes = skipped(blank - text.endswith(("\n", "\r")))
    return without_faults(Table(str(path), ".jsonl", rows, columns_of(rows), notes), faults)


def _loads(line: str) -> Any:
    try:
        return DECODER.decode(line)
    except RecursionError:
        raise ValueError("is nested too deeply for a record") from None


def _is_document(text: str) -> bool:
    try:
        _loads(text)
    except ValueError:
        return False

    return True


def _record(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    kind = "list" if isinstance(value, list) else "single value"
    raise ValueError(f"holds a {kind}; a record is an object with named fields")


def _why(error: ValueError) -> str:
    """Return the fault of a JSON text, without any of the text."""
    if isinstance(error, JSONDecodeError):
        return (
            f"({error.msg} at character {error.colno}) is not JSON; write one record on each "
            f"line{_STRICT}"
        )
    return str(error)


def read_document(path: Path, reading: Reading) -> Table:
    """Read a list of records, or an object with one such list, or one record, or JSON lines.

    An object without any list is one record, whatever its fields are called.
    """
    text = read_text(path, reading.encoding)
    name = safe_line(str(path))

    try:
        fields = list(document(text))
    except JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _json_lines(path, text)
        place = f"{name}, line {error.lineno}"
        where = f"{error.msg} at character {error.colno} of the line"
        raise DataError([f"{place} ({where}) is not JSON{_STRICT}"]) from None
    except ValueError as error:
        raise DataError([f"{name}, {error}"]) from None

    lists = {key: items for key, items in fields if items is not None}
    if (fields and not lists) or _is_record([key for key, _ in fields], lists):
        line = text.count("\n", 0, text.index("{")) + 1
        rows = [Row(_record(_loads(text)), Place(str(path), "line", line))]
        return Table(str(path), ".json", rows, columns_of(rows))

    if len(lists) != 1:
        raise DataError([f"{name}: {_no_list(lists)}"])

    (items,) = lists.values()
    return _table_of_items(path, items)


def _is_record(keys: Collection[str], lists: Mapping[str, Items]) -> bool:
    """Return whether the object of a document is one record of a known form, and none of its lists
    holds records."""
    for form, required in REQUIRED_FIELDS.items():
        if not set(required) <= set(keys):
            continue
        if form in CONVERSATIONS:
            turns = lists.get(required[0])
            who = "role" if form == "messages" else "from"
            if turns is not None and all(isinstance(t, dict) and who in t for _, t in turns):
                return True
        elif not lists.keys() & set(required):
            items = [item for listed in lists.values() for _, item in listed]
            return not any(isinstance(item, dict) for item in items)

    return False


def _no_list(lists: Mapping[str, Any]) -> str:
    remedy = "write a list of records, [{...}, {...}], or one record on each line of a .jsonl file"
    if lists:
        names = listed(list(lists))
        return (
            f"has {len(lists)} lists, in the fields {names}, and which one has the records is "
            f"open; {remedy}"
        )

    return f"has no list; {remedy}"


def _table_of_items(path: Path, items: Sequence[tuple[int, Any]]) -> Table:
    rows = list[Row]()
    faults = Faults()
    for line, value in items:
        place = Place(str(path), "line", line)
        try:
            rows.append(Row(_record(value), place))
        except ValueError as error:
            faults.add(f"{place} {error}", place)

    return without_faults(Table(str(path), ".json", rows, columns_of(rows)), faults)
