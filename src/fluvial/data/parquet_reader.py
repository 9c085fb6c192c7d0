"""The reader of parquet files."""

import io
import math
import re
from pathlib import Path
from typing import Any

from fluvial.data.faults import DataError, shown
from fluvial.data.files import read_bytes
from fluvial.data.reading import Reading
from fluvial.data.rows import Number, Place, Row, Table, Unreadable, columns_of, typed
from fluvial.formatting import safe_line


def read_parquet(path: Path, _: Reading) -> Table:
    """Read a parquet file, which brings its own encoding; raise `DataError` if it is damaged."""
    import pyarrow
    from pyarrow import parquet

    data = read_bytes(path)
    name = safe_line(str(path))

    if not data.startswith(b"PAR1"):
        raise DataError([f"{name}: is not a parquet file; give it the suffix of what it is"])

    try:
        names = parquet.read_schema(io.BytesIO(data)).names
        if len(set(names)) < len(names):  # a table of pyarrow cannot be read with them
            twice = next(each for each in names if names.count(each) > 1)
            raise DataError([f"{name}: has two columns {shown(twice)}; rename one of them"])
        table = parquet.read_table(io.BytesIO(data))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            [f"{name}: is a damaged parquet file ({type(error).__name__}); copy it again"]
        ) from error

    rows = rows_of(table, str(path), "row")
    return Table(str(path), ".parquet", rows, columns_of(rows))


def rows_of(table: Any, name: str, unit: str) -> list[Row]:
    """Return the rows of a table of pyarrow, with places in the file `name`."""
    columns = [_values(column) for column in table.columns]
    records = (
        dict(zip(table.column_names, record, strict=True)) for record in zip(*columns, strict=True)
    )
    return [Row(record, Place(name, unit, number)) for number, record in enumerate(records, 1)]


def _values(column: Any) -> list[Any]:
    """Return the values of a column of pyarrow; where Python has no type for one, each is
    `Unreadable`, since the column may not be needed."""
    import pyarrow

    try:
        values = column.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError, LookupError, ImportError):
        return [Unreadable(str(column.type))] * len(column)

    if re.search(r"\b(halffloat|float)\b", str(column.type)):
        values = [_short(value, column.type) for value in values]
    return [typed(value) for value in values]


def _short(value: Any, kind: Any) -> Any:
    """Return a value of pyarrow's type `kind`, in which short floats have the digits of their
    type."""
    import numpy
    from pyarrow import types

    if value is None:
        return None
    if types.is_float32(kind) or types.is_float16(kind):
        if not math.isfinite(value):
            return value
        return Number(str((numpy.float16 if types.is_float16(kind) else numpy.float32)(value)))
    if types.is_struct(kind):
        return {each.name: _short(value[each.name], each.type) for each in kind}
    if types.is_map(kind):
        return [(_short(key, kind.key_type), _short(item, kind.item_type)) for key, item in value]
    if isinstance(value, list):
        return [_short(item, kind.value_type) for item in value]
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _short(value, kind.value_type)

    return value
