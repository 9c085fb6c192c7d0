"""Table of the held-out measures of each site: the base model, local training and the result."""

from rich.table import Table

from fluvial.formatting import figure, percent, safe_text
from fluvial.report.tables import table
from fluvial.runs.site_comparison import loss_of
from fluvial.storage.run_files import JsonObject

SHARED = "all sites share one held-out set, on which each has the same base and federated model"
"""Note where two of the columns repeat one value."""
MOST = 20
"""Sites of the table on a terminal, the first by name."""


def site_table(run: JsonObject) -> Table | None:
    """Return losses and, where answers were scored, exact match of each site of a finished run;
    None for one site, whose measures are those of the run."""
    rows = run["result"]["heldout_by_site"]
    if len(rows) == 1:
        return None

    local = (run["compare"].get("local", {}).get("result") or {}).get("heldout_by_site", {})
    models = {
        "base": {site: row.get("base") or {} for site, row in rows.items()},
        "local": {site: (local.get(site) or {}).get("final") or {} for site in rows},
        "final": {site: row.get("final") or {} for site, row in rows.items()},
    }
    shown = [name for name in models if name != "local" or local]
    scored = [name for name in shown if any("exact_match" in row for row in models[name].values())]
    score, words = ("exact_match", "exact match") if scored else ("accuracy", "next-token acc.")

    def cells_of(site: str, label: str) -> list[str]:
        return [
            safe_text(label),
            *(figure(loss_of(models[name][site])) for name in shown),
            *(percent(models[name][site].get(score)) for name in scored or shown),
        ]

    repeated = _is_repeated(run["result"])
    if repeated and not local:
        first = next(iter(rows))
        cells = [cells_of(first, f"all {len(rows)} sites (one shared held-out set)")]
    else:
        cells = [cells_of(site, site) for site in list(rows)[:MOST]]
    titles = {"final": "federated"} if run["result"].get("sends_updates") else {}
    headings = [f"{titles.get(name, name)}\nloss" for name in shown]
    headings += [f"{titles.get(name, name)}\n{words}" for name in scored or shown]
    more = len(rows) - MOST if local or not repeated else 0
    notes = [SHARED] if repeated and local else []
    if more > 0:
        notes.append(f"{more} more sites: report.html, and heldout_by_site in result.json")
    return table(
        ["site", *headings],
        cells or [["not measured", *["-"] * len(headings)]],
        "Held-out, by site",
        caption="; ".join(notes),
    )


def _is_repeated(result: JsonObject) -> bool:
    """Return whether all sites have the same measures of the base and of the final model, because
    they measure on the same records."""
    rows = list(result["heldout_by_site"].values())
    one_set = (result.get("overlap") or {}).get("one_set", False)
    return bool(one_set) and all(row == rows[0] for row in rows)
