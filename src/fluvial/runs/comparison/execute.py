"""The runs of a comparison, one after the other, so that times mean something: each in a folder of
its own, and those that are finished not again."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from fluvial import caller
from fluvial.errors import CheckpointError, ConfigError, FluvialError
from fluvial.runs.beginning import begun
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.comparison.child import Message, RunFailedError, in_own_process
from fluvial.runs.comparison.contenders import Comparison, Contender, together
from fluvial.runs.comparison.files import CHECK, run_folder
from fluvial.runs.config import RunConfig
from fluvial.runs.plan import plan
from fluvial.storage.files import private, write_atomically
from fluvial.storage.run_files import COMPARE, read_file, read_result

logger = logging.getLogger(__name__)

Standing = Literal["new", "begun", "finished"]
"""How far a run has come in its folder."""


class Launch(Protocol):
    """Runs a configuration in a folder."""

    def __call__(
        self, config: RunConfig, folder: Path, *, resume: bool, lent: Mapping[str, Path]
    ) -> Iterator[Message]:
        """Yield the events of a run; raises `RunFailedError`. `lent` has folders of finished
        baselines that it shares with other runs, by name."""
        ...


@dataclass(frozen=True)
class Step:
    """A step of a comparison, as those who watch it see it."""

    contender: str
    seed: int
    kind: Literal["finished", "failed", "message"]
    """Finished now or earlier, failed, or a message of the run."""
    message: Message | None = None
    reason: str = ""
    """Why the run failed."""


def execute_comparison(
    comparison: Comparison, out: Path, *, launch: Launch = in_own_process
) -> Iterator[Step]:
    """Check everything, then make all runs that are not finished; yield what happens.

    A run that fails does not stop the others. Raises `ConfigError` with every fault of every
    contender, and `CheckpointError` for folders of other runs, before the first run begins.
    """
    with private(), RunFolder(out) as folder:
        if folder.started:
            raise CheckpointError(
                f"{out} holds a run; give a folder for the comparison with {caller.argument('out')}"
            )

        standings = _standings(comparison, out)
        _check(comparison, standings, out)

        for seed in comparison.seeds:
            for contender in comparison.contenders:
                place = contender.name, seed
                if standings[place] == "finished":
                    yield Step(*place, "finished")
                    continue

                config = contender.configs[seed]
                try:
                    for message in launch(
                        config,
                        run_folder(out, *place),
                        resume=standings[place] == "begun",
                        lent=_shared(comparison, config, out),
                    ):
                        yield Step(*place, "message", message)
                except RunFailedError as error:
                    yield Step(*place, "failed", reason=str(error))
                else:
                    yield Step(*place, "finished")


def _shared(comparison: Comparison, config: RunConfig, out: Path) -> dict[str, Path]:
    """Return the folders of equal baselines that runs of the comparison have finished, by name."""
    found = dict[str, Path]()
    for other in comparison.contenders:
        theirs = other.configs[config.seed]
        for name in set(config.compare) & set(theirs.compare):
            folder = run_folder(out, other.name, config.seed) / COMPARE / name
            same = config.baseline(name).resolved() == theirs.baseline(name).resolved()
            if same and read_result(folder) is not None:
                found.setdefault(name, folder)
    return found


def _standings(comparison: Comparison, out: Path) -> dict[tuple[str, int], Standing]:
    """Return how far each run has come; raises `CheckpointError` with all runs of another
    configuration or with damaged files."""
    standings = dict[tuple[str, int], Standing]()

    def look(contender: Contender, seed: int) -> None:
        folder = run_folder(out, contender.name, seed)
        standings[contender.name, seed] = _standing(folder, contender.configs[seed])

    try:
        together(
            partial(look, contender, seed)
            for contender in comparison.contenders
            for seed in comparison.seeds
        )
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return standings


def _standing(path: Path, config: RunConfig) -> Standing:
    if not path.exists():
        return "new"

    with RunFolder(path) as folder:
        if not folder.started:
            return "new"
        begun(folder, config, resume=True)
        if read_result(path) is None:
            return "begun"
        folder.verify_finished()
        return "finished"


def _check(comparison: Comparison, standings: dict[tuple[str, int], Standing], out: Path) -> None:
    """Check every contender with its model and data, as `fluvial check` does, and keep what was
    predicted.

    Data are drawn by the seed, so each seed is checked too, with the first contender.
    """
    checks: list[Callable[[], object]] = []
    for number, contender in enumerate(comparison.contenders):
        for place, seed in enumerate(comparison.seeds):
            done = standings[contender.name, seed] == "finished"
            needed = place == 0 and read_file(out / contender.name / CHECK) is None
            if (needed or not done) and (number == 0 or place == 0):
                checks.append(partial(_check_one, contender, seed, out, keep=place == 0))

    together(checks)


def _check_one(contender: Contender, seed: int, out: Path, *, keep: bool) -> None:
    logger.info("checking contender %s, seed %d", contender.name, seed)
    try:
        planned: dict[str, Any] = plan(contender.configs[seed])
    except FluvialError as error:
        lines = [f"contender {contender.name!r}: {line}" for line in str(error).splitlines()]
        raise ConfigError("\n".join(lines)) from error

    if keep:
        text = json.dumps(planned, indent=2, allow_nan=False) + "\n"
        write_atomically(out / contender.name / CHECK, text.encode())
