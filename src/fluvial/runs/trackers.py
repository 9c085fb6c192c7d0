"""Trackers of experiments by `report_to`, through those of accelerate; the round is the step.

Measures go out as the lines of metrics.jsonl have them, without the sites' names; settings go out
without paths (`shareable`). `trackers.json` holds the id of each tracker's run and the newest round
that it has, so that a resumed run goes on in the same one and misses no round.
"""

import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from fluvial.errors import ConfigError
from fluvial.federation.meter import APART
from fluvial.runs.shareable import shareable

if TYPE_CHECKING:
    from fluvial.runs.checkpoint import RunFolder
    from fluvial.runs.config import RunConfig

logger = logging.getLogger(__name__)

Tracker = Literal[
    "tensorboard",
    "wandb",
    "mlflow",
    "comet_ml",
    "aim",
    "clearml",
    "dvclive",
    "swanlab",
    "trackio",
]
"""Trackers by accelerate's names."""
STATE = "trackers.json"
"""File with the stand of each tracker."""
PROJECT = "fluvial"
_OURS = ("tensorboard", "wandb", "mlflow")
"""Trackers of the extra `trackers`."""
_NAMES = {
    "loss": "train/loss",
    "seconds": "seconds",
    "bytes_up": "bytes/up",
    "bytes_down": "bytes/down",
    "sites": "sites/answered",
    "snr_db": "codec/snr_db",
    "codec_error": "codec/error",
    "rate": "codec/rate",
    "epsilon": "privacy/epsilon",
    "delta": "privacy/delta",
}
"""Names of values in a tracker, by their names in metrics.jsonl; held-out ones begin with
"heldout/", and others keep their name."""


@cache
def _library() -> Any:
    """Return accelerate's trackers; the module looks for their packages once, when imported."""
    from accelerate import tracking

    return tracking


def check_trackers(names: tuple[Tracker, ...]) -> None:
    """Raise `ConfigError` where the package of a tracker is not installed."""
    available = [str(kind.value) for kind in _library().get_available_trackers()] if names else []
    for name in names:
        if name not in available:
            package = "'fluvial[trackers]'" if name in _OURS else name.replace("_", "-")
            raise ConfigError(
                f"report_to: {name!r} needs a package that is not installed; run pip install "
                f"{package}, or remove it"
            )


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a round's record, by their names in a tracker."""
    values: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "round":
            values[_named(key)] = value

    for row in record.get("bytes", {}).values():
        for kind, size in row.items():
            name = f"bytes/{kind.replace(' ', '_')}"
            values[name] = values.get(name, 0) + size

    missing = {each["site"] for each in record["missing"] if each.get("task") not in APART}
    again = {each["site"] for each in record["asked_again"]}
    return values | {"sites/missing": len(missing), "sites/asked_again": len(again)}


def result_scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a result: held-out means of base and tuned model, and all bytes."""
    values = {
        f"{which}/{key}": value
        for which in ("base", "final")
        for key, value in (result["heldout"].get(which) or {}).items()
    }
    sizes = {f"bytes/total_{key}": result["bytes"][key] for key in ("up", "down", "setup")}
    ratios = {key: result[key] for key in ("round_ratio", "amortised_ratio") if result[key]}
    privacy = result.get("privacy")
    spent = {"privacy/epsilon": privacy["epsilon"]} if privacy else {}
    return values | sizes | ratios | spent | {"wall_s": result["wall_s"]}


def _named(key: str) -> str:
    if key.startswith("heldout_"):
        return f"heldout/{key.removeprefix('heldout_')}"
    return _NAMES.get(key, key)


class Trackers:
    """The trackers of one method's run. Use as a context manager, which closes them."""

    def __init__(
        self,
        names: tuple[Tracker, ...],
        folder: "RunFolder",
        root: Path,
        method: str,
        resolved: Mapping[str, Any],
    ) -> None:
        """Start or continue the trackers of the run in `folder`, which write below `root`."""
        self._folder = folder
        stored = folder.read_json(STATE) or {}
        self._stands: dict[str, dict[str, Any]] = {
            name: stored.get(name, {"round": 0, "id": secrets.token_hex(8)}) for name in names
        }
        self._open: dict[str, Any] = {}
        for name, stand in self._stands.items():
            self._open[name] = self._started(name, stand, root, method)
            if name not in stored:
                self._open[name].store_init_configuration(flat(shareable(resolved)))

        self._save()

    def catch_up(self) -> None:
        """Send the rounds that metrics.jsonl has and a tracker does not."""
        for record in self._folder.metrics():
            self.log(scalars(record), record["round"])

    def _started(self, name: str, stand: dict[str, Any], root: Path, method: str) -> Any:
        """Return a tracker of accelerate that has begun."""
        makers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
        try:
            if name in makers:
                return makers[name](stand, root, method)

            tracker = _library().LOGGER_TYPE_TO_CLASS[name](PROJECT, **_options(name, root))
            tracker.start()
            return tracker
        except Exception as error:
            raise ConfigError(
                f"report_to: {name!r} could not be started: {str(error).strip()[:200]}; set it up "
                "as its own documentation says, or remove it"
            ) from error

    def log(self, values: Mapping[str, float], round: int) -> None:
        """Send values to every tracker that does not have this round yet."""
        self._send(values, round, [n for n in self._open if self._stands[n]["round"] < round])
        for stand in self._stands.values():
            stand["round"] = max(stand["round"], round)

        self._save()

    def log_result(self, values: Mapping[str, float], rounds: int) -> None:
        """Send the values of the result, once."""
        self._send(values, rounds, [n for n in self._open if not self._stands[n].get("finished")])
        for stand in self._stands.values():
            stand["finished"] = True

        self._save()

    def _send(self, values: Mapping[str, float], step: int, names: list[str]) -> None:
        """Send values to some trackers; one that fails is reported and left out, because a run does
        not end for its sake."""
        for name in names:
            try:
                self._open[name].log(dict(values), step=step)
            except Exception as error:
                logger.warning(
                    "report_to: %s failed in round %d and gets no further values; metrics.jsonl "
                    "has them: %s",
                    *(name, step, str(error).strip()[:200]),
                )
                del self._open[name], self._stands[name]

    def _save(self) -> None:
        self._folder.write_json(STATE, self._stands)

    def __enter__(self) -> "Trackers":
        """Return the trackers."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all trackers."""
        for tracker in self._open.values():
            tracker.finish()


def _tensorboard(stand: dict[str, Any], root: Path, method: str) -> Any:
    """Return a tracker that writes to RUN/tensorboard/METHOD.

    Rounds after the newest one that counts are dropped: the process may have died behind it.
    """
    options = {"purge_step": stand["round"] + 1} if stand["round"] else {}
    tracker = _library().TensorBoardTracker(method, root / "tensorboard", **options)
    tracker.start()
    return tracker


def _wandb(stand: dict[str, Any], root: Path, method: str) -> Any:
    """Return a tracker that writes to RUN/wandb, offline unless WANDB_MODE says otherwise.

    Neither console, code nor the machine's description are recorded.
    """
    import wandb

    tracker = _library().WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        name=f"{root.resolve().name}-{method}",
        group=root.resolve().name,
        id=stand["id"],
        resume="allow",
        dir=str(root),
        mode=os.environ.get("WANDB_MODE", "offline"),
        settings=wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True
        ),
    )
    tracker.start()
    return tracker


def _mlflow(stand: dict[str, Any], root: Path, method: str) -> Any:
    """Return a tracker that writes to RUN/mlruns, or where MLFLOW_TRACKING_URI says.

    A store of files needs nothing beside mlflow itself, which asks for a word of consent.
    """
    import mlflow

    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    store = (root / "mlruns").resolve().as_uri()
    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", store))
    tracker = _library().MLflowTracker(
        PROJECT,
        run_id=stand.get("run_id"),
        run_name=f"{root.resolve().name}-{method}",
        tags={"mlflow.source.name": "fluvial"},  # in place of the path of the program
    )
    tracker.start()
    stand["run_id"] = tracker.tracker.info.run_id
    return tracker


def _options(name: str, root: Path) -> dict[str, Any]:
    """Return the options of another tracker, which writes into the run's folder where it can."""
    if name == "comet_ml":
        os.environ.setdefault("COMET_OFFLINE_DIRECTORY", str(root / "comet"))
        return {} if "COMET_API_KEY" in os.environ else {"online": False}
    return {"logging_dir": str(root / name)} if name in ("tensorboard", "aim") else {}


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | bool]:
    """Return settings by dotted name, as texts, numbers and booleans; lists are JSON texts."""
    values: dict[str, str | float | bool] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, str | int | float)
            values[f"{prefix}{key}"] = value if plain else json.dumps(value)

    return values


class _Event(Protocol):
    """An event of a run: its kind and its values."""

    @property
    def kind(self) -> str: ...
    @property
    def values(self) -> dict[str, Any]: ...


E = TypeVar("E", bound=_Event)


def tracked(
    events: Iterator[E], config: "RunConfig", folder: "RunFolder", root: Path
) -> Iterator[E]:
    """Yield the events of a run in `folder`, and send its rounds and its result to its trackers,
    which write below `root`."""
    if not config.report_to:
        yield from events
        return

    with Trackers(
        config.report_to, folder, root, config.method.name, config.resolved()
    ) as trackers:
        for number, event in enumerate(events):
            if (
                number == 0
            ):  # by now the lines are those of the checkpoint that the run goes on from
                trackers.catch_up()
            if event.kind == "round":
                trackers.log(scalars(event.values), event.values["round"])
            elif event.kind == "result":
                trackers.log_result(result_scalars(event.values), config.rounds)
            yield event
