"""The tables of a whole run, finished or not, as `fluvial show` prints them."""

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fluvial.formatting import figure, human_bytes, percent, safe_text
from fluvial.report.block_tables import block_schedule, conflict_log, failures
from fluvial.report.result_tables import (
    closing_words,
    cut_words,
    result_table,
    verdict_line,
    with_compared,
)
from fluvial.report.round_lines import round_header, round_line, setup_lines
from fluvial.report.tables import table
from fluvial.runs.verdict import loss_of

CYCLES = 12
SITES = 32
CONFLICTS = 10
"""How much of a long block schedule and of a long conflict log the terminal gets; the page gets
more."""


def run_tables(found: dict[str, Any]) -> Group:
    """All of a run, finished or not."""
    found = _without_controls(found)
    config = found["config"]
    result = found["result"]
    metrics = found["metrics"]
    method = config.get("method", {}).get("name") or (result or {}).get("method", "run")
    parts: list[RenderableType] = []

    if result:
        parts += [Text.from_markup(line) for line in setup_lines(result.get("setup", {}))]
    if metrics:
        parts += [
            Text.from_markup(line) for line in (round_header(method), *map(round_line, metrics))
        ]

    refused = found.get("refused")
    if refused:
        parts.append(Text(f"Refused by the gate: {safe_text(refused['why'])}", style="red"))
    elif result is None:
        state = f"Not finished: {len(metrics)} of {config.get('rounds', '?')} rounds of {method}."
        for name, run in found["compare"].items():
            state += f" Baseline {name}: " + (
                "finished." if run["result"] else f"{len(run['metrics'])} rounds."
            )

        parts.append(Text(f"{state} Go on with --resume.", style="yellow"))
    else:
        parts += [
            Text(),
            result_table(with_compared(found), cut_words(config)),
            verdict_line(found),
            Text(),
            _site_table(found),
        ]
        parts += [Text(), _bytes_table(result)]

    for excerpt in (
        block_schedule(metrics, cycles=CYCLES, sites=SITES),
        conflict_log(metrics, last=CONFLICTS),
    ):
        if excerpt:
            parts += [
                Text(f"\n{excerpt.title}", style="bold")
            ]  # a table's own title wraps to its width
            parts += [
                table(excerpt.headings, excerpt.rows, "", excerpt.left),
                Text(excerpt.words, style="italic dim"),
            ]

    failed = failures(metrics)
    if failed:
        rows = [
            [str(each["round"]), safe_text(each["site"]), each["task"], safe_text(each["reason"])]
            for each in failed
        ]
        parts += [
            Text(),
            table(["round", "site", "task", "reason"], rows, "Missing replies", left=4),
        ]

    if result:
        parts += [Text(), closing_words(result, Path(found["folder"]))]

    return Group(*parts)


def _site_table(found: dict[str, Any]) -> Table:
    local = (found["compare"].get("local", {}).get("result") or {}).get("heldout_by_site", {})
    rows = []
    for site, row in found["result"]["heldout_by_site"].items():
        base, final = (row.get(which) or {} for which in ("base", "final"))
        before = loss_of(base)
        after = loss_of(final)
        change = None if before is None or after is None else after - before
        losses = [figure(before), figure(after), figure(change, "+.4f")]
        losses += [figure(loss_of((local.get(site) or {}).get("final")))] if local else []
        rows.append(
            [safe_text(site), *losses, *(percent(each.get("accuracy")) for each in (base, final))]
        )

    rows = rows or [["not measured", *["-"] * (6 if local else 5)]]
    headings = [
        "site",
        "base loss",
        "final loss",
        "change",
        *(["local only"] if local else []),
        "base acc.",
        "final acc.",
    ]
    return table(headings, rows, "Held-out, by site")


def _bytes_table(result: dict[str, Any]) -> Table:
    rows = [
        [kind, human_bytes(size), f"{size:,}"] for kind, size in result["bytes"]["by_kind"].items()
    ]
    return table(["message", "", "bytes"], rows, "Bytes by kind, all rounds and sites")


def _without_controls(value: Any) -> Any:
    """Return a plain value whose strings hold no characters that could drive a terminal."""
    if isinstance(value, str):
        return safe_text(value)
    if isinstance(value, list):
        return [_without_controls(each) for each in value]
    if isinstance(value, dict):
        return {safe_text(key): _without_controls(each) for key, each in value.items()}
    return value
