"""Seconds for 1,000 sequences by mode and number of sites, as FedSEA-LLaMA's Table 7 has them.

All contenders share the same cores, so a ratio is one per device. In each repetition they run one
after another; a figure is the mean over the repetitions, with its standard deviation.
"""

from statistics import mean, stdev
from typing import Any

from benchmarks.flglm.bed import Outcome, run, table
from benchmarks.report import Claim, Report, Row, show

CLIENTS = (2, 4, 8)
WHOLE = "whole model at the sites (FedAvg)"
BAR_BATCH = 2.0
"""Bar for a client batch of eight sites against sequential steps (paper: 1.41)."""
BAR_STEP = 1.05
"""Bar for split steps of one site against steps of the whole model."""


def contenders() -> dict[str, dict[str, Any]]:
    """Return `[method]` by contender."""
    methods = {
        mode: {"name": "flglm", "mode": mode, "leakage": {"sites": "none"}}
        for mode in ("sequential", "client-batch", "hierarchical")
    }
    return methods | {WHOLE: {"name": "fedavg"}}


def measure(report: Report, *, source: str, length: int, steps: int, repeats: int) -> None:
    """Add rows and claims to `report`: `steps` of one sequence for each site and round."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeats):
        for sites in (1, *CLIENTS):
            for name, method in contenders().items():
                outcome = one(method, sites, source=source, length=length, steps=steps)
                per_thousand = outcome.seconds / (steps * sites) * 1000
                seconds.setdefault((name, sites), []).append(per_thousand)

    rows: list[Row] = [
        {
            "mode": name,
            "clients": sites,
            "seconds": mean(values),
            "deviation": stdev(values) if len(values) > 1 else None,
            "over_sequential": mean(seconds["sequential", sites]) / mean(values),
        }
        for (name, sites), values in seconds.items()
    ]
    report.rows += rows
    columns = {
        "mode": "mode",
        "clients": "sites",
        "seconds": "s for 1,000 sequences",
        "deviation": "standard deviation",
        "over_sequential": "times as fast as sequential",
    }
    show("Modes, all on the same cores", columns, rows)
    batch = mean(seconds["sequential", 8]) / mean(seconds["client-batch", 8])
    step = mean(seconds["sequential", 1]) / mean(seconds[WHOLE, 1])
    report.claims += [
        Claim("client batch of 8 sites over sequential, speed", batch, BAR_BATCH, "at least"),
        Claim("split steps over steps of the whole model, time", step, BAR_STEP, "at most"),
    ]


def one(method: dict[str, Any], sites: int, *, source: str, length: int, steps: int) -> Outcome:
    """Run three rounds of `steps` steps at each site."""
    base = table(source=source, sites=sites, length=length, rounds=3)
    train = base["train"] | {"max_steps": steps}
    return run(base | {"method": method, "train": train})
