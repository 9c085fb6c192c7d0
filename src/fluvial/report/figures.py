"""Figures of a run's page, as inline SVG that takes its colours from the page."""

import io
import re
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fluvial.formatting import human_bytes, safe_text
from fluvial.runs.verdict import loss_of, losses
from fluvial.storage.run_files import JsonObject

COLOURS = {
    name: f"#0101{number:02x}"
    for number, name in enumerate(("ink", "line", "own", "fedavg", "local", "central"), 1)
}
"""Placeholders that `_svg` replaces by CSS variables, so that figures follow light and dark."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fluvial",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "legend.frameon": False,
    "figure.facecolor": "none",
}
HIGHEST = 2.5
"""Largest error that is drawn at the gate; 1 is the error of sending nothing."""


def _svg(figure: Figure) -> Markup:
    """Return the figure as an SVG element with the page's colours; matplotlib escapes its texts."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = re.sub(
        r' (xmlns(:xlink)?|width|height)="[^"]*"', "", text[text.index("<svg") :], count=4
    )

    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(text)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _colour(name: str, method: str) -> str:
    return COLOURS["own"] if name == method else COLOURS.get(name, COLOURS["ink"])


def _sends_updates(run: JsonObject) -> bool:
    """Return whether a run sends updates, as its description says; False where it has none yet, as
    a baseline before its end."""
    return bool((run["result"] or run.get("description") or {}).get("sends_updates"))


def _or_gap(loss: float | None) -> float:
    """Return a loss to draw, NaN for a loss that sites did not send."""
    return float("nan") if loss is None else loss


def _draw_losses(
    axes: Axes,
    runs: Mapping[str, JsonObject],
    method: str,
    place: Callable[[JsonObject], list[float]],
) -> None:
    """Draw training losses as lines and held-out losses as points.

    `place(run)` returns the value on the horizontal axis of round 0, 1, ...
    """
    for name, run in runs.items():
        colour = _colour(name, method)
        at = place(run)
        records = run["metrics"]
        result = run["result"]
        axes.plot(
            at[1:],
            [_or_gap(record["loss"]) for record in records],
            color=colour,
            label=name,
            linewidth=1.6,
        )
        points = [
            (at[number], record["heldout_loss"])
            for number, record in enumerate(records, start=1)
            if "heldout_loss" in record
        ]

        if result:
            ends = [loss_of(result["heldout"].get(which)) for which in ("base", "final")]
            before, after = (
                [] if loss is None else [(place, loss)]
                for place, loss in zip((at[0], at[-1]), ends, strict=True)
            )
            points = [*before, *points, *after]

        points = [point for point in points if point[0] > 0 or axes.get_xscale() == "linear"]
        if points:
            form = "o:" if len(points) > 1 else "o"
            axes.plot(*zip(*points, strict=True), form, color=colour, ms=4, lw=0.9)

    axes.set_ylabel("loss, nats per token")
    axes.figure.legend(loc="outside upper left", ncols=len(runs))


def loss_by_round(runs: Mapping[str, JsonObject], method: str) -> Markup:
    """Draw training and held-out loss of all `runs` by round."""
    figure, axes = _axes(5.4, 3.3)
    _draw_losses(
        axes, runs, method, lambda run: [0, *(record["round"] for record in run["metrics"])]
    )
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))

    return _svg(figure)


def loss_by_bytes(
    runs: Mapping[str, JsonObject], method: str, ways: tuple[str, ...]
) -> Markup | None:
    """Draw losses by the bytes sent so far in these `ways`; None where no run sends updates."""
    runs = {name: run for name, run in runs.items() if _sends_updates(run)}
    if not runs:
        return None

    figure, axes = _axes(5.4, 3.3)

    def place(run: JsonObject) -> list[float]:
        """Return cumulative bytes; those of set-up, known at the end, come before round 1."""
        sums = [
            float(run["result"]["bytes"]["setup_up" if ways == ("up",) else "setup"])
            if run["result"]
            else 0.0
        ]
        for record in run["metrics"]:
            sums.append(sums[-1] + sum(record[f"bytes_{way}"] for way in ways))
        return sums

    axes.set_xscale("log")
    _draw_losses(axes, runs, method, place)
    ends = [value for run in runs.values() for value in place(run) if value > 0]
    wide = max(ends) > 50 * min(ends)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: human_bytes(value).replace(".00", "").replace(".0", ""))
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"bytes so far, {' and '.join(ways)}")

    return _svg(figure)


def bytes_by_kind(runs: Mapping[str, JsonObject], method: str) -> Markup | None:
    """Draw the bytes of each kind of message; None where no finished run sends updates."""
    tables = {
        name: run["result"]["bytes"]["by_kind"]
        for name, run in runs.items()
        if run["result"] and _sends_updates(run)
    }
    kinds = sorted({kind for table in tables.values() for kind in table}, reverse=True)

    if not kinds:
        return None

    figure, axes = _axes(5.4, 0.9 + len(kinds) * (0.14 + 0.2 * len(tables)))
    thick = 0.8 / len(tables)
    for number, (name, table) in enumerate(reversed(tables.items())):
        at = [index + (number - (len(tables) - 1) / 2) * thick for index in range(len(kinds))]
        bars = axes.barh(
            at,
            [table.get(kind, 0) for kind in kinds],
            thick * 0.9,
            color=_colour(name, method),
            label=name,
        )
        axes.bar_label(
            bars,
            [human_bytes(table[kind]) if kind in table else "" for kind in kinds],
            padding=3,
            fontsize=8,
        )

    axes.set_yticks(range(len(kinds)), kinds)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.15)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper left", ncols=len(tables))

    return _svg(figure)


def snr_by_round(metrics: Sequence[JsonObject]) -> Markup | None:
    """Draw the codec's SNR and the rate of each round; None where the rate is fixed."""
    records = [record for record in metrics if "rate" in record and "snr_db" in record]
    if not records:
        return None

    figure = Figure(figsize=(5.4, 3.3), layout="constrained")
    axes: list[Axes] = list(figure.subplots(2, 1, sharex=True))
    rounds = [record["round"] for record in records]
    for each, key, label in zip(
        axes, ("snr_db", "rate"), ("codec SNR, dB", "times smaller"), strict=True
    ):
        each.plot(rounds, [record[key] for record in records], "o-", color=COLOURS["own"], ms=4)
        each.set_ylabel(label)

    axes[-1].set_xlabel("round")
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    return _svg(figure)


def gate_errors(gate: JsonObject) -> Markup:
    """Draw the errors of codec and predictors at the gate, for A, B and the aggregate."""
    figure, axes = _axes(5.4, 3.3)
    series = {"codec": gate["errors"], **gate["predictors"]}
    colours = [COLOURS[name] for name in ("own", "fedavg", "local", "central")]
    thick = 0.84 / len(series)

    for number, (name, errors) in enumerate(series.items()):
        at = [index + (number - (len(series) - 1) / 2) * thick for index in range(3)]
        values = [errors[factor] for factor in ("a", "b", "aggregate")]
        bars = axes.bar(
            at,
            [min(v, HIGHEST) for v in values],
            thick * 0.9,
            color=colours[number % 4],
            label=name,
        )
        axes.bar_label(
            bars, [f"{v:.2f}" if v < 100 else f"{v:.0e}" for v in values], padding=2, fontsize=7
        )

    axes.axhline(1, color=COLOURS["ink"], linewidth=0.8, linestyle="--")
    axes.set_xticks(range(3), ["A", "B", "aggregate"])
    axes.set_ylabel("relative squared error")
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside upper left", ncols=len(series))

    return _svg(figure)


def heldout_by_site(result: JsonObject, local: JsonObject | None) -> Markup | None:
    """Draw the losses of every measured site before and after; None without any."""
    before = losses(result, "base")
    after = losses(result, "final")
    sites = [
        site for site in reversed(result["heldout_by_site"]) if site in before and site in after
    ]

    if not sites:
        return None

    figure, axes = _axes(5.4, 0.9 + 0.26 * len(sites))
    base = [before[site] for site in sites]
    final = [after[site] for site in sites]
    at = range(len(sites))
    axes.hlines(at, base, final, color=COLOURS["line"], linewidth=3)
    axes.plot(base, at, "o", color=COLOURS["ink"], markerfacecolor="none", label="base model")

    if local and local is not result:
        local_losses = losses(local, "final")
        alone = [local_losses.get(site, float("nan")) for site in sites]
        axes.plot(
            alone,
            at,
            "|",
            color=COLOURS["local"],
            markersize=10,
            markeredgewidth=2,
            label="local only",
        )

    axes.plot(final, at, "o", color=COLOURS["own"], label="final")
    axes.set_yticks(at, [safe_text(site) for site in sites])
    axes.set_ylim(-0.6, len(sites) - 0.4)
    axes.set_xlabel("held-out loss, nats per token")
    figure.legend(loc="outside upper left", ncols=3)

    return _svg(figure)


def ranks_by_site(plans: Mapping[str, JsonObject]) -> Markup:
    """Draw the rank of every weight at every site as a disc, larger for a higher rank."""
    sites = sorted(plans, reverse=True)
    modules = sorted({module for plan in plans.values() for module in plan["ranks"]})
    most = max(rank for plan in plans.values() for rank in plan["ranks"].values())
    discs = [
        (modules.index(module), row, 60 * rank / most)
        for row, site in enumerate(sites)
        for module, rank in plans[site]["ranks"].items()
    ]

    figure, axes = _axes(7.2, 1.1 + 0.3 * len(sites))
    axes.scatter(*zip(*discs, strict=True), color=COLOURS["own"], linewidths=0)
    axes.set_yticks(range(len(sites)), [safe_text(site) for site in sites])
    axes.set_ylim(-0.6, len(sites) - 0.4)
    axes.set_xticks([])
    axes.set_xlabel(f"{len(modules)} weights in order of their names; the largest disc is {most}")

    return _svg(figure)


def budget_trials(choice: JsonObject) -> Markup | None:
    """Draw the losses of all trials by the bytes of a site so far; None without any trial."""
    if not choice["trials"]:
        return None

    figure, axes = _axes(5.4, 3.3)
    for trial in sorted(choice["trials"], key=lambda trial: trial["chosen"]):
        at, losses = zip(*trial["points"], strict=True)
        name = f"rank {trial['r']} on {safe_text(trial['target_modules'])}, {trial['codec']}"
        axes.plot(
            at,
            [_or_gap(loss) for loss in losses],
            "o-",
            color=COLOURS["own"] if trial["chosen"] else COLOURS["line"],
            label=f"chosen: {name}" if trial["chosen"] else None,
            markersize=5 if trial["chosen"] else 3.5,
            linewidth=1.6 if trial["chosen"] else 0.9,
        )

    axes.axhline(choice["base_loss"], color=COLOURS["ink"], linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes of a site so far, up and down")
    axes.set_ylabel("held-out loss, nats per token")
    figure.legend(loc="outside upper left")

    return _svg(figure)
