"""A choice within shares of the bytes of both directions, against fixed and free adapters.

    python -m benchmarks.budget --part both [--quick] [--cell NAME ...] [--seeds N]
        [--cache FILE.jsonl] [--out FILE.json]

All contenders have the local learning rate that is best for the *uncompressed* run on seed 0. The
target is the loss of the uncompressed run, same seed, after two thirds of the rounds. The fixed
adapter is rank 8 on q, k, v and o. A budget is a share of the bytes that a site sends and receives
with it and powersgd at 1/64 both ways in the whole run, and its run measures the moving average of
the adapter (`method.ema_decay`), in its trials too. The same choice without it is a row of its own:
the average ends lower, and follows a loss that falls fast with a delay.
Trials are as long as the run, because coarse codecs of both ways may lose again after some rounds
what they had gained. The optimizer steps of a site in the whole run are the same for all; they are
divided into `rounds`, or where that is open into as many as the choice takes, and the fixed adapter
then runs in each of these ways. By hand, every adapter of the grid runs on
the sites' own data within a third, on seed 0, with powersgd both ways.
"""

from collections.abc import Sequence
from statistics import mean

from benchmarks.budget.bed import Bed, Runs, resolve
from benchmarks.budget.choice import (
    CELLS,
    USUAL,
    Figures,
    best_rate,
    by_hand,
    candidates_of,
    choice_row,
    chosen,
    words_of,
)
from benchmarks.cgfedllm.bed import Table
from benchmarks.codecs.figures import bytes_until
from benchmarks.report import Claim, Row
from fluvial.runs.budget.pairs import Pair
from fluvial.runs.budget.settled import settle
from fluvial.runs.config import RunConfig

__all__ = ["CELLS", "claims", "measure"]

FIXED: dict[str, tuple[Table, Table]] = {
    "fixed r 8, powersgd 1/64 both ways": (
        {"name": "powersgd", "rate": 64, "error_feedback": True},
        {"name": "powersgd", "rate": 64},
    ),
    "fixed r 8, trellis 1/64, down trellis 1/32": (
        {"name": "trellis", "rate": 64, "error_feedback": True},
        {"name": "trellis", "rate": 32},
    ),
}
"""Codecs of the uplink and of the downlink: what needs the fewest bytes in most cells of
`benchmarks.codecs bytes_to_target`, and what reaches its target in all of them."""
MEASURE = next(iter(FIXED))
BY_HAND = Pair("powersgd", "powersgd")
BUDGETS = {"budget of all bytes": 1.0, "budget of a half": 1 / 2, "budget of a third": 1 / 3}
"""Shares of the bytes of `MEASURE`."""
THIRD = "budget of a third"
DIVIDED = {"half, rounds chosen": 1 / 2, "third, rounds chosen": 1 / 3}
"""Shares of the same, of runs whose steps are divided into rounds by the choice."""
A_ROUND = "steps a round"
LAST = "last adapter"
"""A choice whose run measures the last adapter, and not the moving average."""
AVERAGED: Table = {"name": "fedavg", "ema_decay": 0.5}


def measure(cell: str, bed: Bed, runs: Runs) -> list[Row]:
    """Return the rows of one cell: contenders by seed."""
    rate = best_rate(cell, bed, runs)
    rows: list[Row] = []

    for seed in range(bed.seeds):
        plain = runs.one(resolve(cell, bed, rate, seed, lora=USUAL))
        figures = Figures(cell, seed, rate, plain["loss"][bed.target - 1])
        rows.append(figures.row("uncompressed, r 8", plain))
        for name, (up, down) in FIXED.items():
            run = runs.one(resolve(cell, bed, rate, seed, lora=USUAL, codec=up, downlink=down))
            rows.append(figures.row(name, run))
            if name == MEASURE:
                limit = bytes_until(run, bed.rounds)["all"]

        for name, share in BUDGETS.items():
            budget = {
                "total_bytes": int(share * limit),
                "trial_rounds": bed.rounds,
                **candidates_of(bed),
            }
            config = resolve(cell, bed, rate, seed, budget=budget, method=AVERAGED)
            rows += choice_rows(name, config, figures, runs)

        rows += divided(cell, bed, figures, runs, limit)

        for each in by_hand(config, [BY_HAND]) if seed == 0 else ():
            name = f"by hand: r {each.lora.r} on {words_of(each)}, powersgd both ways"
            rows.append(figures.row(name, runs.one(each)))

    return rows


def divided(cell: str, bed: Bed, figures: Figures, runs: Runs, limit: float) -> list[Row]:
    """Return the figures of runs with equal steps in fewer rounds: the fixed adapter, and choices
    within shares of `limit` that choose the rounds too."""
    rate = figures.learning_rate
    up, down = FIXED[MEASURE]
    rows = []
    for steps in bed.divisions[1:]:
        tables = {"rounds": bed.all_steps // steps, "train": bed.train(rate, steps)}
        config = resolve(
            cell, bed, rate, figures.seed, lora=USUAL, codec=up, downlink=down, **tables
        )
        rows.append(figures.row(f"{MEASURE}, {steps} {A_ROUND}", runs.one(config)))

    for name, share in DIVIDED.items():
        budget = {
            "total_bytes": int(share * limit),
            "total_steps": bed.all_steps,
            "max_steps": list(bed.divisions),
            "trial_rounds": bed.rounds,
            **candidates_of(bed),
        }
        tables = {"rounds": None, "train": bed.train(rate), "budget": budget, "method": AVERAGED}
        rows += choice_rows(name, resolve(cell, bed, rate, figures.seed, **tables), figures, runs)
    return rows


def choice_rows(name: str, config: RunConfig, figures: Figures, runs: Runs) -> list[Row]:
    """Return the figures of a choice, with the moving average and without."""
    row = choice_row(name, config, figures, runs)
    own = settle(config, runs.one(config, chosen))
    last = own.model_copy(update={"method": own.method.model_copy(update={"ema_decay": 0.0})})
    return [row, figures.row(f"{name}, {LAST}", runs.one(last))]


def claims(rows: Sequence[Row], cells: Sequence[str]) -> list[Claim]:
    """Return the claims that this bed can decide, for each cell."""
    found = []
    for cell in cells:
        some = [row for row in rows if row["cell"] == cell]

        def until(name: str, some: Sequence[Row] = some) -> float | None:
            """Return the mean bytes up to the target; None where a seed does not reach it."""
            those = [row for row in some if row["contender"] == name]
            whole = all(row["reached"] for row in those)
            return mean(row["all_to_target"] for row in those) if whole else None

        longer = {row["contender"] for row in some if row["contender"].endswith(A_ROUND)}
        for name in (*BUDGETS, *(DIVIDED if longer else ())):
            others = FIXED if name in BUDGETS else {*FIXED, *longer}
            words = "" if name in BUDGETS else ", in any number of rounds"
            fixed = [each for known in others if (each := until(known)) is not None]
            found += [
                Claim(
                    f"{cell}, {own}: bytes of both ways up to the target, of those of the best "
                    f"fixed adapter{words}",
                    size / min(fixed) if (size := until(own)) is not None and fixed else None,
                    1 / 3,
                    "at most",
                )
                for own in (name, f"{name}, {LAST}")
            ]

        losses = {row["contender"]: row["loss"] for row in some if row["seed"] == 0}
        best = min(loss for name, loss in losses.items() if name.startswith("by hand"))
        words = f"{cell}: final loss of the choice over the best by hand, less 1, seed 0"
        found.append(Claim(words, losses[THIRD] / best - 1, 0.01, "at most"))

    return found
