"""Part "download" of `benchmarks.fedcybgd`: bytes, loss and gradients of each form of download."""

import argparse
import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from statistics import mean

from benchmarks.cgfedllm.bed import Table
from benchmarks.codecs.cache import Cache
from benchmarks.codecs.figures import half_width
from benchmarks.fedcybgd.bed import Found, Job, cosines, resolve
from benchmarks.fedcybgd.contenders import (
    LATIN,
    Bed,
    Cell,
    Contender,
)
from benchmarks.fedcybgd.jobs import EQUAL, FEWER, bed_of, run_all
from benchmarks.report import Claim, Report, Row, show

DRAWS = 4
"""Draws of a stale subset for its cosine."""


# -- download ------------------------------------------------------------------------------------


def _form(name: str, download: Table, codec: Table | None = None) -> Contender:
    """One form, as lossy as it is: the gate refuses nothing."""
    lossy = download["form"] in ("proxy", "stale-subset", "low-bit")
    method = LATIN | {"download": download} | ({"gate": {"threshold": 0}} if lossy else {})
    return Contender(name, method, codec=codec or {"name": "int8"}, falls=True)


THIN: Table = {"form": "proxy", "kept": 0.25, "prune": "neurons and heads"}
"""Without heads, attention alone is more than a quarter."""
EXACT = "cache, int8"
FORMS = (
    _form("full", {"form": "full"}),
    _form("proxy, kept 1", {"form": "proxy", "kept": 1.0, "drop": 0.0}),
    _form("proxy, kept 0.75", {"form": "proxy", "kept": 0.75}),
    _form("proxy, kept 0.5", {"form": "proxy", "kept": 0.5}),
    _form("proxy, kept 0.25", THIN),
    _form("stale subset 0.5", {"form": "stale-subset", "share": 0.5}),
    _form("stale subset 1", {"form": "stale-subset", "share": 1.0}),
    _form("low-bit int8", {"form": "low-bit", "codec": {"name": "int8"}}),
    _form("low-bit nf4", {"form": "low-bit", "codec": {"name": "nf4"}}),
    _form(EXACT, {"form": "cache"}),
    _form("cache, hadamard 1/16", {"form": "cache"}, {"name": "hadamard", "rate": 16}),
    _form("cache, hadamard 1/32", {"form": "cache"}, {"name": "hadamard", "rate": 32}),
)
"""Codecs of the upload that a cache replays; all other forms upload int8."""
QUICK_FORMS = ("proxy, kept 0.5", "stale subset 0.5", EXACT, "cache, hadamard 1/16")
DOWN_COLUMNS = {
    "form": "form",
    "seeds": "seeds",
    "down": "down per visit",
    "down_first": "first cycle",
    "down_last": "last cycle",
    "loss": "loss",
    "loss_half": "+-",
    "cosine_base": "cosine, base",
    "cosine_base_least": "least",
    "cosine_tuned": "cosine, tuned",
    "cosine_tuned_least": "least",
    "why": "",
}


def download_part(
    pool: Executor, cells: Sequence[Cell], report: Report, options: argparse.Namespace
) -> None:
    """Figure 3."""
    bed = replace(bed_of(options), paces=(1.0,), further=0)
    forms = [each for each in FORMS if not options.quick or each.name in QUICK_FORMS]

    for cell in cells:
        found = run_all(
            pool, [Job(cell, form, bed, options.cache, options.deadline) for form in forms], report
        )
        measured = [each for each in found if each.runs and "stopped" not in each.runs[0]]
        seen = [
            pool.submit(
                _cosines, cell, [each.job.contender for each in measured], bed, seed, options
            )
            for seed in range(bed.seeds)
        ]
        gradients = [each.result() for each in seen]
        rows = [_down_row(each) for each in found]

        for place, each in enumerate(measured):
            row = next(row for row in rows if row["form"] == each.job.contender.name)
            row |= _gradients([table[place] for table in gradients if table])

        title = (
            f"{cell.name}: bytes down of a visit, final loss, gradient cosine through the "
            "download (mean, least block)"
        )
        show(title, DOWN_COLUMNS, rows)
        report.rows += [{"part": "download", **row} for row in rows]
        report.claims += down_claims(cell.name, rows)


def _cosines(
    cell: Cell, forms: Sequence[Contender], bed: Bed, seed: int, options: argparse.Namespace
) -> list[Row] | None:
    """Return the cosines of all forms in the state of an exact run's end; remembered like a run."""
    exact = next(form for form in FORMS if form.name == EXACT)
    configs = [resolve(cell, form, bed, pace=1.0, seed=seed) for form in (exact, *forms)]
    cache = Cache(options.cache)
    key = hashlib.sha256(
        f"{DRAWS}{[Cache.key(config) for config in configs]}".encode()
    ).hexdigest()[:16]
    known = cache.find(key)

    if known is None:
        if time.time() >= options.deadline:
            return None
        known = cache.add(
            key, {"cell": cell.name, "seed": seed, "forms": cosines(configs[0], configs[1:], DRAWS)}
        )

    found: list[Row] = known["forms"]
    return found


def _gradients(tables: Sequence[Row]) -> Row:
    """Over the blocks and the seeds."""
    if not tables:
        return {}

    row: Row = {}
    for key in ("cosine_base", "cosine_tuned"):
        values = [value for each in tables for value in each[key]]
        row |= {key: mean(values), f"{key}_least": min(values)}
        row[f"{key}_by_block"] = [
            mean(values) for values in zip(*(each[key] for each in tables), strict=True)
        ]

    return row


def _down_row(each: Found) -> Row:
    runs = [run for run in each.runs if "stopped" not in run]
    row: Row = {"cell": each.job.cell.name, "form": each.job.contender.name, "seeds": len(runs)}
    stopped = next((run["stopped"] for run in each.runs if "stopped" in run), None)
    row |= {"stopped": stopped, "why": "stopped" if stopped else "", "learning_rate": each.best}

    if runs:
        row |= {
            "loss": mean(run["loss"] for run in runs),
            "loss_half": half_width([run["loss"] for run in runs]),
            "losses": [run["loss"] for run in runs],
            "down": mean(sum(run["down"]) / sum(run["visits"]) for run in runs),
            "down_first": mean(run["down"][0] / run["visits"][0] for run in runs),
            "down_last": mean(run["down"][-1] / run["visits"][-1] for run in runs),
            "up": mean(sum(run["up"]) / sum(run["visits"]) for run in runs),
        }

    return row


def down_claims(cell: str, rows: Sequence[Row]) -> list[Claim]:
    """Return the cache against the paper's design, at equal final loss.

    The proxy that is compared is the cheapest one that ends within 0.5 % of the cache; where none
    does, the cheapest of all, which favours the proxy.
    """
    run = {row["form"]: row for row in rows if row["seeds"]}
    proxies = [row for name, row in run.items() if name.startswith("proxy")]
    found = []

    for name in ("cache, int8", "cache, hadamard 1/16", "cache, hadamard 1/32"):
        if name not in run or not proxies:
            continue

        cache = run[name]
        equal = [row for row in proxies if row["loss"] <= cache["loss"] * (1 + EQUAL)]
        other = min(equal or proxies, key=lambda row: row["down"])
        word = "equal in loss" if equal else "worse in loss"
        title = f"{cell}: bytes down of {other['form']} ({word}) over those of {name}"
        found.append(Claim(title, other["down"] / cache["down"], FEWER, "at least"))

        if EXACT in run and name != EXACT:
            over = cache["loss"] / run[EXACT]["loss"] - 1
            found.append(
                Claim(f"{cell}: loss of {name} over {EXACT}, less 1", over, EQUAL, "at most")
            )

    return found
