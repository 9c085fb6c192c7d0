"""The reader of parquet files."""

import io
import math
from pathlib import Path
from typing import Any

from fluvial.data.faults import DataError, shown
from fluvial.data.files import read_bytes
from fluvial.data.reading import Reading
from fluvial.data.rows import Number, Place, Row, Table, typed
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
        table = parquet.read_table(io.BytesIO(data))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            [f"{name}: is a damaged parquet file ({type(error).__name__}); copy it again"]
        ) from error

    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(each for each in names if names.count(each) > 1)
        raise DataError([f"{name}: has two columns {shown(twice)}; rename one of them"])

    columns = [_values(name, each, table.column(each)) for each in names]
    records = (dict(zip(names, record, strict=True)) for record in zip(*columns, strict=True))
    rows = [
        Row(record, Place(str(path), "row", number))
        for number, record in enumerate(records, start=1)
    ]

    return Table(str(path), ".parquet", rows, tuple(names))


def _short(value: Any, kind: str) -> Any:
    """Return a value of a column of pyarrow's type `kind`; a short float keeps its type's
    digits."""
    import numpy

    if kind not in ("halffloat", "float") or value is None or not math.isfinite(value):
        return value
    return Number(str((numpy.float16 if kind == "halffloat" else numpy.float32)(value)))


def _values(file: str, name: str, column: Any) -> list[Any]:
    """Return the values of a column of pyarrow.

    Raise `DataError` for values that Python has no type for.
    """
    import pyarrow

    try:
        return [typed(_short(value, str(column.type))) for value in column.to_pylist()]
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        fault = (
            f"{file}: column {shown(name)} of type {column.type} holds a value that cannot be read "
            f"({type(error).__name__}); write it as text, or remove the column"
        )
        raise DataError([fault]) from error
