"""Overhead of a round without training: start-up, time and memory, with Flower beside it.

    python -m benchmarks.overhead [--quick] [--out FILE.json] [--flower-python PATH]

Every row is a fresh process, so a peak of memory is that row's own. Flower takes its place if
`flwr[simulation]` can be imported by `--flower-python` (this Python unless it is given; an
environment of its own is best, since flwr pins much).
"""

import os
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.child import answer_of
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show

VALUES = 32_768
"""Values of the embedded model's adapter: 131,072 bytes."""
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
TIMEOUT_S = 240.0
COLUMNS = {
    "what": "what",
    "sites": "sites",
    "site_ms": "ms / site and round",
    "first_round_s": "first round s",
    "checkpoint_ms": "checkpoint ms / round",
    "bytes_up": "bytes up / site",
    "peak_mb": "peak MB",
    "site_mb": "MB / further site",
    "note": "note",
}


def probe(module: str, *arguments: object, python: str = sys.executable) -> dict[str, Any]:
    """Return the JSON object that a measuring process printed last.

    Raises `RuntimeError` with the end of the error output of a process that failed.
    """
    return answer_of(
        f"benchmarks.overhead.{module}",
        *arguments,
        environment=QUIET,
        python=python,
        timeout_s=TIMEOUT_S,
    )


def has_flower(python: str) -> bool:
    """Return True where that Python can run Flower's simulation."""
    try:
        return not subprocess.run(
            [python, "-c", "import flwr, ray"],
            capture_output=True,
            check=False,
            env={**os.environ, **QUIET},
        ).returncode
    except OSError:
        return False


def start_up(times: int) -> tuple[list[Row], float]:
    """Rows of start-up and imports, and the median seconds from process start to the first
    round."""
    found = [probe("probe", "start", time.time()) for _ in range(times)]
    rows: list[Row] = [
        {
            "what": f"start: {key.removesuffix('_s').replace('_', ' ')}",
            "seconds": statistics.median(each[key] for each in found),
            "fastest": min(each[key] for each in found),
            "slowest": max(each[key] for each in found),
        }
        for key in found[0]
    ]
    by_part = [probe("probe", "imports") for _ in range(times)]
    rows += [
        {
            "what": f"import {name}",
            "seconds": statistics.median(each[name] for each in by_part),
            "fastest": min(each[name] for each in by_part),
            "slowest": max(each[name] for each in by_part),
        }
        for name in by_part[0]
    ]

    return rows, statistics.median(each["first_round_begins_s"] for each in found)


def fluvial_row(sites: int, rounds: int) -> Row:
    """Measure rounds in one process with FedAvg's server half."""
    found = probe("probe", "rounds", sites, rounds, VALUES)
    grown = found["peak_rss_bytes"] - found["rss_before_bytes"]

    return {
        "what": "fluvial",
        "sites": sites,
        "site_ms": 1e3 * statistics.median(found["round_s"][1:]) / sites,
        "first_round_s": found["round_s"][0],
        "checkpoint_ms": 1e3 * statistics.median(found["checkpoint_s"]),
        "bytes_up": found["bytes_up"],
        "bytes_down": found["bytes_down"],
        "peak_mb": found["peak_rss_bytes"] / 1e6,
        "grown_mb": grown / 1e6,
    }


def flower_row(sites: int, rounds: int, python: str) -> Row:
    """Return the same rounds in Flower's Ray simulation."""
    try:
        found = probe("flower_rounds", sites, rounds, VALUES, python=python)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {
            "what": "Flower, Ray simulation",
            "sites": sites,
            "note": f"no result: {str(error)[-80:]}",
        }

    return {
        "what": "Flower, Ray simulation",
        "sites": sites,
        "site_ms": 1e3 * statistics.median(found["round_s"][1:]) / sites,
        "first_round_s": found["start_s"] + found["round_s"][0],
        "bytes_up": 4 * VALUES,
        "peak_mb": found["peak_pss_bytes"] / 1e6,
        "note": "PSS of all processes",
    }


def add_growth(rows: list[Row]) -> None:
    """Megabytes that each further site costs, against the row of the same engine with the fewest
    sites."""
    first: dict[str, Row] = {}
    for row in rows:
        base = first.setdefault(row["what"], row)
        if row is not base and "peak_mb" in row and "peak_mb" in base:
            row["site_mb"] = (row["peak_mb"] - base["peak_mb"]) / (row["sites"] - base["sites"])


def claims(rows: list[Row], begins_s: float, sizes: tuple[int, ...]) -> list[Claim]:
    """Return the bars of this benchmark."""
    ours = {row["sites"]: row for row in rows if row["what"] == "fluvial"}
    theirs = {
        row["sites"]: row for row in rows if row["what"].startswith("Flower") and "site_ms" in row
    }
    largest = max(sizes)
    flat = abs(ours[largest]["peak_mb"] / ours[10]["peak_mb"] - 1)
    found = [
        Claim("start-up to the first round, imports included, s", begins_s, 5.0, "below"),
        Claim(
            "ms for a site and round apart from training, worst size from 10 sites",
            max(row["site_ms"] for sites, row in ours.items() if sites >= 10),
            10.0,
            "below",
        ),
        Claim(
            f"MB that each further site costs, up to {largest} sites",
            ours[largest]["site_mb"],
            1.0,
            "below",
        ),
        Claim(f"peak memory from 10 to {largest} sites, relative change", flat, 0.10, "at most"),
    ]
    found += [
        Claim(
            f"Flower's time for a site and round over ours, {sites} sites",
            row["site_ms"] / ours[sites]["site_ms"],
            1.0,
            "at least",
        )
        for sites, row in sorted(theirs.items())
    ]

    if theirs:
        sites = max(theirs)
        found.append(
            Claim(
                f"Flower's peak memory over ours, {sites} sites",
                theirs[sites]["peak_mb"] / ours[sites]["peak_mb"],
                1.0,
                "at least",
            )
        )

    return found


def main() -> None:
    """See the module."""
    parser = parser_of(
        "overhead", __doc__, quick="under a minute: up to 100 sites, Flower with 10 only"
    )
    parser.add_argument(
        "--flower-python", default=sys.executable, help="a Python that has flwr[simulation]"
    )
    options = parser.parse_args()
    load = os.getloadavg()
    sizes = (1, 10, 100) if options.quick else (1, 10, 100, 1000)
    rounds, times = (3, 1) if options.quick else (5, 3)
    report = Report(
        "overhead",
        {
            "quick": options.quick,
            "rounds": rounds,
            "values": VALUES,
            "starts": times,
            "sites": list(sizes),
        },
    )
    starting, begins_s = start_up(times)
    show(
        f"Start-up, median of {times} (imports: each after those before it)",
        {"what": "what", "seconds": "s", "fastest": "fastest", "slowest": "slowest"},
        starting,
    )
    flower = has_flower(options.flower_python)
    rows: list[Row] = []

    for sites in sizes:
        rows.append(fluvial_row(sites, rounds))
        if not flower:
            rows.append({"what": "Flower, Ray simulation", "sites": sites, "note": "not installed"})
        elif sites == 10 or not options.quick:
            rows.append(flower_row(sites, rounds, options.flower_python))

    add_growth(rows)
    show(
        f"{rounds} rounds without training, an update of {4 * VALUES:,} bytes up and down",
        COLUMNS,
        rows,
    )
    if not flower:
        report.skip(
            "Flower: not installed (pip install 'flwr[simulation]' in an environment of its own)"
        )

    report.rows = [*starting, *rows]
    report.claims = claims(rows, begins_s, sizes)
    report.finish(options.out, load)
