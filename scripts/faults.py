"""Break a deployment in every way that the tests of faults know, and write what was seen to
docs/reliability.md.

    python scripts/faults.py --out docs/reliability.md [--only EXPRESSION] [--table]

Rows are kept in benchmarks/results/faults.json, so `--only` (as pytest's -k) does single faults
again, and `--table` only writes the page. Half an hour on two cores; nothing leaves loopback.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as Xml
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
TESTS = ("tests/flower/test_faults.py", "tests/flower/test_stream_faults.py")
SETTINGS = (sys.executable, "-m", "pytest", *TESTS, "-m", "faults")
INTRODUCTION = """# What happens when something breaks

`make faults` writes this page. Do not edit it by hand.

Every fault hits real processes on loopback: a SuperLink with TLS and node keys, and three sites.
The sites tune a tiny model for three rounds with error feedback, so anything that is lost or
counted twice shows in the adapter. A process is stopped at the named moment and killed there with
SIGKILL. "Same adapter" means that the file's SHA-256 equals that of an undisturbed run in one
process with the same participants. Seconds run from the fault until the server, or the process in
question, noticed it. The deadline is `fleet.deadline_s = 30`. Split learning, whose turns go over
the live stream, has two rounds of a model of four layers and a deadline of 60 s. The whole
procedure is in tests/flower/test_faults.py and tests/flower/test_stream_faults.py. Connections
that break in the middle of turns need no deployment: tests/oracle/test_conversation_over_stream.py.
"""

NOT_TESTED = {
    "a file system that is really full": "a limit on the size of files stands for it; mounting "
    "one needs root",
    "a computer whose own clock is wrong": "one process's clock and the certificate's days are "
    "moved instead",
    "a power cut": "files are synced before they are renamed, but nothing here cuts the power",
    "the faults over a wide-area line": "all processes are on loopback",
    "a run stopped while its message comes down": "tried by hand only, over 5 Mbit/s: in 2 of 6 "
    "attempts the site was "
    "one reply behind, its SuperNode was started again, and all later runs went on",
}


def run(only: str) -> int:
    """Run the faults and keep their rows; returns pytest's exit code."""
    with tempfile.TemporaryDirectory(prefix="fluvial-faults-") as folder:
        rows = Path(folder) / "rows.json"
        report = Path(folder) / "report.xml"
        with subprocess.Popen(
            [*SETTINGS, *(["-k", only] if only else []), f"--junitxml={report}"],
            cwd=ROOT,
            env={**os.environ, "FLUVIAL_FAULTS": str(rows), "OMP_NUM_THREADS": "1"},
        ) as tests:
            try:
                code = tests.wait()
            except (
                KeyboardInterrupt
            ):  # pytest has heard it too, and ends its processes; what was seen is kept
                code = tests.wait()

        seen = json.loads(rows.read_text()) if rows.exists() else {}
        kept = read()
        stamp = {"date": time.strftime("%Y-%m-%d"), "machine": machine()}

        for case in Xml.parse(report).iter("testcase") if report.exists() else ():
            name = case.attrib.get("name", "")  # none where the tests were broken off
            wrong = case.find("failure")
            wrong = case.find("error") if wrong is None else wrong

            if wrong is not None and name:
                why = wrong.attrib.get("message", "").strip().splitlines() or ["no message"]
                before = kept["rows"].get(name, {})
                known = {key: before.get(key, "") for key in ("fault", "expected")}
                kept["rows"][name] = {
                    **known,
                    "observed": f"did not hold: {why[0][:200]}",
                    "seconds": None,
                    **stamp,
                }
            elif name in seen:
                kept["rows"][name] = {**seen[name], **stamp}

        RESULTS.write_text(json.dumps(kept, indent=2) + "\n")

    return code


def names() -> list[str]:
    """All faults, in the order of the file."""
    found = subprocess.run(
        [*SETTINGS, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = "|".join(map(re.escape, TESTS))
    return re.findall(rf"^(?:{files})::(.+)$", found.stdout, re.MULTILINE)


def read() -> dict[str, Any]:
    """Return the rows that are known."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    return found


def page(rows: dict[str, dict[str, Any]], faults: Sequence[str]) -> str:
    """docs/reliability.md."""
    lines = [
        INTRODUCTION,
        "| fault | expected | observed | seconds to notice |",
        "| --- | --- | --- | ---: |",
    ]
    for name in faults:
        row = rows.get(name)
        if row is None:
            lines.append(f"| `{name}` | | not tested: has not been run | |")
            continue

        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        cells = [row["fault"] or f"`{name}`", row["expected"], row["observed"], seconds]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")

    lines += [f"| {fault} | | not tested: {why} | |" for fault, why in NOT_TESTED.items()]
    stamps = sorted({f"{row['date']}: {row['machine']}" for row in rows.values()})
    lines += ["", *(f"Measured on {stamp}." for stamp in stamps)]

    return "\n".join(lines) + "\n"


def machine() -> str:
    """Where this runs."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("flwr", "torch"))
    return f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, {versions}"


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.md")
    parser.add_argument("--only", default="", help="as pytest's -k: only these faults")
    parser.add_argument(
        "--table", action="store_true", help="run nothing, write the page from the rows"
    )
    given = parser.parse_args()
    code = 0 if given.table else run(given.only)
    given.out.write_text(page(read()["rows"], names()))

    return code


if __name__ == "__main__":
    sys.exit(main())
