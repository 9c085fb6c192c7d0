"""Tables of FedPipe: the plans of its example, and the losses beside the baselines."""

from typing import Any

from table_parts import read, table

from fluvial.formatting import human_bytes

EXAMPLE = "fedpipe.json"
"""The result of `configs/fedpipe.toml`."""


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
