"""The configurations that a site has agreed to, one for each run, in files that are known by their
digest.

A site trains by such a file and counts its epsilon by it, so a damaged one is refused.
"""

from pathlib import Path

from fluvial.errors import CheckpointError, FluvialError
from fluvial.runs.config import RunConfig, parse
from fluvial.storage.files import sealed, unsealed, write_atomically
from fluvial.wire.payload import Value

NAME = "config.json"
"""Name of the file in the folder of a run."""


def keep_config(folder: Path, table: Value) -> None:
    """Write the configuration of the run that is kept in `folder`, as the server sent it."""
    write_atomically(folder / NAME, sealed("config", table))


def config_of(folder: Path) -> RunConfig | None:
    """Return the configuration of the run that is kept in `folder`, None before its hello.

    Raises `CheckpointError` where its file is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None

    try:
        return parse(unsealed("config", path.read_bytes()), str(path))
    except (ValueError, TypeError, FluvialError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}; restore {folder} from a copy. Without it this site does "
            "not know what the run has released"
        ) from error


def other_runs(folder: Path) -> list[RunConfig]:
    """Return the configurations of all runs of the site except the one that is kept in `folder`."""
    others = sorted(path.parent for path in folder.parent.glob(f"*/{NAME}"))
    found = [config_of(other) for other in others if other != folder]
    return [config for config in found if config is not None]
