"""One self-contained HTML page about a comparison, in the style of a run's page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluvial.formatting import figure, human_bytes, human_seconds, safe_text
from fluvial.report.charts import COLOURS, Bars, bar_chart, legend
from fluvial.report.comparison_figures import curves
from fluvial.report.comparison_tables import (
    Rows,
    coding_words,
    colour,
    cost_rows,
    costs_caption,
    equal_words,
    measure_name,
    measure_rows,
    measures_caption,
    told_apart,
)
from fluvial.report.figures import Run, score_of
from fluvial.report.page import AXES, PAGES
from fluvial.runs.comparison.judging import p_words
from fluvial.runs.comparison.result import Compared, ComparedContender
from fluvial.storage.run_files import JsonObject, damage, read_metrics, read_result

MOST = len(COLOURS)
"""Contenders whose curves are drawn, at most: the baseline, and those of the lowest loss."""
REFRESH_S = 10
"""Seconds after which a browser reads the page of a comparison that goes on anew."""


def comparison_page(compared: Compared, folder: Path, *, written: str = "") -> bytes:
    """Return the page of the comparison in `folder`.

    `written` is the time that the page shows as that of its writing. A browser reads the page anew
    while runs are to be made.
    """
    drawn = _drawn(compared)
    runs = {
        each.name: _runs(each, folder, colour) for each, colour in zip(drawn, COLOURS, strict=False)
    }
    score = score_of([run for some in runs.values() for run in some])
    every = [(each, run) for each in compared.contenders for run in each.runs]
    open_runs = any(not run.finished and run.failed is None for _, run in every)
    headings = ["", "seed", "held-out loss", "time", "peak memory", "weights SHA-256"]

    content: JsonObject = {
        "title": f"Comparison with {safe_text(compared.baseline)}",
        "verdict": safe_text(compared.verdict),
        "mark": {"green": "yes", "red": "no"}.get(colour(compared), ""),
        "contenders": len(compared.contenders),
        "seeds": len(compared.seeds),
        "finished": sum(run.finished for _, run in every),
        "runs": every,
        "folder": str(folder),
        "written": written,
        "refresh_s": REFRESH_S if open_runs else 0,
        "notes": [safe_text(note) for note in (*compared.notes, *_damage(compared, folder))],
        "measures": [measure_rows(compared, name) for name in told_apart(compared)],
        "measures_caption": measures_caption(compared),
        "equal": equal_words(compared),
        "coding": safe_text(coding_words(compared)),
        "costs": cost_rows(compared),
        "costs_caption": costs_caption(compared),
        "axes": _axes(runs, score),
        "legend": legend(
            [(safe_text(name), some[0].colour) for name, some in runs.items() if some]
        ),
        "curves_caption": _curves_caption(compared, drawn),
        "bars": _bars(compared, score),
        "runs_rows": [
            headings,
            *(
                [
                    safe_text(each.name),
                    str(run.seed),
                    _loss(each, run.seed),
                    "-" if run.wall_s is None else human_seconds(run.wall_s),
                    "-" if run.peak_rss_bytes is None else human_bytes(run.peak_rss_bytes),
                    (run.weights_sha256 or "-")[:16],
                ]
                for each, run in every
            ),
        ],
        "differing": _differing(compared),
        "failed": [
            {"name": safe_text(f"{each.name}, seed {run.seed}"), "reason": safe_text(run.failed)}
            for each, run in every
            if run.failed
        ],
        "version": compared.fluvial,
    }
    return PAGES.get_template("comparison_page.html").render(content).encode(errors="replace")


def _damage(compared: Compared, folder: Path) -> list[str]:
    """Return what is damaged in the folders of the finished runs."""
    finished = [run.folder for each in compared.contenders for run in each.runs if run.finished]
    return [line for name in finished for line in damage(folder / name, name)]


def _loss(contender: ComparedContender, seed: int) -> str:
    """Return the held-out loss of a run; over all sites together where the data are in one
    place."""
    score = contender.scores.get("loss_pooled" if contender.pooled else "loss")
    return "-" if score is None or seed not in score.by_seed else figure(score.by_seed[seed])


def _drawn(compared: Compared) -> list[ComparedContender]:
    """Return the contenders whose curves are drawn, in their order."""
    if len(compared.contenders) <= MOST:
        return list(compared.contenders)

    others = [each for each in compared.contenders if each.name != compared.baseline]
    known = [each for each in others if "loss" in each.scores]
    best = sorted(known, key=lambda each: each.scores["loss"].mean)[: MOST - 1]
    names = {compared.baseline, *(each.name for each in best)}
    return [each for each in compared.contenders if each.name in names]


def _runs(contender: ComparedContender, folder: Path, colour: str) -> list[Run]:
    """Return the finished runs of a contender, one for each seed."""
    found = []
    for run in contender.runs:
        path = folder / run.folder
        result = read_result(path) if run.finished else None
        if result is not None:
            sends = bool(result["sends_updates"])
            name = safe_text(contender.name)
            found.append(Run(name, colour, read_metrics(path), result, sends))
    return found


def _axes(runs: dict[str, list[Run]], score: str) -> list[JsonObject]:
    """Return the charts of loss and score over each axis, those without values left out."""
    found = []
    for key, name in AXES.items():
        charts = [curves(list(runs.values()), key, measure) for measure in ("loss", score)]
        if any(charts):
            found.append({"key": key, "name": name, "charts": [each for each in charts if each]})
    return found


def _curves_caption(compared: Compared, drawn: Sequence[ComparedContender]) -> str:
    words = (
        "Lines: mean training loss of the sites. Points: held-out measures, means over the sites."
    )
    if len(compared.seeds) > 1:
        words += " Both are means over the seeds; the band is from the lowest to the highest seed."
    if len(drawn) < len(compared.contenders):
        words += f" Drawn: the baseline, and the {len(drawn) - 1} contenders of the lowest loss."
    return (
        f"{words} Bytes: of training and set-up; held-out measures apart. Time: of the rounds, "
        "set-up and final measures left out."
    )


def _bars(compared: Compared, score: str) -> list[JsonObject]:
    """Return the charts of differences and of costs."""
    found = []
    for measure in ("loss", score):
        shown = measure in told_apart(compared)
        others = [each for each in compared.contenders if shown and measure in each.differences]
        if not others:
            continue
        show = (lambda value: figure(value, "+.4f")) if measure == "loss" else _points
        differences = [each.differences[measure] for each in others]
        chart = bar_chart(
            [safe_text(each.name) for each in others],
            [
                Bars(
                    measure_name(measure),
                    "own",
                    [each.mean for each in differences],
                    [show(each.mean) for each in differences],
                    [
                        show(each.mean)
                        if each.low is None or each.high is None
                        else f"{show(each.mean)}, {show(each.low)} to {show(each.high)}, "
                        f"p = {p_words(each.p_holm)}"
                        for each in differences
                    ],
                )
            ],
            name=f"difference of {measure_name(measure)}",
        )
        better = "To the left is better" if measure == "loss" else "To the right is better"
        found.append(
            {
                "heading": f"Difference of {measure_name(measure)}",
                "chart": chart,
                "words": f"To {safe_text(compared.baseline)}. {better}. A hover shows the 95 % "
                "interval and p.",
            }
        )

    costs = (
        ("Bytes of a site", "up_bytes_per_site", human_bytes, "Up, all rounds, set-up included."),
        ("Time of a run", "wall_s", human_seconds, "Mean over the seeds."),
    )
    for heading, name, words, caption in costs:
        values = [
            None if each.pooled and name != "wall_s" else getattr(each, name)
            for each in compared.contenders
        ]
        chart = bar_chart(
            [safe_text(each.name) for each in compared.contenders],
            [Bars(heading, "own", values, ["-" if v is None else words(v) for v in values])],
            name=heading,
        )
        if chart:
            found.append({"heading": heading, "chart": chart, "words": caption})
    return found


def _points(value: float) -> str:
    """Return a difference of shares in percentage points."""
    return figure(100 * value, "+.2f") + " points"


def _differing(compared: Compared) -> Rows:
    """Return the settings that differ, with the value of each contender."""
    names = [each.name for each in compared.contenders]
    rows = [["setting", *map(safe_text, names)]]
    for key, values in compared.differing.items():
        rows.append([key, *(safe_text(_shown(values.get(name))) for name in names)])
    return rows


def _shown(value: Any) -> str:
    return "-" if value is None else json.dumps(value)
