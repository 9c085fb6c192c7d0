"""Read the folder of a finished or unfinished run as plain JSON values, without torch."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluvial.errors import CheckpointError
from fluvial.federation.boundary import place
from fluvial.report import JsonObject


def read_run(folder: Path) -> JsonObject:
    """Return the content of a run's folder as plain JSON values.

    The keys are folder, config, refused, metrics, result, and compare with the baselines by name.
    Raises `CheckpointError` if the folder holds no run.
    """
    run = {
        "folder": str(folder),
        "config": _read_json(folder / "config.json"),
        "refused": _read_json(folder / "refused.json"),
        **_read_results(folder),
    }
    if run["config"] is None and not run["metrics"] and run["result"] is None:
        raise CheckpointError(
            f"{folder} holds no run: it has no config.json; give the folder that `fluvial run` "
            "wrote, by default runs/NAME"
        )

    compared = sorted(path for path in folder.glob("compare/*") if path.is_dir())
    return {
        **run,
        "config": run["config"] or {},
        "compare": {path.name: _read_results(path) for path in compared},
    }


def _read_results(folder: Path) -> JsonObject:
    """Return the metrics and the result of one method's run."""
    path = folder / "metrics.jsonl"
    records = []
    try:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break  # a run that is being written, or was killed, may end in half a line

        if not isinstance(record, dict):
            break

        records.append(record)

    return {"metrics": records, "result": _read_json(folder / "result.json")}


def _read_json(path: Path) -> JsonObject | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}; it should be JSON that `fluvial run` wrote"
        ) from error

    if not isinstance(content, dict):
        raise CheckpointError(
            f"cannot read {path}: it holds no JSON object, which `fluvial run` writes"
        )

    return content


@contextmanager
def damage_reported(folder: Path) -> Iterator[None]:
    """Raise `CheckpointError` where the values of a folder are not those that a run writes."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{folder} is damaged: its JSON files are not as `fluvial run` wrote them "
            f"({type(error).__name__} at {place(error)}); restore them from a copy"
        ) from error
