"""A choice within a third of the bytes of both directions, against fixed and free adapters.

    python -m benchmarks.budget --part both [--quick] [--cell NAME ...] [--seeds N]
        [--cache FILE.jsonl] [--out FILE.json]

All contenders have the local learning rate that is best for the *uncompressed* run on seed 0. The
target is the loss of the uncompressed run, same seed, after two thirds of the rounds. The fixed
adapter is rank 8 on q, k, v and o. A budget is all or a third of the bytes that a site sends and
receives with it and powersgd at 1/64 both ways in the whole run. Trials are as long as the run,
because coarse codecs of both ways may lose again after some rounds what they had gained. With a
third, one choice has the local steps of all others, and one is free to take two or four times as
many. By hand, every adapter of the grid runs on the sites' own data within a third, on seed 0 and
with the usual steps, with powersgd and with trellis both ways.
"""

from collections.abc import Sequence
from statistics import mean

from benchmarks.budget.bed import Bed, Runs, resolve
from benchmarks.budget.choice import (
    CELLS,
    SHARE,
    USUAL,
    Figures,
    best_rate,
    by_hand,
    candidates_of,
    choice_row,
    words_of,
)
from benchmarks.cgfedllm.bed import Table
from benchmarks.codecs.figures import bytes_until
from benchmarks.report import Claim, Row
from fluvial.runs.budget.pairs import Pair

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
BY_HAND = (Pair("powersgd", "powersgd"), Pair("trellis", "trellis"))
OTHERS = "powersgd both ways"
BUDGETS = ("budget of all bytes", "budget of a third", "budget of a third, free steps")
STEPS = (1, 2, 4)
"""Factors of the local steps, where the budget may choose them."""


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

        whole: Table = {
            "total_bytes": int(limit),
            "trial_rounds": bed.rounds,
            **candidates_of(bed),
        }
        third = whole | {"total_bytes": int(SHARE * limit)}
        steps = {"max_steps": [factor * bed.steps for factor in STEPS]}
        config = resolve(cell, bed, rate, seed, budget=third)
        train = {"learning_rate": rate, "per_device_train_batch_size": bed.batch}
        free = resolve(cell, bed, rate, seed, train=train, budget=third | steps)
        every = (resolve(cell, bed, rate, seed, budget=whole), config, free)
        rows += [
            choice_row(name, each, figures, runs) for name, each in zip(BUDGETS, every, strict=True)
        ]

        for pair in BY_HAND if seed == 0 else ():
            for each in by_hand(config, [pair]):
                name = f"by hand: r {each.lora.r} on {words_of(each)}, {pair.up} both ways"
                rows.append(figures.row(name, runs.one(each)))

    return rows


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

        fixed = [each for name in FIXED if (each := until(name)) is not None]
        for name in BUDGETS:
            own = until(name)
            found.append(
                Claim(
                    f"{cell}, {name}: bytes of both ways up to the target, of those of the best "
                    "fixed adapter",
                    own / min(fixed) if own is not None and fixed else None,
                    1 / 3,
                    "at most",
                )
            )

        losses = {row["contender"]: row["loss"] for row in some if row["seed"] == 0}
        hand = {name: loss for name, loss in losses.items() if name.startswith("by hand")}
        others = [loss for name, loss in hand.items() if name.endswith(OTHERS)]
        if hand:
            best = min(hand.values())
            words = f"{cell}: final loss of the choice over the best by hand, less 1, seed 0"
            found.append(Claim(words, losses[BUDGETS[1]] / best - 1, 0.01, "at most"))
        if others:
            words = f"{cell}: the same over the best adapter with powersgd both ways"
            found.append(Claim(words, losses[BUDGETS[1]] / min(others) - 1, 0.0, "at most"))

    return found
