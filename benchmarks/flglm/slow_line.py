"""Round times of split learning over a slow line, predicted by `fluvial check` and measured.

    python -m benchmarks.flglm.slow_line [--quick] [--out FILE.json]

A server and two sites are processes of a deployment, each end in a network namespace of its own,
with the line of `benchmarks.engine.line` between them: 20 Mbit/s and 100 ms. Flower's messages and
the live stream both cross it. The time of the work itself is that of the same rounds in one
process, on the same machine and in the same run of this benchmark.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.engine.fleets import environment_of
from benchmarks.engine.line import SERVER, Lines, Setting, inside, possible
from benchmarks.engine.link import line_of
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from fluvial.runs.run import execute
from tests.support import flower_lab

LINE = Setting(20.0, 50.0, 0.0)
"""20 Mbit/s, 50 ms one way."""
SITES = ("site1", "site2")
CASES: dict[str, dict[str, Any]] = {
    "client-batch, exact": {"mode": "client-batch"},
    "client-batch, int8": {
        "mode": "client-batch",
        "hidden": {"name": "int8"},
        "gradient": {"name": "int8"},
    },
    "hierarchical, exact": {"mode": "hierarchical"},
}
BAR = 0.2


def table(method: dict[str, Any], folder: Path, *, steps: int, rounds: int) -> dict[str, Any]:
    """Return a run of the embedded model on texts of full length, written into `folder`."""
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(SITES):
        lines = [
            f"Site {number} writes line {line}: " + "water flows on, a stone stays. " * 20
            for line in range(16)
        ]
        content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (text / f"{name}.jsonl").write_text(content, encoding="utf-8")

    return {
        "model": {"dtype": "float32", "device": "cpu"},
        "rounds": rounds,
        "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "attention"},
        "data": {
            "source": str(text.resolve()),
            "form": "text",
            "partition": {"by": "file"},
            "max_length": 64,
            "max_heldout": 1,
        },
        "train": {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "max_steps": steps},
        "method": {"name": "flglm", "leakage": {"sites": "none"}} | method,
        "fleet": {"deadline_s": 600.0},
        "evaluate": {"sample_tokens": 1},
    }


def measure(report: Report, folder: Path, *, steps: int, rounds: int, quick: bool) -> None:
    """Add rows and claims to `report`."""
    cases = dict(list(CASES.items())[:1]) if quick else CASES
    lines = Lines(len(SITES))
    lab = flower_lab.Deployment(
        (folder / "lab").resolve(),
        flower_lab.free_port(),
        False,
        False,
        SITES,
        environment_of(folder),
    )
    lab.folder.mkdir(parents=True)
    try:
        _start(lab, lines)
        lines.use(LINE)
        tried = lines.tried()
        with inside(lines.server):
            rows = [
                _row(lab, name, table(method, folder, steps=steps, rounds=rounds), folder)
                for name, method in cases.items()
            ]
    finally:
        lab.end_all()
        lines.close()

    report.rows += [{"part": "line", **tried}, *rows]
    columns = {
        "case": "case",
        "line_s": "line and engine, predicted",
        "work_s": "work in one process",
        "predicted_s": "round, predicted",
        "measured_s": "round, measured",
        "off": "off",
    }
    show("Rounds over 20 Mbit/s and 100 ms", columns, rows)
    worst = max(abs(row["off"]) for row in rows)
    report.claims.append(Claim("round over a slow line, largest error", worst, BAR, "at most"))


def _start(lab: flower_lab.Deployment, lines: Lines) -> None:
    """Start the deployment, past the line."""
    with inside(lines.server):
        lab.command("server", "init", str(lab.server), "--address", f"{SERVER}:{lab.port}")
        lab.start_server()
        lines.use(None)

    for name, namespace in zip(SITES, lines.sites, strict=True):
        with inside(lines.server):
            lab.make_site(name)
        file = lab.site(name) / "site.toml"
        file.write_text(file.read_text().replace(f"127.0.0.1:{lab.port}", f"{SERVER}:{lab.port}"))
        with inside(namespace):
            lab.start_site(name)
    with inside(lines.server):
        lab.wait_online(len(SITES), timeout=300)


def _row(lab: flower_lab.Deployment, name: str, run: dict[str, Any], folder: Path) -> Row:
    """Return the prediction and the measure of one case: means without the first round."""
    out = folder / name.replace(", ", "-")
    lab.submit(run, out)
    lab.wait(out, timeout=900)
    records = list(RunFolder(out).metrics())

    here = folder / f"{out.name}-here"
    for _ in execute(parse(run, "benchmark"), here):
        pass
    work_s = statistics.mean(row["seconds"] for row in list(RunFolder(here).metrics())[1:])

    with_line = run | {"fleet": run["fleet"] | {"line": line_of(LINE).model_dump()}}
    line_s = plan(parse(with_line, "benchmark"))["round_over_line_s"]
    seconds = [float(record["seconds"]) for record in records[1:]]
    measured_s = statistics.mean(seconds)
    return {
        "part": "slow line",
        "case": name,
        "rounds": len(seconds),
        "line_s": line_s,
        "work_s": work_s,
        "predicted_s": line_s + work_s,
        "measured_s": measured_s,
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "off": (line_s + work_s) / measured_s - 1,
    }


def main() -> None:
    """See the module."""
    parser = parser_of("flglm.slow_line", __doc__, quick="one case, few steps")
    options = parser.parse_args()
    load = os.getloadavg()
    steps, rounds = (2, 2) if options.quick else (8, 3)
    report = Report(
        "flglm_slow_line",
        {"steps": steps, "rounds": rounds, "mbit_s": LINE.mbit_s, "rtt_ms": 2 * LINE.delay_ms},
    )
    why = possible()
    if why is not None:
        raise SystemExit(why)

    with tempfile.TemporaryDirectory() as folder:
        measure(report, Path(folder), steps=steps, rounds=rounds, quick=options.quick)
    report.finish(options.out, load)


if __name__ == "__main__":
    main()
