"""Tables of FedPipe: the plans and losses of its example, and choices of weights at equal bytes."""

from typing import Any

from table_parts import cell, claims, read, table

from fluvial.formatting import human_bytes

EXAMPLE = "fedpipe.json"
"""The result of `configs/fedpipe.toml`."""
SELECTION = "fedpipe_selection.json"


def example_plans() -> str:
    """Return what each site of the example trains, and the losses beside the baselines."""
    result = read(EXAMPLE)
    heading = [
        "site",
        "weights",
        "ranks",
        "batch",
        "steps",
        "checkpointing",
        "predicted memory",
        "up in a round",
        "change of held-out loss",
    ]
    rows = [heading]
    for site, plan in result["setup"]["plans"].items():
        ranks = list(plan["ranks"].values())
        loss = result["heldout_by_site"][site]
        rows.append(
            [
                site,
                str(len(ranks)),
                f"{min(ranks)} to {max(ranks)}",
                str(plan["batch"]),
                str(plan["steps"]),
                "yes" if plan["checkpointing"] else "no",
                human_bytes(plan["prediction"]["memory_bytes"]),
                human_bytes(plan["prediction"]["bytes_up"]),
                f"{loss['final']['loss'] - loss['base']['loss']:+.4f}",
            ]
        )

    return f"{_losses(result)}\n\n{table(rows)}"


def _losses(result: dict[str, Any]) -> str:
    """Return the held-out losses and the bytes of the example as a sentence."""
    heldout = result["heldout"]
    fedavg = result["compare"]["fedavg"]["bytes"]
    sent = result["bytes"]
    up = sent["up"] + sent["setup_up"]
    return (
        f"Held-out loss, mean over {result['sites']} sites after {result['rounds']} rounds: "
        f"{heldout['base']['loss']:.4f} for the base, {heldout['local']['loss']:.4f} for each site "
        f"alone, {heldout['fedavg']['loss']:.4f} for FedAvg without limits, "
        f"{heldout['final']['loss']:.4f} for FedPipe within the limits. Bytes up, set-up included: "
        f"{human_bytes(up)} against {human_bytes(fedavg['up'])}. One seed."
    )


def selections() -> str:
    """Return choices of weights at equal bytes."""
    given = read(SELECTION)
    columns = {
        "selection": "choice",
        "loss": "held-out loss",
        "deviation": "standard deviation",
        "worst": "change at the worst site",
        "bytes_up": "bytes up",
        "overlap": "better half in common between seeds",
    }
    rows = [[cell(row[key]) for key in columns] for row in given["rows"]]
    settings = given["settings"]
    words = (
        f"{settings['rounds']} rounds, {settings['seeds']} seeds, {settings['memory_mb']:g} MB at "
        f"every site (`python -m benchmarks.fedpipe.selection --rounds {settings['rounds']} "
        f"--seeds {settings['seeds']}`)."
    )
    return "\n\n".join((words, table([list(columns.values()), *rows]), claims(SELECTION)))
