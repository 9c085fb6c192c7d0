"""Figures of a run's page, drawn from the values of its folder."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fluvial.formatting import (
    epsilon_words,
    figure,
    human_bytes,
    human_ratio,
    human_seconds,
    percent,
    safe_text,
)
from fluvial.report.axes import AXIS_WORDS, SCORES, chart_of, tips_of
from fluvial.report.block_tables import block_words
from fluvial.report.charts import Bars, Cell, Series, bar_chart, grid_chart, legend
from fluvial.report.cross_site import Matrix
from fluvial.report.dots import dot_chart
from fluvial.report.line_charts import line_chart
from fluvial.report.scales import LEAST_LOSS, LEAST_SCORE, spanned
from fluvial.runs.site_comparison import losses
from fluvial.storage.run_files import JsonObject

SITES = 48
"""Number of sites of a figure at most: the first by name."""
CYCLES = 24
"""Number of cycles of a block schedule: the last ones."""
POOLED = "pooled"
"""Name of the records of all sites together in results, as `data.POOLED`, which needs torch."""
ALL_SITES = "all sites, pooled"
"""Its label, below those of the sites."""
HIGHEST = 2.5
"""Largest error that is drawn at the gate; 1 is the error of sending nothing."""


@dataclass(frozen=True)
class Run:
    """One run of a page: the method's own, or one of its baselines."""

    name: str
    """Name as the result table has it."""
    colour: str
    metrics: Sequence[JsonObject]
    result: JsonObject | None
    sends_updates: bool

    def places(self, axis: str) -> list[float]:
        """Return the value on an axis before round 1 and after each round.

        The axes are round, up, both and seconds. Bytes of set-up, known at the end, come before
        round 1.
        """
        if axis == "round":
            return [0.0, *(float(record["round"]) for record in self.metrics)]
        if axis == "seconds":
            steps = [float(record["seconds"]) for record in self.metrics]
            return _sums(0.0, steps)

        keys = ("bytes_up",) if axis == "up" else ("bytes_up", "bytes_down")
        setup = "setup_up" if axis == "up" else "setup"
        before = float(self.result["bytes"][setup]) if self.result else 0.0
        return _sums(before, [float(sum(record[key] for key in keys)) for record in self.metrics])


def score_of(runs: Sequence[Run]) -> str:
    """Return the most telling score that a run has."""
    heldout = [run.result["heldout"] for run in runs if run.result]
    measured = [table.get(key) or {} for table in heldout for key in ("base", "final")]
    return next((name for name in SCORES if any(name in each for each in measured)), "accuracy")


def by_axis(runs: Sequence[Run], axis: str, measure: str) -> Markup:
    """Draw the loss or a score of all `runs` over an axis of `Run.places`."""
    drawn = [run for run in runs if axis in ("round", "seconds") or run.sends_updates]
    series = [series_of(run, axis, measure) for run in drawn]
    if measure != "loss" and not any(each.joined for each in series):
        return Markup("")  # two marks at the ends of an empty box, whose values are in the tables
    return chart_of(series, axis, measure)


def series_of(run: Run, axis: str, measure: str) -> Series:
    """Return training losses as a line, and held-out measures as points."""
    at = run.places(axis)
    line = []
    points = []
    for place, record in zip(at[1:], run.metrics, strict=True):
        if measure == "loss" and record["loss"] is not None:
            line.append((place, float(record["loss"])))
        value = record.get(f"heldout_{measure}")
        if value is not None:
            points.append((place, float(value)))

    joined = bool(points)  # measures at the two ends alone say nothing of the rounds between
    if run.result:
        before, after = (
            _number((run.result["heldout"].get(which) or {}).get(measure))
            for which in ("base", "final")
        )
        points = [
            *([] if before is None else [(at[0], before)]),
            *points,
            *([] if after is None else [(at[-1], after)]),
        ]

    tips = tips_of(run.name, axis, measure, line, points)
    return Series(run.name, run.colour, line, points, tips, joined=joined)


def bytes_by_kind(runs: Sequence[Run]) -> Markup:
    """Draw the bytes of each kind of message, of finished runs that send updates."""
    finished = [(run, run.result["bytes"]["by_kind"]) for run in runs if run.result]
    tables = [(run, table) for run, table in finished if run.sends_updates]
    kinds = sorted({kind for _, table in tables for kind in table})
    bars = [
        Bars(
            run.name,
            run.colour,
            [table.get(kind) for kind in kinds],
            [human_bytes(table[kind]) if kind in table else "none" for kind in kinds],
        )
        for run, table in tables
    ]
    chart = bar_chart(kinds, bars, name="Bytes by kind") if kinds else Markup("")
    return _with_legend(chart, bars)


def losses_by_site(own: Run, others: Sequence[Run]) -> Markup:
    """Draw the held-out loss of every site under the base, each run and the final model."""
    tables = [("base model, untuned", "base", losses(own.result or {}, "base"))]
    tables += [(run.name, run.colour, losses(run.result or {}, "final")) for run in (*others, own)]
    known = {site for _, _, table in tables for site in table}
    sites = [*sorted(known - {POOLED})[:SITES], *(known & {POOLED})]
    dots = [
        Bars(
            name,
            colour,
            [table.get(site) for site in sites],
            [figure(table.get(site)) for site in sites],
        )
        for name, colour, table in tables
        if table.keys() & set(sites)
    ]
    if not dots:
        return Markup("")

    labels = [ALL_SITES if site == POOLED else safe_text(site) for site in sites]
    chart = dot_chart(labels, dots, across="held-out loss, nats per token", least=LEAST_LOSS)
    return legend([(each.name, each.colour) for each in dots], kind="points") + chart


def scores_by_site(own: Run, others: Sequence[Run], score: str) -> Markup:
    """Draw a score of every site under the base, each run and the final model."""
    rows = (own.result or {}).get("heldout_by_site") or {}
    sites = list(rows)[:SITES]
    tables = [("base model, untuned", "base", rows, "base")]
    for run in (*others, own):
        found = (run.result or {}).get("heldout_by_site") or {}
        tables.append((run.name, run.colour, found, "final"))

    bars = []
    for name, colour, table, which in tables:
        values = [_number(((table.get(site) or {}).get(which) or {}).get(score)) for site in sites]
        if any(value is not None for value in values):
            bars.append(Bars(name, colour, values, [percent(value) for value in values]))

    labels = [safe_text(site) for site in sites]
    chart = bar_chart(labels, bars, name="Score by site") if labels and bars else Markup("")
    return _with_legend(chart, bars)


def bytes_by_site(own: Run, *, unequal: float) -> Markup:
    """Draw the bytes that each site has sent in the rounds; empty where the most are less than
    `unequal` times the fewest."""
    sums: dict[str, int] = {}
    for record in own.metrics:
        for site, kinds in (record.get("bytes") or {}).items():
            up = sum(size for kind, size in kinds.items() if kind.startswith("up "))
            sums[site] = sums.get(site, 0) + up
    sites = sorted(sums)[:SITES]
    if not sites or not own.sends_updates or max(sums.values()) < unequal * min(sums.values()):
        return Markup("")

    values = [float(sums[site]) for site in sites]
    bars = [Bars(own.name, own.colour, values, [human_bytes(value) for value in values])]
    return bar_chart([safe_text(site) for site in sites], bars, name="Bytes up by site")


def snr_by_round(metrics: Sequence[JsonObject]) -> Markup:
    """Draw the codec's SNR by round; empty without any."""
    return _by_round(metrics, "snr_db", "codec SNR, dB", lambda value: f"codec SNR {value:.2f} dB")


def rate_by_round(metrics: Sequence[JsonObject]) -> Markup:
    """Draw the rate of each round; empty where the rate is fixed."""
    return _by_round(metrics, "rate", "times smaller", lambda value: human_ratio(1 / value))


def epsilon_by_round(metrics: Sequence[JsonObject]) -> Markup:
    """Draw the epsilon that was spent after each round; empty without any."""
    return _by_round(
        metrics, "epsilon", "epsilon so far", lambda value: f"epsilon {epsilon_words(value)}"
    )


def _by_round(
    metrics: Sequence[JsonObject], key: str, up: str, words: Callable[[float], str]
) -> Markup:
    found = [(float(record["round"]), record[key]) for record in metrics if key in record]
    points = [(round, value) for round, value in found if _number(value) is not None]
    tips = [f"round {round:g}: {words(value)}" for round, value in points]
    return line_chart(
        [Series("", "own", points=points, tips=tips)], across="round", up=up, whole=True
    )


def gate_errors(gate: JsonObject) -> Markup:
    """Draw the errors of codec and predictors at the gate, for A, B and the aggregate."""
    colours = ("own", "fedavg", "local", "central", "sixth")
    bars = []
    for number, (name, errors) in enumerate(
        {"codec": gate["errors"], **gate["predictors"]}.items()
    ):
        values = [errors[factor] for factor in ("a", "b", "aggregate")]
        words = [f"{value:.2f}" if value < 100 else f"{value:.0e}" for value in values]
        drawn = [min(value, HIGHEST) for value in values]
        bars.append(Bars(safe_text(name), colours[number % len(colours)], drawn, words))

    chart = bar_chart(["A", "B", "aggregate"], bars, name="Errors at the codec gate")
    return _with_legend(chart, bars)


def ranks_by_site(plans: Mapping[str, JsonObject]) -> Markup:
    """Draw the rank of every weight at every site as a cell, stronger for a higher rank."""
    modules = sorted({module for plan in plans.values() for module in plan["ranks"]})
    most = max(rank for plan in plans.values() for rank in plan["ranks"].values())
    rows = {}
    for site in sorted(plans)[:SITES]:
        ranks = plans[site]["ranks"]
        rows[safe_text(site)] = [
            Cell(
                ranks[module] / most if module in ranks else None,
                "",
                f"{safe_text(site)}\n{safe_text(module)}: "
                + (f"rank {ranks[module]}" if module in ranks else "not tuned"),
            )
            for module in modules
        ]

    return grid_chart(rows, [""] * len(modules), name="Rank of each weight by site")


def prediction_errors(metrics: Sequence[JsonObject]) -> Markup:
    """Draw the relative error of each site's last prediction; empty without any."""
    latest: dict[str, JsonObject] = {}
    for record in metrics:
        latest |= record.get("predicted", {})
    sites = sorted(latest)[:SITES]
    bars = []
    for colour, key, words in (
        ("own", "bytes_up", human_bytes),
        ("fedavg", "bytes_down", human_bytes),
        ("local", "seconds", human_seconds),
        ("central", "memory_bytes", human_bytes),
    ):
        figures = [latest[site].get(key) or {} for site in sites]
        errors = [_number(each.get("error")) for each in figures]
        if any(error is not None for error in errors):
            shown = ["not measured" if error is None else f"{error:+.0%}" for error in errors]
            tips = [_compared(each, words) for each in figures]
            bars.append(Bars(key.replace("_", " "), colour, errors, shown, tips))

    labels = [safe_text(site) for site in sites]
    chart = bar_chart(labels, bars, name="Plan against measured") if bars else Markup("")
    return _with_legend(chart, bars)


def _compared(figures: JsonObject, words: Callable[[float], str]) -> str:
    """Return what was predicted and what was measured."""
    pairs = ((name, _number(figures.get(name))) for name in ("predicted", "measured"))
    return ", ".join(f"{name} {words(value)}" for name, value in pairs if value is not None)


def schedule_grid(metrics: Sequence[JsonObject], setup: JsonObject) -> Markup:
    """Draw the blocks that each site trained in the last cycles; empty without visits."""
    records = [record for record in metrics if "visits" in record][-CYCLES:]
    if not records:
        return Markup("")

    order = [block["name"] for block in setup.get("blocks", [])]
    order += sorted({v["block"] for r in records for v in r["visits"]} - set(order))
    sites = sorted({visit["site"] for record in records for visit in record["visits"]})[:SITES]
    rows = {safe_text(site): [_visits(record, site, order) for record in records] for site in sites}
    return grid_chart(
        rows, [str(record["round"]) for record in records], name="Block schedule, by cycle"
    )


def _visits(record: JsonObject, site: str, order: Sequence[str]) -> Cell:
    """Return the blocks that a site trained in one cycle as a cell; a later block is stronger."""
    visits = [visit for visit in record["visits"] if visit["site"] == site]
    lines = [f"{safe_text(site)}, cycle {record['round']}"]
    for visit in visits[:4]:
        state = {0: ", refused", 1: ""}.get(visit["share"], f", step times {visit['share']:g}")
        loss = "" if _number(visit.get("loss")) is None else f", loss {figure(visit['loss'])}"
        lines.append(f"{safe_text(visit['block'])}{state}{loss}")
    if not visits:
        return Cell(None, "-", "\n".join([*lines, "no visit"]))

    place = order.index(visits[-1]["block"])
    shade = 0.1 + 0.8 * place / max(1, len(order) - 1)
    text = block_words(visits[0]["block"]) + (" …" if len(visits) > 1 else "")
    return Cell(shade, text, "\n".join(lines), bad=any(v["share"] == 0 for v in visits))


def tokens_read(leakage: JsonObject) -> Markup:
    """Draw the share of tokens that each attack read."""
    attacks = leakage["attacks"]
    values = [_number(row["accuracy"]) for row in attacks]
    bars = [Bars("tokens read", "fedavg", values, [percent(value) for value in values])]
    return bar_chart([safe_text(row["attack"]) for row in attacks], bars, name="Tokens read")


def heat_map(matrix: Matrix) -> Markup:
    """Draw the cross-site matrix, stronger for a better value."""
    known = [value for row in matrix.values for value in row if value is not None]
    is_loss = matrix.name == "loss"
    low, high = spanned(known, LEAST_LOSS if is_loss else LEAST_SCORE, math.inf if is_loss else 1.0)
    rows = {}
    for label, values in zip(matrix.rows, matrix.values, strict=True):
        cells = []
        for site, value in zip(matrix.columns, values, strict=True):
            share = None
            if value is not None:
                share = (value - low) / (high - low)
                share = 0.08 + 0.84 * (1 - share if is_loss else share)
            shown = "" if value is None else matrix.short(value)
            tip = f"model of {label}\ndata of {site}: {matrix.text(value)}"
            cells.append(Cell(share, shown, tip))
        rows[label] = cells

    return grid_chart(rows, matrix.columns, name=f"Held-out {matrix.name}, by model and by data")


def budget_trials(choice: JsonObject) -> Markup:
    """Draw the losses of all trials by the bytes of a site so far; empty without any trial."""
    series = []
    words = AXIS_WORDS["both"][0]
    for trial in sorted(choice["trials"], key=lambda trial: trial["chosen"]):
        name = f"rank {trial['r']} on {safe_text(trial['target_modules'])}, {trial['codec']}"
        name = f"chosen: {name}" if trial["chosen"] else name
        points = [(float(at), loss) for at, loss in trial["points"] if _number(loss) is not None]
        tips = [f"{name}\n{words(at)}: {figure(loss)}" for at, loss in points]
        series.append(Series(name, "own" if trial["chosen"] else "base", points=points, tips=tips))

    chart = line_chart(
        series,
        across="bytes of a site so far, up and down",
        up="held-out loss, nats per token",
        words=words,
        log=True,
        least=LEAST_LOSS,
    )
    chosen = [(each.name, each.colour) for each in series if each.colour == "own"]
    return legend(chosen) + chart if chart else chart


def _with_legend(chart: Markup, bars: Sequence[Bars]) -> Markup:
    """Return the chart below the legend of its bars; empty without a chart."""
    return (
        legend([(each.name, each.colour) for each in bars], kind="bars") + chart if chart else chart
    )


def _sums(before: float, steps: Sequence[float]) -> list[float]:
    sums = [before]
    for step in steps:
        sums.append(sums[-1] + step)
    return sums


def _number(value: object) -> float | None:
    """Return a finite number, None for all else; a file that was changed by hand may hold it."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
