"""Read the folder of a finished or unfinished run as plain JSON values, without torch."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluvial.errors import CheckpointError
from fluvial.federation.boundary import place


def read_run(folder: Path) -> dict[str, Any]:
    """Everything that the folder of a run tells, as plain JSON values; raises `CheckpointError` if
    it holds no run."""
    found = {
        "folder": str(folder),
        "config": _read_json(folder / "config.json"),
        "refused": _read_json(folder / "refused.json"),
        **_read_part(folder),
    }
    if found["config"] is None and not found["metrics"] and found["result"] is None:
        raise CheckpointError(
            f"{folder} holds no run: it has no config.json; give the folder that `fluvial run` wrote, "
            "by default runs/NAME"
        )

    compared = sorted(path for path in folder.glob("compare/*") if path.is_dir())
    return {
        **found,
        "config": found["config"] or {},
        "compare": {path.name: _read_part(path) for path in compared},
    }


def _read_part(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.jsonl"
    records = []
    try:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    for line in lines:
        try:
            record = json.loads(line)
        except (
            ValueError,
            RecursionError,
        ):  # a run that is being written, or was cut off, may end in half a line
            break

        if not isinstance(record, dict):
            break

        records.append(record)

    return {"metrics": records, "result": _read_json(folder / "result.json")}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}; it should be JSON that `fluvial run` wrote"
        ) from error

    if not isinstance(found, dict):
        raise CheckpointError(
            f"cannot read {path}: it holds no JSON object, which `fluvial run` writes"
        )

    return found


@contextmanager
def damage_reported(folder: Path) -> Iterator[None]:
    """Raise `CheckpointError` where what `read_run` found cannot be shown, since no run wrote
    it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{folder} is damaged: its JSON files are not as `fluvial run` wrote them "
            f"({type(error).__name__} at {place(error)}); restore them from a copy"
        ) from error
