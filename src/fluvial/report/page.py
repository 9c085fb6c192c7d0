"""One self-contained HTML page about a run, with charts as inline SVG, for light and dark.

The page loads nothing and has no script. Its template is page.html in this folder.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fluvial.errors import ConfigError
from fluvial.formatting import privacy_words, safe_text, shown_answer
from fluvial.report import figures
from fluvial.report.aggregation_tables import aggregation_by_module
from fluvial.report.axes import SCORES
from fluvial.report.block_tables import Excerpt, block_schedule, conflict_log, failures
from fluvial.report.budget_tables import budget_trials
from fluvial.report.charts import legend
from fluvial.report.cross_site import matrix_of
from fluvial.report.fairness_tables import fairness_by_round
from fluvial.report.figures import Run, score_of
from fluvial.report.harness_table import tasks_of_run
from fluvial.report.headline import ORDER, first_lines, tiles
from fluvial.report.leakage_tables import leakage_by_attack
from fluvial.report.line_rates import Rates
from fluvial.report.result_tables import (
    ANSWER_SCORES,
    INTERVAL,
    answers_caption,
    cut_words,
    endless_words,
    result_caption,
    result_rows,
    run_name,
    sample_words,
    too_long_words,
    with_compared,
)
from fluvial.report.round_times import round_times
from fluvial.report.site_plans import plans_by_site, predicted_by_site
from fluvial.storage.files import write_whole
from fluvial.storage.paths import last_part, without_folders
from fluvial.storage.run_files import JsonObject, setup_of

CONFLICTS = 128
"""Number of entries of a conflict log on the page: the last ones."""
MODULES = 64
"""Number of modules of the table of aggregation errors on the page."""
ROUNDS = 12
"""Number of last rounds of the table of fairness on the page."""
UNEQUAL = 1.05
"""Ratio of the most to the fewest bytes of a site from which these are drawn."""
EXACT = ANSWER_SCORES["exact_match"]
FURTHER = ("next-token accuracy", ANSWER_SCORES["f1"], ANSWER_SCORES["rouge_l"])
"""Headings of scores that stand apart where there is exact match."""
AXES = {"round": "By round", "up": "By bytes up", "both": "By all bytes", "seconds": "By time"}
"""Axes of losses and scores, with the words of their tabs."""
MEASURES = {
    "cosine": "Cosine to the true update",
    "aggregate_cosine": "cosine of the aggregate",
    "shuffled_error": "error with frames shuffled",
    "product_error": "error of the weights' change",
    "contraction": "contraction",
    "snr_db": "SNR in dB",
}
"""Names on the page of the gate's measures."""
PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
)
"""Templates of pages, which are in this folder."""


def page_of(run: JsonObject, *, written: str = "", refresh_s: int = 0) -> bytes:
    """Return the page of a run, which `read_run` has read.

    `written` is the time that the page shows as that of its writing. A browser reads the page anew
    every `refresh_s` seconds; 0 for a page that stays as it is.
    """
    content = _content(run) | {"written": written, "refresh_s": refresh_s}
    return PAGES.get_template("page.html").render(content).encode(errors="replace")


def write_page(run: JsonObject, path: Path) -> None:
    """Write the page of a run, which `read_run` has read; raise `ConfigError` if it cannot be."""
    write_html(page_of(run), path)


def write_html(page: bytes, path: Path) -> None:
    """Write a page where a person wants it; raise `ConfigError` if it cannot be, or if a file that
    is no page stands there."""
    if path.is_file() and path.stat().st_size and not _is_page(path):
        raise ConfigError(f"{path}: exists and is no page; choose another --html")

    write_whole(path, page, "choose another --html")


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(256).lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _content(run: JsonObject) -> JsonObject:
    """Return the values that the template names."""
    result = run["result"]
    config = without_folders(run["config"])
    metrics = run["metrics"]
    description = run["description"] or {}
    changed = without_folders(description.get("set", {}))
    method = config.get("method", {}).get("name") or (result or {}).get("method", "run")
    own = Run(
        run_name(result) if result else method,
        "own",
        metrics,
        result,
        bool((result or description).get("sends_updates")),
    )
    others = _baselines(run["compare"], description)
    runs = [each for each in (*others, own) if each.metrics]
    score = score_of(runs)
    setup = setup_of(run)
    gate = setup.get("gate") or (run.get("refused") or {}).get("gate")
    blocks = block_schedule(metrics, cycles=figures.CYCLES, sites=figures.SITES)
    missing = failures(metrics)
    rates = Rates.of(config)
    rows = result_rows(with_compared(run), rates) if result else []
    excerpts = (
        budget_trials(setup),
        _blocks(setup),
        conflict_log(metrics, last=CONFLICTS),
        leakage_by_attack(result or {}),
        plans_by_site(setup),
        predicted_by_site(metrics),
        round_times(metrics),
        aggregation_by_module(metrics, modules=MODULES),
        fairness_by_round(metrics, rounds=ROUNDS),
    )

    return {
        "title": own.name,
        "model": config.get("model", {}).get("name_or_path", ""),
        "rounds": config.get("rounds", len(metrics)),
        "done": len(metrics),
        "finished": result is not None,
        "folder": last_part(run["folder"]),
        "damaged": [safe_text(line) for line in run["damaged"]],
        "verdict": first_lines(run, method),
        "tiles": tiles(run, score) if result else [],
        "tables": _tables(rows) if rows else [],
        "tasks": tasks_of_run(result or {}),
        "caption": _caption(result, config, result_caption(rows[0], rates, result))
        if result
        else "",
        "axes": _axes(runs, score),
        "runs": legend([(each.name, each.colour) for each in runs]),
        "maps": _maps(result or {}),
        "figures": _figures(own, others, setup, score, gate),
        "score": SCORES[score].capitalize(),
        "schedule": f"{blocks.words} A stronger colour is a later block." if blocks else "",
        "privacy": _privacy(result or {}),
        "gate": gate,
        "snapshots": setup.get("snapshots"),
        "measures": _measures(gate) if gate else {},
        "criteria": _criteria(gate) if gate else [],
        "samples": [_sample(sample) for sample in (result or {}).get("samples", [])],
        "excerpts": [excerpt for excerpt in excerpts if excerpt],
        "failures": [{**failure, "reason": safe_text(failure["reason"])} for failure in missing],
        "missing": _missing(missing),
        "changed": [(name, json.dumps(value)) for name, value in _flat(changed)],
        "config": json.dumps(config, indent=2),
        "versions": {"fluvial": result["fluvial"], "python": result["python"], **result["versions"]}
        if result
        else {},
        "sha256": (result or {}).get("adapter_sha256") or (result or {}).get("model_sha256"),
    }


def _figures(
    own: Run, others: Sequence[Run], setup: JsonObject, score: str, gate: JsonObject | None
) -> dict[str, str]:
    """Return the charts by the names of the template; empty where there is nothing to draw."""
    metrics = own.metrics
    leakage = (own.result or {}).get("leakage")

    return {
        "losses": figures.losses_by_site(own, others),
        "scores": figures.scores_by_site(own, others, score),
        "kinds": figures.bytes_by_kind([each for each in (*others, own) if each.metrics]),
        "sent": figures.bytes_by_site(own, unequal=UNEQUAL),
        "snr": figures.snr_by_round(metrics),
        "rates": figures.rate_by_round(metrics),
        "gate": figures.gate_errors(gate) if gate else "",
        "epsilon": figures.epsilon_by_round(metrics),
        "read": figures.tokens_read(leakage) if leakage else "",
        "errors": figures.prediction_errors(metrics),
        "ranks": figures.ranks_by_site(setup["plans"]) if setup.get("plans") else "",
        "budget": figures.budget_trials(setup["budget"]) if setup.get("budget") else "",
        "schedule": figures.schedule_grid(metrics, setup),
    }


def _measures(gate: JsonObject) -> JsonObject:
    """Return what the gate measured, by its words."""
    return {what: gate[key] for key, what in MEASURES.items() if gate[key] is not None}


def _sample(sample: JsonObject) -> JsonObject:
    """Return a prompt and its answers as they are shown."""
    return {
        "prompt": safe_text(sample["prompt"]),
        "base": shown_answer(sample["base"]),
        "final": shown_answer(sample["final"]),
        "right": shown_answer(sample["right"]) if "right" in sample else None,
        "words": sample_words(sample),
    }


def _baselines(compare: Mapping[str, JsonObject], description: JsonObject) -> list[Run]:
    """Return the baselines that have begun, under the names of the result table."""
    known = description.get("compare", {})
    runs = []
    for name, baseline in sorted(compare.items(), key=lambda item: ORDER.find(item[0])):
        about = baseline["result"] or known.get(name) or {}
        runs.append(
            Run(
                str(about.get("label", name)),
                name,
                baseline["metrics"],
                baseline["result"],
                bool(about.get("sends_updates")),
            )
        )

    return runs


def _tables(rows: list[list[str]]) -> list[list[list[str]]]:
    """Return the result table; with answers their exact match comes first, and the other scores are
    a table of their own."""
    headings = rows[0]
    if EXACT not in headings:
        return [rows]

    first = [EXACT, INTERVAL]
    further = [name for name in FURTHER if name in headings]
    rest = [name for name in headings[1:] if name not in (*first, *further)]
    chosen = [[0, *map(headings.index, names)] for names in ([*first, *rest], further)]
    return [[[row[at] for at in places] for row in rows] for places in chosen if len(places) > 1]


def _caption(result: JsonObject, config: JsonObject, columns: str) -> str:
    """Return the meaning of the columns of the result tables, and remarks on what they measure."""
    scored = "exact_match" in (result["heldout"].get("final") or {})
    answers = f" {answers_caption(result)}" if scored else ""
    notes = (cut_words(config), too_long_words(result), endless_words(result))
    return columns + answers + "".join(notes)


def _axes(runs: Sequence[Run], score: str) -> list[JsonObject]:
    """Return the charts of loss and score over each axis, those without values left out."""
    found = []
    for key, name in AXES.items():
        charts = [figures.by_axis(runs, key, measure) for measure in ("loss", score)]
        if any(charts):
            found.append({"key": key, "name": name, "charts": [each for each in charts if each]})

    return found


def _maps(result: JsonObject) -> list[JsonObject]:
    """Return the heat maps of the cross-site matrix, of loss and of exact match."""
    names = {"loss": "Held-out loss", "exact_match": "Exact match, per cent"}
    found = [(heading, matrix_of(result, name)) for name, heading in names.items()]
    return [
        {
            "heading": f"{heading}, by model and by data",
            "chart": figures.heat_map(matrix),
            "words": matrix.words,
        }
        for heading, matrix in found
        if matrix
    ]


def _privacy(result: JsonObject) -> list[str]:
    """Return the sentences on what the run promises about privacy."""
    report = result.get("privacy")
    noise = result.get("noise")
    return [
        *([privacy_words(report)] if report else []),
        *([safe_text(noise["sentence"])] if noise else []),
    ]


def _missing(missing: Sequence[JsonObject]) -> str:
    """Return how many replies are missing, in how many rounds, and of which sites."""
    sites: dict[str, int] = {}
    for failure in missing:
        sites[failure["site"]] = sites.get(failure["site"], 0) + 1
    rounds = len({failure["round"] for failure in missing})
    listed = ", ".join(f"{safe_text(site)} {count}" for site, count in sorted(sites.items()))
    return f"{len(missing)} missing in {rounds} of the rounds, by site: {listed}."


def _flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the settings of a nested table by their dotted names."""
    found: list[tuple[str, Any]] = []
    for key, value in table.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found


def _criteria(gate: JsonObject) -> list[JsonObject]:
    """Return the criteria of the gate with their verdicts.

    A run records only the failed ones by name.
    """
    holds = (
        "finite, a contraction, depends on the input, and better than every predictor for A, B "
        "and the aggregate"
    )
    return [{"what": reason, "holds": False} for reason in gate["failed"]] or [
        {"what": holds, "holds": True}
    ]


def _blocks(setup: JsonObject) -> Excerpt | None:
    """Return the blocks of the model, with their gradient cosines where these were measured."""
    if "blocks" not in setup:
        return None

    cosines = setup.get("gradient_cosines", {})
    rows = [
        [safe_text(block["name"]), f"{block['values']:,}"]
        + ([f"{cosines[block['name']]:.3f}"] if cosines else [])
        for block in setup["blocks"]
    ]
    words = (
        "Gradient cosine: on public text, through the download against the exact model."
        if cosines
        else ""
    )

    return Excerpt(
        "Blocks",
        ["block", "values", *(["gradient cosine"] if cosines else [])],
        rows,
        left=1,
        words=words,
    )
