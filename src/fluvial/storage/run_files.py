"""Names of the files in a run's folder, and their reading as plain JSON values, without torch."""

import fcntl
import json
from pathlib import Path
from typing import Any

from fluvial import caller
from fluvial.errors import CheckpointError
from fluvial.formatting import safe_text
from fluvial.storage.files import digest_of_file

CONFIG = "config.json"
"""The resolved configuration, and a description of the run."""
METRICS = "metrics.jsonl"
"""One JSON object for each round."""
RESULT = "result.json"
"""The result, written last; a folder that has it is finished."""
REFUSED = "refused.json"
"""The gate's reasons to refuse the codec, where it did."""
SETUP = "setup.json"
"""The findings of the set-up, such as the gate's verdict and plans; it goes when the result, which
has them too, is there."""
BUDGET = "budget.json"
"""The choice within the budget and its trials, so that a run that is resumed keeps it."""
PAGE = "report.html"
"""The page of the run, for people."""
DIGESTS = "digests.json"
"""SHA-256 of the files of a finished run."""
CHECKPOINTS = "checkpoints"
"""Folder of the server's state after a round."""
SITES = "sites"
"""Folder of what the sites keep."""
ENSEMBLE = "tgap"
"""Folder of the updates that TGAP has collected; it goes when the codec is in a checkpoint."""
COMPARED = "compare.json"
"""Figures of a comparison, in its folder."""
COMPARE = "compare"
"""Folder of the baselines, each a folder of a run under its name."""
EXPORTS = ("adapter", "model")
"""Folders of the final weights, as PEFT or transformers writes them."""
WRITTEN = (METRICS, REFUSED, SETUP, PAGE, DIGESTS, SITES, ENSEMBLE, COMPARE, *EXPORTS)
"""Names that a run replaces in its folder, once its configuration is written."""
LOCK = ".lock"
"""Name of the file that the process of a run locks."""
INPUTS = "inputs"
"""Key of the description: digests of the files that a run reads, by the setting."""
DESCRIPTION = "run"
"""Key of the configuration's file that holds the description of the run."""
DESCRIBED = ("label", "pooled", "baseline", "sends_updates")
"""Keys of a description, which are those of the result as well."""
JsonObject = dict[str, Any]
"""JSON object in a file of a run, whose keys and types are not checked yet."""


def anew() -> str:
    """Return the remedy for a damaged file of a run."""
    return f"restore it from a copy, or {caller.another_folder()}"


def begun(folder: Path) -> bool:
    """Return True where a run was begun in `folder`."""
    return any((folder / name).exists() for name in (CONFIG, RESULT, CHECKPOINTS))


def in_use(folder: Path) -> bool:
    """Return True while a process holds the run in `folder`."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def check_free(folder: Path, *, resume: bool) -> None:
    """Raise `CheckpointError` if `folder` holds a run and `resume` is False, if it holds none and
    `resume` is True, if a run would replace what others wrote there, or if its path is no text."""
    if any("\ud800" <= character <= "\udfff" for character in str(folder.absolute())):
        raise CheckpointError(
            f"{safe_text(str(folder))}: its path is no UTF-8, so that no weights can be written "
            f"there; {caller.another_folder()}"
        )
    if begun(folder):
        if resume:
            return
        raise CheckpointError(
            f"{folder} already holds a run; use {caller.resume()} to go on with it, "
            f"{caller.argument('out')} for another folder, or remove it"
        )

    if resume:
        raise CheckpointError(
            f"{folder} holds no run to resume; start it without {caller.resume()}"
        )
    others = [name for name in WRITTEN if (folder / name).exists()]
    if others:
        raise CheckpointError(
            f"{folder} holds no run, but {', '.join(others)}, which a run would replace; "
            f"move it, or {caller.another_folder()}"
        )


def read_file(path: Path) -> JsonObject | None:
    """Return the object in a JSON file of a run, None where there is no such file.

    Raises `CheckpointError` if it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; {anew()}") from error

    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object; {anew()}")

    return content


def check_written(path: Path, digest: Any) -> None:
    """Raise `CheckpointError` unless a file of a run has the SHA-256 that the run wrote down."""
    fault = _fault(path, digest)
    if fault is not None:
        raise CheckpointError(f"{path} {fault}; {anew()}")


def _fault(path: Path, digest: Any) -> str | None:
    """Return how a file differs from the one with this SHA-256, None where it does not."""
    if not path.exists():
        return "is missing"
    try:
        written = digest_of_file(path) == digest
    except OSError as error:
        return f"is damaged: it cannot be read: {error.strerror}"
    return None if written else "is damaged: its bytes are not those that were written"


def damage(folder: Path, name: str = "") -> list[str]:
    """Return one sentence for each file that tables and pages of a finished run are made of and
    that is not as the run wrote it; nothing for a run that has not finished.

    Files are named by their place in the folder, and this by `name`, if any.
    """
    within = Path(name)
    try:
        listed = read_file(folder / DIGESTS) or {}
    except CheckpointError as error:
        told = str(error).replace(str(folder / DIGESTS), str(within / DIGESTS))
        return [f"{told}; until then nothing shows whether the run's other files are damaged"]

    follows = {
        CONFIG: "the settings that are shown may be others than the run's",
        METRICS: "what is shown of its rounds may be missing or wrong",
        RESULT: "its figures may be wrong",
    }
    lines = []
    for file, what in follows.items():
        fault = _fault(folder / file, listed[file]) if file in listed else None
        if file == RESULT and fault == "is missing":
            lines.append(
                f"{within / file} is missing, so the finished run is shown as one that has not "
                f"finished; restore it from a copy, or write it anew with {caller.resume()}"
            )
        elif fault is not None:
            lines.append(f"{within / file} {fault}; {what}; restore it from a copy")

    return lines


def check_weights_written(folder: Path) -> None:
    """Raise `CheckpointError` where a weight file in RUN/adapter or RUN/model is not the one that
    the finished run wrote; a folder of another place is not known."""
    for name, digest in (read_file(folder.parent / DIGESTS) or {}).items():
        if Path(name).parent.name == folder.name and name.endswith(".safetensors"):
            check_written(folder.parent / name, digest)


def check_run_written(folder: Path) -> None:
    """Raise `CheckpointError` for files of a finished run that are not as the run wrote them; a
    folder of another place is not known."""
    if not (folder / DIGESTS).exists():
        return
    lines = damage(folder, str(folder))
    if lines:
        made = [name for name in EXPORTS if (folder / name).is_dir()]
        remedy = f"To use the weights alone, copy {folder / made[0]} to another folder. "
        raise CheckpointError(f"{'. '.join(lines)}. {remedy if made else ''}".rstrip())


def read_result(folder: Path) -> JsonObject | None:
    """Return the result of the run in `folder`, None where it has not finished.

    Raises `CheckpointError` if the file is damaged, or was written by an older version, whose
    results do not describe the run.
    """
    result = read_file(folder / RESULT)
    if result is None:
        return None

    missing = [key for key in DESCRIBED if key not in result]
    if missing and "fluvial" in result:
        raise CheckpointError(
            f"{folder / RESULT} was written by an older version of Fluvial, whose results have no "
            f"{missing[0]!r}; read it with that version, or {caller.another_folder()}"
        )

    return result


def read_metrics(folder: Path) -> list[JsonObject]:
    """Return the lines of the rounds, up to one that is cut off or holds no JSON object.

    A run that is being written, or was killed, may end in half a line. Raises `CheckpointError`
    if the file cannot be read.
    """
    path = folder / METRICS
    try:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {anew()}") from error

    records: list[JsonObject] = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break

        if not isinstance(record, dict):
            break

        records.append(record)

    return records


def read_run(folder: Path) -> JsonObject:
    """Return the content of a run's folder as plain JSON values.

    The keys are folder, config, description (None where the configuration's file has none),
    refused, setup (None where the result has it), damaged (see `damage`; with the baselines),
    metrics, result, and compare with the baselines by name. Raises `CheckpointError` if the folder
    holds no run, or a file that cannot be read.
    """
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the folder of a run, such as runs/NAME")

    config = read_file(folder / CONFIG)
    run = _outcome(folder)

    if not run["metrics"] and run["result"] is None:
        why = f"it has no {CONFIG}" if config is None else f"its {CONFIG} is a model's"
        if config is None or "model_type" in config:
            raise CheckpointError(
                f"{folder} holds no run: {why}; give the folder of a run, by default runs/NAME"
            )

    config = config or {}
    description = config.pop(DESCRIPTION, None)
    compared = sorted(path for path in folder.glob(f"{COMPARE}/*") if path.is_dir())

    return {
        "folder": str(folder),
        "config": config,
        "description": description,
        "refused": read_file(folder / REFUSED),
        "setup": read_file(folder / SETUP) if run["result"] is None else None,
        "damaged": [
            line
            for path in (folder, *compared)
            for line in damage(path, "" if path == folder else f"{COMPARE}/{path.name}")
        ],
        **run,
        "compare": {path.name: _outcome(path) for path in compared},
    }


def with_description(run: JsonObject) -> JsonObject:
    """Return the settings of a run that `read_run` has read, with its description."""
    return {**run["config"], DESCRIPTION: run["description"]}


def setup_of(run: JsonObject) -> JsonObject:
    """Return the findings of the set-up of a run that `read_run` has read, finished or not."""
    return dict((run["result"] or run).get("setup") or {})


def _outcome(folder: Path) -> JsonObject:
    """Return the metrics and the result of one method's run."""
    return {"metrics": read_metrics(folder), "result": read_result(folder)}
