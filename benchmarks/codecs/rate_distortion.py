"""Errors of every codec on updates that sites send, at four rates, on frames as they are sent.

    python -m benchmarks.codecs rate_distortion [--quick] [--cell NAME ...] [--seeds N]
        [--processes N] [--out FILE.json]

Updates are those of TGAP: eight sites train together for some rounds, and the last rounds are held
out. A codec that learns is fitted to the earlier updates of the sites themselves, as in the paper
(source "sites"), or to updates of simulated sites on public text, which cost the sites nothing
("public"). Errors are squared and relative to the update, 1 is sending nothing; an unbiased codec
may exceed it. Intervals are 95 % over seeds, of the data's split and order, of the initial adapter
and of the codec's draws.
"""

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from benchmarks.cgfedllm.bed import (
    CORPORA,
    Ensemble,
    Size,
    Source,
    Table,
    ensemble,
    fitted,
    workers,
)
from benchmarks.codecs.contenders import CELLS
from benchmarks.codecs.figures import half_width
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show
from fluvial.codecs import CODECS
from fluvial.codecs.base import Codec
from fluvial.errors import FluvialError
from fluvial.seeds import derive
from fluvial.wire.tensors import Named, WeightedMean, cosine, relative_error

FULL = Size(rounds=1, steps=8, tgap_rounds=12, heldout=1, iterations=0, seeds=3)
QUICK = Size(rounds=1, steps=2, tgap_rounds=4, heldout=1, iterations=0, seeds=1)
RATES = (16, 32, 64, 128)

RATED: dict[str, Table] = {
    "klt": {"name": "klt"},
    "klt_trellis": {"name": "klt_trellis"},
    "klt, dithered": {"name": "klt", "mode": "dithered"},
    "vq": {"name": "vq"},
    "cnn": {"name": "cnn"},
    "trellis": {"name": "trellis"},
    "hadamard": {"name": "hadamard"},
    "eden": {"name": "eden"},
    "eden, biased": {"name": "eden", "unbiased": "no"},
    "dct_top_k": {"name": "dct_top_k"},
    "top_k": {"name": "top_k", "value_bits": "best"},
    "random_k": {"name": "random_k"},
    "ternary": {"name": "ternary"},
    "powersgd": {"name": "powersgd"},
}
"""Codecs with a rate, by the name in the tables; those that learn come first. The paper's
autoencoder, which has no free rate and sends nothing at 1/64, is in `benchmarks.cgfedllm`."""
FIXED: tuple[Table, ...] = tuple(
    {"name": name} for name in ("bf16", "int8", "int4", "nf4", "sign", "half_sign")
)
ONCE = ("vq", "cnn")
"""Their fits take tens of seconds, so they are measured on the first seed only."""
OURS = ("trellis",)
"""Learns nothing either, and is no opponent."""
LEARNED = ("klt", "klt_trellis")
BAR_LARGE = 1.5
BAR_SMALL = 0.8
"""Decibels that klt should gain at 1/64, from d 128 on and below."""
WIDE = 128


def measured(
    cell: str, seed: int, size: Size, rated: dict[str, Table], fixed: Sequence[Table]
) -> list[Row]:
    """Every codec at every rate on the held-out updates of one cell and seed."""
    own = ensemble(cell, size, "sites", seed=seed)
    wide = max(max(shape) for _, shape in own.layout.shapes)
    described = {"cell": cell, "seed": seed, "width": wide, "raw_bytes": own.layout.raw_bytes}
    rows = []

    for name, table in rated.items():
        if name in ONCE and seed > 0:
            continue

        sources: tuple[Source, ...] = (
            ("sites", "public") if CODECS[table["name"]].learned else ("sites",)
        )
        for source in sources:
            training = own if source == "sites" else ensemble(cell, size, "public", seed=seed)
            learned = {"learned": len(sources) > 1, "source": source if len(sources) > 1 else "-"}
            for rate in RATES:
                row: Row = {**described, "codec": name, "rate": rate, **learned}
                rows.append(row | _figures({**table, "rate": rate}, own, training, seed))

    for table in fixed:
        row = {**described, "codec": table["name"], "rate": None, "learned": False, "source": "-"}
        rows.append(row | _figures(table, own, own, seed))

    return rows


def _figures(table: Table, own: Ensemble, training: Ensemble, seed: int) -> Row:
    try:
        codec = fitted(table, own.layout, training.training)
    except FluvialError as error:
        return {"stopped": f"{error}"[:200]}

    return distortion(codec, own, seed)


def distortion(codec: Codec, found: Ensemble, seed: int) -> Row:
    """Means over the held-out updates: frame bytes, error, cosine; and of the mean over the sites
    of a round."""
    errors = []
    cosines = []
    sizes = []
    means: dict[int, tuple[WeightedMean, WeightedMean]] = {}

    for snapshot in found.heldout:
        drawn = derive(seed, "codec", snapshot.round, snapshot.site)
        frame = codec.encode(snapshot.update, seed=drawn, round=snapshot.round)
        decoded = codec.decode(frame, round=snapshot.round)
        sizes.append(len(frame))
        errors.append(relative_error(snapshot.update, decoded))
        cosines.append(cosine(snapshot.update, decoded))
        pair = means.setdefault(snapshot.round, (WeightedMean(), WeightedMean()))

        for folded, update in zip(pair, (snapshot.update, decoded), strict=True):
            folded.add(update, 1)

    pairs: list[tuple[Named, Named]] = [(true.mean(), sent.mean()) for true, sent in means.values()]
    return {
        "bytes": mean(sizes),
        "error": mean(errors),
        "cosine": mean(cosines),
        "error_mean": mean(relative_error(*pair) for pair in pairs),
        "cosine_mean": mean(cosine(*pair) for pair in pairs),
    }


def over_seeds(found: Sequence[Row]) -> list[Row]:
    """One row for each cell, codec, rate and source."""
    rows = []
    keys = ("cell", "codec", "rate", "source")

    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in found):
        group = [row for row in found if tuple(row[name] for name in keys) == key]
        done = [row for row in group if "stopped" not in row]
        row = {name: group[0][name] for name in (*keys, "learned", "width", "raw_bytes")} | {
            "seeds": len(done)
        }
        row["stopped"] = next((each["stopped"] for each in group if "stopped" in each), None)

        if done:
            for figure in ("bytes", "error", "cosine", "error_mean", "cosine_mean"):
                row[figure] = mean(each[figure] for each in done)
            row |= {
                "error_half": half_width([each["error"] for each in done]),
                "ratio": row["raw_bytes"] / row["bytes"],
            }

        rows.append(row)

    return rows


def gains(rows: Sequence[Row], found: Sequence[Row], codec: str = "klt") -> list[Row]:
    """Decibels that `codec` gains over the best opponent that learns nothing, by cell, source and
    rate."""
    gained = []
    for row in rows:
        if row["codec"] != codec or not row["seeds"]:
            continue

        rivals = [
            other
            for other in rows
            if (other["cell"], other["rate"]) == (row["cell"], row["rate"])
            and not other["learned"]
            and other["codec"] not in OURS
            and other["seeds"]
        ]
        if not rivals:
            continue

        best = min(rivals, key=lambda other: float(other["error"]))
        ours = _by_seed(found, row["cell"], codec, row["rate"], row["source"])
        theirs = _by_seed(found, row["cell"], best["codec"], row["rate"], best["source"])
        decibels = [
            10 * math.log10(theirs[seed] / ours[seed]) for seed in ours.keys() & theirs.keys()
        ]
        gained.append(
            {
                **{
                    key: row[key]
                    for key in ("codec", "cell", "source", "rate", "width", "error", "bytes")
                },
                "best": best["codec"],
                "best_error": best["error"],
                "best_bytes": best["bytes"],
                "gain_db": mean(decibels),
                "gain_half": half_width(decibels),
            }
        )

    return gained


def _by_seed(
    found: Sequence[Row], cell: str, codec: str, rate: float, source: str
) -> dict[int, float]:
    wanted = (cell, codec, rate, source)
    return {
        row["seed"]: row["error"]
        for row in found
        if (row["cell"], row["codec"], row["rate"], row["source"]) == wanted
        and "stopped" not in row
    }


def claims(gained: Sequence[Row]) -> list[Claim]:
    """Return the gain of our learned codecs at 1/64 in the worst cell, by width and source."""
    found = []
    for codec, source in itertools.product(LEARNED, ("sites", "public")):
        for wide, bar in ((True, BAR_LARGE), (False, BAR_SMALL)):
            at_64 = [
                row["gain_db"]
                for row in gained
                if (row["codec"], row["rate"], row["source"]) == (codec, 64, source)
                and (row["width"] >= WIDE) == wide
            ]
            what = f"d {WIDE} and more" if wide else f"d below {WIDE}"
            name = (
                f"{codec} at 1/64, fitted on {source}, {what}: dB over the best opponent, worst "
                f"of {len(at_64)}"
            )

            if at_64:
                found.append(Claim(name, min(at_64), bar, "at least"))

    return found


def available(report: Report) -> tuple[dict[str, Table], list[Table]]:
    """Return the codecs that the package has; each of the others is written to the report."""
    rated = {name: table for name, table in RATED.items() if table["name"] in CODECS}
    fixed = [table for table in FIXED if table["name"] in CODECS]
    missing = {table["name"] for table in (*RATED.values(), *FIXED)} - set(CODECS)

    for name in sorted(missing):
        report.skip(f"{name}: the package has no such codec")
    return rated, fixed


COLUMNS = {
    "codec": "codec",
    "source": "fitted on",
    "rate": "1/",
    "bytes": "bytes",
    "ratio": "in fact 1/",
    "error": "error",
    "error_half": "+-",
    "cosine": "cosine",
    "error_mean": "error of the mean",
    "cosine_mean": "cosine of the mean",
    "stopped": "",
}


def main() -> None:
    """See the module."""
    parser = parser_of(
        "codecs rate_distortion", __doc__, quick="standard library, one seed, few updates, no cnn"
    )
    parser.add_argument(
        "--cell", action="append", choices=CELLS, help="default: all that are present"
    )
    parser.add_argument("--seeds", type=int, help="default 3 (quick: 1)")
    parser.add_argument("--processes", type=int, help="default: as many as cores")
    options = parser.parse_args()
    load = os.getloadavg()
    size = QUICK if options.quick else FULL

    if options.seeds:
        size = Size(**{**asdict(size), "seeds": options.seeds})

    wanted = options.cell or (["stdlib"] if options.quick else list(CELLS))
    described: dict[str, Any] = {
        key: getattr(size, key) for key in ("steps", "tgap_rounds", "seeds")
    }
    report = Report(
        "rate_distortion", {"quick": options.quick, "cells": wanted, "rates": RATES, **described}
    )

    for cell in wanted:
        if not CORPORA[cell].present:
            report.skip(f"{cell}: this checkout has no ../shared beside it")

    cells = [cell for cell in wanted if CORPORA[cell].present]
    rated, fixed = available(report)
    if options.quick:
        rated.pop("cnn", None)

    with workers(options.processes) as pool:
        waiting = [
            pool.submit(measured, cell, seed, size, rated, fixed)
            for cell in cells
            for seed in range(size.seeds)
        ]
        found = [row for each in waiting for row in each.result()]

    report.rows = over_seeds(found)
    gained = [row for codec in LEARNED for row in gains(report.rows, found, codec)]
    for cell in cells:
        here = [row for row in report.rows if row["cell"] == cell]
        show(f"{cell}: updates of held-out rounds, {size.seeds} seeds", COLUMNS, here)

    columns = {
        "codec": "codec",
        "cell": "cell",
        "source": "fitted on",
        "rate": "1/",
        "error": "error",
        "best": "best",
    }
    columns |= {"best_error": "its error", "gain_db": "gain, dB", "gain_half": "+-"}
    show("Against the best opponent that learns nothing", columns, gained)
    report.rows += [{"part": "gain", **row} for row in gained]
    report.claims = claims(gained)
    report.finish(options.out, load)
