"""FedCyBGD against full tuning and LoRA: held-out loss, bytes, client memory and compute.

    python -m benchmarks.fedcybgd [--part losses|download|memory|compute|paper ...] [--quick]
        [--cell NAME ...] [--contender TEXT ...] [--seeds N] [--minutes M]
        [--cache FILE.jsonl] [--known FILE.json] [--processes N] [--device cuda]
        [--out FILE.json] [--pictures FOLDER]

losses    Every contender makes the same passes over the same data, unless its name says otherwise.
          Its learning rate is the best of three on seed 0, by the held-out loss after the last
          round, and of up to two more where the best is at the edge; then all seeds run at it.
          Losses are means over the sites, bytes are those of one site's serialised messages over
          the whole run, and memory is by formula. Rows that --known has are kept, and not run
          again; new ones are joined to them.
download  The forms of download at one setting and learning rate: bytes down of a visit, final
          loss, and the cosine of a block's gradient through the download to the exact one, at the
          base and at the end of a run.
memory    Peak of one visit in a process of its own; see `benchmarks.fedcybgd.memory`.
compute   Time of a step by block; see `benchmarks.fedcybgd.compute`.
paper     The paper's figures: losses cycle by cycle of every order of blocks, of the paper's own
          form and of visits of 150 steps; --pictures FOLDER draws them beside the stored memory
          and losses.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from benchmarks.cgfedllm.bed import workers
from benchmarks.codecs.cache import SOURCE
from benchmarks.codecs.figures import half_width
from benchmarks.fedcybgd.bed import Found, Job
from benchmarks.fedcybgd.compute import compute_part
from benchmarks.fedcybgd.contenders import (
    CELLS,
    CONTENDERS,
    CUT,
    EMBEDDINGS,
    FEDBAVG,
    INT8,
    LONGER,
    LORA,
    OURS,
    QUICK_NAMES,
    REFERENCE,
    WIDE,
    Cell,
)
from benchmarks.fedcybgd.download import download_part
from benchmarks.fedcybgd.jobs import bed_of, run_all
from benchmarks.fedcybgd.memory import memory_part
from benchmarks.fedcybgd.paper import paper_part
from benchmarks.fedcybgd.pictures import draw
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show

PARTS = ("losses", "download", "memory", "compute", "paper")
UPLOAD = 0.1
MEMORY = 1 / 3
LOSS = 0.01
"""Shares of Fed-full's upload and client memory, and of its loss beyond it, that FedCyBGD may
take."""


# -- losses --------------------------------------------------------------------------------------


def losses_part(
    pool: Executor, cells: Sequence[Cell], report: Report, options: argparse.Namespace
) -> None:
    """Figure 1."""
    bed = bed_of(options)
    named = (
        [each for each in CONTENDERS if each.name in QUICK_NAMES]
        if options.quick
        else list(CONTENDERS)
    )

    if options.contender:
        named = [
            each
            for each in named
            if any(text in each.name for text in (*options.contender, REFERENCE))
        ]

    known = known_rows(options.known, report) if options.known else []
    have = {(row["cell"], row["contender"]) for row in known}
    waiting = [
        Job(cell, each, bed, options.cache, options.deadline)
        for cell in cells
        for each in named
        if (cell.name, each.name) not in have
    ]
    found = run_all(pool, sorted(waiting, key=lambda job: job.contender.tier), report)
    rows = [
        row
        for cell in cells
        for row in table(
            [each for each in found if each.job.cell == cell],
            [row for row in known if row["cell"] == cell.name],
        )
    ]

    for cell in cells:
        title = (
            f"{cell.name}: {bed.rounds} rounds of {bed.steps} steps; bytes of one site, memory by "
            "formula"
        )
        show(title, COLUMNS, [row for row in rows if row["cell"] == cell.name])

    report.rows += [{"part": "losses", **row} for row in rows]
    report.claims += claims(rows, report)


COLUMNS = {
    "contender": "contender",
    "learning_rate": "lr",
    "seeds": "seeds",
    "loss": "loss",
    "loss_half": "+-",
    "ratio": "of fed-full",
    "ratio_half": "+-",
    "gain_kept": "gain kept",
    "bytes_up": "up",
    "bytes_down": "down",
    "up_share": "up, of fed-full",
    "memory_bytes": "memory",
    "memory_share": "of fed-full",
    "cpu_s": "CPU s",
    "why": "",
}


def known_rows(path: Path, report: Report) -> list[Row]:
    """Return the rows of an earlier result, each with the state of the package that it is of; what
    was not measured then is noted again."""
    earlier = json.loads(path.read_text(encoding="utf-8"))
    report.skipped += earlier["skipped"]
    report.settings["note"] = earlier["settings"].get("note")
    source = earlier["settings"]["source"]

    return [{"source": source, **row} for row in earlier["rows"] if row["part"] == "losses"]


def table(found: Sequence[Found], known: Sequence[Row] = ()) -> list[Row]:
    """Return a row for every contender of one cell, those of `known` first, beside Fed-full's runs
    with the same seeds."""
    rows = [*known, *(_row(each) for each in found if each.tuning)]
    full = next((row for row in rows if row["contender"] == REFERENCE and row["seeds"]), None)

    for row in rows:
        if full is not None and row["seeds"]:
            row |= _beside(row, full)

    return rows


def _beside(row: Row, full: Row) -> Row:
    """Return what a row is of Fed-full's, by the seeds that both have."""
    pairs = list(zip(row["losses"], full["losses"], strict=False))
    ratios = [mine / theirs for mine, theirs in pairs]
    base = len(pairs) * row["base_loss"]
    gain = base - sum(theirs for _, theirs in pairs)
    up = row["bytes_up"]

    return {
        "ratio": mean(ratios),
        "ratio_half": half_width(ratios),
        "gain_kept": (base - sum(mine for mine, _ in pairs)) / gain,
        "up_share": None if up is None else up / full["bytes_up"],
        "memory_share": row["memory_bytes"] / full["memory_bytes"],
    }


def _row(each: Found) -> Row:
    rates = list(each.tuning)
    row: Row = {
        "cell": each.job.cell.name,
        "contender": each.job.contender.name,
        "learning_rate": each.best,
        "edge": len(rates) > 1 and each.best in (min(rates), max(rates)),
        "complete": each.complete,
        "stopped": next(
            (run["stopped"] for run in (*each.tuning.values(), *each.runs) if "stopped" in run),
            None,
        ),
        "tuning": {f"{rate:g}": run.get("loss") for rate, run in each.tuning.items()},
    }
    runs = [run for run in each.runs if "stopped" not in run]
    row |= {
        "seeds": len(runs),
        "why": "stopped" if row["stopped"] else "lr at the grid's edge" if row["edge"] else "",
    }

    if not runs or each.config is None:
        return row

    config = each.config
    sends = each.config.entry.traits.sends == "codec"
    row |= {
        "rounds": config.rounds,
        "rank": config.lora.r if config.adapter else None,
        "codec": config.coding.name if sends else None,
        "codec_rate": getattr(config.coding, "rate", None),
        "base_loss": mean(run["base_loss"] for run in runs),
        "loss": mean(run["loss"] for run in runs),
        "loss_half": half_width([run["loss"] for run in runs]),
        "losses": [run["loss"] for run in runs],
        "bytes_up": mean(sum(run["up"]) / run["sites"] for run in runs) if sends else None,
        "bytes_down": mean(sum(run["down"]) / run["sites"] for run in runs) if sends else None,
        "memory_bytes": each.memory_bytes,
        "conflicts": mean(run["conflicts"] for run in runs),
        "run_s": mean(run["seconds"] for run in runs),
        "cpu_s": mean(run["cpu_s"] for run in runs),
        "source": runs[-1]["source"],
    }

    return row


def claims(rows: Sequence[Row], report: Report) -> list[Claim]:
    """Figure 1's verdicts, cell by cell."""
    found = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        here = {row["contender"]: row for row in rows if row["cell"] == cell and row["seeds"]}
        if REFERENCE not in here:
            continue

        for name in (OURS, INT8, EMBEDDINGS, WIDE, CUT, LONGER):
            if name in here:
                row = here[name]
                title = f"{cell}: {name}"
                found += [
                    Claim(
                        f"{title}: loss over fed-full's, less 1", row["ratio"] - 1, LOSS, "at most"
                    ),
                    Claim(f"{title}: upload over fed-full's", row["up_share"], UPLOAD, "at most"),
                    Claim(
                        f"{title}: client memory over fed-full's, by formula",
                        row["memory_share"],
                        MEMORY,
                        "at most",
                    ),
                ]

        found += _against_lora(cell, here, report) + _among_themselves(cell, here)

    return found


def _against_lora(cell: str, here: dict[str, Row], report: Report) -> list[Claim]:
    """Better than LoRA at equal bytes, where full tuning beats LoRA at equal passes."""
    lora = here.get(LORA)
    if lora is None:
        return []
    if here[REFERENCE]["loss"] >= lora["loss"]:
        report.skip(
            f"{cell}: no verdict against LoRA, because full tuning does not beat it at equal passes"
        )
        return []

    matched = [
        (each.match.name, each.name) for each in CONTENDERS if each.match and each.tune == "lora"
    ]
    pairs = [
        (here[ours], here[theirs]) for ours, theirs in matched if ours in here and theirs in here
    ]
    return [
        Claim(
            f"{cell}: {ours['contender']} less {theirs['contender']}, nats",
            ours["loss"] - theirs["loss"],
            0.0,
            "below",
        )
        for ours, theirs in pairs
    ]


def _among_themselves(cell: str, here: dict[str, Row]) -> list[Claim]:
    """Return claims on Jacobi groups, and on the paper's order of FedCyBGD and FedBAvg."""
    if INT8 not in here:
        return []

    alone = here[INT8]["loss"]
    found = [
        Claim(
            f"{cell}: {name} over one block at a time, less 1",
            here[name]["loss"] / alone - 1,
            LOSS,
            "at most",
        )
        for name in (f"{INT8}, parallel 2", f"{INT8}, parallel 4")
        if name in here
    ]
    if FEDBAVG in here:
        name = f"{cell}: {INT8} less {FEDBAVG}, nats"
        found.append(Claim(name, alone - here[FEDBAVG]["loss"], 0.0, "at most"))

    return found


def main() -> None:
    """See the module."""
    parser = parser_of("fedcybgd", __doc__, quick="few contenders and steps: whether it works")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument(
        "--cell",
        action="append",
        choices=list(CELLS),
        help="default: all; of download, the first; of paper, the second",
    )
    parser.add_argument(
        "--contender", action="append", default=[], help="only those with this text in their name"
    )
    parser.add_argument("--seeds", type=int, help="default: 3")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no run after this time"
    )
    parser.add_argument(
        "--cache", type=Path, help="JSON lines: runs to take, and to add to; may be shared"
    )
    parser.add_argument(
        "--known", type=Path, help="result of an earlier call, whose rows of part losses are kept"
    )
    parser.add_argument("--processes", type=int, help="default: as many as cores")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of part compute")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures of part paper")
    options = parser.parse_args()
    load = os.getloadavg()
    options.deadline = time.time() + 60 * options.minutes
    parts = options.part or list(PARTS)
    report = Report("fedcybgd", {"quick": options.quick, "parts": parts, "source": SOURCE})
    cells = _cells(options, report)

    if {"losses", "download"} & set(parts):
        report.settings |= {**asdict(bed_of(options)), "cells": [asdict(cell) for cell in cells]}
        with workers(options.processes) as pool:
            if "losses" in parts:
                losses_part(pool, cells, report, options)
            if "download" in parts:
                download_part(pool, cells if options.cell else cells[:1], report, options)

    if "paper" in parts:
        _one_thread()
        report.settings |= {**asdict(bed_of(options)), "cells": [asdict(cell) for cell in cells]}
        paper_part(cells if options.cell else cells[1:2] or cells, report, options)

    if "memory" in parts:
        memory_part(report, quick=options.quick)
    if "compute" in parts:
        _one_thread()
        compute_part(report, quick=options.quick, device=options.device)

    report.finish(options.out, load)
    if options.pictures is not None:
        draw(options.pictures, report.rows)


def _cells(options: argparse.Namespace, report: Report) -> list[Cell]:
    """Those asked for that this checkout has."""
    wanted = [CELLS[name] for name in options.cell or (["embedded"] if options.quick else CELLS)]
    for cell in wanted:
        if not cell.present:
            report.skip(f"{cell.name}: this checkout has no ../shared beside it")

    return [cell for cell in wanted if cell.present]


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
