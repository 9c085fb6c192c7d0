"""Draw the figures of FedCyBGD's page from stored results: memory, orders, convergence.

    python -m benchmarks.fedcybgd.pictures [--out docs/images]

It reads `benchmarks/results/fedcybgd_{paper,memory,losses}.json`; without the first it draws memory
alone, and says so. Part "paper" with `--pictures`
draws the same from what it has just measured.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.fedcybgd.contenders import (
    CYCLIC,
    EQUAL_BLOCKS,
    FEDBAVG,
    INT8,
    LONGER,
    REFERENCE,
)
from benchmarks.fedcybgd.memory import LLAMA_2_7B
from benchmarks.fedcybgd.paper import ORDERS, PROXIES, VISIT
from benchmarks.fedcybgd.shapes import layout_of
from benchmarks.report import Row
from fluvial.methods.fedcybgd.blocks import partition
from fluvial.methods.fedcybgd.memory import client_memory
from fluvial.methods.fedcybgd.visit_sizes import Full, OnDisk, Proxy, Sizes

RESULTS = Path(__file__).parents[1] / "results"
STYLE = {
    "svg.hashsalt": "fluvial",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
BAR, LINE = "#7a9cc6", "#b5482a"
BARS = {
    "Fed-full": (REFERENCE, "full"),
    "Centralized-Cy": (CYCLIC, "exact"),
    "FedBAvg": (FEDBAVG, "exact"),
    "FedCyBGD": (INT8, "exact"),
    "4 equal blocks,\n1.5 x passes": (LONGER, "equal"),
    "FedCyBGD, proxy 0.5": (None, "proxy"),
}
"""Bars by title: the contender whose losses are drawn above a bar, and what a site holds."""


def stored(name: str) -> list[Row]:
    """Return the rows of a stored result of this benchmark."""
    content = json.loads((RESULTS / f"fedcybgd_{name}.json").read_text(encoding="utf-8"))
    rows: list[Row] = content["rows"]
    return rows


def large_bytes() -> dict[str, int]:
    """Return the memory of a site that tunes LLaMA-2-7B in half precision, by formula and by bar,
    with one decoder layer in a block, or equal blocks and the rest on disk, and no activations."""
    layout = layout_of(LLAMA_2_7B)
    sizes = Sizes.of(partition(layout), 0)
    parts = partition(layout, extra=EQUAL_BLOCKS["extra"], num_blocks=EQUAL_BLOCKS["num_blocks"])
    largest = max(range(len(parts)), key=lambda index: parts.blocks[index].numel)
    equal = Sizes.of(parts, largest)
    held = {
        "full": client_memory(Sizes.full(layout.numel), Full(), width=2),
        "exact": client_memory(sizes, Full(), width=2),
        "equal": client_memory(equal, OnDisk(Full()), width=2),
        "proxy": client_memory(sizes, Proxy(0.5), width=2),
    }
    return {title: held[kind].states for title, (_, kind) in BARS.items()}


def shares(losses: Sequence[Row], contender: str | None) -> float | None:
    """Return the loss of a contender over Fed-full's, the mean of the cells; None for no such
    contender."""
    found = [row["ratio"] for row in losses if row["contender"] == contender and row["seeds"]]
    return mean(found) if found else None


def memory_figure(memory: Sequence[Row], losses: Sequence[Row]) -> Figure:
    """Draw memory bars of a 7B shape by formula and of a small model as measured, with the loss
    over Fed-full's as a line."""
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    large, small = figure.subplots(1, 2, width_ratios=(5, 3))
    bars = large_bytes()
    large.bar(list(bars), [size / 1e9 for size in bars.values()], color=BAR)
    large.set_ylabel("GB of a site")
    large.set_title("LLaMA-2-7B, by formula, no activations")
    large.tick_params(axis="x", rotation=25)

    line = large.twinx()
    values = [shares(losses, BARS[title][0]) for title in bars]
    line.plot(
        list(bars), [float("nan") if v is None else v for v in values], color=LINE, marker="o"
    )
    line.set_ylabel("loss over Fed-full's,\nsmall models, mean of cells", color=LINE)
    line.grid(visible=False)

    measured = {
        "all weights": ("full", "memory"),
        "one block": ("block", "memory"),
        "one block,\nrest on disk": ("block", "disk"),
    }
    found = {(row["tunes"], row["hold"]): row for row in memory if row["dtype"] == "float32"}
    rows = [found[key] for key in measured.values()]
    small.bar(list(measured), [row["train_mb"] for row in rows], color=BAR, label="measured")
    small.plot(
        list(measured), [row["formula_mb"] for row in rows], "k_", markersize=24, label="formula"
    )
    small.set_ylabel("MB of a visit")
    small.set_title(f"{rows[0]['parameters'] / 1e6:.0f} M parameters, fp32")
    small.legend()
    return figure


def orders_figure(rows: Sequence[Row]) -> Figure:
    """Draw the final loss by order of blocks, beside Fed-full, FedBAvg and the paper's own form."""
    wanted = (REFERENCE, CYCLIC, FEDBAVG, *ORDERS, *(each.name for each in PROXIES))
    found = {row["contender"]: row for row in rows if row["steps"] < VISIT}
    chosen = [found[name] for name in wanted if name in found]
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axes = figure.add_subplot()

    for place, row in enumerate(chosen):
        axes.plot([place] * len(row["losses"]), row["losses"], "o", color=BAR, alpha=0.7)
        axes.plot([place], [row["loss"]], "_", color=LINE, markersize=24)

    axes.set_xticks(range(len(chosen)), [row["contender"] for row in chosen], rotation=25)
    axes.set_ylabel("held-out loss at the end")
    axes.set_title("Allocation of blocks: one dot a seed, the bar is the mean")
    return figure


def convergence_figure(rows: Sequence[Row]) -> Figure:
    """Draw the loss from the beginning to the end of a run, with short visits and with long
    ones."""
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=(3, 2))

    for panel, long in zip(panels, (False, True), strict=True):
        chosen = [row for row in rows if (row["steps"] >= VISIT) == long]
        for row in chosen:
            steps = [row["steps"] * cycle for cycle in range(len(row["curve"]))]
            panel.plot(steps, row["curve"], marker=".", label=row["contender"])

        panel.set_xlabel("steps of a site")
        panel.set_ylabel("held-out loss")
        if chosen:
            panel.set_title(f"visits of {chosen[0]['steps']} steps")
            panel.legend(fontsize=7)

    return figure


def draw(folder: Path, rows: Sequence[Row]) -> None:
    """Write the figures as SVG; `rows` are those of part "paper", of one cell. Without rows there
    is the figure of memory alone."""
    mine = [row for row in rows if row["part"] == "paper"]
    mine = [row for row in mine if row["cell"] == mine[0]["cell"]]
    memory = [row for row in stored("memory") if row["part"] == "memory"]
    folder.mkdir(parents=True, exist_ok=True)

    with mpl.rc_context(STYLE):
        figures = {"memory": memory_figure(memory, stored("losses"))}
        if mine:
            figures["orders"] = orders_figure(mine)
            figures["convergence"] = convergence_figure(mine)

        for name, figure in figures.items():
            figure.savefig(
                folder / f"fedcybgd_{name}.svg",
                metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
            )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fedcybgd.pictures")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder")
    measured = (RESULTS / "fedcybgd_paper.json").exists()
    if not measured:
        Console().print("no fedcybgd_paper.json: orders and convergence are not drawn")
    draw(parser.parse_args().out, stored("paper") if measured else [])


if __name__ == "__main__":
    main()
