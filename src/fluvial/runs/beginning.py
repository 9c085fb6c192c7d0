"""The beginning of a run in its folder: whether it may begin or go on there, and with which
choice."""

from typing import Any

from fluvial import caller
from fluvial.errors import CheckpointError
from fluvial.runs.budget.settled import Open, opened, settle
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, difference
from fluvial.storage import paths
from fluvial.storage.inputs import changed, digests
from fluvial.storage.run_files import BUDGET, CONFIG, DESCRIPTION, INPUTS, anew, check_free


def begun(
    folder: RunFolder, config: RunConfig, *, resume: bool
) -> tuple[RunConfig, dict[str, Any] | None]:
    """Return the configuration of a run with the choice that it has made within its budget, and
    that choice; None where none was made yet.

    Raises `CheckpointError` if `folder` holds a run and `resume` is not set, or holds another run,
    and `ConfigError` for a budget that cannot choose.
    """
    choice = folder.read_json(BUDGET) if folder.started else None
    chooses = config.budget is not None and Open.of(config)
    if folder.started and resume and chooses and choice is None:
        raise CheckpointError(
            f"{folder.path / BUDGET} is missing, and the run has a budget; {anew()}"
        )
    if choice is not None:
        config = settle(config, choice, str(folder.path / BUDGET))
    elif config.budget is not None:
        opened(config)  # which refuses what needs no model to be known

    _check_folder(folder, config, resume=resume)
    return config, choice


def _check_folder(folder: RunFolder, config: RunConfig, *, resume: bool) -> None:
    check_free(folder.path, resume=resume)
    if not folder.started:
        return

    stored = folder.read_json(CONFIG)
    if stored is None:
        raise CheckpointError(
            f"{folder.path / CONFIG} is missing, and the folder holds a run; {anew()}"
        )

    stored.pop("fluvial", None)
    description = stored.pop(DESCRIPTION, None)
    # How many sites work at a time, the page, trackers and traces change nothing in the result. And
    # as long as the method itself has not got through its set-up, another method or codec only
    # keeps the baselines, which do not depend on them.
    free = (
        "fleet.workers",
        "page",
        "report_to",
        "profile",
        *(() if folder.newest() else ("method.", "codec.")),
    )
    ours = config.resolved()
    other = [key for key in difference(ours, stored) if not key.startswith(free)]
    moved = {".".join(place): paths.value_at(stored, place) for place in paths.places(ours)}
    if other and all(isinstance(moved.get(key), str) for key in other):
        places = ", ".join(f"{key} was {moved[key]!r}" for key in other[:5])
        raise CheckpointError(
            f"{folder.path} was started with files at other places ({places}), and a run goes on "
            "with the files that it began with; put them back there, or a link to where they are "
            f"now, or {caller.another_folder()}"
        )

    if other:
        raise CheckpointError(
            f"{folder.path} was started with another configuration (differs in "
            f"{', '.join(other[:5])}); "
            f"resume with the same one, or {caller.another_folder()}"
        )

    inputs = description.get(INPUTS) if isinstance(description, dict) else None
    if others := changed(inputs, digests(ours)):
        names = "names" if len(others) == 1 else "name"
        raise CheckpointError(
            f"{folder.path} was started with other files than those that {', '.join(others[:5])} "
            f"{names} now, and a run goes on with the content that it began with; put the files "
            f"back, or {caller.another_folder()}"
        )
