"""Configurations of the runs that a site takes part in, in files sealed by a digest.

A site trains and counts epsilon by such a file, so a damaged one is refused.
"""

from pathlib import Path

from fluvial.errors import CheckpointError, FluvialError
from fluvial.runs.config import RunConfig, parse
from fluvial.storage.files import sealed, unsealed, write_atomically
from fluvial.wire.payload import Value

NAME = "config.json"
"""Name of the configuration's file in the folder of a run."""


def write_config(folder: Path, config: Value) -> None:
    """Write the configuration of the run in `folder`, as the server sent it."""
    write_atomically(folder / NAME, sealed("config", config))


def read_config(folder: Path) -> RunConfig | None:
    """Return the configuration of the run in `folder`, None before the site has joined the run.

    Raises `CheckpointError` if the file is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None

    try:
        return parse(unsealed("config", path.read_bytes()), str(path))
    except (ValueError, TypeError, FluvialError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}; restore {folder} from a copy. Without it this site "
            "cannot count what the run has released"
        ) from error


def other_runs(folder: Path) -> list[RunConfig]:
    """Return the configurations of all runs of the site except the one in `folder`."""
    folders = sorted(path.parent for path in folder.parent.glob(f"*/{NAME}"))
    configs = [read_config(other) for other in folders if other != folder]
    return [config for config in configs if config is not None]
