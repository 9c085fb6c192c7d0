"""One run of a contender on a task: loss, bytes and seconds after each round."""

import json
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.codecs.cache import Cache
from benchmarks.fedpipe import fedadapter
from benchmarks.fedpipe.clock import Ledger, enforced
from benchmarks.fedpipe.contenders import Contender, configured
from benchmarks.fedpipe.hetlora import DECAY, PENALTY, SelfPruning
from benchmarks.report import Row
from fluvial.methods.fedpipe.planner.settings import SiteBudget
from fluvial.methods.measuring import Texts
from fluvial.models.pool import ModelPool
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import texts_of
from fluvial.runs.own import with_own
from fluvial.runs.run import execute

TASKS = Path(__file__).parent / "tasks"
MBIT = 10**6 / 8
"""Bytes of 10^6 bits."""
MEASURES = "evaluate"
"""Task whose bytes belong to the benchmark, not to the contender."""


def read_task(name: str, *, quick: bool = False) -> dict[str, Any]:
    """Return a task; a quick one has two rounds of two steps."""
    task = tomllib.loads((TASKS / f"{name}.toml").read_text(encoding="utf-8"))
    if quick:
        task["rounds"] = 2
        task["train"]["max_steps"] = 2
        task["data"]["max_heldout"] = 2
    return task


def parsed(table: dict[str, Any]) -> RunConfig:
    """Return the configuration of a table, which may name FedAdapter's schedule."""
    return parse(table, "benchmark", kind=with_own([fedadapter.METHOD], []))


@dataclass(frozen=True)
class Bed:
    """The runs of a benchmark, of which earlier ones are taken from a file."""

    cache: Cache
    cached_only: bool = False
    """True to make no new run."""

    def run(
        self,
        task: dict[str, Any],
        contender: Contender,
        *,
        seed: int,
        learning_rate: float,
        deadline_s: float | None = None,
    ) -> Row | None:
        """Return the figures of a run; None for one that would be new under `cached_only`."""
        table = configured(
            task, contender, seed=seed, learning_rate=learning_rate, deadline_s=deadline_s
        )
        key = self.cache.key(parsed(table))
        if contender.self_pruning:
            key += f"-{DECAY}-{PENALTY}"
        row = self.cache.find(key)
        if row is not None or self.cached_only:
            return row
        pruning = SelfPruning() if contender.self_pruning else None
        return self.cache.add(key, measured(table, task["method"]["budgets"], pruning))


def measured(
    table: dict[str, Any], budgets: list[dict[str, Any]], pruning: SelfPruning | None = None
) -> Row:
    """Run a configuration, with the speeds and lines of `budgets`, and return its figures."""
    limits = {budget["site"]: SiteBudget(**budget) for budget in budgets}
    speeds = {site: budget.speed for site, budget in limits.items()}
    with tempfile.TemporaryDirectory() as folder, enforced(speeds, pruning=pruning) as ledger:
        path = Path(folder) / "run"
        first, *_, last = execute(parsed(table), path, texts=_texts)
        records = list(RunFolder(path).metrics())

    result = last.values
    sizes = [_trained_bytes(record) for record in records]
    setup = result["bytes"]["setup"]
    total = setup
    clock = max(ledger.setup.values(), default=0.0)
    total_bytes = []
    seconds = []
    for record, by_site in zip(records, sizes, strict=True):
        total += sum(up + down for up, down in by_site.values())
        clock += _round_s(record["round"], by_site, ledger, limits)
        total_bytes.append(total)
        seconds.append(clock)

    base = result["heldout"]["base"]["loss"]
    plans = first.values.get("plans", {})
    return {
        "losses": [base, *(record["heldout_loss"] for record in records)],
        "bytes": [0, *total_bytes],
        "seconds": [0.0, *seconds],
        "setup_bytes": setup,
        "setup_s": max(ledger.setup.values(), default=0.0),
        "site_s": {
            site: mean(
                _site_s(site, record["round"], by_site[site], ledger, limits)
                for record, by_site in zip(records, sizes, strict=True)
                if site in by_site
            )
            for site in sorted(sizes[0])
        },
        "errors": [record.get("aggregation_error") for record in records],
        "under_training": [record.get("under_training", 0.0) for record in records],
        "worst_site": max(
            (row["final"]["loss"] for row in result["heldout_by_site"].values()), default=None
        ),
        "sizes": [[record["depth"], record["width"]] for record in records if "depth" in record],
        "pruned": dict(pruning.share) if pruning else {},
        "plans": {
            site: {name: plan[name] for name in ("batch", "steps", "checkpointing", "ranks")}
            for site, plan in plans.items()
        },
    }


_TEXTS: dict[str, Texts] = {}
"""Text of earlier runs by the seed and the settings of the data, read and tokenised once."""


def _texts(config: RunConfig, pool: ModelPool) -> Texts:
    """Return the sites' text, of an earlier run where it was the same."""
    table = config.resolved()
    key = json.dumps([table["seed"], table["data"], table["model"]], sort_keys=True)
    if key not in _TEXTS:
        _TEXTS[key] = texts_of(config, pool)
    return _TEXTS[key]


def _trained_bytes(record: Row) -> dict[str, tuple[int, int]]:
    """Return the bytes up and down of each site in a round, without those of measuring."""
    return {
        site: (
            sum(n for kind, n in row.items() if kind.startswith("up ") and MEASURES not in kind),
            sum(n for kind, n in row.items() if kind.startswith("down ") and MEASURES not in kind),
        )
        for site, row in record["bytes"].items()
    }


def _site_s(
    site: str,
    round: int,
    sizes: tuple[int, int],
    ledger: Ledger,
    limits: dict[str, SiteBudget],
) -> float:
    """Return the seconds of a site in a round: its training and its messages on its own line."""
    budget = limits.get(site) or SiteBudget(site=site)
    up, down = sizes
    line_s = (budget.rtt_ms or 0.0) / 1000
    if budget.up_mbit_s:
        line_s += up / (budget.up_mbit_s * MBIT)
    if budget.down_mbit_s:
        line_s += down / (budget.down_mbit_s * MBIT)
    return ledger.rounds.get((site, round), 0.0) + line_s


def _round_s(
    round: int,
    by_site: dict[str, tuple[int, int]],
    ledger: Ledger,
    limits: dict[str, SiteBudget],
) -> float:
    """Return the seconds of a round, which are those of its slowest site."""
    return max(_site_s(site, round, sizes, ledger, limits) for site, sizes in by_site.items())
