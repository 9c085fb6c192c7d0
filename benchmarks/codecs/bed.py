"""What the benchmarks of codecs share: cells, contenders, one run of a contender, and the file that
remembers runs.

A cell is a corpus with a model. A contender is a codec, a scheme or a pair of codecs for both ways,
at one rate. Runs are kept in a file of JSON lines under the hash of their resolved configuration,
so that an interrupted benchmark goes on where it was and several processes share the work.
"""

import fcntl
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import fluvial
from benchmarks.cgfedllm.bed import CORPORA, Table
from benchmarks.report import Row
from fluvial.codecs import must_learn
from fluvial.codecs.base import Snapshot
from fluvial.data import DataConfig, SiteTexts
from fluvial.errors import ClientError, ConfigError, DivergenceError, GateError
from fluvial.exchange import tgap
from fluvial.federation.meter import Metered
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.targets import LoraSettings
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.run import MEASURING, Run, check_settings

SMALL = ("fairytales", "shakespeare", "mini_ops", "babi")
"""Corpora on stories260k, d 64."""
LARGE = tuple(f"{name}, babyllama105" for name in SMALL)
"""The same on babyllama105, d 128."""
CELLS = (*SMALL, *LARGE, "stdlib")
"""The last is the embedded model, d 128, with Python's standard library."""
MEMORY = Path("/dev/shm")
"""Runs write their folders here where it exists: on a disk, half of a small round is waiting for
it."""

Role = Literal["reference", "ours", "published", "assembled"]


@dataclass(frozen=True)
class Contender:
    """What competes, as tables of a configuration; everything else is the same for all."""

    name: str
    role: Role
    """"published" is a scheme as its authors ship it, both ways; "assembled" is another's codec in
    our FedAvg, with error feedback where it is biased, which is stronger than it was published."""
    codec: Table | None = None
    downlink: Table | None = None
    method: Table = field(default_factory=lambda: {"name": "fedavg"})
    tier: int = 1
    """Contenders of tier 1 come first."""
    rate: float | None = None
    """The rate under which claims compare it."""


def _coded(
    codec: str,
    rate: float,
    *,
    role: Role,
    tier: int = 1,
    feedback: bool = True,
    down: Table | None = None,
    **more: Any,
) -> Contender:
    """A codec with a rate in FedAvg."""
    table = {"name": codec, "rate": rate, **more} | ({"error_feedback": True} if feedback else {})
    both = "" if down is None else f", down {down['name']} 1/{down['rate']:g}"
    name = f"{codec} 1/{rate:g}{' + EF' if feedback else ''}{both}"
    return Contender(name, role, table, down, tier=tier, rate=rate)


def _judged(codec: str, rate: float) -> Contender:
    """A learned codec that the gate may refuse: measured all the same."""
    method = {"name": "cgfedllm", "gate": "report"}
    table = {"name": codec, "rate": rate, "error_feedback": True}

    return Contender(
        f"{codec} 1/{rate:g} + EF", "assembled", table, method=method, tier=2, rate=rate
    )


DOWN: Table = {"name": "trellis", "rate": 32}
"""The downlink of contenders that are ours."""
ASSEMBLED_DOWN: Table = {"name": "hadamard", "rate": 32}
"""And of those that are assembled."""
REFERENCE = "uncompressed"
CONTENDERS = (
    Contender(REFERENCE, "reference", {"name": "identity"}),
    _coded("trellis", 64, role="ours"),
    _coded("klt", 64, role="ours"),
    _coded("hadamard", 64, role="assembled"),
    _coded("klt_trellis", 64, role="ours"),
    _coded("eden", 64, role="assembled", feedback=False),
    _coded("dct_top_k", 64, role="assembled"),
    _coded("top_k", 64, role="assembled", value_bits="best"),
    _coded("powersgd", 64, role="assembled"),
    Contender("auto", "ours", {"name": "auto"}, rate=64),
    _coded("trellis", 128, role="ours"),
    _coded("klt", 128, role="ours"),
    _coded("klt_trellis", 128, role="ours"),
    _coded("hadamard", 128, role="assembled"),
    Contender("nf4, both ways", "published", {"name": "nf4"}, {"name": "nf4"}),
    Contender("int8, both ways", "published", {"name": "int8"}, {"name": "int8"}),
    Contender("flasc", "published", method={"name": "flasc"}),
    Contender("ecolora", "published", method={"name": "ecolora"}),
    Contender(
        "powersgd 1/64 + EF, both ways",
        "published",
        {"name": "powersgd", "rate": 64, "error_feedback": True},
        {"name": "powersgd", "rate": 64},
    ),
    _coded("trellis", 64, role="ours", down=DOWN),
    _coded("trellis", 64, role="ours", down={"name": "trellis", "rate": 64}),
    _coded("hadamard", 64, role="assembled", down=ASSEMBLED_DOWN),
    _coded("trellis", 32, role="ours", tier=2),
    _coded("trellis", 16, role="ours", tier=2),
    _coded("hadamard", 32, role="assembled", tier=2),
    _coded("trellis", 256, role="ours", tier=2),
    _coded("klt_trellis", 256, role="ours", tier=2),
    _coded("hadamard", 256, role="assembled", tier=2),
    Contender("auto, down trellis 1/32", "ours", {"name": "auto"}, DOWN, tier=2, rate=64),
    _coded("trellis", 128, role="ours", down=DOWN, tier=2),
    _coded("hadamard", 128, role="assembled", down=ASSEMBLED_DOWN, tier=2),
    _coded("eden", 128, role="assembled", feedback=False, tier=2),
    _coded("klt", 32, role="ours", tier=2),
    _coded("klt", 16, role="ours", tier=2),
    _judged("vq", 64),
    _judged("cnn", 64),
)
"""In the order of their importance."""


@dataclass(frozen=True)
class Bed:
    """How much is run of every contender."""

    rounds: int
    steps: int
    batch: int
    tgap_rounds: int
    heldout: int
    """Held-out sequences of each site."""
    seeds: int
    learning_rates: tuple[float, ...]
    """The grid, the same for every contender (see `grid`); the best of seed 0 is used for all
    seeds."""
    target: int
    """The round whose uncompressed loss is the target."""


def grid(cell: str, bed: Bed) -> tuple[float, ...]:
    """The learning rates of one cell; stories260k learns best at about twice the rate of the other
    models."""
    times = 2 if CORPORA[cell].model == "stories260k" else 1
    return tuple(times * rate for rate in bed.learning_rates)


def resolve(
    cell: str, contender: Contender, bed: Bed, *, learning_rate: float, seed: int
) -> RunConfig:
    """The configuration of one run; raises `ConfigError` where the package lacks what the contender
    needs."""
    tables = CORPORA[cell].tables()
    table: Table = {
        **tables,
        "data": tables["data"] | {"max_length": 128, "max_heldout": bed.heldout},
        "seed": seed,
        "rounds": bed.rounds,
        "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
        "train": {
            "learning_rate": learning_rate,
            "per_device_train_batch_size": bed.batch,
            "max_steps": bed.steps,
        },
        "method": contender.method,
        "evaluate": {"every": 1, "sample_tokens": 1},
        "fleet": {"workers": 1},
    }
    table |= {"codec": contender.codec} if contender.codec is not None else {}
    table |= {"downlink": contender.downlink} if contender.downlink is not None else {}
    where = f"{cell}, {contender.name}"
    config = parse(table, where)

    if must_learn(config.coding):
        table["method"] = {
            **contender.method,
            "tgap": {"source": "public", "rounds": bed.tgap_rounds},
        }
        config = parse(table, where)

    return config


def possible(
    contenders: Sequence[Contender], skip: Callable[[str], None], bed: Bed
) -> list[Contender]:
    """The contenders that the package can be configured for; each of the others is told to
    `skip`."""
    found = []
    for contender in contenders:
        try:
            resolve("stdlib", contender, bed, learning_rate=bed.learning_rates[0], seed=0)
        except ConfigError as error:
            skip(str(error).splitlines()[0].split(";")[0])
        else:
            found.append(contender)

    return found


# -- one run -------------------------------------------------------------------------------------


@lru_cache(2)
def _bench(model: ModelConfig, lora: LoraSettings) -> ModelPool:
    return ModelPool(model, lora)


@lru_cache(6)
def _texts(data: str, bench: ModelPool, seed: int) -> SiteTexts:
    return SiteTexts(DataConfig.model_validate_json(data), bench.tokenizer, seed=seed)


def traced(config: RunConfig) -> Row:
    """Held-out loss and bytes of all sites, round by round; a run that was refused or stopped says
    why.

    `up` and `down` are of training, `setup` of everything else (snapshots, installing a codec): one
    figure before round 1, then one for each round. Bytes of measuring are left out.
    """
    since = time.perf_counter()
    busy = time.process_time()
    bench = _bench(config.model, config.lora)
    texts = _texts(config.data.model_dump_json(), bench, config.seed)

    with (
        tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder,
        RunFolder(Path(folder)) as place,
    ):
        try:
            check_settings(config, bench.layout, bench.blank(), texts)
            with shared_snapshots(config):
                run = Run(config, place, bench, texts)
                for event in run.events():  # the rounds, and not what a run does at its end
                    if event.kind == "round" and event.values["round"] == config.rounds:
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
_collect = tgap.collect


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
        """Take the place of `tgap.collect`."""

        def collect(settings: Any, fleet: Any, *rest: Any, **named: Any) -> list[Snapshot]:
            if isinstance(fleet, Metered):
                return _collect(settings, fleet, *rest, **named)

            key = self.key + settings.model_dump_json()
            if key not in _snapshots:
                while len(_snapshots) >= 8:
                    del _snapshots[next(iter(_snapshots))]
                _snapshots[key] = _collect(settings, fleet, *rest, **named)

            return _snapshots[key]

        tgap.collect = collect  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        tgap.collect = _collect


# -- what was run before -------------------------------------------------------------------------


def _source_digest() -> str:
    root = Path(fluvial.__file__).parent
    state = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        state.update(f"{path.relative_to(root)};".encode() + path.read_bytes())
    return state.hexdigest()[:8]


SOURCE = _source_digest()
"""Eight digits that change with any line of the package's code, as it was when this process
began."""


class Cache:
    """Results by the hash of what was asked, in a file of JSON lines that several processes append
    to."""

    def __init__(self, path: Path | None) -> None:
        """`path=None` remembers in memory."""
        self.path = path
        self.rows: dict[str, Row] = {}
        self._read = 0

    @staticmethod
    def key(config: RunConfig) -> str:
        """Of a resolved configuration; how many sites work at a time does not count."""
        table = config.resolved()
        del table["fleet"]["workers"]
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]

    def find(self, key: str, *, fresh: bool = False) -> Row | None:
        """The newest result, or None; with `fresh` only one of this very state of the package."""
        self._catch_up()
        row = self.rows.get(key)
        return None if row is None or (fresh and row["source"] != SOURCE) else row

    def add(self, key: str, row: Row) -> Row:
        """Write a result down, with the state of the package it comes from; returns that."""
        row = {"key": key, "source": SOURCE, **row}
        self.rows[key] = row

        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(row) + "\n")

        return row

    def _catch_up(self) -> None:
        """Read the lines that others have added."""
        if self.path is None or not self.path.exists():
            return

        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                row = json.loads(line)
                self.rows[row["key"]] = row


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


@dataclass
class Found:
    """What a job measured."""

    cell: str
    contender: Contender
    tuning: dict[float, Row]
    """By learning rate, seed 0."""
    runs: list[Row]
    """By seed, at the best learning rate; fewer than asked where the time was over."""
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
    key = Cache.key(config)
    known = cache.find(key, fresh=job.fresh)

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
    return cache.add(key, {**described, **traced(config)})


# -- figures -------------------------------------------------------------------------------------


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean, by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def first_round(losses: Sequence[float], target: float) -> int | None:
    """The first round, from 1, whose loss is at most `target`."""
    return next((number for number, loss in enumerate(losses, start=1) if loss <= target), None)


def bytes_until(run: Row, round: int) -> dict[str, float]:
    """Bytes of one site, on average, up to and with `round`: `up`, `down`, `setup`, and `all` of
    them."""
    sites = run["sites"]
    parts = {way: sum(run[way][:round]) / sites for way in ("up", "down")}
    parts["setup"] = sum(run["setup"][: round + 1]) / sites

    return {**parts, "all": sum(parts.values())}


def average(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means, key by key."""
    return {key: mean(row[key] for row in rows) for key in rows[0]}


def settings(bed: Bed) -> dict[str, Any]:
    """For the report."""
    return {**asdict(bed), "sites": 8, "max_length": 128, "source": SOURCE, "cores": os.cpu_count()}
