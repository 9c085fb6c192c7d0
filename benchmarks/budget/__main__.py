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

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from benchmarks.cgfedllm.bed import CORPORA, SHARED, Table
from benchmarks.codecs.bed import traced
from benchmarks.codecs.cache import SOURCE, Cache
from benchmarks.codecs.figures import bytes_until, first_round
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row
from fluvial.data import SiteTexts
from fluvial.models.pool import ModelPool
from fluvial.runs.budget.candidates import Costs, adapters, with_choice
from fluvial.runs.budget.choice import choose
from fluvial.runs.budget.pairs import pairs
from fluvial.runs.budget.settled import Open, settle
from fluvial.runs.config import RunConfig, parse

CELLS = ("fairytales", "shakespeare", "mini_ops", "fairytales, embedded model")
PUBLIC = {"shakespeare": "fairytales"}
"""Public text of a cell, below `SHARED`; the plays for the others. Trials on the text of the other
benchmarks would measure nothing: two of the models were pre-trained on it."""
SHARE = 1 / 3
"""The budget, of the bytes up of the fixed adapter."""
FIXED_NAME = "fixed r 8, trellis 1/64"
FIXED: Table = {"name": "trellis", "rate": 64, "error_feedback": True}


@dataclass(frozen=True)
class Bed:
    """How much is run."""

    rounds: int = 12
    steps: int = 6
    batch: int = 2
    heldout: int = 8
    seeds: int = 2
    learning_rates: tuple[float, ...] = (4e-3, 8e-3)
    """Local learning rates for the uncompressed run."""
    target: int = 8
    """The round of the uncompressed run whose loss is the target."""
    trial_rounds: int = 4
    ranks: tuple[int, ...] = (2, 8)
    targets: tuple[str, ...] = ("default", "all-linear")


FULL = Bed(
    seeds=3,
    learning_rates=(2e-3, 4e-3, 8e-3),
    trial_rounds=8,
    ranks=(1, 2, 4, 8, 16),
    targets=("q_proj+v_proj", "default", "all-linear"),
)
QUICK = Bed(
    rounds=3,
    steps=2,
    heldout=2,
    seeds=1,
    learning_rates=(8e-3,),
    target=2,
    trial_rounds=2,
    ranks=(1, 8),
)


def resolve(cell: str, bed: Bed, learning_rate: float, seed: int, **tables: Any) -> RunConfig:
    """Return the configuration of one run, with further `tables`."""
    corpus = CORPORA[cell].tables()
    if CORPORA[cell].folder is not None:
        public = SHARED / "data" / PUBLIC.get(cell, "shakespeare") / "train.jsonl"
        corpus["data"] |= {"public_source": str(public)}
    lora = {"lora_alpha": 16, "lora_dropout": 0.0, **tables.pop("lora", {})}
    table: Table = {
        **corpus,
        "data": corpus["data"] | {"max_length": 128, "max_heldout": bed.heldout},
        "seed": seed,
        "rounds": bed.rounds,
        "lora": lora,
        "train": {
            "learning_rate": learning_rate,
            "per_device_train_batch_size": bed.batch,
            "max_steps": bed.steps,
        },
        "evaluate": {"every": 1, "sample_tokens": 1},
        "fleet": {"workers": 1},
        **tables,
    }
    return parse(table, cell)


class Runs:
    """Runs of this benchmark, each made once."""

    def __init__(self, cache: Path | None) -> None:
        self.cache = Cache(cache)
        self.console = Console()

    def one(self, config: RunConfig, make: Callable[[RunConfig], Row] = traced) -> Row:
        """Return what `make` finds with a configuration, from the cache where it is there."""
        key = Cache.key(config)
        known = self.cache.find(key)
        if known is not None:
            return known

        row = self.cache.add(key, make(config))
        self.console.print(
            f"{config.data.source}, seed {config.seed}, r {config.lora.r} "
            f"{config.lora.target_modules}, {config.coding.name}: "
            f"{row.get('loss', row.get('why'))} in {row.get('seconds', 0):.0f} s",
            markup=False,
            soft_wrap=True,
        )
        return row


def chosen(config: RunConfig) -> Row:
    """Return the choice within the budget of a configuration, as JSON values."""
    pool = ModelPool(config.model, config.adapter)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    return choose(config, pool, texts)


def by_hand(config: RunConfig) -> list[RunConfig]:
    """Return the configurations of all adapters of the grid, each at the budget."""
    assert config.budget is not None
    pool = ModelPool(config.model, config.adapter)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    costs = Costs(config, config.budget, texts)
    tried = pairs(config.budget, Open.of(config))
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


def measure(cell: str, bed: Bed, runs: Runs) -> list[Row]:
    """Return the rows of one cell: contenders by seed."""
    tuning = {
        rate: runs.one(resolve(cell, bed, rate, 0, lora={"r": 8})) for rate in bed.learning_rates
    }
    rate = min(tuning, key=lambda each: tuning[each]["loss"][-1])
    rows: list[Row] = []

    for seed in range(bed.seeds):
        plain = runs.one(resolve(cell, bed, rate, seed, lora={"r": 8}))
        fixed = runs.one(resolve(cell, bed, rate, seed, lora={"r": 8}, codec=FIXED))
        budget = {
            "up_bytes": int(SHARE * bytes_until(fixed, bed.rounds)["up"]),
            "trial_rounds": bed.trial_rounds,
            "r": list(bed.ranks),
            "target_modules": list(bed.targets),
        }
        config = resolve(cell, bed, rate, seed, budget=budget)
        choice = runs.one(config, chosen)
        own = runs.one(settle(config, choice))
        figures = Figures(cell, seed, rate, plain["loss"][bed.target - 1])
        found = {key: choice[key] for key in ("why", "chosen", "trials")}
        rows += [
            figures.row("uncompressed, r 8", plain),
            figures.row(FIXED_NAME, fixed),
            figures.row("budget", own, **found),
        ]
        if seed == 0:
            rows += [
                figures.row(f"by hand: r {each.lora.r} on {_words(each)}", runs.one(each))
                for each in by_hand(config)
            ]

    return rows


def _words(config: RunConfig) -> str:
    targets = config.lora.target_modules
    return "+".join(targets) if isinstance(targets, tuple) else targets or "q, k, v, o"


def claims(rows: Sequence[Row], cells: Sequence[str]) -> list[Claim]:
    """Return the claims of issue 17 that this bed can decide."""
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


def main() -> None:
    """Run the benchmark and write its report."""
    parser = parser_of("budget", __doc__, quick="few cells and short runs: whether it works")
    parser.add_argument("--cell", action="append")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--full", action="store_true", help="more ranks, targets and trial rounds")
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    started = os.getloadavg()
    bed = QUICK if options.quick else FULL if options.full else Bed()
    if options.seeds:
        bed = replace(bed, seeds=options.seeds)
    cells = options.cell or (("stdlib",) if options.quick else CELLS)
    report = Report("budget", {**asdict(bed), "share": SHARE, "source": SOURCE})
    done = []
    runs = Runs(options.cache)

    for cell in cells:
        if not CORPORA[cell].present:
            report.skip(f"{cell}: its files are not here")
            continue
        report.rows += measure(cell, bed, runs)
        done.append(cell)

    report.claims = claims(report.rows, done)
    report.finish(options.out, started)


if __name__ == "__main__":
    main()
