"""Choices of weights and ranks at equal bytes: by three scores, uniform, and random.

    python -m benchmarks.fedpipe.selection [--rounds N] [--seeds N] [--quick] [--out FILE.json]

Every site of the embedded task has the same memory, which has room for about a tenth of the
adapter at full rank, so that the choice matters. Each seed draws the initial adapter, the order of
the data and the random ranks.
"""

import os
import tempfile
import tomllib
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show
from fluvial.methods.fedpipe.importance import overlap
from fluvial.runs.config import parse
from fluvial.runs.run import execute

MEMORY_MB = 17.0
"""Memory of a site, in 10^6 bytes; the base and four sequences of 64 tokens take nearly all."""
CONTENDERS: dict[str, dict[str, Any]] = {
    "importance, invariant": {"importance": "invariant"},
    "importance, sensitivity": {"importance": "sensitivity"},
    "importance, spectral": {"importance": "spectral"},
    "uniform": {"planner": {"selection": "uniform"}},
    "random": {"planner": {"selection": "random"}},
}
BAR_OVERLAP = 0.7
"""Share of the better half of the weights that the scores of two seeds have in common."""


def table(contender: str, *, seed: int, rounds: int, sites: list[str]) -> dict[str, Any]:
    """Return the configuration of one run."""
    path = Path(__file__).parents[2] / "configs" / "fedpipe.toml"
    stored = tomllib.loads(path.read_text(encoding="utf-8"))
    change = CONTENDERS[contender]
    planner = {"objective": "value", "batches": [4], "checkpointing": "never", "eighths": [8]}
    method: dict[str, Any] = {
        "name": "fedpipe",
        "replan_every": 0,
        "budgets": [{"site": site, "memory_mb": MEMORY_MB, "tokens_s": 1e4} for site in sites],
        "planner": planner | change.get("planner", {}),
    }
    if "importance" in change:
        method |= {"importance": change["importance"], "probe_steps": 8}

    data = {name: value for name, value in stored["data"].items() if name != "sites"}
    return {key: stored[key] for key in ("model", "lora", "train")} | {
        "data": data,
        "seed": seed,
        "rounds": rounds,
        "method": method,
        "evaluate": {"sample_tokens": 1},
    }


def run(configuration: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a run in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        *_, last = execute(parse(configuration, "benchmark"), Path(folder) / "run")
        return last.values


def measure(report: Report, *, seeds: int, rounds: int) -> None:
    """Add rows and claims to `report`."""
    sites = ["archives", "asyncio", "email", "numbers", "processes", "unittest", "web", "xml"]
    losses: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    worst: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    sizes: dict[str, list[int]] = {name: [] for name in CONTENDERS}
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}

    for seed in range(seeds):
        for name in CONTENDERS:
            result = run(table(name, seed=seed, rounds=rounds, sites=sites))
            losses[name].append(result["heldout"]["final"]["loss"])
            gains = [
                row["final"]["loss"] - row["base"]["loss"]
                for row in result["heldout_by_site"].values()
            ]
            worst[name].append(max(gains))
            sizes[name].append(result["bytes"]["by_kind"]["up train"])
            if "scores" in result["setup"]:
                scores[name].append(result["setup"]["scores"])

    rows: list[Row] = [
        {
            "selection": name,
            "loss": mean(losses[name]),
            "deviation": stdev(losses[name]) if seeds > 1 else None,
            "worst": mean(worst[name]),
            "bytes_up": round(mean(sizes[name])),
            "overlap": _overlap(scores[name]),
        }
        for name in CONTENDERS
    ]
    report.rows += rows
    columns = {
        "selection": "choice",
        "loss": "held-out loss",
        "deviation": "standard deviation",
        "worst": "change of the loss at the worst site",
        "bytes_up": "bytes up",
        "overlap": "common half between seeds",
    }
    show("Choices of weights at equal bytes", columns, rows)

    best = "importance, invariant"
    for other in ("uniform", "random"):
        gain = mean(losses[other]) - mean(losses[best])
        claim = f"loss of the {other} choice above that of the invariant score, nats"
        report.claims.append(Claim(claim, gain, 0.0, "at least"))
    report.claims.append(
        Claim(
            "better half of the weights that two seeds have in common, invariant score",
            _overlap(scores[best]),
            BAR_OVERLAP,
            "at least",
        )
    )


def _overlap(scores: list[dict[str, float]]) -> float | None:
    """Return the mean share of the better half that two seeds have in common; None for one."""
    shares = [overlap(one, other, len(one) // 2) for one, other in combinations(scores, 2)]
    return mean(shares) if shares else None


def main() -> None:
    """See the module."""
    parser = parser_of("fedpipe.selection", __doc__, quick="one round, one seed")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each run")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each choice")
    options = parser.parse_args()
    load = os.getloadavg()
    rounds, seeds = (1, 1) if options.quick else (options.rounds, options.seeds)
    report = Report("fedpipe", {"rounds": rounds, "seeds": seeds, "memory_mb": MEMORY_MB})
    measure(report, seeds=seeds, rounds=rounds)
    report.finish(options.out, load)


if __name__ == "__main__":
    main()
