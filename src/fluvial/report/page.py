"""One self-contained HTML page about a run, with figures as inline SVG, for light and dark.

The page loads nothing. Its template is page.html in this folder.
"""

import json
import warnings
from pathlib import Path

import matplotlib as mpl
from jinja2 import Environment, StrictUndefined

from fluvial.errors import ConfigError
from fluvial.formatting import figure, human_bytes, human_ratio, human_seconds, percent, safe_text
from fluvial.report.aggregation_tables import aggregation_by_module
from fluvial.report.block_tables import Excerpt, block_schedule, conflict_log, failures
from fluvial.report.budget_tables import budget_trials
from fluvial.report.fairness_tables import fairness_by_round
from fluvial.report.figures import (
    STYLE,
    bytes_by_kind,
    gate_errors,
    heldout_by_site,
    loss_by_bytes,
    loss_by_round,
    ranks_by_site,
    snr_by_round,
)
from fluvial.report.figures import budget_trials as figure_of_trials
from fluvial.report.leakage_tables import leakage_by_attack
from fluvial.report.result_tables import (
    RESULT_CAPTION,
    cut_words,
    result_rows,
    run_name,
    too_long_words,
    verdict_of,
    with_compared,
)
from fluvial.report.site_plans import plans_by_site, predicted_by_site
from fluvial.runs.verdict import NAMES, loss_of
from fluvial.storage.run_files import JsonObject

CYCLES = 48
"""Number of cycles of a block schedule on the page: the last ones."""
SITES = 256
"""Number of sites of a block schedule on the page."""
CONFLICTS = 128
"""Number of entries of a conflict log on the page: the last ones."""
MODULES = 64
"""Number of modules of the table of aggregation errors on the page."""
ROUNDS = 12
"""Number of last rounds of the table of fairness on the page."""
MEASURES = {
    "cosine": "Innovation cosine",
    "aggregate_cosine": "of the aggregate",
    "shuffled_error": "error with frames shuffled",
    "product_error": "error of the weights' change",
    "contraction": "contraction",
    "snr_db": "SNR in dB",
}
"""Names on the page of the gate's measures."""
TEMPLATE = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
    Path(__file__).with_name("page.html").read_text(encoding="utf-8")
)


def write_page(run: JsonObject, path: Path) -> None:
    """Write the page of a run, which `read_run` has read; raise `ConfigError` if it cannot be."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # The browser has the glyphs that DejaVu lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        page = TEMPLATE.render(_content(run)).encode(errors="replace")

    if path.is_dir():
        raise ConfigError(f"cannot write {path}: is a folder; choose another --html")

    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(page)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; choose another --html"
        ) from error


def _content(run: JsonObject) -> JsonObject:
    """Return the values that the template names."""
    result = run["result"]
    config = run["config"]
    metrics = run["metrics"]
    runs = {name: other for name, other in sorted(run["compare"].items()) if other["metrics"]}
    method = config.get("method", {}).get("name") or (result or {}).get("method", "run")

    if metrics:
        runs[method] = {
            "metrics": metrics,
            "result": result,
            "description": run["description"],
        }

    setup = (result or {}).get("setup", {})
    refused = run.get("refused") or {}
    gate = setup.get("gate") or refused.get("gate")
    figures = {
        "rounds": loss_by_round(runs, method) if runs else None,
        "up": loss_by_bytes(runs, method, ("up",)),
        "both": loss_by_bytes(runs, method, ("up", "down")),
        "kinds": bytes_by_kind(runs, method),
        "rates": snr_by_round(metrics),
        "gate": gate_errors(gate) if gate else None,
        "ranks": ranks_by_site(setup["plans"]) if setup.get("plans") else None,
        "budget": figure_of_trials(setup["budget"]) if setup.get("budget") else None,
        "sites": heldout_by_site(result, run["compare"].get("local", {}).get("result"))
        if result
        else None,
    }
    samples = [
        {key: safe_text(text) for key, text in sample.items()}
        for sample in (result or {}).get("samples", [])
    ]
    excerpts = (
        budget_trials(setup),
        _blocks(setup),
        block_schedule(metrics, cycles=CYCLES, sites=SITES),
        conflict_log(metrics, last=CONFLICTS),
        leakage_by_attack(result or {}),
        plans_by_site(setup),
        predicted_by_site(metrics),
        aggregation_by_module(metrics, modules=MODULES),
        fairness_by_round(metrics, rounds=ROUNDS),
    )

    return {
        "title": run_name(result) if result else method,
        "model": config.get("model", {}).get("name_or_path", ""),
        "rounds": config.get("rounds", len(metrics)),
        "done": len(metrics),
        "refused": refused.get("why", ""),
        "finished": result is not None,
        "folder": run["folder"],
        "headline": _headline(run) if result else [],
        "rows": result_rows(with_compared(run)) if result else [],
        "caption": RESULT_CAPTION + cut_words(config) + too_long_words(result or {}),
        "figures": figures,
        "gate": gate,
        "snapshots": setup.get("snapshots"),
        "measures": {what: gate[key] for key, what in MEASURES.items() if gate[key] is not None}
        if gate
        else {},
        "verdicts": _verdicts(gate) if gate else [],
        "samples": samples,
        "excerpts": [excerpt for excerpt in excerpts if excerpt],
        "failures": [
            {**failure, "reason": safe_text(failure["reason"])} for failure in failures(metrics)
        ],
        "config": json.dumps(config, indent=2),
        "versions": {"fluvial": result["fluvial"], "python": result["python"], **result["versions"]}
        if result
        else {},
        "sha256": (result or {}).get("adapter_sha256") or (result or {}).get("model_sha256"),
    }


def _headline(run: JsonObject) -> list[dict[str, str]]:
    """Return the tiles at the top of the page: what, value, note, and a mark for its colour."""
    result = run["result"]
    verdict = verdict_of(run)
    base, final = (loss_of(result["heldout"].get(key)) for key in ("base", "final"))
    change = None if base is None or final is None else final - base
    reference = NAMES[verdict.against] if verdict.against else "other runs"
    tiles = [
        {
            "what": f"helped against {reference}",
            "value": verdict.tile(),
            "note": verdict.line(),
            "mark": {"yes": "yes", "no": "no"}.get(verdict.helped, ""),
        },
        {
            "what": "held-out loss, mean over sites",
            "value": figure(final),
            "note": f"base model {figure(base)}" + ("" if change is None else f" ({change:+.4f})"),
        },
    ]

    if result.get("round_ratio") is not None:
        up = result["bytes"]["up"]
        sites = result["sites"]
        tiles += [
            {
                "what": "updates, of uncompressed",
                "value": human_ratio(result["round_ratio"]),
                "note": f"{human_bytes(up / sites)} up per site in {result['rounds']} rounds",
            },
            {
                "what": "amortised, of uncompressed",
                "value": human_ratio(result["amortised_ratio"]),
                "note": "all bytes in both directions, set-up included",
            },
        ]

    if result.get("leakage"):
        tiles.append(
            {
                "what": "tokens that the server could read",
                "value": percent(result["leakage"]["accuracy"]),
                "note": safe_text(result["leakage"]["sentence"]),
            }
        )
    if result.get("noise"):
        tiles.append(
            {
                "what": "epsilon of a hidden state",
                "value": figure(result["noise"]["epsilon"], ".3g"),
                "note": safe_text(result["noise"]["sentence"]),
            }
        )

    tiles.append(
        {
            "what": "wall time",
            "value": human_seconds(result["wall_s"]),
            "note": f"{human_bytes(result['peak_rss_bytes'])} of memory at most",
        }
    )
    return tiles


def _verdicts(gate: JsonObject) -> list[JsonObject]:
    """Return the criteria of the gate and those of the reproduction, with their verdicts.

    A run records only the failed criteria of the gate by name.
    """
    holds = (
        "finite, a contraction, depends on the input, and better than every predictor for A, B "
        "and the aggregate"
    )
    ours = [{"what": reason, "holds": False} for reason in gate["failed"]] or [
        {"what": holds, "holds": True}
    ]
    theirs = [{"what": name, "holds": value} for name, value in gate["reproduction"].items()]

    return [
        {"name": "Fluvial's gate, which decides", "rows": ours},
        {"name": "The reproduction's thresholds, for comparison", "rows": theirs},
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
