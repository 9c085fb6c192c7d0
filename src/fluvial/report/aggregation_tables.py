"""Table of what the aggregation of adapters lost, module by module."""

from collections.abc import Sequence

from fluvial.formatting import percent, safe_text
from fluvial.report.block_tables import Excerpt
from fluvial.storage.run_files import JsonObject


def aggregation_by_module(metrics: Sequence[JsonObject], *, modules: int) -> Excerpt | None:
    """Return the error of the aggregate of the first `modules`, of falling error in the last round;
    None where it was not measured."""
    records = [record for record in metrics if "aggregation_error_by_module" in record]
    if not records:
        return None

    first, last = records[0], records[-1]
    errors = last["aggregation_error_by_module"]
    names = sorted(errors, key=lambda name: (-errors[name], name))
    rows = [
        [
            safe_text(name),
            percent(first["aggregation_error_by_module"].get(name)),
            percent(errors[name]),
            percent(last["retained_energy_by_module"][name]),
        ]
        for name in names[:modules]
    ]
    left_out = f" {len(names) - modules} modules are not shown." if len(names) > modules else ""
    words = (
        "Distance of what sites received from the exact mean of the products B A, relative to "
        f"the latter. Mean over all modules of the last measured round, {last['round']}: "
        f"{percent(last['aggregation_error'])}.{left_out}"
    )
    headings = [
        "module",
        f"error, round {first['round']}",
        f"error, round {last['round']}",
        f"energy retained, round {last['round']}",
    ]
    return Excerpt("Aggregation, by module", headings, rows, left=1, words=words)
