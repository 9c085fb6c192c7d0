"""Tables of the benchmark of FedPipe, for `write_tables.py`."""

from typing import Any

from table_parts import cell, claims, read, table

LOSSES = "fedpipe_losses.json"
PRESENT = "fedpipe_mini_ops.json"
"""One task and one seed, by the present planner."""
VALUE = "fedpipe_value.json"
PREDICTIONS = "fedpipe_predictions.json"


def pipe_losses() -> str:
    """Return loss, bytes and time of each contender on each task, by an earlier planner."""
    return _losses(LOSSES)


def pipe_present() -> str:
    """Return loss, bytes and time of the contenders of which the present planner has runs."""
    return _losses(PRESENT)


def _losses(name: str) -> str:
    columns = {
        "task": "task",
        "contender": "contender",
        "seeds": "seeds",
        "learning_rate": "learning rate",
        "rates": "rates tried",
        "loss": "loss after",
        "deviation": "standard deviation",
        "worst_site": "worst site",
        "bytes": "bytes, all rounds",
        "over_fedpipe": "loss over FedPipe's at equal bytes",
        "over_uniform": "loss over uniform LoRA's at equal bytes",
        "over_uniform_at_s": "loss over uniform LoRA's at equal s",
        "seconds": "s, all rounds",
        "setup_share_of_s": "set-up, share of s",
        "setup_share_of_bytes": "set-up, share of bytes",
        "speed": "times sooner at uniform LoRA's loss",
        "speed_without_setup": "the same without set-up",
        "reached": "runs that reach it",
    }
    given = read(name)
    columns = {key: words for key, words in columns.items() if key in given["rows"][0]}
    rows = [[_figure(key, row) for key in columns] for row in given["rows"]]
    skipped = "".join(f"- not measured: {line}\n" for line in given["skipped"])
    return "\n\n".join(
        each
        for each in (table([list(columns.values()), *rows]), skipped.rstrip(), claims(name))
        if each
    )


def _figure(column: str, row: dict[str, Any]) -> str:
    """Return a figure of the table of losses; losses have as many digits as their spread has."""
    value = row.get(column)
    if column == "rates" and row["like"]:
        return f"as {row['like']}"
    if value is None or not isinstance(value, float):
        return cell(value)
    if column.startswith("setup_share"):
        return f"{100 * value:.0f} %"
    if column == "learning_rate":
        return f"{value:g}"
    return f"{value:+.3f}" if column.startswith("over_") else f"{value:.3f}"


def pipe_errors() -> str:
    """Return the relative error of each aggregation to the exact mean, by round."""
    rows = [row for row in read(LOSSES)["rows"] if row["errors"] and not _planned(row)]
    rounds = max(len(row["errors"]) for row in rows)
    heading = ["task", "contender", *(f"round {n}" for n in range(1, rounds + 1)), "loss after"]
    return table(
        [
            heading,
            *(
                [
                    row["task"],
                    row["contender"],
                    *(cell(float(f"{error:.3g}")) for error in row["errors"]),
                    cell(row["loss"]),
                ]
                for row in rows
            ),
        ]
    )


def _planned(row: dict[str, Any]) -> bool:
    """Return whether a row is FedPipe's, or an ablation of it."""
    return bool(row["contender"].startswith("FedPipe"))


def pipe_value() -> str:
    """Return the rank correlations of the planner's value with the loss that is saved."""
    columns = {
        "task": "task",
        "draw": "random adapters",
        "draws": "number",
        "invariant": "V, invariant score",
        "sensitivity": "V, sensitivity",
        "spectral": "V, spectral",
        "size": "parameters alone",
    }
    rows = [[_signed(row[key]) for key in columns] for row in read(VALUE)["rows"]]
    return "\n\n".join((table([list(columns.values()), *rows]), claims(VALUE)))


def _signed(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else cell(value)


def pipe_predictions() -> str:
    """Return memory and time of plans, predicted and measured."""
    columns = {
        "case": "plan",
        "memory_mb": "predicted, MB",
        "peak_mb": "measured, MB",
        "memory_off": "off",
        "process_mb": "whole process, MB",
        "predicted_s": "predicted, s",
        "measured_s": "measured, s",
        "time_off": "off",
    }
    rows = [
        [f"{100 * row[key]:+.1f} %" if key.endswith("_off") else cell(row[key]) for key in columns]
        for row in read(PREDICTIONS)["rows"]
    ]
    return "\n\n".join((table([list(columns.values()), *rows]), claims(PREDICTIONS)))
