"""The bed of `benchmarks.budget`: how much is run, configurations, and runs that are made once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cgfedllm.bed import CORPORA, SHARED, Table
from benchmarks.codecs.bed import traced
from benchmarks.codecs.cache import Cache
from benchmarks.report import Row
from fluvial.runs.config import RunConfig, parse

PUBLIC = {
    "shakespeare": "fairytales/train.jsonl",
    "mini_ops": "mini_ops/test.jsonl",
    "babi": "babi/test.jsonl",
}
"""Public text of a corpus, below the data of `SHARED`; the plays for the others. Trials on the text
of the other benchmarks would measure nothing: two of the models were pre-trained on it. The two
sets of questions have their own form, so their test files, of which no site owns a record, are
their public text."""
PLAYS = "shakespeare/train.jsonl"


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
    targets: tuple[str, ...] = ("attention", "all-linear")

    def train(self, learning_rate: float, steps: int | None = None) -> Table:
        """Return the settings of training, with `steps` of a round, which None leaves open."""
        fixed = {} if steps is None else {"max_steps": steps}
        return {"learning_rate": learning_rate, "per_device_train_batch_size": self.batch, **fixed}

    @property
    def divisions(self) -> tuple[int, ...]:
        """Return the steps of a round of runs with equal steps in all, the fewest first."""
        return tuple(
            n for n in (self.steps, 2 * self.steps, 4 * self.steps) if 2 * n <= self.all_steps
        )

    @property
    def all_steps(self) -> int:
        """Return the steps of a site in a run."""
        return self.rounds * self.steps


FULL = Bed(
    seeds=3,
    learning_rates=(2e-3, 4e-3, 8e-3),
    trial_rounds=8,
    ranks=(1, 2, 4, 8, 16),
    targets=("q_proj+v_proj", "attention", "all-linear"),
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
    """Return the configuration of one run, with further `tables`; settings that are None are left
    open."""
    corpus = CORPORA[cell].tables()
    if (folder := CORPORA[cell].folder) is not None:
        public = SHARED / "data" / PUBLIC.get(folder, PLAYS)
        corpus["data"] |= {"public_source": str(public)}
        if folder in PUBLIC:
            corpus["data"].pop("public", None)  # its own questions are read as those of the sites
    lora = {"lora_alpha": 16, "lora_dropout": 0.0, **tables.pop("lora", {})}
    table: Table = {
        **corpus,
        "data": corpus["data"] | {"max_length": 128, "max_heldout": bed.heldout},
        "seed": seed,
        "rounds": bed.rounds,
        "lora": lora,
        "train": bed.train(learning_rate, bed.steps),
        "evaluate": {"every": 1, "sample_tokens": 1},
        "fleet": {"workers": 1},
        **tables,
    }
    return parse({name: value for name, value in table.items() if value is not None}, cell)


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
