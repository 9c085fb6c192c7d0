"""The tables of a whole run, finished or not, as `fluvial show` prints them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fluvial.formatting import human_bytes, safe_text
from fluvial.report.block_tables import block_schedule, conflict_log, failures
from fluvial.report.cross_site import cross_site_table
from fluvial.report.harness_table import run_tasks
from fluvial.report.leakage_tables import leakage_by_attack
from fluvial.report.result_tables import (
    closing_words,
    result_table,
    verdict_line,
    with_compared,
)
from fluvial.report.round_lines import round_header, round_line, setup_lines
from fluvial.report.round_times import round_times
from fluvial.report.site_plans import predicted_by_site
from fluvial.report.site_tables import site_table
from fluvial.report.tables import table
from fluvial.storage.run_files import JsonObject, setup_of

CYCLES = 12
"""Number of cycles of a block schedule on the terminal: the last ones."""
SITES = 32
"""Number of sites of a block schedule on the terminal."""
CONFLICTS = 10
"""Number of entries of a conflict log on the terminal: the last ones."""


def run_tables(run: JsonObject) -> Group:
    """Return all tables of a run, finished or not."""
    run = _safe_values(run)
    result = run["result"]
    metrics = run["metrics"]
    method = run["config"].get("method", {}).get("name") or (result or {}).get("method", "run")
    content: list[RenderableType] = []

    content += [Text(line, style="red") for line in run["damaged"]]
    content += [Text.from_markup(line) for line in setup_lines(setup_of(run))]
    if metrics:
        content += [
            Text.from_markup(line) for line in (round_header(method), *map(round_line, metrics))
        ]

    content += _outcome(run, method)

    for excerpt in (
        block_schedule(metrics, cycles=CYCLES, sites=SITES),
        conflict_log(metrics, last=CONFLICTS),
        cross_site_table(result or {}),
        leakage_by_attack(result or {}),
        predicted_by_site(metrics),
        round_times(metrics),
    ):
        if excerpt:
            # The title stands outside of the table, which would wrap it to its own width.
            content += [
                Text(f"\n{excerpt.title}", style="bold"),
                table(excerpt.headings, excerpt.rows, "", excerpt.left),
                Text(excerpt.words, style="italic dim"),
            ]

    if missing := failures(metrics):
        content += [Text(), _missing_table(missing)]
    if result:
        content += [Text(), closing_words(result, Path(run["folder"]))]

    return Group(*content)


def _outcome(run: JsonObject, method: str) -> list[RenderableType]:
    """Return the result tables of a finished run, else one line on its state."""
    if refused := run.get("refused"):
        return [Text(f"Refused by the gate: {safe_text(refused['why'])}", style="red")]

    if run["result"] is None:
        rounds = run["config"].get("rounds", "?")
        metrics = run["metrics"]
        if metrics and "stopped" in metrics[-1]:
            return [Text(f"Stopped: {safe_text(metrics[-1]['stopped'])}", style="red")]

        state = f"Not finished: {len(metrics)} of {rounds} rounds of {method}."
        for name, baseline in run["compare"].items():
            done = "finished" if baseline["result"] else f"{len(baseline['metrics'])} rounds"
            state += f" Baseline {name}: {done}."

        return [Text(f"{state} Continue with --resume.", style="yellow")]

    sites = site_table(run)
    by_site: list[RenderableType] = [] if sites is None else [sites, Text()]
    return [
        Text(),
        result_table(with_compared(run), run["config"]),
        verdict_line(run),
        Text(),
        *by_site,
        _bytes_table(run["result"]),
        *run_tasks(run["result"]),
    ]


def _missing_table(missing: Sequence[JsonObject]) -> Table:
    rows = [
        [str(reply["round"]), safe_text(reply["site"]), reply["task"], safe_text(reply["reason"])]
        for reply in missing
    ]
    return table(["round", "site", "task", "reason"], rows, "Missing replies", left=4)


def _bytes_table(result: JsonObject) -> Table:
    rows = [
        [kind, human_bytes(size), f"{size:,}"] for kind, size in result["bytes"]["by_kind"].items()
    ]
    return table(["message", "", "bytes"], rows, "Bytes by kind, all rounds and sites")


def _safe_values(value: Any) -> Any:
    """Return JSON values whose strings cannot drive a terminal."""
    if isinstance(value, str):
        return safe_text(value)
    if isinstance(value, list):
        return [_safe_values(item) for item in value]
    if isinstance(value, dict):
        return {safe_text(key): _safe_values(item) for key, item in value.items()}
    return value
