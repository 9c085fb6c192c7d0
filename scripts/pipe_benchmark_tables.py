"""Tables of the benchmark of FedPipe, for `write_tables.py`."""

from typing import Any

from table_parts import cell, claim_table, claims, read, table

LOSSES = ("fedpipe_losses.json", "fedpipe_losses_more.json")
"""Reports of the part "losses", each of other tasks."""
VALUE = "fedpipe_value.json"
PREDICTIONS = "fedpipe_predictions.json"
ENFORCED = "fedpipe_enforced.json"


def pipe_losses() -> str:
    """Return loss, bytes and time of each contender, a table for each task."""
    columns = {
        "contender": "contender",
        "seeds": "seeds",
        "learning_rate": "learning rate",
        "loss": "loss after",
        "deviation": "standard deviation",
        "worst_site": "worst site",
        "bytes": "bytes, all rounds",
        "over_fedpipe": "loss over FedPipe's at equal bytes",
        "over_uniform": "loss over uniform LoRA's at equal bytes",
        "over_uniform_at_s": "loss over uniform LoRA's at equal s",
        "seconds": "s, all rounds",
        "setup_share_of_s": "set-up, share of s",
        "speed": "times sooner at uniform LoRA's loss",
        "speed_without_setup": "the same without set-up",
        "reached": "runs that reach it",
    }
    reports = [read(name) for name in LOSSES]
    measured = [row for report in reports for row in report["rows"]]
    found = []
    for task in dict.fromkeys(row["task"] for row in measured):
        rows = [[_figure(key, row) for key in columns] for row in measured if row["task"] == task]
        found += [f"`{task}`", table([list(columns.values()), *rows])]

    compared = [one for report in reports for one in report["claims"] if _between_methods(one)]
    lines = [line for report in reports for line in report["skipped"]]
    skipped = "\n".join(f"- not measured: {line}" for line in lines)
    return "\n\n".join(each for each in (*found, skipped, claim_table(compared)) if each)


def _between_methods(claim: dict[str, Any]) -> bool:
    """Return whether a claim compares FedPipe with another method, not with a variant of its own or
    with another base."""
    return "over FedPipe" not in claim["name"] and ", base in" not in claim["name"]


def _figure(column: str, row: dict[str, Any]) -> str:
    """Return a figure of the table of losses; losses have as many digits as their spread has."""
    value = row.get(column)
    if value is None or not isinstance(value, float):
        return cell(value)
    if column.startswith("setup_share"):
        return f"{100 * value:.0f} %"
    if column == "learning_rate":
        return f"{value:g}"
    return f"{value:+.3f}" if column.startswith("over_") else f"{value:.3f}"


def pipe_errors() -> str:
    """Return the relative error of each aggregation to the exact mean, by round."""
    measured = [row for name in LOSSES for row in read(name)["rows"]]
    rows = [row for row in measured if row["errors"] and not _planned(row)]
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
        "invariant_by_seed": "by seed",
        "sensitivity": "V, sensitivity",
        "spectral": "V, spectral",
        "size": "parameters alone",
    }
    rows = [[_signed(row[key]) for key in columns] for row in read(VALUE)["rows"]]
    return "\n\n".join((table([list(columns.values()), *rows]), claims(VALUE)))


def _signed(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_signed, value))
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


def pipe_enforced() -> str:
    """Return how sites ended in processes that cannot exceed their memory."""
    rows = [
        [
            "site",
            "limit, MB",
            "ranks of the plan",
            "batch",
            "checkpointing",
            "predicted, MB",
            "grown by, MB",
            "by its plan",
            "grown by, MB, uniform LoRA",
            "under uniform LoRA",
        ]
    ]
    for row in read(ENFORCED)["rows"]:
        least, most = row["ranks"]
        rows.append(
            [
                row["site"],
                "none" if row["limit_mb"] is None else f"{row['limit_mb']:g}",
                f"{least} to {most}",
                str(row["batch"]),
                "yes" if row["checkpointing"] else "no",
                f"{row['predicted_mb']:.0f}",
                f"{row['peak_mb']:.0f}",
                row["outcome"],
                f"{row['uniform_peak_mb']:.0f}",
                row["uniform_outcome"],
            ]
        )
    return "\n\n".join((table(rows), claims(ENFORCED)))
