"""One self-contained page about a run: figures as inline SVG, light and dark, nothing loaded from
anywhere."""

import json
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, StrictUndefined

from fluvial.errors import ConfigError
from fluvial.formatting import figure, human_bytes, human_ratio, human_seconds, safe_text
from fluvial.report.block_tables import Excerpt, block_schedule, conflict_log, failures
from fluvial.report.figures import (
    STYLE,
    bytes_by_kind,
    gate_errors,
    heldout_by_site,
    loss_by_bytes,
    loss_by_round,
)
from fluvial.report.result_tables import (
    RESULT_CAPTION,
    cut_words,
    result_rows,
    run_name,
    verdict_of,
    with_compared,
)
from fluvial.runs.verdict import NAMES, loss_of

CYCLES = 48
SITES = 256
CONFLICTS = 128
"""How much of a long block schedule and of a long conflict log is on the page."""
MEASURES = {
    "cosine": "Innovation cosine",
    "aggregate_cosine": "of the aggregate",
    "shuffled_error": "error with frames shuffled",
    "product_error": "error of the weights' change",
    "contraction": "contraction",
    "snr_db": "SNR in dB",
}


def write_page(found: dict[str, Any], path: Path) -> None:
    """Write the page of what `read_run` found; raises `ConfigError` if `path` cannot be written."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph"
        )  # the browser has the glyphs that DejaVu lacks
        page = TEMPLATE.render(_content(found)).encode(errors="replace")

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


def _content(found: dict[str, Any]) -> dict[str, Any]:
    result = found["result"]
    config = found["config"]
    metrics = found["metrics"]
    runs = {name: run for name, run in sorted(found["compare"].items()) if run["metrics"]}
    method = config.get("method", {}).get("name") or (result or {}).get("method", "run")

    if metrics:
        runs[method] = {"metrics": metrics, "result": result}

    setup = (result or {}).get("setup", {})
    refused = found.get("refused") or {}
    gate = setup.get("gate") or refused.get("gate")
    figures = {
        "rounds": loss_by_round(runs, method) if runs else None,
        "up": loss_by_bytes(runs, method, ("up",)),
        "both": loss_by_bytes(runs, method, ("up", "down")),
        "kinds": bytes_by_kind(runs, method),
        "gate": gate_errors(gate) if gate else None,
        "sites": heldout_by_site(result, found["compare"].get("local", {}).get("result"))
        if result
        else None,
    }
    samples = [
        {key: safe_text(text) for key, text in sample.items()}
        for sample in (result or {}).get("samples", [])
    ]
    excerpts = (
        _blocks(setup),
        block_schedule(metrics, cycles=CYCLES, sites=SITES),
        conflict_log(metrics, last=CONFLICTS),
    )

    return {
        "title": run_name(result) if result else method,
        "model": config.get("model", {}).get("name_or_path", ""),
        "rounds": config.get("rounds", len(metrics)),
        "done": len(metrics),
        "refused": refused.get("why", ""),
        "finished": result is not None,
        "folder": found["folder"],
        "headline": _headline(found) if result else [],
        "rows": result_rows(with_compared(found)) if result else [],
        "caption": RESULT_CAPTION + cut_words(config),
        "figures": figures,
        "gate": gate,
        "snapshots": setup.get("snapshots"),
        "measures": {what: gate[key] for key, what in MEASURES.items() if gate[key] is not None}
        if gate
        else {},
        "verdicts": _verdicts(gate) if gate else [],
        "samples": samples,
        "excerpts": [each for each in excerpts if each],
        "failures": [{**each, "reason": safe_text(each["reason"])} for each in failures(metrics)],
        "config": json.dumps(config, indent=2),
        "versions": {"fluvial": result["fluvial"], "python": result["python"], **result["versions"]}
        if result
        else {},
        "sha256": (result or {}).get("adapter_sha256") or (result or {}).get("model_sha256"),
    }


def _headline(run: dict[str, Any]) -> list[dict[str, str]]:
    result = run["result"]
    verdict = verdict_of(run)
    base, final = (loss_of(result["heldout"].get(key)) for key in ("base", "final"))
    change = None if base is None or final is None else final - base
    reference = NAMES[verdict.against] if verdict.against else "other runs"
    found = [
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
        found += [
            {
                "what": "updates, of uncompressed",
                "value": human_ratio(result["round_ratio"]),
                "note": f"{human_bytes(up / sites)} up per site in {result['rounds']} rounds",
            },
            {
                "what": "amortised, of uncompressed",
                "value": human_ratio(result["amortised_ratio"]),
                "note": "all bytes both ways, set-up included",
            },
        ]

    found.append(
        {
            "what": "wall time",
            "value": human_seconds(result["wall_s"]),
            "note": f"{human_bytes(result['peak_rss_bytes'])} of memory at most",
        }
    )
    return found


def _verdicts(gate: dict[str, Any]) -> list[dict[str, Any]]:
    """Both lists, ours first; of ours only what failed is on record by name."""
    holds = "finite, a contraction, depends on the input, and better than every predictor for A, B and the aggregate"
    ours = [{"what": reason, "holds": False} for reason in gate["failed"]] or [
        {"what": holds, "holds": True}
    ]
    theirs = [{"what": name, "holds": value} for name, value in gate["reproduction"].items()]

    return [
        {"name": "Fluvial's gate, which decides", "rows": ours},
        {"name": "The reproduction's thresholds, for comparison", "rows": theirs},
    ]


def _blocks(setup: dict[str, Any]) -> Excerpt | None:
    """What the model was cut into, and what the download leaves of each block's gradient where that
    was measured."""
    if "blocks" not in setup:
        return None

    cosines = setup.get("gradient_cosines", {})
    rows = [
        [safe_text(each["name"]), f"{each['values']:,}"]
        + ([f"{cosines[each['name']]:.3f}"] if cosines else [])
        for each in setup["blocks"]
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


# -- the page ------------------------------------------------------------------------------------

PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }} - Fluvial</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #23272e; --soft: #667; --line: #d5d6da;
  --own: #0b6fa4; --fedavg: #c8641b; --local: #5f8a3c; --central: #8657a6; --good: #2f7d32; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1c2027; --ink: #e4e6ea; --soft: #9aa1ac;
  --line: #3a404b; --own: #58b4e6; --fedavg: #f0985a; --local: #9cc777; --central: #c39adf; --good: #7fc883;
  --bad: #f2877f } }
body { margin: 0 auto; max-width: 1120px; padding: 28px 20px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 26px; margin: 0 } h2 { font-size: 16px; margin: 0 0 10px } p { margin: 6px 0 }
.soft, figcaption { color: var(--soft); font-size: 13px }
section, .cards > div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px }
section, .cards, .two { margin-top: 16px } .two section { margin-top: 0; min-width: 0 }
.cards { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)) }
@media (min-width: 760px) { .cards > :first-child { grid-column: span 2 } }
.cards b { display: block; font-size: 28px; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3 }
.two { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)) }
figure { margin: 0 } svg { display: block; width: 100%; height: auto } svg text { font-family: inherit !important }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: 14px }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line) }
td { font-variant-numeric: tabular-nums } th { font-weight: 600 }
tr > :first-child, .text, .texts td, .texts th { text-align: left }
tr.own td { font-weight: 600; color: var(--own) }
.yes { color: var(--good) } .no { color: var(--bad) }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace }
pre i { font-style: normal; color: var(--soft) } summary { cursor: pointer; font-weight: 600 }
details pre { margin-top: 10px }
</style></head><body>
<h1>{{ title }}</h1>
<p class="soft">{{ model }} &middot;
{% if finished %}{{ rounds }} rounds{% elif refused %}refused by the gate{% else -%}
not finished: {{ done }} of {{ rounds }} rounds{% endif +%}
&middot; {{ folder }}</p>
{% if refused %}<p class="no">{{ refused }}</p>{% endif %}
{% if headline %}<div class="cards">{% for each in headline %}
<div><span class="soft">{{ each.what }}</span><b class="{{ each.get("mark", "") }}">{{ each.value }}</b>
<span class="soft">{{ each.note }}</span></div>
{% endfor %}</div>{% endif %}
{% if rows %}<section><h2>Result</h2><div class="scroll"><table>
<tr>{% for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows[1:] %}<tr{% if loop.last %} class="own"{% endif %}>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table></div><p class="soft">{{ caption }}</p></section>{% endif %}
{% macro draw(name, heading, words) %}{% if figures[name] %}<section><h2>{{ heading }}</h2><figure>{{ figures[name] }}
<figcaption>{{ words }}</figcaption></figure></section>{% endif %}{% endmacro %}
<div class="two">
{% set words = "Lines: mean training loss of the sites. Points: held-out loss, mean over the sites." %}
{% set counted = "Set-up included. " if finished else "" %}
{{ draw("rounds", "Loss by round", words) }}
{{ draw("up", "Loss by bytes sent up", counted ~ words) }}
{{ draw("both", "Loss by bytes both ways", counted ~ words) }}
{{ draw("kinds", "Bytes by kind", "Serialised messages, all rounds and sites. Evaluation counts in no ratio.") }}
{{ draw("gate", "Errors at the codec gate", "Errors of the innovation on held-out snapshots;"
  ~ " the codec must beat guesses without a message."
  ~ " Bars end at 2.5; the dashed line is what sending nothing gives.") }}
{% if gate %}<section><h2>Codec gate:
<span class="{{ 'yes' if gate.passed else 'no' }}">{{ "passed" if gate.passed else "failed" }}</span></h2>
<table class="texts">{% for list in verdicts %}<tr><th colspan="2">{{ list.name }}</th></tr>
{% for row in list.rows %}<tr><td>{{ row.what }}</td><td class="{{ 'yes' if row.holds else 'no' }}">
{{ "holds" if row.holds else "fails" }}</td></tr>{% endfor %}{% endfor %}</table>
<p class="soft">{{ gate.snapshots }} held-out of {{ snapshots }} snapshots. {% for what, value in measures.items() %}
{{ what }} {{ "%.3f"|format(value) }}{{ ", " if not loop.last else "." }}{% endfor %}</p></section>{% endif %}
{{ draw("sites", "Held-out loss by site", "From the base model to the final one; lower is better.") }}
{% if samples %}<section><h2>Samples</h2>{% for each in samples %}
<p class="soft">Before</p><pre><i>{{ each.prompt }}</i>{{ each.base }}</pre>
<p class="soft">After</p><pre><i>{{ each.prompt }}</i>{{ each.final }}</pre>{% endfor %}</section>{% endif %}
</div>
{% for each in excerpts %}<section><h2>{{ each.title }}</h2><div class="scroll"><table>
<tr>{% for cell in each.headings %}<th{% if loop.index <= each.left %} class="text"{% endif %}>{{ cell }}</th>
{% endfor %}</tr>
{% for row in each.rows %}<tr>{% for cell in row %}<td class="{{ 'text' if loop.index <= each.left else
'no' if cell.endswith(' refused') }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div><p class="soft">{{ each.words }}</p></section>{% endfor %}
{% if failures %}<section><h2>Missing replies</h2><div class="scroll"><table class="texts">
<tr><th>round</th><th>site</th><th>task</th><th>reason</th></tr>{% for each in failures %}
<tr><td>{{ each.round }}</td><td>{{ each.site }}</td><td>{{ each.task }}</td><td>{{ each.reason }}</td></tr>{% endfor %}
</table></div></section>{% endif %}
<section><details><summary>Configuration</summary><pre>{{ config }}</pre></details></section>
<p class="soft">{% for name, version in versions.items() %}{{ name }} {{ version }}
{{- " &middot; "|safe if not loop.last }}{% endfor %}{% if sha256 %}<br>weights SHA-256 {{ sha256 }}{% endif %}</p>
</body></html>
"""
TEMPLATE = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
    PAGE
)
