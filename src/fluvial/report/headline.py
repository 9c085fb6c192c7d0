"""The top of a run's page: whether it helped or how far it is, and its most telling figures."""

from fluvial.formatting import (
    epsilon_words,
    figure,
    human_bytes,
    human_ratio,
    human_seconds,
    percent,
    safe_text,
)
from fluvial.report.axes import SCORES
from fluvial.report.result_tables import COUNTED, UP, of_the_chosen, says, verdict_of
from fluvial.runs.site_comparison import loss_of
from fluvial.storage.run_files import JsonObject

ORDER = "local central fedavg"
"""Names of the baselines in the order of the result table."""


def first_lines(run: JsonObject, method: str) -> dict[str, str]:
    """Return the first line of the page, the one after it, and the colour of the first."""
    if refused := run.get("refused"):
        return {"first": "Refused by the gate", "more": safe_text(refused["why"]), "mark": "no"}

    metrics = run["metrics"]
    if run["result"] is None:
        if metrics and "stopped" in metrics[-1]:
            return {"first": "Stopped", "more": safe_text(metrics[-1]["stopped"]), "mark": "no"}

        total = run["config"].get("rounds", "?")
        states = [
            f"{name}: " + ("finished" if other["result"] else f"{len(other['metrics'])} rounds")
            for name, other in sorted(run["compare"].items(), key=lambda item: ORDER.find(item[0]))
        ]
        first = f"Not finished: {len(metrics)} of {total} rounds of {method}"
        more = f"Baselines: {', '.join(states)}." if states else ""
        return {"first": first, "more": more, "mark": ""}

    verdict = verdict_of(run)
    conclusion, *further = verdict.sentences()
    return {
        "first": safe_text(conclusion.removesuffix(".")),
        "more": safe_text(" ".join(further)),
        "mark": {"yes": "yes", "no": "no"}.get(verdict.helped, ""),
    }


def tiles(run: JsonObject, score: str) -> list[dict[str, str]]:
    """Return the tiles at the top of a finished run's page: what, value and note."""
    result = run["result"]
    heldout = result["heldout"]
    base, final = (heldout.get(which) or {} for which in ("base", "final"))
    before, after = loss_of(base), loss_of(final)
    change = "" if before is None or after is None else f" ({after - before:+.4f})"
    found = [
        {
            "what": "held-out loss, mean over sites",
            "value": figure(after),
            "note": f"base model {figure(before)}{change}",
        },
        {
            "what": f"{SCORES[score]}, mean over sites",
            "value": percent(final.get(score)),
            "note": f"base model {percent(base.get(score))}",
        },
    ]

    found += _traffic(result)
    if result.get("leakage"):
        found.append(
            {
                "what": "tokens that the server could read",
                "value": percent(result["leakage"]["accuracy"]),
                "note": safe_text(result["leakage"]["sentence"]),
            }
        )
    if result.get("noise"):
        found.append(
            {
                "what": "epsilon of a hidden state",
                "value": epsilon_words(result["noise"]["epsilon"]),
                "note": "what it leaves out stands below",
            }
        )
    if result.get("privacy"):
        found.append(
            {
                "what": "epsilon of the run",
                "value": epsilon_words(result["privacy"]["epsilon"]),
                "note": f"at delta {result['privacy']['delta']:g}",
            }
        )

    baselines = [other["result"]["wall_s"] for other in run["compare"].values() if other["result"]]
    of_it = f"{human_seconds(sum(baselines))} of it for baselines; " if baselines else ""
    found.append(
        {
            "what": "wall time",
            "value": human_seconds(result["wall_s"] + sum(baselines)),
            "note": f"{of_it}{human_bytes(result['peak_rss_bytes'])} of memory at most",
        }
    )
    return found


def _traffic(result: JsonObject) -> list[dict[str, str]]:
    """Return the tiles of a run's bytes: its ratios, or the bytes alone where these say nothing."""
    if result.get("round_ratio") is None:
        return []

    up = human_bytes(result["bytes"]["up"] / result["sites"])
    rounds = f"in {result['rounds']} rounds"
    alone = {**result, "compare": {}}
    words = of_the_chosen(result)
    found = [{"what": UP, "value": up, "note": rounds}]
    if says("round_ratio", alone):
        note = f"{up} up per site {rounds}{f'; uncompressed: {words}' if words else ''}"
        ratio = human_ratio(result["round_ratio"])
        found = [{"what": "updates, of uncompressed", "value": ratio, "note": note}]
    if says("amortised_ratio", alone):
        ratio = human_ratio(result["amortised_ratio"])
        found.append({"what": "amortised, of uncompressed", "value": ratio, "note": COUNTED})
    return found
