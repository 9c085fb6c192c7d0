"""Tables and lines about a choice within a budget: its reason, and the trials that led to it."""

import json

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from fluvial.formatting import figure, human_bytes, human_seconds, safe_text
from fluvial.report.block_tables import Excerpt
from fluvial.report.tables import table
from fluvial.storage.run_files import JsonObject

HEADINGS = [
    "adapter on",
    "codec",
    "downlink",
    "rank",
    "steps",
    "rate",
    "frame",
    "up",
    "down",
    "time",
    "rounds",
    "loss",
]
LINES = 3
"""Trials that a run prints: the best."""


def budget_lines(setup: JsonObject) -> list[str]:
    """Return the reason for a choice and the best trials, with rich markup; none without one."""
    choice = setup.get("budget")
    if choice is None:
        return []

    rows = _rows(choice)[:LINES]
    return [
        f"budget: {escape(safe_text(choice['why']))}",
        *(
            f"  loss {row['loss']} after {row['rounds']} rounds: rank {row['rank']} on "
            f"{escape(row['adapter on'])}, {row['steps']} steps, {escape(row['codec'])} "
            f"{row['rate']}, downlink {escape(row['downlink'])}, {row['up']} up and {row['down']} "
            "down in the run"
            for row in (dict(zip(HEADINGS, cells, strict=True)) for cells in rows)
        ),
    ]


def budget_table(choice: JsonObject) -> Group:
    """Return a choice with all its trials."""
    content: list[RenderableType] = []
    rows = _rows(choice)
    if rows:
        content.append(table(HEADINGS, rows, "Trials on public text; bytes of a site in the run"))
    content.append(Text(f"• {safe_text(choice['why'])}"))
    content += [
        Text(f"• to keep it, in the place of [budget]: {line}")
        for line in _settings(choice["chosen"])
    ]
    return Group(*content)


def budget_trials(setup: JsonObject) -> Excerpt | None:
    """Return the trials of a choice for the page; None without any."""
    choice = setup.get("budget")
    if choice is None or not choice["trials"]:
        return None

    return Excerpt(
        "Trials within the budget",
        HEADINGS,
        _rows(choice),
        left=3,
        words=f"{safe_text(choice['why'])}. Bytes and time are those of a site in the whole run. "
        f"Losses are of text that was held out from {choice['sites']} simulated sites, by rounds; "
        "a trial of fewer rounds was ended because others were better.",
    )


def _rows(choice: JsonObject) -> list[list[str]]:
    """Return a row for each trial, those that went on longest first, by loss."""

    def order(trial: JsonObject) -> tuple[float, float]:
        loss = float("inf") if trial["loss"] is None else trial["loss"]
        return -trial["rounds"] / trial["of_rounds"], loss

    return [
        [
            safe_text(trial["target_modules"]) + (" (chosen)" if trial["chosen"] else ""),
            safe_text(trial["codec"]),
            _downlink(trial),
            str(trial["r"]),
            "-" if trial["max_steps"] is None else str(trial["max_steps"]),
            f"1/{trial['rate']:.3g}",
            human_bytes(trial["frame_bytes"]),
            human_bytes(trial["up_bytes"]),
            human_bytes(trial["down_bytes"]),
            "-" if trial["run_s"] is None else human_seconds(trial["run_s"]),
            str(trial["rounds"]),
            figure(trial["loss"]),
        ]
        for trial in sorted(choice["trials"], key=order)
    ]


def _downlink(trial: JsonObject) -> str:
    """Return the codec of a trial's downlink, with its rate if it codes."""
    name = safe_text(trial["downlink"])
    return name if name == "exact" else f"{name} 1/{trial['down_rate']:.3g}"


def _settings(chosen: JsonObject) -> list[str]:
    """Return the chosen settings as lines of TOML."""
    tables = {"target_modules": "lora.", "r": "lora.", "max_steps": "train.", "rounds": ""}
    lines = [
        f"{tables[name]}{name} = {_toml(value)}"
        for name, value in chosen.items()
        if name in tables and value is not None
    ]
    return lines + [
        f"{table}.{name} = {_toml(value)}"
        for table in ("codec", "downlink")
        for name, value in (chosen.get(table) or {}).items()
    ]


def _toml(value: object) -> str:
    """Return a value as TOML writes it; JSON is the same for texts, numbers and lists of these."""
    return json.dumps(value)
