"""Rounds to a target: those that other benchmarks have stored, and those of rank 2, run here.

All are of a small model. The target is the held-out loss of the uncompressed run of rank 8 on the
attention after two thirds of its rounds, with the same seed; adapter and codec of a contender are
its own, and the learning rate is that which is best for the uncompressed run.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.cgfedllm.bed import SHARED
from benchmarks.codecs.bed import traced
from benchmarks.codecs.bytes_to_target import FULL
from benchmarks.codecs.contenders import CONTENDERS, REFERENCE, Contender, resolve
from benchmarks.codecs.figures import first_round
from benchmarks.engine.fleets import ROOT
from benchmarks.report import Row

CELL = "fairytales"
LEARNING_RATE = 8e-3
SEEDS = (0, 1)
STORED = ROOT / "benchmarks" / "results" / "bytes_to_target.json"


def stored(cell: str = CELL) -> dict[str, float]:
    """Return the mean rounds of those contenders of `bytes_to_target` that always reached the
    target."""
    return {
        row["contender"]: float(row["rounds"])
        for row in json.loads(STORED.read_text())["rows"]
        if row["cell"] == cell and row["reached"] == row["seeds"]
    }


def missing() -> str | None:
    """Return why the runs of this machine cannot be made, or None."""
    return None if SHARED.is_dir() else f"the texts of {CELL} are not here"


def rows(contenders: Sequence[Contender], seeds: Sequence[int] = SEEDS) -> Iterator[Row]:
    """Run each contender on the small model; yield the round in which it reached the target."""
    reference = next(each for each in CONTENDERS if each.name == REFERENCE)
    for seed in seeds:
        plain = traced(resolve(CELL, reference, FULL, learning_rate=LEARNING_RATE, seed=seed))
        target = plain["loss"][FULL.target - 1]
        for contender in contenders:
            config = resolve(CELL, contender, FULL, learning_rate=LEARNING_RATE, seed=seed)
            run = traced(config)
            yield {
                "part": "rounds",
                "contender": contender.name,
                "seed": seed,
                "target": target,
                "reached": first_round(run["loss"], target),
                "loss": run["loss"][-1],
            }


def mean_rounds(found: Sequence[Row]) -> Mapping[str, float]:
    """Return the mean rounds of the contenders that reached the target with every seed."""
    by_name: dict[str, list[int | None]] = {}
    for row in found:
        by_name.setdefault(row["contender"], []).append(row["reached"])

    return {
        name: statistics.fmean(each for each in reached if each is not None)
        for name, reached in by_name.items()
        if None not in reached
    }
