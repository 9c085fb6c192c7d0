"""Table of how unequal the sites' held-out losses are, round by round."""

from collections.abc import Sequence

from fluvial.formatting import safe_text
from fluvial.report.block_tables import Excerpt
from fluvial.storage.run_files import JsonObject


def fairness_by_round(metrics: Sequence[JsonObject], *, rounds: int) -> Excerpt | None:
    """Return the worst site and the spread of the held-out losses in the last `rounds` measured
    rounds, and the first one; None where `evaluate.every` measured none of several sites."""
    records = [record for record in metrics if record.get("heldout_spread")]
    if not records:
        return None

    last = records[-rounds:]
    shown = last if records[0] in last else [records[0], *last]
    rows = [
        [
            str(record["round"]),
            f"{record['heldout_loss']:.4f}",
            safe_text(record["heldout_worst_site"]),
            f"{record['heldout_worst_loss']:.4f}",
            f"{record['heldout_spread']:.4f}",
        ]
        for record in shown
    ]
    left_out = (
        f" {len(records) - len(shown)} rounds are not shown." if len(records) > len(shown) else ""
    )
    words = (
        "Held-out loss of the global model, nats per label token: mean over the sites, largest of "
        f"a site, and the difference between the largest and the smallest.{left_out}"
    )
    headings = ["round", "mean", "worst site", "its loss", "spread"]
    return Excerpt("Fairness, by round", headings, rows, left=1, words=words)
