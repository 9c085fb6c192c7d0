"""The beds of `benchmarks.fedcybgd`: cells, contenders, one run of a contender, and gradients
through a download.

A cell is a model with the text of eight sites. All contenders of a cell make the same passes: a
cycle of FedCyBGD is a round of FedAvg, in which every site takes the same number of steps. Those
that are compared at equal bytes get their rank, their rate or their rounds from the size of the
frame that they are to match (see `Match`).
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.cgfedllm.bed import CORPORA, Table
from benchmarks.codecs.bed import MEMORY
from benchmarks.codecs.cache import Cache
from benchmarks.fedcybgd.contenders import LINEAR, Bed, Cell, Contender, Match, contender
from benchmarks.fedcybgd.memory import largest_beside
from benchmarks.report import Row
from fluvial.codecs import CodecSettings, build
from fluvial.data import DataConfig, SiteTexts
from fluvial.errors import ClientError, ConfigError, DivergenceError, GateError
from fluvial.methods import METHODS
from fluvial.methods.fedcybgd.config import partition
from fluvial.methods.fedcybgd.memory import client_memory
from fluvial.methods.fedcybgd.server import FedCyBgdServer
from fluvial.methods.fedcybgd.visit_sizes import Full, OnDisk, Sizes
from fluvial.methods.shared import SharedModelServer
from fluvial.models.loading import meta_base
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig, dtype_of
from fluvial.models.targets import LoraSettings
from fluvial.models.tuning import tuned_layout
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import check_settings, given
from fluvial.runs.run import Run
from fluvial.seeds import generator
from fluvial.training.evaluate import heldout
from fluvial.wire.tensors import Layout


def resolve(cell: Cell, which: Contender, bed: Bed, *, pace: float, seed: int) -> RunConfig:
    """Return the configuration of one run; raises `ConfigError` where no setting matches the bytes
    that are to be matched."""
    centre = cell.lora_rate if which.tune == "lora" else cell.rate
    tables = CORPORA[cell.corpus].tables()
    method = which.method

    if method.get("order") == "pairs":
        method = method | {"layers_per_block": cell.layers_per_pair}

    table: Table = {
        **tables,
        "data": tables["data"]
        | {"max_length": bed.length or cell.length, "max_heldout": bed.heldout or cell.heldout},
        "seed": seed,
        "rounds": round(bed.rounds * which.rounds),
        "train": {
            "learning_rate": centre * which.pace * pace,
            "per_device_train_batch_size": cell.batch,
            "max_steps": bed.steps,
            "round_scheduler_type": "cosine" if which.falls else "constant",
        },
        "method": method,
        "evaluate": {"sample_tokens": 1},
    }
    if not METHODS[which.method["name"]].traits.pooled:
        table["fleet"] = {"workers": 1}
    if which.tune == "lora":
        table["lora"] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": LINEAR}
    elif which.method["name"] in ("fedavg", "central"):
        table["tune"] = "full"

    table |= {"codec": which.codec} if which.codec is not None else {}
    config = parse(table, f"{cell.name}, {which.name}")
    if which.match is None:
        return config

    wanted = frame_bytes(resolve(cell, contender(which.match.name), bed, pace=1.0, seed=0))
    return parse(_matched(table, config, which.match, wanted), f"{cell.name}, {which.name}")


def _matched(table: Table, config: RunConfig, match: Match, wanted: int) -> Table:
    """`table` with the setting that brings its bytes to those `wanted` of a frame."""
    found = frame_bytes(config)
    if match.by == "rounds":
        rounds = round(config.rounds * wanted / found)
        if rounds <= config.rounds:
            raise ConfigError(
                f"a frame has {found} bytes and the other's {wanted}: no more rounds for the same "
                "bytes"
            )

        return table | {"rounds": rounds}

    if match.by == "rate":
        rate = layout(config).raw_bytes / wanted
        return table | {"codec": table["codec"] | {"rate": rate}}

    highest = min(min(shape) for _, shape in _layout(config.model, None).shapes if len(shape) > 1)
    for rank in range(min(highest, round(8 * wanted / found) + 1), 0, -1):
        changed = table | {"lora": table["lora"] | {"r": rank, "lora_alpha": 2 * rank}}
        if frame_bytes(parse(changed, "match")) <= wanted:
            return changed

    raise ConfigError(f"even rank 1 has more bytes than {wanted}")


def layout(config: RunConfig) -> Layout:
    """Return the layout of all tensors that are tuned."""
    return _layout(config.model, config.adapter)


@lru_cache(32)
def _layout(model: ModelConfig, lora: LoraSettings | None) -> Layout:
    return tuned_layout(meta_base(model), lora)


def frame_bytes(config: RunConfig) -> int:
    """Bytes of one update, of the largest block where there are some."""
    facts = given(config, layout(config), meta_base(config.model), sites=1)
    return _frame_bytes(config.coding, config.entry.plan(config.method, facts).sent)


@lru_cache(64)
def _frame_bytes(codec: CodecSettings, sent: Layout) -> int:
    update = {name: torch.randn(shape, generator=generator(0, name)) for name, shape in sent.shapes}
    return len(build(codec, sent).encode(update))


def memory_bytes(config: RunConfig) -> int:
    """Return the most that a client holds, by formula and without activations.

    Under an adapter lies the whole base. Of what is read from disk the largest weight counts, which
    is in use at times.
    """
    method: Any = config.method
    whole = _layout(config.model, None).numel
    width: Any = dtype_of(config.model).itemsize

    if config.adapter is not None:
        return client_memory(Sizes(layout(config).numel, 0, whole), Full(), width=width).peak()
    if method.name in ("fedavg", "central"):
        return client_memory(Sizes.full(whole), Full(), width=width).peak()

    parts = partition(method, layout(config))
    largest = max(range(len(parts)), key=lambda index: parts.blocks[index].numel)
    sizes = Sizes.of(parts, largest)

    if getattr(method, "hold", "memory") == "disk":
        in_use = width * largest_beside(layout(config), parts.blocks[largest].layout)
        return client_memory(sizes, OnDisk(Full()), width=width).peak(in_use)

    return client_memory(sizes, Full(), width=width).peak()


# -- one run -------------------------------------------------------------------------------------


@lru_cache(2)
def _pool(model: ModelConfig, lora: LoraSettings | None) -> ModelPool:
    return ModelPool(model, lora)


@lru_cache(6)
def _texts(data: str, pool: ModelPool, seed: int) -> SiteTexts:
    return SiteTexts(DataConfig.model_validate_json(data), pool.tokenizer, seed=seed)


@dataclass
class Finished:
    """A run that went to its end."""

    run: Run
    texts: SiteTexts
    records: list[Row]
    """metrics.jsonl."""


def finish(config: RunConfig) -> Finished:
    """All rounds of a run, and not what a run does at its end."""
    pool = _pool(config.model, config.adapter)
    texts = _texts(config.data.model_dump_json(), pool, config.seed)

    with (
        tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder,
        RunFolder(Path(folder)) as place,
    ):
        check_settings(config, pool.layout, pool.blank(), texts)
        run = Run(config, place, pool, texts)
        for event in run.events():
            if event.kind == "round" and event.values["round"] == config.rounds:
                break

        return Finished(run, texts, place.metrics())


def traced(config: RunConfig) -> Row:
    """Held-out losses and bytes of one run; a run that was refused or stopped says why.

    Losses are means over the sites, also of a baseline that trains on the union. Bytes are of all
    sites, as sent, round by round, without those of measuring.
    """
    since = time.perf_counter()
    busy = time.process_time()

    try:
        done = finish(config)
    except (GateError, DivergenceError, ClientError) as error:
        return {"stopped": f"{type(error).__name__}: {error}"[-300:]}

    server = done.run.server
    assert isinstance(server, SharedModelServer), "all of these have a global model"
    state = server.model()
    pool = done.run.pool
    taken = {"seconds": time.perf_counter() - since, "cpu_s": time.process_time() - busy}

    return {
        "base_loss": _loss(pool, done.texts, pool.base_state()),
        "loss": _loss(pool, done.texts, state),
        "up": [record["bytes_up"] for record in done.records],
        "down": [record["bytes_down"] for record in done.records],
        "visits": [len(record.get("visits", done.texts.names)) for record in done.records],
        "conflicts": sum(len(record.get("conflicts", ())) for record in done.records),
        "sites": len(done.texts.names),
        **taken,
    }


def _loss(pool: ModelPool, texts: SiteTexts, state: Any) -> float:
    pad = pool.tokenizer.pad_token_id
    with pool.model(state) as model:
        return mean(
            heldout(model, texts.load(name).heldout, pad_token_id=pad).loss for name in texts.names
        )


# -- gradients through a download ----------------------------------------------------------------


def cosines(exact: RunConfig, forms: Sequence[RunConfig], draws: int) -> list[Row]:
    """Return, for each form of download, the cosine of each block's gradient to the exact one.

    Gradients are taken at the base and after `exact`.

    `exact` is run to its end, and each form's server is put into its state, whatever codec the
    form's own run has: what a site sees follows from the state and the form. A stale subset is
    drawn `draws` times.
    """
    done = finish(exact)
    state = done.run.server.state()
    rows = []

    for config in forms:
        method: Any = config.method
        row: Row = {"cosine_base": [], "cosine_tuned": []}
        for key in ("cosine_base", "cosine_tuned"):
            server = FedCyBgdServer(method, done.run.context)
            if key == "cosine_tuned":
                server.restore(state)

            visits = [
                f"draw/{draw}"
                for draw in range(draws if method.download.form == "stale-subset" else 1)
            ]
            for block in range(len(server.parts)):
                row[key].append(mean(server._cosine(block, visit) for visit in visits))

        rows.append(row)

    return rows


# -- jobs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One contender in one cell: the learning rates on seed 0, then the best of them on all
    seeds."""

    cell: Cell
    contender: Contender
    bed: Bed
    cache: Path | None
    deadline: float
    """Nothing is begun after this, in seconds of `time.time`."""


@dataclass
class Found:
    """Measurements of a job."""

    job: Job
    tuning: dict[float, Row] = field(default_factory=dict)
    """Runs with seed 0 by learning rate."""
    runs: list[Row] = field(default_factory=list)
    """Runs at the best learning rate by seed."""
    config: RunConfig | None = None
    memory_bytes: int | None = None
    """Memory of a client by formula."""
    complete: bool = False

    @property
    def best(self) -> float | None:
        """The learning rate of the lowest loss on seed 0."""
        ended = {rate: row["loss"] for rate, row in self.tuning.items() if "stopped" not in row}
        return min(ended, key=lambda rate: ended[rate]) if ended else None


@lru_cache(1)
def _cache(path: Path | None) -> Cache:
    return Cache(path)


def compete(job: Job) -> Found:
    """Do a job, or what of it fits before its deadline."""
    found = Found(job)
    paces = dict[float, float]()
    waiting = list(job.bed.paces)
    further = job.bed.further

    while waiting:
        pace = waiting.pop(0)
        config = resolve(job.cell, job.contender, job.bed, pace=pace, seed=0)
        row = remembered(job, config)

        if row is None:
            return found

        found.tuning[config.train.learning_rate] = row
        paces[config.train.learning_rate] = pace
        if not waiting and further and found.best is not None:
            waiting = beyond(list(paces.values()), paces[found.best])
            further = further - 1

    if found.best is None:
        return replace(found, complete=True)

    pace = paces[found.best]
    found.memory_bytes = memory_bytes(resolve(job.cell, job.contender, job.bed, pace=pace, seed=0))
    for seed in range(job.bed.seeds):
        found.config = resolve(job.cell, job.contender, job.bed, pace=pace, seed=seed)
        row = remembered(job, found.config)
        if row is None:
            return found
        found.runs.append(row)

    return replace(found, complete=True)


def beyond(paces: Sequence[float], best: float) -> list[float]:
    """Return the pace that continues a grid where the best lies at its edge, or none."""
    if best == max(paces):
        return [2 * best]
    return [best / 2] if best == min(paces) else []


def remembered(job: Job, config: RunConfig) -> Row | None:
    """Return the row of a run from the cache, or made now; None where the time is over."""
    cache = _cache(job.cache)
    key = Cache.key(config)
    known = cache.find(key)

    if known is not None:
        return known
    if time.time() >= job.deadline:
        return None

    described = {
        "cell": job.cell.name,
        "contender": job.contender.name,
        "learning_rate": config.train.learning_rate,
    }
    return cache.add(key, {**described, "seed": config.seed, **traced(config)})
