"""Cells and contenders of the benchmarks of codecs, and one run of a contender.

A cell is a corpus with a model. A contender is a codec, a scheme or a pair of codecs for both
directions, at one rate. Runs are kept in a file of JSON lines under the hash of their resolved
configuration, so that an interrupted benchmark continues where it was and several processes share
the work.
"""

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.codecs.cache import SOURCE, Cache
from benchmarks.codecs.contenders import Bed, Contender, grid, resolve
from benchmarks.report import Row
from fluvial.codecs.base import Snapshot
from fluvial.data import DataConfig, SiteTexts
from fluvial.errors import ClientError, DivergenceError, GateError
from fluvial.exchange import collecting
from fluvial.exchange.ensemble import loaded
from fluvial.federation.meter import MEASURING
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.targets import LoraSettings
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig
from fluvial.runs.opening import check_settings
from fluvial.runs.run import Run

MEMORY = Path("/dev/shm")
"""Runs write their folders here where it exists: on a disk, half of a small round is waiting for
it."""


# -- one run -------------------------------------------------------------------------------------


@lru_cache(2)
def _pool(model: ModelConfig, lora: LoraSettings) -> ModelPool:
    return ModelPool(model, lora)


@lru_cache(6)
def _texts(data: str, pool: ModelPool, seed: int) -> SiteTexts:
    return SiteTexts(DataConfig.model_validate_json(data), pool.tokenizer, seed=seed)


def traced(config: RunConfig, target: float | None = None) -> Row:
    """Held-out loss and bytes of all sites, round by round; a run that was refused or stopped says
    why. With `target`, the run ends where its loss is that or less.

    `up` and `down` are of training, `setup` of everything else (snapshots, installing a codec): one
    figure before round 1, then one for each round. Bytes of measuring are left out.
    """
    since = time.perf_counter()
    busy = time.process_time()
    pool = _pool(config.model, config.lora)
    texts = _texts(config.data.model_dump_json(), pool, config.seed)

    with (
        tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder,
        RunFolder(Path(folder)) as place,
    ):
        try:
            check_settings(config, pool.layout, pool.blank(), texts)
            with shared_snapshots(config):
                run = Run(config, place, pool, texts)
                for event in run.events():  # the rounds, and not what a run does at its end
                    if event.kind == "round" and _ended(event.values, config.rounds, target):
                        break
        except (GateError, DivergenceError, ClientError) as error:
            return {"stopped": f"{type(error).__name__}: {error}"[-300:]}

        records = place.metrics()

    rounds = [_by_purpose(record["bytes"]) for record in records]
    return {
        "loss": [record["heldout_loss_pooled"] for record in records],
        "up": [row["up"] for row in rounds],
        "down": [row["down"] for row in rounds],
        "setup": [sum(run.setup_bytes.values()), *(row["setup"] for row in rounds)],
        "sites": len(run.fleet.sites),
        "choice": run.setup.get("choice"),
        "seconds": time.perf_counter() - since,
        "cpu_s": time.process_time() - busy,
    }


def _ended(values: Row, rounds: int, target: float | None) -> bool:
    """Return whether a round is the last that is needed."""
    reached = target is not None and float(values["heldout_loss_pooled"]) <= target
    return reached or int(values["round"]) == rounds


def _by_purpose(by_site: dict[str, dict[str, int]]) -> dict[str, int]:
    """Bytes of one round in metrics.jsonl, which has "up train" and the like for every site."""
    found = {"up": 0, "down": 0, "setup": 0}
    for row in by_site.values():
        for kind, size in row.items():
            way, task = kind.split(" ", 1)
            if task != MEASURING:
                found[way if task == "train" else "setup"] += size

    return found


_snapshots: dict[str, list[Snapshot]] = {}
_collect = collecting.collect


class shared_snapshots:  # noqa: N801 - used like a function
    """Inside, simulated sites train once for all codecs of one seed and learning rate.

    What they send depends on nothing else, and no site sends a byte for it. Real sites are asked as
    ever.
    """

    def __init__(self, config: RunConfig) -> None:
        table = config.resolved()
        self.key = json.dumps(
            {key: table[key] for key in ("seed", "model", "lora", "data", "train")}
        )

    def __enter__(self) -> None:
        """Take the place of `collecting.collect`."""

        def collect(settings: Any, fleet: Any, *rest: Any, **named: Any) -> list[Snapshot]:
            if set(fleet.transport.tasks) != {"snapshot"}:
                return _collect(settings, fleet, *rest, **named)

            key = self.key + settings.model_dump_json()
            if key not in _snapshots:
                while len(_snapshots) >= 8:
                    del _snapshots[next(iter(_snapshots))]
                _snapshots[key] = loaded(_collect(settings, fleet, *rest, **named))

            return _snapshots[key]

        collecting.collect = collect  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        collecting.collect = _collect


@dataclass(frozen=True)
class Job:
    """One contender in one cell: every learning rate on seed 0, then the best of them on the other
    seeds."""

    cell: str
    contender: Contender
    bed: Bed
    cache: Path | None
    deadline: float
    """Nothing is begun after this, in seconds of `time.time`."""
    fresh: bool = False
    """Take no result of another state of the package."""
    target: float | None = None
    """Loss at which a run ends; None for the whole run."""


@dataclass
class Found:
    """Measurements of a job."""

    cell: str
    contender: Contender
    tuning: dict[float, Row]
    """Runs with seed 0 by learning rate."""
    runs: list[Row]
    """Runs at the best learning rate by seed; fewer than asked where the time was over."""
    complete: bool

    @property
    def learning_rate(self) -> float | None:
        """The best on seed 0, by the loss of the last round."""
        ended = {rate: row["loss"][-1] for rate, row in self.tuning.items() if "stopped" not in row}
        return min(ended, key=lambda rate: ended[rate]) if ended else None


@lru_cache(1)
def _cache(path: Path | None) -> Cache:
    return Cache(path)


def compete(job: Job) -> Found:
    """Do a job, or what of it fits before its deadline."""
    found = Found(job.cell, job.contender, {}, [], complete=False)
    for rate in grid(job.cell, job.bed):
        row = _one(job, rate, 0)
        if row is None:
            return found
        found.tuning[rate] = row

    best = found.learning_rate
    if best is None:
        found.complete = True
        return found

    for seed in range(job.bed.seeds):
        row = _one(job, best, seed)
        if row is None:
            return found
        found.runs.append(row)

    found.complete = True
    return found


def _one(job: Job, learning_rate: float, seed: int) -> Row | None:
    config = resolve(job.cell, job.contender, job.bed, learning_rate=learning_rate, seed=seed)
    cache = _cache(job.cache)
    whole = Cache.key(config)
    key = whole if job.target is None else f"{whole}, until {job.target!r}"
    for each in (whole, key):
        known = cache.find(each, fresh=job.fresh)
        if known is not None:
            return known

    if time.time() >= job.deadline:
        return None

    described = {
        "cell": job.cell,
        "contender": job.contender.name,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    return cache.add(key, {**described, **traced(config, job.target)})


def settings(bed: Bed) -> dict[str, Any]:
    """Return the settings for the report."""
    return {**asdict(bed), "sites": 8, "max_length": 128, "source": SOURCE, "cores": os.cpu_count()}
