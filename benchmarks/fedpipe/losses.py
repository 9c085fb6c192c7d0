"""Part "losses" of `benchmarks.fedpipe`: held-out loss at equal bytes, and time to a loss.

The learning rate of each contender is the best one on seed 0 of the middle rate, the next larger
one, and, where that is no better, the next smaller one; an ablation has that of FedPipe. A
contender and FedPipe are compared at the bytes that both have sent, those of the one that has sent
fewer; they are compared at equal seconds in the same way. The target of a task is the loss of
uniform LoRA after its last round. Between rounds, losses are interpolated. A row has the figures of
its runs, from which a later benchmark goes on (`--known`).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median_low, stdev
from typing import Any, Literal

from benchmarks.fedpipe.bed import Bed, read_task
from benchmarks.fedpipe.contenders import CONTENDERS, FEDPIPE, RATES, UNIFORM, Contender
from benchmarks.report import Claim, Report, Row, show
from fluvial.errors import ClientError

BAR_SPEED = 1.5
"""How many times sooner FedPipe should reach the loss of uniform LoRA."""
Unit = Literal["bytes", "seconds"]
"""Measure that is equal where the losses of two runs are compared."""
SAFETY = 1.2
"""Factor on the time of the middle site that is the deadline, as `fluvial plan` shows it."""
COLUMNS = {
    "task": "task",
    "contender": "contender",
    "seeds": "seeds",
    "learning_rate": "learning rate",
    "rates": "rates tried",
    "base": "loss before",
    "loss": "loss after",
    "deviation": "standard deviation",
    "worst_site": "worst site",
    "bytes": "bytes, all rounds",
    "over_fedpipe": "loss over FedPipe's at equal bytes",
    "over_uniform": "loss over uniform LoRA's at equal bytes",
    "over_uniform_at_s": "loss over uniform LoRA's at equal s",
    "seconds": "s, all rounds",
    "setup_s": "of these in set-up",
    "speed": "times sooner at the target",
    "error": "aggregation error, last round",
}


@dataclass(frozen=True)
class Cell:
    """A contender on a task, with one seed."""

    task: str
    contender: str
    seed: int


def cells(tasks: Sequence[str], names: Sequence[str], seeds: int) -> Iterator[Cell]:
    """Yield the cells that are wanted, task by task; the first seed of a contender is the one on
    which its learning rate is searched."""
    for task in tasks:
        yield from (Cell(task, name, seed) for seed in range(seeds) for name in names)


class Losses:
    """The runs of the tasks, old and new."""

    def __init__(self, bed: Bed, *, quick: bool) -> None:
        self.bed = bed
        self.quick = quick
        self.refused: dict[str, str] = {}
        """Reasons of runs that a site's plan refused, by task and contender."""

    def run(self, cell: Cell) -> Row | None:
        """Return the figures of a cell, None where they are not known and no run is made."""
        if cell.seed == 0:
            self.search(cell.task, cell.contender)
        rate = self.best(cell.task, cell.contender)
        if rate is None:
            return None
        return self._run(cell.task, CONTENDERS[cell.contender], cell.seed, rate)

    def search(self, task: str, name: str) -> None:
        """Run a contender on seed 0 with the learning rates that its search asks for."""
        contender = CONTENDERS[name]
        if contender.like is not None:
            return
        smaller, middle, larger = contender.rates
        losses = [
            row["losses"][-1]
            for row in (self._run(task, contender, 0, rate) for rate in (middle, larger))
            if row is not None
        ]
        if len(losses) > 1 and losses[0] <= losses[1]:
            self._run(task, contender, 0, smaller)

    def _run(self, task: str, contender: Contender, seed: int, rate: float) -> Row | None:
        deadline_s = None
        if contender.ranks == "planned":
            deadline_s = self.deadline_s(task)
            if deadline_s is None:
                return None
        table = read_task(task, quick=self.quick)
        try:
            return self.bed.run(
                table, contender, seed=seed, learning_rate=rate, deadline_s=deadline_s
            )
        except ClientError as error:
            name = next(name for name, each in CONTENDERS.items() if each == contender)
            self.refused[f"{task}: {name}, seed {seed}, rate {rate:g}"] = str(error)
            return None

    def deadline_s(self, task: str) -> float | None:
        """Return the deadline of the planned contenders: the middle site's round of uniform LoRA,
        times the planner's factor of safety, in two digits."""
        row = self._run(task, CONTENDERS[UNIFORM], 0, RATES[1])
        if row is None:
            return None
        return float(f"{SAFETY * median_low(row['site_s'].values()):.2g}")

    def best(self, task: str, name: str) -> float | None:
        """Return the learning rate with the lowest loss on seed 0, None where none was tried."""
        losses = self.tried(task, CONTENDERS[name].like or name)
        return min(losses, key=losses.__getitem__) if losses else None

    def tried(self, task: str, name: str) -> dict[float, float]:
        """Return the loss after the run on seed 0 by learning rate, of those that were tried."""
        return {rate: row["losses"][-1] for rate, row in self.searched(task, name).items()}

    def searched(self, task: str, name: str) -> dict[float, Row]:
        """Return the runs on seed 0 by learning rate."""
        contender = CONTENDERS[name]
        found = {rate: self.known._run(task, contender, 0, rate) for rate in contender.rates}
        return {rate: row for rate, row in found.items() if row is not None}

    @property
    def known(self) -> "Losses":
        """Return the same without new runs."""
        return Losses(Bed(self.bed.cache, cached_only=True), quick=self.quick)

    def rows(self, task: str, name: str, seeds: int) -> dict[int, Row]:
        """Return the figures that are known, by seed, at the best learning rate."""
        found = {seed: self.known.run(Cell(task, name, seed)) for seed in range(seeds)}
        return {seed: row for seed, row in found.items() if row is not None}


def at(position: float, positions: Sequence[float], values: Sequence[float]) -> float:
    """Return the value at a position of a curve, a straight line between its points."""
    for place in range(1, len(positions)):
        if positions[place] >= position:
            step = positions[place] - positions[place - 1]
            share = (position - positions[place - 1]) / step if step else 1.0
            return values[place - 1] + share * (values[place] - values[place - 1])
    return values[-1]


def until(target: float, positions: Sequence[float], losses: Sequence[float]) -> float | None:
    """Return the position at which a curve first has a loss of `target`, or None."""
    for place, loss in enumerate(losses):
        if loss > target:
            continue
        if place == 0:
            return positions[0]
        share = (losses[place - 1] - target) / (losses[place - 1] - loss)
        return positions[place - 1] + share * (positions[place] - positions[place - 1])
    return None


def over(row: Row, other: Row, unit: Unit = "bytes") -> float:
    """Return the loss of a run minus that of another, at the bytes that both have sent, or at the
    seconds that both have taken."""
    common = min(row[unit][-1], other[unit][-1])
    return at(common, row[unit], row["losses"]) - at(common, other[unit], other["losses"])


def times_sooner(row: Row, uniform: Row, *, setup: bool = True) -> float | None:
    """Return the seconds of uniform LoRA over those until a run has its last loss, or None.

    Without `setup` the clock of the run begins with its first round.
    """
    before = 0.0 if setup else row["setup_s"]
    positions = [max(0.0, second - before) for second in row["seconds"]]
    needed = until(uniform["losses"][-1], positions, row["losses"])
    return None if not needed else uniform["seconds"][-1] / needed


def measure(
    report: Report,
    bed: Bed,
    *,
    tasks: Sequence[str],
    names: Sequence[str],
    seeds: int,
    minutes: float,
    quick: bool,
) -> None:
    """Make the runs that are missing, for so many minutes; add rows and claims to `report`."""
    losses = Losses(bed, quick=quick)
    ends = time.monotonic() + 60 * minutes
    for cell in cells(tasks, names, seeds):
        if time.monotonic() > ends:
            report.skip("losses: time ended; cells without a row, or with fewer seeds or rates")
            break
        losses.run(cell)

    for run, why in losses.refused.items():
        report.skip(f"losses: {run}: {why}")

    for task in tasks:
        known = {name: losses.rows(task, name, seeds) for name in names}
        for name in names:
            if known[name]:
                rate = losses.best(task, name)
                row = _row(task, name, rate, losses.tried(task, name), known)
                report.rows.append(row | {"runs": _runs(losses.searched(task, name), known[name])})
        missing = [name for name in names if not known[name]]
        if missing:
            report.skip(f"losses: {task}: {'; '.join(missing)}")
        report.claims += _claims(task, known)
    show("Losses", COLUMNS, [row for row in report.rows if row["part"] == "losses"])


def _row(
    task: str,
    name: str,
    rate: float | None,
    tried: dict[float, float],
    known: dict[str, dict[int, Row]],
) -> dict[str, Any]:
    rows = known[name]
    fedpipe = known.get(FEDPIPE, {})
    uniform = known.get(UNIFORM, {})
    finals = [row["losses"][-1] for row in rows.values()]
    gaps = [over(row, fedpipe[seed]) for seed, row in rows.items() if seed in fedpipe]
    ratios = [times_sooner(row, uniform[seed]) for seed, row in rows.items() if seed in uniform]
    reached = [ratio for ratio in ratios if ratio is not None]
    errors = [row["errors"] for row in rows.values() if None not in row["errors"]]
    return {
        "part": "losses",
        "task": task,
        "contender": name,
        "seeds": len(rows),
        "learning_rate": rate,
        "rates": len(tried),
        "like": CONTENDERS[name].like,
        "base": mean(row["losses"][0] for row in rows.values()),
        "loss": mean(finals),
        "deviation": stdev(finals) if len(finals) > 1 else None,
        "worst_site": mean(row["worst_site"] for row in rows.values()),
        "bytes": round(mean(row["bytes"][-1] for row in rows.values())),
        "over_fedpipe": mean(gaps) if gaps else None,
        "seconds": mean(row["seconds"][-1] for row in rows.values()),
        "setup_s": mean(row["setup_s"] for row in rows.values()),
        "setup_share_of_s": mean(row["setup_s"] / row["seconds"][-1] for row in rows.values()),
        "setup_share_of_bytes": mean(
            row["setup_bytes"] / row["bytes"][-1] for row in rows.values()
        ),
        "speed": _mean_of_all(ratios),
        "reached": f"{len(reached)} of {len(ratios)}",
        "over_uniform": _over_uniform(rows, uniform),
        "over_uniform_at_s": _over_uniform(rows, uniform, "seconds"),
        "speed_without_setup": _mean_of_all(
            [
                times_sooner(row, uniform[seed], setup=False)
                for seed, row in rows.items()
                if seed in uniform
            ]
        ),
        "under_training": mean(mean(row["under_training"]) for row in rows.values()),
        "error": mean(row[-1] for row in errors) if errors else None,
        "errors": [mean(column) for column in zip(*errors, strict=True)],
        "plan": rows[min(rows)]["plans"],
        "sizes": rows[min(rows)].get("sizes", []),
    }


def _mean_of_all(figures: Sequence[float | None]) -> float | None:
    """Return the mean, None where a figure lacks: a run that never reaches the target has none."""
    known = [figure for figure in figures if figure is not None]
    return mean(known) if known and len(known) == len(figures) else None


def _runs(searched: dict[float, Row], rows: dict[int, Row]) -> list[Row]:
    """Return each run that a row rests on once, those of all seeds after those of the search; the
    row has the plan of its first seed, and its runs have none."""
    runs = {row["key"]: row for row in (*searched.values(), *rows.values())}
    first = rows[min(rows)]["key"]
    return [row | ({"plans": {}} if key != first else {}) for key, row in runs.items()]


def _over_uniform(
    rows: dict[int, Row], uniform: dict[int, Row], unit: Unit = "bytes"
) -> float | None:
    """Return the mean loss over that of uniform LoRA, with equal bytes or seconds; None for no
    common seed."""
    gaps = [over(row, uniform[seed], unit) for seed, row in rows.items() if seed in uniform]
    return mean(gaps) if gaps else None


def _claims(task: str, known: dict[str, dict[int, Row]]) -> list[Claim]:
    """Return the claims of a task: time to the target, loss at equal bytes, selection, `svd`."""
    fedpipe = known.get(FEDPIPE, {})
    uniform = known.get(UNIFORM, {})
    common = sorted(fedpipe.keys() & uniform.keys())
    if not common:
        return []

    ratios = [times_sooner(fedpipe[seed], uniform[seed]) for seed in common]
    claims = [
        Claim(
            f"{task}: times sooner at the loss of uniform LoRA, mean of {len(common)} seeds",
            _mean_of_all(ratios),
            BAR_SPEED,
            "at least",
        )
    ]
    for name, rows in known.items():
        gaps = [over(row, fedpipe[seed]) for seed, row in rows.items() if seed in fedpipe]
        if name != FEDPIPE and gaps:
            claims.append(
                Claim(
                    f"{task}: FedPipe's loss over {name}'s at equal bytes, {len(gaps)} seeds",
                    -mean(gaps),
                    0.0,
                    "below",
                )
            )
    return claims
