"""Part `size` of `benchmarks.engine`: where the time of a round goes at the size of a real model.

The model has the shape of Qwen2.5-0.5B and random weights, and the tokenizer of the embedded model
stands in for its own, so that nothing is downloaded. Server and sites are a deployment of Flower,
each in a network namespace of its own, behind lines of `benchmarks.engine.line`. Sites train LoRA
of rank 16 on every linear layer, one step on one sequence of 32 tokens: what is measured is the
time of coding and sending at this size, and a loss would say nothing.

Seconds by part are those that the run reports itself, as `fluvial show` prints them. What a site
cannot report is split by the line's rate into the upload and the rest, which is the engine's.

The time to a target is a model: the measured seconds of a round, times the rounds that the
contender needs with a small model (`benchmarks.engine.size_rounds`), less one download, because in
round 1 each site makes the adapter itself.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import SubprocessError

from benchmarks.codecs.contenders import Contender
from benchmarks.engine import size_rounds
from benchmarks.engine.cells import names_of, write_text
from benchmarks.engine.fleets import (
    MARK,
    SERVERS,
    Watch,
    environment_of,
    marked,
    peak_of,
)
from benchmarks.engine.line import Setting, possible
from benchmarks.engine.link import over_lines
from benchmarks.engine.size_contenders import (
    CONTENDERS,
    QWEN,
    TINY,
    Shape,
    Table,
    float_type,
    make_model,
    table_of,
)
from benchmarks.report import Claim, Report, Row, show
from tests.support import flower_lab

SITES = 2
ROUNDS = 4
FURTHER = 30
"""Rounds of a run beyond those that are waited for, so that it goes on when it is stopped."""
UNCOUNTED = 2
"""First rounds, in which the model is loaded and kernels are compiled."""
LINE = Setting(20, 0, 0.0)
"""20 Mbit/s each way for each site, without delay or loss."""
COLUMNS = {
    "contender": "contender",
    "round_s": "round s",
    "download_s": "down",
    "train_s": "train",
    "encode_s": "site codec",
    "other_s": "site other",
    "upload_s": "up",
    "engine_s": "engine",
    "server_codec_s": "server codec",
    "codec_share": "codec share",
    "codec_share_untrained": "without training",
    "rounds": "rounds",
    "to_target_s": "to target s",
    "server_mb": "server MB",
    "site_mb": "site MB",
}

# -- measuring ------------------------------------------------------------------------------------


def rows(
    contenders: Sequence[Contender],
    shape: Shape,
    *,
    rounds: int,
    folder: Path,
    ends: float,
) -> Iterator[Row | str]:
    """Yield the seconds by part of each contender, over the line.

    What is not reached before `ends` (of `time.monotonic`) is reported as a sentence.
    """
    model = make_model(shape, folder)
    text = write_text(folder, SITES)
    opened = over_the_line if shape == QWEN else over_loopback

    with opened(folder) as (lab, tried):
        if tried is not None:
            yield tried
        for contender in contenders:
            if time.monotonic() > ends:
                yield f"size: {contender.name}: no time left"
                continue
            table = table_of(contender, model, text, rounds=rounds + FURTHER, steps=1)
            yield {**_measured(lab, contender, table, folder), "shape": shape.name}


@contextmanager
def over_the_line(folder: Path) -> Iterator[tuple[flower_lab.Deployment, Row | None]]:
    """Start a deployment behind `LINE`, and try the line."""
    with over_lines(folder, SITES) as (lab, lines):
        lines.use(LINE)
        yield lab, {"part": "line", "link": f"{LINE.mbit_s:g} Mbit/s", **lines.tried()}


@contextmanager
def over_loopback(folder: Path) -> Iterator[tuple[flower_lab.Deployment, Row | None]]:
    """Start a deployment over loopback."""
    sites = dict.fromkeys(names_of(SITES), "")
    environment = environment_of(folder)
    with flower_lab.deployment(folder / "lab", sites, environment=environment) as lab:
        yield lab, None


def _measured(lab: flower_lab.Deployment, contender: Contender, table: Table, folder: Path) -> Row:
    """Run a contender for its rounds, and stop it: what follows a run is no part of a round."""
    seen = Watch(lab.environment)
    out = folder / "".join(each if each.isalnum() else "-" for each in contender.name)
    began = time.time()
    number = lab.submit(table, out)
    seen.rounds(out, table["rounds"] - FURTHER, alive=lambda: True, timeout=900)
    peaks = _peaks(seen.environment)
    lab.command("stop", str(lab.server), str(number))
    lab.finished(number)

    return {
        "part": "size",
        "contender": contender.name,
        "start_s": seen.ended[0] - began,
        **row_of(seen.records),
        **peaks,
    }


def row_of(records: Sequence[Row]) -> Row:
    """Return the medians over the rounds after the `UNCOUNTED` ones.

    A site's parts are means over the sites, and `upload_s` is that of the frame at the line's rate.
    `codec_share` is coding and decoding at both ends over the round, and `codec_share_untrained`
    over the round without training.
    """
    later = records[UNCOUNTED:]

    def site_s(part: str) -> float:
        return statistics.median(
            statistics.fmean(times.get(part, 0.0) for times in record["times"]["sites"].values())
            for record in later
        )

    def server_s(part: str) -> float:
        return statistics.median(
            float(record["times"]["server"].get(part, 0.0)) for record in later
        )

    last = records[-1]
    sites = len(last["times"]["sites"])
    round_s = statistics.median(record["seconds"] for record in later)
    up = last["bytes_up"] / sites
    upload_s = 8e-6 * up / LINE.mbit_s
    codec_s = site_s("coding") + server_s("coding") + server_s("decoding")
    train_s = site_s("training")

    return {
        "round_s": round_s,
        "download_s": site_s("download"),
        "train_s": train_s,
        "encode_s": site_s("coding"),
        "other_s": site_s("other"),
        "upload_s": upload_s,
        "engine_s": site_s("transfer") - upload_s,
        "server_codec_s": server_s("coding") + server_s("decoding"),
        "codec_s": codec_s,
        "codec_share": codec_s / round_s,
        "codec_share_untrained": codec_s / (round_s - train_s),
        "bytes_up": up,
        "bytes_down": last["bytes_down"] / sites,
    }


def _peaks(environment: dict[str, str]) -> Row:
    """Return the most resident memory of the server's processes, added, and of a site's largest."""
    server = 0
    site = 0
    for pid, words in marked(environment[MARK]).items():
        peak = peak_of(pid)
        if any(Path(word).name in SERVERS for word in words[:3]):
            server += peak
        else:
            site = max(site, peak)

    return {"server_mb": server / 1e6, "site_mb": site / 1e6}


# -- the report -----------------------------------------------------------------------------------


def with_target(found: Sequence[Row], rounds: Mapping[str, float]) -> list[Row]:
    """Return the rows with `rounds` and `to_target_s`, the seconds of all these rounds, the first
    without a download; None where the rounds are not known."""
    return [
        row
        | {
            "rounds": rounds.get(row["contender"]),
            "to_target_s": rounds[row["contender"]] * row["round_s"] - row["download_s"]
            if row["contender"] in rounds
            else None,
        }
        for row in found
    ]


def claims(found: Sequence[Row]) -> list[Claim]:
    """Return the bars: the codec's share of a round, and the time to the target."""
    ours = {contender.name for contender in CONTENDERS if contender.role == "ours"}
    shares = [row["codec_share"] for row in found if row["contender"] in ours]
    bare = [row["codec_share_untrained"] for row in found if row["contender"] in ours]
    times = {
        row["contender"]: row["to_target_s"] for row in found if row["to_target_s"] is not None
    }
    best = min((times[name] for name in times if name in ours), default=None)
    other = min((times[name] for name in times if name not in ours), default=None)

    return [
        Claim(
            "coding and decoding at both ends, share of a round, worst of ours",
            max(shares, default=None),
            0.1,
            "below",
        ),
        Claim("the same of a round without training", max(bare, default=None), 0.1, "below"),
        Claim(
            "computed time to the target, best of ours over the best of the others",
            None if best is None or other is None else best / other,
            1.0,
            "below",
        ),
    ]


def settings(*, quick: bool) -> Row:
    """Return the settings of the report."""
    shape = TINY if quick else QWEN
    return {
        "quick": quick,
        "shape": shape.name,
        "dtype": float_type(),
        "sites": SITES,
        "rounds": ROUNDS,
        "steps": 1,
        "tokens": 32,
        "line": "loopback" if quick else f"{LINE.mbit_s:g} Mbit/s each way, namespaces",
        "scheduler": "real time" if os.sched_getscheduler(0) in _REAL_TIME else "shared",
        "cell_of_rounds": size_rounds.CELL,
        "learning_rate_of_rounds": size_rounds.LEARNING_RATE,
    }


_REAL_TIME = (os.SCHED_RR, os.SCHED_FIFO)


def run(report: Report, *, quick: bool, ends: float) -> None:
    """Measure all contenders, and put rows and claims into the report."""
    why = None if quick else possible()
    if why is not None:
        report.skip(f"size: {why}")
        return

    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fluvial-size-", ignore_cleanup_errors=True) as folder:
        try:
            for row in rows(
                CONTENDERS[3:5] if quick else CONTENDERS,
                TINY if quick else QWEN,
                rounds=ROUNDS,
                folder=Path(folder),
                ends=ends,
            ):
                if isinstance(row, str):
                    report.skip(row)
                else:
                    found.append(row)
                    print(row, flush=True)
        except (RuntimeError, AssertionError, OSError, SubprocessError) as problem:
            report.skip(f"size: no result: {' '.join(str(problem).split())[-300:]}")

    line = [row for row in found if row["part"] == "line"]
    small: list[Row] = []
    why = size_rounds.missing()
    if why is not None:
        report.skip(f"rounds of rank 2: {why}")
    elif not quick:
        small += size_rounds.rows([contender for contender in CONTENDERS if contender.lora])

    rounds = {**size_rounds.stored(), **size_rounds.mean_rounds(small)}
    measured = with_target([row for row in found if row["part"] == "size"], rounds)
    show(
        f"Rounds at the size of {measured[0]['shape']}" if measured else "Rounds", COLUMNS, measured
    )
    report.rows += [*line, *measured, *small]
    report.claims += claims(measured)
