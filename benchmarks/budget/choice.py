"""A choice within a third of the bytes, against every choice by hand and a fixed adapter.

    python -m benchmarks.budget [--quick | --full] [--cell NAME ...] [--seeds N]
        [--cache FILE.jsonl] [--out FILE.json]

All contenders have the local learning rate that is best for the *uncompressed* run on seed 0. The
target is the loss of the uncompressed run, same seed, after two thirds of the rounds. The fixed
adapter is rank 8 on q, k, v and o with trellis at 1/64. The budget is a third of the bytes that a
site sends with it in the whole run; the local steps are fixed, so adapter and codec are chosen. By
hand, every adapter of the grid runs on the sites' own data at the same budget, on seed 0: what a
choice that knew the result would take.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from benchmarks.budget.bed import Bed, Runs, resolve
from benchmarks.cgfedllm.bed import Table
from benchmarks.codecs.figures import bytes_until, first_round
from benchmarks.report import Claim, Row
from fluvial.data import SiteTexts
from fluvial.models.pool import ModelPool
from fluvial.runs.budget.candidates import Costs, adapters, with_choice
from fluvial.runs.budget.choice import choose
from fluvial.runs.budget.pairs import Pair, pairs
from fluvial.runs.budget.settled import Open, settle
from fluvial.runs.config import RunConfig

CELLS = ("fairytales", "shakespeare", "mini_ops", "babi", "fairytales, embedded model")
SHARE = 1 / 3
"""The budget, of the bytes up of the fixed adapter."""
USUAL: Table = {"r": 8, "target_modules": "attention"}
"""The adapter of CG-FedLLM: q, k, v and o."""
FIXED_NAME = "fixed r 8, trellis 1/64"
FIXED: Table = {"name": "trellis", "rate": 64, "error_feedback": True}


def chosen(config: RunConfig) -> Row:
    """Return the choice within the budget of a configuration, as JSON values."""
    pool = ModelPool(config.model, config.adapter)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    return choose(config, pool, texts)


def by_hand(config: RunConfig, tried: Sequence[Pair] | None = None) -> list[RunConfig]:
    """Return the configurations of all adapters of the grid, each at the budget, with the first of
    the `tried` codecs that fits; None stands for those that the budget tries."""
    assert config.budget is not None
    pool = ModelPool(config.model, config.adapter)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    costs = Costs(config, config.budget, texts)
    tried = pairs(config.budget, Open.of(config)) if tried is None else tried
    found = []
    for adapter in adapters(config.budget, Open.of(config)):
        own = pool.beside(with_choice(config, adapter).adapter)
        first = costs.first(adapter, own, tried)
        if first is not None:
            found.append(first.config)

    return found


@dataclass(frozen=True)
class Figures:
    """Cell, seed, learning rate and target that all rows of one seed have in common."""

    cell: str
    seed: int
    learning_rate: float
    target: float
    """Loss to reach."""

    def row(self, contender: str, run: Row, **more: Any) -> Row:
        """Return the figures of one contender."""
        rounds = len(run["loss"])
        reached = first_round(run["loss"], self.target)
        until = bytes_until(run, reached or rounds)
        return {
            **asdict(self),
            "contender": contender,
            "loss": run["loss"][-1],
            "losses": run["loss"],
            "reached": reached,
            "up_to_target": until["up"],
            "all_to_target": until["all"],
            "up": bytes_until(run, rounds)["up"],
            **more,
        }


def best_rate(cell: str, bed: Bed, runs: Runs) -> float:
    """Return the learning rate that is best for the uncompressed run on seed 0."""
    tuning = {
        rate: runs.one(resolve(cell, bed, rate, 0, lora=USUAL)) for rate in bed.learning_rates
    }
    return min(tuning, key=lambda each: tuning[each]["loss"][-1])


def candidates_of(bed: Bed) -> Table:
    """Return the adapters among which a budget chooses."""
    return {"r": list(bed.ranks), "target_modules": list(bed.targets)}


def choice_row(name: str, config: RunConfig, figures: Figures, runs: Runs) -> Row:
    """Return the figures of a run with what is chosen within the budget of `config`."""
    choice = runs.one(config, chosen)
    own = runs.one(settle(config, choice))
    return figures.row(name, own, **{key: choice[key] for key in ("why", "chosen", "trials")})


def measure(cell: str, bed: Bed, runs: Runs) -> list[Row]:
    """Return the rows of one cell: contenders by seed."""
    rate = best_rate(cell, bed, runs)
    rows: list[Row] = []

    for seed in range(bed.seeds):
        plain = runs.one(resolve(cell, bed, rate, seed, lora=USUAL))
        fixed = runs.one(resolve(cell, bed, rate, seed, lora=USUAL, codec=FIXED))
        budget = {
            "up_bytes": int(SHARE * bytes_until(fixed, bed.rounds)["up"]),
            "trial_rounds": bed.trial_rounds,
            **candidates_of(bed),
        }
        config = resolve(cell, bed, rate, seed, budget=budget)
        figures = Figures(cell, seed, rate, plain["loss"][bed.target - 1])
        rows += [
            figures.row("uncompressed, r 8", plain),
            figures.row(FIXED_NAME, fixed),
            choice_row("budget", config, figures, runs),
        ]
        if seed == 0:
            rows += [
                figures.row(f"by hand: r {each.lora.r} on {words_of(each)}", runs.one(each))
                for each in by_hand(config)
            ]

    return rows


def words_of(config: RunConfig) -> str:
    """Return the modules of an adapter in words."""
    targets = config.lora.target_modules
    return (
        "+".join(targets)
        if isinstance(targets, tuple)
        else targets.replace("attention", "q, k, v, o")
    )


def claims(rows: Sequence[Row], cells: Sequence[str]) -> list[Claim]:
    """Return the claims that this bed can decide."""
    found = []
    for cell in cells:
        some = [row for row in rows if row["cell"] == cell]
        fixed = [row for row in some if row["contender"] == FIXED_NAME]
        own = [row for row in some if row["contender"] == "budget"]
        hand = [row["loss"] for row in some if row["contender"].startswith("by hand")]
        until = [mean(row["up_to_target"] for row in group) for group in (own, fixed)]
        losses = [mean(row["loss"] for row in group) for group in (own, fixed)]
        reached = all(row["reached"] for row in own)
        found += [
            Claim(
                f"{cell}: bytes up to the target, of those of the fixed adapter",
                until[0] / until[1] if reached else None,
                1 / 3,
                "at most",
            ),
            Claim(
                f"{cell}: final loss of the choice less that of the fixed adapter, nats",
                losses[0] - losses[1],
                0.0,
                "at most",
            ),
            Claim(
                f"{cell}: final loss of the choice over the best by hand, less 1, seed 0",
                own[0]["loss"] / min(hand) - 1,
                0.01,
                "at most",
            ),
        ]

    return found
