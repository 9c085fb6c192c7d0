"""Tables and lines about the plans of sites: what `fluvial plan` shows, and what a run measured."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from fluvial.formatting import human_bytes, human_seconds, safe_text
from fluvial.report.block_tables import Excerpt
from fluvial.report.tables import table
from fluvial.storage.run_files import JsonObject

PLAN_HEADINGS = ["site", "base", "batch", "steps", "not trained on", "weights at rank"]
PREDICTED_HEADINGS = ["site", "memory limit", "memory", "up", "down", "training", "messages"]
FIGURES = {
    "memory_bytes": human_bytes,
    "bytes_up": human_bytes,
    "bytes_down": human_bytes,
    "seconds": human_seconds,
}
"""Figures of a round that are predicted and measured, and their form."""


def site_plans_table(planned: JsonObject) -> Group:
    """Return the plans of all sites, the sites without one, and the choice of method and codec."""
    plans = {site["name"]: site["plan"] for site in planned["sites"] if site["plan"] is not None}
    limits = {site["name"]: site["limits"] for site in planned["sites"]}
    content: list[RenderableType] = []
    if plans:
        predicted = [_predicted_row(site, plan, limits[site]) for site, plan in plans.items()]
        content = [
            table(PLAN_HEADINGS, _plan_rows(plans), "Plan of each site"),
            table(PREDICTED_HEADINGS, predicted, "Predicted, a round"),
        ]
    notes = [
        f"no plan for site {site['name']}: {site['refused']}"
        for site in planned["sites"]
        if site["plan"] is None
    ]

    notes += _other_formats(planned)
    method = planned["method"]
    notes.append(f"method: {method['name'] or 'none'}; {method['why']}")
    codec = planned["codec"]
    notes += [] if codec is None else [f"codec: {codec['name']}; {codec['why']}"]
    limit = planned["deadline_s"]
    deadline = "no deadline" if limit is None else f"deadline {human_seconds(limit)}"
    notes.append(
        f"{planned['candidates']} candidate weights, objective {planned['objective']}, {deadline}"
    )
    if planned["gap"]:
        notes.append(
            "the ranks are not exactly the best, since costs were rounded up: at most "
            f"{planned['gap']:.2%} of the value is missing"
        )
    uniform = planned["uniform_under_training"]
    if uniform:
        left = [
            site["plan"]["under_training"] if site["plan"] else 1.0 for site in planned["sites"]
        ]
        notes.append(
            f"by the deadline {sum(left) / len(left):.0%} of a site's data stays untrained in the "
            f"mean; under uniform LoRA it would be {sum(uniform.values()) / len(uniform):.0%}"
        )
    load = planned["full_load_s"]
    if limit is None and load is not None:
        notes.append(
            f"the middle site trains on all of its data within {human_seconds(load)}; as "
            "method.deadline_s this would bound every round"
        )
    return Group(*content, *(Text(f"• {safe_text(note)}") for note in notes))


def plan_lines(values: JsonObject) -> list[str]:
    """Return a line about the plan of each site, and about a base that is measured in another
    format than the run's, with rich markup; none without plans."""
    lines = [
        f"plan of {row[0]}: {row[1]}, batch {row[2]}, {row[3]} steps, weights at rank: {row[5]}"
        for row in _plan_rows(values.get("plans", {}))
    ]
    return [escape(line) for line in [*lines, *_other_formats(values)]]


def _other_formats(values: JsonObject) -> list[str]:
    """Return a sentence about each site that has no room for the base in the run's own format."""
    return [
        f"{safe_text(site)} has no room for the base in the run's own format: its profile, its "
        f"probe and its held-out measures are of the base in {format}"
        for site, format in sorted(values.get("measured_in", {}).items())
    ]


def predicted_lines(record: JsonObject) -> list[str]:
    """Return a line about each site's predicted and measured figures, with rich markup; none in a
    round without a comparison."""
    return [
        escape(f"{'':>5}  {site}: {', '.join(_compared_words(figures))}")
        for site, figures in _safe_names(record.get("predicted", {}))
    ]


def plans_by_site(setup: JsonObject) -> Excerpt | None:
    """Return the first plan of each site; None where none was made."""
    plans = setup.get("plans")
    if not plans:
        return None

    words = "Plans of the set-up; a plan that was made anew stands in the record of its round."
    words = " ".join([words, *(f"{line}." for line in _other_formats(setup))])
    return Excerpt("Plan of each site", PLAN_HEADINGS, _plan_rows(plans), left=1, words=words)


def predicted_by_site(metrics: Sequence[JsonObject]) -> Excerpt | None:
    """Return predicted and measured figures of each site's last round that has them; None without
    any."""
    latest: dict[str, tuple[int, JsonObject]] = {}
    for record in metrics:
        for site, figures in _safe_names(record.get("predicted", {})):
            latest[site] = record["round"], figures
    if not latest:
        return None

    measured = {
        name: words
        for name, words in FIGURES.items()
        if any(figures[name]["measured"] is not None for _, figures in latest.values())
    }
    rows = [
        [site, f"{round}", *(_compared(figures[name], words) for name, words in measured.items())]
        for site, (round, figures) in sorted(latest.items())
    ]
    return Excerpt(
        "Predicted and measured, by site",
        ["site", "round", *(name.replace("_", " ") for name in measured)],
        rows,
        left=1,
        words="Predicted and measured, and the relative error, of the first round after a plan. "
        "Memory that was not measured apart is left out; seconds are those of training.",
    )


def ranks_words(ranks: Mapping[str, int]) -> str:
    """Return how many weights have which rank: "4 at 16, 12 at 8"."""
    counts = sorted(Counter(ranks.values()).items(), reverse=True)
    return ", ".join(f"{count} at {rank}" for rank, count in counts)


def format_words(plan: JsonObject) -> str:
    """Return the format of a base, or how many layers have which: "nf4 x 9, int8 x 13"."""
    counts = Counter(name for _, name in plan["layer_formats"])
    words = (f"{name} x {count}" for name, count in sorted(counts.items(), reverse=True))
    return ", ".join(words) or str(plan["format"])


def _plan_rows(plans: Mapping[str, JsonObject]) -> list[list[str]]:
    return [
        [
            site,
            format_words(plan),
            f"{plan['batch']} x {plan['length']}" + (", recomputed" * plan["checkpointing"]),
            f"{plan['steps']:,}",
            f"{plan['under_training']:.0%}",
            ranks_words(plan["ranks"]),
        ]
        for site, plan in _safe_names(plans)
    ]


def _predicted_row(site: str, plan: JsonObject, limits: JsonObject) -> list[str]:
    prediction = plan["prediction"]
    return [
        safe_text(site),
        human_bytes(limits["memory_bytes"]),
        human_bytes(prediction["memory_bytes"]),
        human_bytes(prediction["bytes_up"]),
        human_bytes(prediction["bytes_down"]),
        human_seconds(prediction["compute_s"]),
        human_seconds(prediction["link_s"]) if has_link(limits) else "no link given",
    ]


def has_link(limits: JsonObject) -> bool:
    """Return whether a site's link is known, and so costs time."""
    rates = (limits["up_bytes_s"], limits["down_bytes_s"])
    return any(rate is not None for rate in rates) or limits["latency_s"] > 0


def _compared_words(figures: JsonObject) -> list[str]:
    return [
        f"{name.replace('_', ' ')} {_compared(figures[name], words)}"
        for name, words in FIGURES.items()
        if figures[name]["measured"] is not None
    ]


def _compared(figure: JsonObject, words: Callable[[float], str]) -> str:
    """Return a predicted figure, the measured one and how far off the prediction was."""
    predicted = words(figure["predicted"])
    if figure["measured"] is None:
        return f"{predicted} predicted"
    error = ""
    if figure["error"] is not None:
        way = "too much" if figure["error"] > 0 else "too little"
        off = f"{abs(figure['error']):.0%}"
        error = " (as predicted)" if off == "0%" else f" ({off} {way} predicted)"
    return f"{predicted} predicted, {words(figure['measured'])} measured{error}"


def _safe_names(values: Mapping[str, JsonObject]) -> list[tuple[str, JsonObject]]:
    """Return the values of sites in order of their names, which are safe to print."""
    return [(safe_text(site), values[site]) for site in sorted(values)]
