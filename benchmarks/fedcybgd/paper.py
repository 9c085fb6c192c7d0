"""Part "paper" of `benchmarks.fedcybgd`: the paper's figures, from the beginning to the end of a
run.

Every contender is measured on the sites' held-out text before training and after every cycle. All
block methods upload int8 and share the learning rate that `losses` found for FedCyBGD's int8;
Fed-full has its own, and the proxy lower ones too, because a step on a pruned model leads
elsewhere. In "visits of 150 steps" a site trains as long as in the released code's run
of LLaMA-2-7B, for one cycle.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from benchmarks.cgfedllm.bed import Table
from benchmarks.codecs.cache import Cache
from benchmarks.codecs.figures import half_width
from benchmarks.fedcybgd.bed import _loss, finish, resolve
from benchmarks.fedcybgd.contenders import (
    CYCLIC,
    FEDBAVG,
    REFERENCE,
    Bed,
    Cell,
    Contender,
    contender,
)
from benchmarks.fedcybgd.jobs import bed_of
from benchmarks.report import Claim, Report, Row, show
from fluvial.errors import ClientError, DivergenceError, GateError
from fluvial.runs.config import RunConfig

VISIT = 150
"""Steps of a visit in the released code's run of LLaMA-2-7B."""
ORDERS = ("ascending", "descending", "random", "latin", "latin-random")
PAPER = "ascending, proxy 0.75"
ASCENDING = "ascending"
LATIN = "latin"


def _cyclic(name: str, order: str, download: Table | None = None, pace: float = 0.5) -> Contender:
    method: Table = {"name": "fedcybgd", "order": order}
    if download is not None:
        method |= {"download": download, "gate": {"threshold": 0}}
    return Contender(name, method, codec={"name": "int8"}, pace=pace)


PROXIES = (
    _cyclic(PAPER, "ascending", {"form": "proxy", "kept": 0.75}),
    *(
        _cyclic(f"{PAPER}, rate / {part}", "ascending", {"form": "proxy", "kept": 0.75}, 0.5 / part)
        for part in (4, 16)
    ),
    _cyclic("ascending, proxy 0.9", "ascending", {"form": "proxy", "kept": 0.9, "drop": 0.1}),
)
SHORT = (
    contender(REFERENCE),
    *(_cyclic(order, order) for order in ORDERS),
    contender(FEDBAVG),
    contender(CYCLIC),
    *PROXIES,
)
"""In cycles of as many steps as in part `losses`."""
LONG = (contender(REFERENCE), _cyclic(ASCENDING, "ascending"), PROXIES[0])
"""With visits of 150 steps."""
COLUMNS = {
    "contender": "contender",
    "steps": "steps a visit",
    "seeds": "seeds",
    "first": "loss before",
    "loss": "loss at the end",
    "loss_half": "+-",
    "bytes_up": "up",
    "bytes_down": "down",
}


@dataclass(frozen=True)
class Task:
    """One contender with one length of visits."""

    contender: Contender
    bed: Bed


def paper_part(cells: Sequence[Cell], report: Report, options: argparse.Namespace) -> None:
    """Measure losses cycle by cycle, seed after seed, as far as the time suffices."""
    cache = Cache(options.cache)

    for cell in cells:
        tasks = tasks_of(bed_of(options), quick=options.quick)
        runs: list[list[Row]] = [[] for _ in tasks]

        for seed in range(bed_of(options).seeds):
            for task, made in zip(tasks, runs, strict=True):
                row = curve(_config(cell, task, seed), cache, options.deadline)
                if row is not None:
                    made.append(row)

        rows = [_row(cell, task, made, report) for task, made in zip(tasks, runs, strict=True)]
        rows = [row for row in rows if row["seeds"]]
        show(f"{cell.name}: losses from beginning to end", COLUMNS, rows)
        report.rows += [{"part": "paper", **row} for row in rows]
        report.claims += claims(cell.name, rows)


def tasks_of(bed: Bed, *, quick: bool) -> list[Task]:
    """Return what is run; with `quick` the paper's own form beside Fed-full alone."""
    if quick:
        return [Task(each, bed) for each in (SHORT[0], PROXIES[0])]
    long = replace(bed, rounds=1, steps=VISIT)
    return [*(Task(each, bed) for each in SHORT), *(Task(each, long) for each in LONG)]


def _config(cell: Cell, task: Task, seed: int) -> RunConfig:
    config = resolve(cell, task.contender, task.bed, pace=1.0, seed=seed)
    every = config.evaluate.model_copy(update={"every": 1})
    return config.model_copy(update={"evaluate": every})


def curve(config: RunConfig, cache: Cache, deadline: float) -> Row | None:
    """Return the held-out loss before training and after every cycle, from the cache or measured
    now; None where the time is over."""
    key = Cache.key(config)
    known = cache.find(key)
    if known is not None:
        return known
    if time.time() >= deadline:
        return None

    try:
        done = finish(config)
    except (GateError, DivergenceError, ClientError) as error:
        return cache.add(key, {"stopped": f"{type(error).__name__}: {error}"[-300:]})

    pool = done.run.pool
    sites = len(done.texts.names)
    return cache.add(
        key,
        {
            "curve": [
                _loss(pool, done.texts, pool.base_state()),
                *(record["heldout_loss"] for record in done.records),
            ],
            "up": sum(record["bytes_up"] for record in done.records) / sites,
            "down": sum(record["bytes_down"] for record in done.records) / sites,
        },
    )


def _row(cell: Cell, task: Task, made: Sequence[Row], report: Report) -> Row:
    name = task.contender.name
    ended = [row for row in made if "stopped" not in row]
    for stopped in (each["stopped"] for each in made if "stopped" in each):
        report.skip(f"{cell.name}, {name}: {stopped}")

    if len(made) < task.bed.seeds:
        report.skip(
            f"{cell.name}, {name}, {task.bed.steps} steps a visit: time for {len(made)} seeds only"
        )

    row: Row = {
        "cell": cell.name,
        "contender": name,
        "steps": task.bed.steps,
        "seeds": len(ended),
    }
    if not ended:
        return row

    last = [each["curve"][-1] for each in ended]
    return row | {
        "curve": [mean(values) for values in zip(*(each["curve"] for each in ended), strict=True)],
        "first": mean(each["curve"][0] for each in ended),
        "loss": mean(last),
        "loss_half": half_width(last),
        "losses": last,
        "bytes_up": mean(each["up"] for each in ended),
        "bytes_down": mean(each["down"] for each in ended),
    }


def claims(cell: str, rows: Sequence[Row]) -> list[Claim]:
    """Return the paper's qualitative results as claims: the order of blocks matters little, the
    loss is no higher than FedBAvg's, and the proxy costs little."""
    run = {(row["contender"], row["steps"]): row for row in rows}
    found = []

    for (name, steps), row in run.items():
        exact: Any = run.get((ASCENDING, steps))
        if exact is None or row["seeds"] != exact["seeds"]:
            continue
        title = f"{cell}: {name} over {ASCENDING}, {steps} steps a visit, less 1"
        if name in ORDERS and name != ASCENDING:
            found.append(Claim(title, abs(row["loss"] / exact["loss"] - 1), 0.01, "at most"))
        if name in {each.name for each in PROXIES}:
            found.append(Claim(title, row["loss"] / exact["loss"] - 1, 0.01, "at most"))
        if name == FEDBAVG:
            nats = exact["loss"] - row["loss"]
            found.append(Claim(f"{cell}: {ASCENDING} less {FEDBAVG}, nats", nats, 0.0, "at most"))

    return found
