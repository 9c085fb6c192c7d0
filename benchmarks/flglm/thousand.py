"""Bytes and seconds for 1,000 samples, beside what else a user could take.

Fluvial's rows are measured in this process, over the real bytes. The released code of FedSEA-LLaMA
is counted, because it runs on a GPU with a model that cannot be had here: one site at a time, four
tensors of 16-bit values a sample, each padded to the longest length, and 8 bytes that say a length
(https://arxiv.org/abs/2505.15683). Its seconds are those of our own steps on samples that all have
the longest length, without a transport. The last row adds two exchanges of Flower's messages for
each sample, as benchmarks/results/engine_rounds.json has measured them.
"""

import json
import random
from pathlib import Path
from typing import Any

from benchmarks.flglm.bed import Outcome, run, table
from benchmarks.report import Claim, Report, Row, show
from fluvial.models.pretrained import read_config
from fluvial.runs.config import parse

LONGEST = 256
"""Tokens of the longest sample; data.max_length."""
SITES = 4
ENGINE = Path(__file__).parents[1] / "results" / "engine_rounds.json"
CODECS: dict[str, dict[str, Any]] = {
    "Fluvial, exact (fp32)": {},
    "Fluvial, bf16": {"hidden": {"name": "bf16"}, "gradient": {"name": "bf16"}},
    "Fluvial, int4": {"hidden": {"name": "int4"}, "gradient": {"name": "int4"}},
}
COUNTED = "released code, counted"
MESSAGES = "released code's steps as messages of Flower"
BARS = {"Fluvial, bf16": 1.0, "Fluvial, int4": 0.3}
"""Bars for bytes against the released code's, which has 16-bit values too."""


def measure(report: Report, *, source: Path, folder: Path, steps: int) -> None:
    """Add rows and claims to `report`: `steps` samples at each of four sites and round."""
    unequal = folder / "unequal.jsonl"
    _shorten(source, unequal)
    rows: list[Row] = []

    for name, method in CODECS.items():
        rows.append({"what": name, **_of_thousand(_run(str(unequal), method, steps), steps)})

    longest = _of_thousand(_run(str(source), {}, steps), steps)
    base = table(source=str(source), sites=SITES, length=LONGEST, rounds=1)
    width = read_config(parse(base, "benchmark").model).hidden_size
    counted = 1000 * (4 * LONGEST * width * 2 + 8)
    steps_alone = {key: longest[key] for key in ("seconds", "cpu_seconds")}
    rows.append({"what": COUNTED, "bytes": counted, **steps_alone})
    exchange_s = _exchange_s()
    exchanges_s = 2 * 1000 * exchange_s
    messages_s = longest["seconds"] + exchanges_s
    alone = {"seconds": messages_s, "cpu_seconds": longest["cpu_seconds"]}
    rows.append({"what": MESSAGES, "bytes": counted, **alone, "exchanges_s": exchanges_s})

    report.rows += rows
    columns = {
        "what": "1,000 samples",
        "bytes": "bytes, both ways",
        "seconds": "seconds",
        "cpu_seconds": "CPU seconds",
        "exchanges_s": "seconds of Flower's exchanges beside",
    }
    show("Beside what else there is", columns, rows)
    by_name = {row["what"]: row["bytes"] for row in rows}
    report.claims += [
        Claim(f"{name}: bytes over the released code's", by_name[name] / counted, bar, "at most")
        for name, bar in BARS.items()
    ]


def _run(source: str, method: dict[str, Any], steps: int) -> Outcome:
    quiet = {"name": "flglm", "mode": "sequential", "leakage": {"sites": "none"}}
    base = table(source=source, sites=SITES, length=LONGEST, rounds=3)
    train = base["train"] | {"max_steps": steps}
    return run(base | {"method": quiet | method, "train": train})


def _of_thousand(outcome: Outcome, steps: int) -> Row:
    samples = steps * SITES
    sent = (outcome.bytes_up + outcome.bytes_down) / 3
    return {
        "bytes": sent / samples * 1000,
        "seconds": outcome.seconds / samples * 1000,
        "cpu_seconds": (outcome.server_cpu_s + outcome.sites_cpu_s) / samples * 1000,
    }


def _shorten(source: Path, out: Path) -> None:
    """Write the records of `source` with lengths drawn evenly from a tenth to all of a record."""
    draw = random.Random(0)
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        lines.append(json.dumps({"text": text[: int(len(text) * draw.uniform(0.1, 1.0))]}))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _exchange_s() -> float:
    """Return the seconds of one exchange by Flower's messages, deployed with warm processes."""
    rows = json.loads(ENGINE.read_text(encoding="utf-8"))["rows"]
    return min(float(row["apart_s"]) for row in rows if row.get("what") == "Flower deployed, warm")
