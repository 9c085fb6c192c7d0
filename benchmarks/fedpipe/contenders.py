"""Contenders of `benchmarks.fedpipe`: methods, baselines and ablations, on the same sites."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

LARGEST_RANK = 16
"""Rank of the global adapter of contenders that use each site's memory for rank."""
UNIFORM_RANK = 4
"""Largest rank for all weights that every site of the tasks holds."""
SCALE = 1
"""Scale s of every adapter: alpha over rank."""
MORE_ROUNDS = 2
"""Rounds of a planned or scheduled contender for each round of the others: its rounds are shorter,
and what counts is the loss at equal bytes and at equal seconds."""
RATES = (3e-3, 1e-2, 3e-2)
"""Learning rates among which each contender has its best on seed 0."""

FULL_RATES = (1e-3, 3e-3, 1e-2)
"""The same where all weights are tuned, which bear smaller ones."""

Ranks = Literal["equal", "unequal", "planned", "scheduled", "none"]


@dataclass(frozen=True)
class Contender:
    """A method and its settings."""

    ranks: Ranks
    """One rank at all sites, the largest one that each site holds, those of a plan, those of
    FedAdapter's schedule, or none, because all weights are tuned."""
    aggregation: dict[str, Any]
    planner: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    """Other settings of the method."""
    rank: int = UNIFORM_RANK
    """Rank of the run's adapter: that of all sites, or the largest one that a site may get."""
    base: dict[str, Any] = field(default_factory=dict)
    """Settings of the base model in the place of the task's."""
    self_pruning: bool = False
    """True for HetLoRA's self-pruning at the sites."""
    late: bool = False
    """True for a plan without the deadline of the other planned contenders."""
    rates: tuple[float, float, float] = RATES
    """Learning rates among which it has its best, in rising order."""
    like: str | None = None
    """Contender whose best learning rate this one has too; None for one with a search of its
    own."""


UNIFORM = "uniform LoRA (FedIT)"
FEDPIPE = "FedPipe"
LARGEST: dict[str, Any] = {
    "selection": "all",
    "ranks": [2, 4, 8, 16],
    "batches": [8],
    "eighths": [8],
    "checkpointing": "never",
}
"""The planner as a rule: the largest rank for all weights that the site's memory holds."""
MEANS: dict[str, Any] = {"mode": "ab-mean", "measure": "always"}
"""Means of A and of B, with their error measured."""
PLANNED: dict[str, Any] = {"ranks": [2, 4], "batches": [4, 8, 16]}
"""The choices of the planner. Beside ranks up to 16, FedPipe gave all but a few weights 2 or 4, and
each site's time for the side path of rank 16 went from its steps."""

SCHEDULE: dict[str, Any] = {"depth": 1, "width": 2, "interval": 2}
"""FedAdapter's schedule, the best of those that were tried on seed 0 of mini_ops."""


def _fedpipe(*, mode: str = "svd", base: dict[str, Any] | None = None, **planner: Any) -> Contender:
    """Return FedPipe with one thing that is other."""
    return Contender(
        "planned",
        {"mode": mode},
        PLANNED | planner,
        rank=max((PLANNED | planner)["ranks"]),
        base=base or {},
        like=FEDPIPE,
    )


def _largest(mode: str, *, self_pruning: bool = False, **aggregation: str) -> Contender:
    """Return a contender with the largest rank that each site holds."""
    return Contender(
        "unequal",
        {"mode": mode, **aggregation},
        LARGEST,
        rank=LARGEST_RANK,
        self_pruning=self_pruning,
    )


def _uniform(**base: Any) -> Contender:
    """Return uniform LoRA over another base."""
    return Contender("equal", MEANS, base=base, like=UNIFORM)


WIDE = replace(_fedpipe(ranks=[2, 4, 8, LARGEST_RANK]), like=None)
"""FedPipe whose global adapter has the rank of those that use each site's memory for rank."""

CONTENDERS: dict[str, Contender] = {
    UNIFORM: Contender("equal", MEANS),
    FEDPIPE: Contender("planned", {"mode": "svd"}, PLANNED),
    "uniform LoRA, rank 2": Contender("equal", MEANS, rank=2),
    "uniform LoRA, rank 8": Contender("equal", MEANS, rank=8),
    "HetLoRA": _largest("pad", self_pruning=True),
    "HetLoRA without self-pruning": _largest("pad"),
    "FlexLoRA (svd of products)": _largest("svd", target="products"),
    "svd of changes, unequal ranks": _largest("svd"),
    "svd of changes, equal ranks": Contender("equal", {"mode": "svd"}),
    "FLoRA (stack)": Contender("equal", {"mode": "stack"}),
    "FedEx-LoRA (residual)": Contender("equal", {"mode": "residual"}),
    "FFA-LoRA": Contender("equal", {"mode": "ffa"}, more={"factors": "B"}),
    "FedAdapter's schedule over LoRA": Contender("scheduled", {}, more=SCHEDULE),
    "all weights (vanilla fine-tuning)": Contender("none", {}, rates=FULL_RATES),
    "FedPipe, no deadline": replace(_fedpipe(), late=True),
    "FedPipe over FFA": Contender("planned", {"mode": "ffa"}, PLANNED, more={"factors": "B"}),
    "FedPipe, ranks up to 16": WIDE,
    "FedPipe, ranks up to 16, no deadline": replace(WIDE, late=True),
    "FedPipe, ranks up to 16, short set-up": replace(
        WIDE, planner=WIDE.planner | {"batches": [4, 8]}, more={"probe_steps": 2}
    ),
    "FedPipe, ranks up to 16, over FFA": replace(
        WIDE, aggregation={"mode": "ffa"}, more={"factors": "B"}
    ),
    "FedPipe, random selection": _fedpipe(selection="random"),
    "FedPipe, uniform selection": _fedpipe(selection="uniform"),
    "FedPipe, no selection": _fedpipe(selection="all"),
    "FedPipe, no rank adaptation": _fedpipe(ranks=[UNIFORM_RANK]),
    "FedPipe, no batch adaptation": _fedpipe(batches=[8]),
    "FedPipe, ranks by type": _fedpipe(granularity="type"),
    "FedPipe, mode pad": _fedpipe(mode="pad"),
    "uniform LoRA, base in bf16": _uniform(dtype="bfloat16"),
    "uniform LoRA, base in int8": _uniform(quantization="int8"),
    "uniform LoRA, base in NF4": _uniform(quantization="nf4"),
    "FedPipe, base in int8": _fedpipe(base={"quantization": "int8"}),
    "FedPipe, base in NF4": _fedpipe(base={"quantization": "nf4"}),
}
"""Contenders in the order of the table: the paper's method and the usual one, baselines, ablations,
formats of the base."""


def configured(
    task: dict[str, Any],
    contender: Contender,
    *,
    seed: int,
    learning_rate: float,
    deadline_s: float | None,
) -> dict[str, Any]:
    """Return the configuration of a run; `deadline_s` is that of planned contenders."""
    method: dict[str, Any] = {"name": "fedavg"}
    if contender.aggregation:
        method["aggregation"] = contender.aggregation
    if contender.ranks == "scheduled":
        method["name"] = "fedadapter"
    if contender.ranks in ("unequal", "planned"):
        method |= {
            "name": "fedpipe",
            "planner": contender.planner,
            "budgets": task["method"]["budgets"],
            "replan_every": 0,
        }
    if contender.ranks == "planned":
        if contender.planner.get("selection", "importance") == "importance":
            method["probe_steps"] = task["method"]["probe_steps"]
        if deadline_s is not None and not contender.late:
            method["deadline_s"] = deadline_s

    longer = contender.ranks in ("planned", "scheduled")
    table = task | {
        "rounds": task["rounds"] * (MORE_ROUNDS if longer else 1),
        "seed": seed,
        "model": task.get("model", {}) | contender.base,
        "method": method | contender.more,
        "lora": task["lora"] | {"r": contender.rank, "lora_alpha": contender.rank * SCALE},
        "train": task["train"] | {"learning_rate": learning_rate},
    }
    if contender.ranks == "none":
        del table["lora"]
        table["tune"] = "full"
    return table
