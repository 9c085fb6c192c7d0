"""Contenders of `benchmarks.fedpipe`: methods, baselines and ablations, on the same sites."""

from dataclasses import dataclass, field
from typing import Any, Literal

RANK = 16
"""Rank of the global adapter of unequal sites, and the largest that a site may get."""
UNIFORM_RANK = 4
"""Largest rank for all weights that every site of the tasks holds."""
SCALE = 1
"""Scale s of every adapter: alpha over rank."""
RATES = (3e-3, 1e-2, 3e-2)
"""Learning rates among which each contender has its best on seed 0."""

Ranks = Literal["equal", "unequal", "planned"]


@dataclass(frozen=True)
class Contender:
    """A method and its settings."""

    ranks: Ranks
    """One rank at all sites, the largest one that each site holds, or those of a plan."""
    aggregation: dict[str, Any]
    planner: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    """Other settings of the method."""

    @property
    def rank(self) -> int:
        """Rank of the run's adapter."""
        return UNIFORM_RANK if self.ranks == "equal" else RANK


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
PLANNED: dict[str, Any] = {"ranks": [2, 4, 8, 16], "batches": [4, 8, 16]}

CONTENDERS: dict[str, Contender] = {
    UNIFORM: Contender("equal", {"mode": "ab-mean", "measure": "always"}),
    FEDPIPE: Contender("planned", {"mode": "svd"}, PLANNED),
    "HetLoRA (pad)": Contender("unequal", {"mode": "pad"}, LARGEST),
    "FlexLoRA (svd of products)": Contender(
        "unequal", {"mode": "svd", "target": "products"}, LARGEST
    ),
    "svd of changes, unequal ranks": Contender("unequal", {"mode": "svd"}, LARGEST),
    "svd of changes, equal ranks": Contender("equal", {"mode": "svd"}),
    "FLoRA (stack)": Contender("equal", {"mode": "stack"}),
    "FedEx-LoRA (residual)": Contender("equal", {"mode": "residual"}),
    "FFA-LoRA": Contender("equal", {"mode": "ffa"}, more={"factors": "B"}),
    "FedPipe, random selection": Contender(
        "planned", {"mode": "svd"}, PLANNED | {"selection": "random"}
    ),
    "FedPipe, uniform selection": Contender(
        "planned", {"mode": "svd"}, PLANNED | {"selection": "uniform"}
    ),
    "FedPipe, no selection": Contender("planned", {"mode": "svd"}, PLANNED | {"selection": "all"}),
    "FedPipe, no rank adaptation": Contender(
        "planned", {"mode": "svd"}, PLANNED | {"ranks": [UNIFORM_RANK]}
    ),
    "FedPipe, no batch adaptation": Contender(
        "planned", {"mode": "svd"}, PLANNED | {"batches": [8]}
    ),
    "FedPipe, ranks by type": Contender(
        "planned", {"mode": "svd"}, PLANNED | {"granularity": "type"}
    ),
}


def configured(
    task: dict[str, Any],
    contender: Contender,
    *,
    seed: int,
    learning_rate: float,
    deadline_s: float | None,
) -> dict[str, Any]:
    """Return the configuration of a run; `deadline_s` is that of planned contenders."""
    method: dict[str, Any] = {"name": "fedavg", "aggregation": contender.aggregation}
    if contender.ranks != "equal":
        method |= {
            "name": "fedpipe",
            "planner": contender.planner,
            "budgets": task["method"]["budgets"],
            "replan_every": 0,
        }
    if contender.ranks == "planned":
        if contender.planner.get("selection", "importance") == "importance":
            method["probe_steps"] = task["method"]["probe_steps"]
        if deadline_s is not None:
            method["deadline_s"] = deadline_s

    return task | {
        "seed": seed,
        "method": method | contender.more,
        "lora": task["lora"] | {"r": contender.rank, "lora_alpha": contender.rank * SCALE},
        "train": task["train"] | {"learning_rate": learning_rate},
    }
