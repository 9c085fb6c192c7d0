"""Rounds on five engines apart from training: time, start-up, memory and bytes, also over a line.

    python -m benchmarks.engine [--part rounds|link|size] [--quick] [--fleet NAME ...]
        [--payload MB ...] [--sites N ...] [--nvflare-python PATH] [--minutes M]
        [--out FILE.json]

rounds  The same run in process, over Flower's Ray simulation, and deployed with TLS and node keys
        by warm clients and by Flower's stock execution; beside them NVFlare 2.9's simulator with
        clients that only answer. All payloads run with 2 sites, and all numbers of sites with
        10 MB: the whole grid would take hours on deployed fleets. A payload is the fp32 values of
        the adapter, which a site receives and answers with. Values differ at every site, because
        Flower sends equal chunks once. Columns:

        apart s    seconds of a round, as the server counts them, in which no site trains (the
                   clock of `benchmarks.engine.clock`); median and worst of the rounds after the
                   first
        start s    from the command, deployed from `fluvial submit`, to the end of the first round
        join s     deployed: from the start of the sites until the server sees them all
        peak MB    most of the sum of PSS (shared pages count once) over all processes, sampled
        server MB  most resident memory of the server's own processes: Ray's driver; SuperLink and
                   ServerApp, added; NVFlare's server. It counts as flat in the number of sites
                   where 8 sites take at most a tenth more than 2
        meter      bytes that Flower's own meter saw, over the payloads that the run must move

        Stock clients with more than 2 sites come last and are the first that `--minutes` cuts:
        every message imports torch anew at every site.

link    Warm rounds over a line of 20 Mbit/s each way and 100 ms there and back, without loss and
        with 0.1 %, a line for each site, and at the end one line for all. Times are those that
        `fluvial check` predicts (training is added as measured), those of the same formula with
        the engine's own times of this run, and measured ones. Needs Linux, root, and /dev/net/tun.

size    Where the time of a round goes at the size of Qwen2.5-0.5B, LoRA of rank 16 on every linear
        layer, two sites, 20 Mbit/s each way: seconds by part, and from these and the rounds of
        benchmarks/results the time to a target (`benchmarks.engine.size`). Only on request. The
        quick form has two small layers, over loopback without namespaces. On a busy machine,
        `chrt -r 5 python -m benchmarks.engine --part size` runs before all others.

NVFlare takes its place if `--nvflare-python` has it (`pip install nvflare==2.9.*` in an environment
of its own).
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.engine import line, link, size
from benchmarks.engine.cells import FLEETS, NAMES, Cell
from benchmarks.engine.fleets import measure
from benchmarks.engine.line import Setting
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show

ROUNDS = 4
PAYLOADS_MB = (0.1, 1.0, 10.0, 100.0)
SITES = (2, 4, 8)
FEW = 2
SITES_MB = 10.0
"""All payloads with FEW sites, all numbers of sites with SITES_MB."""
FLOOR_S = 3.0
"""Flower's SuperNode sleeps so long between an answer and the next question, in its code."""
LINES = (Setting(20, 50, 0.0), Setting(20, 50, 0.001), Setting(20, 50, 0.0, shared=True))
LINK_PAYLOADS_MB = (0.1, 1.0, 10.0)
COLUMNS = {
    "what": "engine",
    "payload_mb": "MB",
    "sites": "sites",
    "apart_s": "apart s",
    "apart_worst_s": "worst",
    "round_s": "round s",
    "train_s": "train s",
    "start_s": "start s",
    "join_s": "join s",
    "peak_mb": "peak MB",
    "server_mb": "server MB",
    "bytes_up": "up / site",
    "metered_ratio": "meter",
}
LINK_COLUMNS = {
    "link": "line",
    "payload_mb": "MB",
    "round_s": "round s",
    "fastest_s": "fastest",
    "slowest_s": "slowest",
    "predicted_s": "check s",
    "off": "off",
    "fitted_s": "fitted s",
}
PROBLEMS = (RuntimeError, AssertionError, OSError, subprocess.SubprocessError)


def grid(
    fleets: Sequence[str], payloads: Sequence[float], sites: Sequence[int], rounds: int
) -> list[list[Cell]]:
    """Cells in the order in which they are measured; those of a list share a deployment."""
    shared_mb = SITES_MB if SITES_MB in payloads else max(payloads)
    few = min(sites)
    groups: list[list[Cell]] = []

    for fleet in fleets:
        groups.append([Cell(fleet, payload, few, rounds) for payload in sorted(payloads)])
        groups += [[Cell(fleet, shared_mb, each, rounds)] for each in sorted(sites) if each != few]

    return sorted(groups, key=lambda cells: cells[0].fleet == "stock" and cells[0].sites > few)


def has_nvflare(python: str) -> bool:
    """Return True where that Python can run NVFlare."""
    try:
        return not subprocess.run(
            [python, "-c", "import nvflare"], capture_output=True, check=False
        ).returncode
    except OSError:
        return False


def rounds_part(
    groups: list[list[Cell]], report: Report, *, python: str, ends: float
) -> Iterator[Row]:
    """Rows as they are measured; what is not reached, or fails, is reported."""
    for number, cells in enumerate(groups):
        left = list(cells)
        with tempfile.TemporaryDirectory(
            prefix="fluvial-engine-", ignore_cleanup_errors=True
        ) as folder:
            found = measure(cells, Path(folder), nvflare_python=python)
            try:
                while left and time.monotonic() < ends:
                    print(f"{number + 1}/{len(groups)} {left[0]} ...", file=sys.stderr, flush=True)
                    row = next(found)
                    left.pop(0)
                    print(
                        f"    {row['apart_s']:.3g} s apart from training",
                        file=sys.stderr,
                        flush=True,
                    )
                    yield row
            except PROBLEMS as problem:
                words = " ".join(str(problem).split())[-300:]
                report.skip(f"{left[0]}: no result: {words}")
                left.pop(0)

                for cell in left:
                    report.skip(f"{cell}: not tried, because the one before it failed")
                continue
            except KeyboardInterrupt:
                report.skip(f"{left[0]} and what comes after it: interrupted")
                return
            finally:
                found.close()

        for cell in left:
            report.skip(f"{cell}: no time left")


def link_part(report: Report, *, quick: bool, ends: float) -> list[Row]:
    """Return the table of the slow line."""
    why = line.possible()
    if why is not None:
        report.skip(f"link: {why}")
        return []

    rows: list[Row] = []
    lines, payloads, rounds = (
        (LINES[:1], LINK_PAYLOADS_MB[:1], 2) if quick else (LINES, LINK_PAYLOADS_MB, ROUNDS)
    )
    with tempfile.TemporaryDirectory(
        prefix="fluvial-engine-", ignore_cleanup_errors=True
    ) as folder:
        try:
            tables = link.rows(
                lines, payloads, sites=FEW, rounds=rounds, folder=Path(folder), ends=ends
            )
            for found in tables:
                if isinstance(found, str):
                    report.skip(found)
                else:
                    rows.append(found)
                    print(
                        " ".join(f"{key}={value}" for key, value in found.items()),
                        file=sys.stderr,
                        flush=True,
                    )
        except PROBLEMS as problem:
            report.skip(f"link: no result: {' '.join(str(problem).split())[-300:]}")

    return rows


def round_claims(rows: list[Row]) -> list[Claim]:
    """Return the bars of part `rounds`."""
    found = {(row["what"], row["payload_mb"], row["sites"]): row for row in rows}
    warm = NAMES["warm"]
    stock = NAMES["stock"]
    few = min((row["sites"] for row in rows), default=FEW)
    smallest = min((row["payload_mb"] for row in rows), default=0.0)
    ours = found.get((warm, smallest, few), {}).get("apart_s")
    theirs = found.get((stock, smallest, few), {}).get("apart_s")
    claims = [
        Claim(
            f"warm deployed: s apart from training, {smallest:g} MB, {few} sites",
            ours,
            FLOOR_S + 1.5,
            "at most",
        ),
        Claim(
            f"stock over warm, time apart from training, {smallest:g} MB, {few} sites",
            theirs / ours if ours and theirs else None,
            3.0,
            "at least",
        ),
    ]
    counted = [row["bytes_up"] / row["payload"] - 1 for row in rows if "bytes_up" in row]
    claims.append(
        Claim(
            "bytes up beyond the payload, our count, worst",
            max(counted, default=None),
            0.01,
            "at most",
        )
    )
    claims += [
        Claim(
            f"bytes beyond the payloads by Flower's meter, {row['payload_mb']:g} MB, "
            f"{row['sites']} sites",
            abs(row["metered_ratio"] - 1),
            0.01,
            "at most",
        )
        for row in rows
        if "metered_ratio" in row and row["what"] == warm
    ]
    by_sites = sorted(
        (sites, row) for (what, _, sites), row in found.items() if what == warm and sites != few
    )

    if by_sites:
        many, last = by_sites[-1]
        base = found.get((warm, last["payload_mb"], few))
        grown = last["server_mb"] / base["server_mb"] - 1 if base else None
        name = (
            f"warm deployed: server's memory, {many} sites over {few}, {last['payload_mb']:g} MB, "
            "relative change"
        )
        claims.append(Claim(name, grown, 0.10, "at most"))

    return claims


def link_claims(rows: list[Row]) -> list[Claim]:
    """Return the bar of part `link`."""
    off = [abs(row["off"]) for row in rows if "off" in row]
    return [
        Claim(
            "round over a slow line, predicted against measured, worst",
            max(off, default=None),
            0.20,
            "at most",
        )
    ]


def main() -> None:
    """See the module."""
    parser = parser_of("engine", __doc__, quick="2 sites, 0.1 MB, 2 rounds, one line")
    parser.add_argument("--part", choices=("rounds", "link", "size"), help="one part only")
    parser.add_argument("--fleet", nargs="+", choices=FLEETS, default=list(FLEETS))
    parser.add_argument(
        "--payload", nargs="+", type=float, metavar="MB", help="payloads of part rounds"
    )
    parser.add_argument(
        "--sites", nargs="+", type=int, metavar="N", help="numbers of sites of part rounds"
    )
    parser.add_argument(
        "--nvflare-python", default=sys.executable, help="a Python that has nvflare 2.9"
    )
    parser.add_argument(
        "--minutes", type=float, default=40.0, help="begin nothing after so many minutes"
    )
    options = parser.parse_args()
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # so that everything that was started is ended
    load = os.getloadavg()
    ends = time.monotonic() + 60 * options.minutes
    payloads = options.payload or ([0.1] if options.quick else list(PAYLOADS_MB))
    sites = options.sites or ([FEW] if options.quick else list(SITES))
    rounds = 2 if options.quick else ROUNDS
    report = Report(
        "engine",
        {
            "quick": options.quick,
            "rounds": rounds,
            "payloads_mb": payloads,
            "sites": sites,
            "fleets": options.fleet,
            "minutes": options.minutes,
            "line": "TUN devices between network namespaces, TCP Reno",
        },
    )

    if options.part in (None, "rounds"):
        fleets = list(options.fleet)
        if "nvflare" in fleets and not has_nvflare(options.nvflare_python):
            fleets.remove("nvflare")
            report.skip(
                "NVFlare: not installed (pip install 'nvflare==2.9.*' in an environment of its own)"
            )

        groups = grid(fleets, payloads, sites, rounds)
        rows = list(rounds_part(groups, report, python=options.nvflare_python, ends=ends))
        show(f"Rounds, median of {rounds - 1}", COLUMNS, rows)
        report.rows += rows
        report.claims += round_claims(rows)

    if options.part in (None, "link"):
        rows = link_part(report, quick=options.quick, ends=ends)
        show("Rounds over a line", LINK_COLUMNS, [row for row in rows if row["part"] == "link"])
        report.rows += rows
        report.claims += link_claims(rows)

    if options.part == "size":
        report.settings = size.settings(quick=options.quick)
        size.run(report, quick=options.quick, ends=ends)

    report.finish(options.out, load)
