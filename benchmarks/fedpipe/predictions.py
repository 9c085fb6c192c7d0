"""Part "predictions" of `benchmarks.fedpipe`: memory and time of a plan, predicted and measured.

    python -m benchmarks.fedpipe.predictions CONFIG.json

has one site of a run measure itself, get its plan and train for a round, and prints one JSON
object. The process has made the same run with a tiny model before. Memory is the base's weights and
what the resident memory grows by in the training (VmHWM): the plan is about a site's training, and
this process has the server too. The growth of the whole process since the run with the tiny model
stands beside it. Freed memory goes back at once, so that the peak is what is in use. Time is that
of `benchmarks.fedpipe.clock`.
"""

import gc
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.child import answer_of
from benchmarks.fedcybgd.memory import ALLOCATOR, RESET, STATUS, status
from benchmarks.fedcybgd.shapes import QUICK, SMALL, layout_of, write_model
from benchmarks.flglm.bed import standard_library
from benchmarks.report import Claim, Report, Row, show

BAR_MEMORY = 0.10
BAR_TIME = 0.20
LENGTH = 64
RANK = 32
STEPS = 3
SMALL_BATCHES = [1, 2]
"""Batches whose memory the site measures; that of the case is predicted from them."""
CASES: dict[str, dict[str, Any]] = {
    "batch 8": {"batch": 8, "rank": 8, "checkpointing": "never"},
    "batch 8, checkpointing": {"batch": 8, "rank": 8, "checkpointing": "always"},
    "batch 16": {"batch": 16, "rank": 8, "checkpointing": "never"},
    "batch 16, checkpointing": {"batch": 16, "rank": 8, "checkpointing": "always"},
    "batch 8, rank 32": {"batch": 8, "rank": 32, "checkpointing": "never"},
}
COLUMNS = {
    "case": "case",
    "batch": "batch of the plan",
    "memory_mb": "predicted MB",
    "peak_mb": "measured MB",
    "memory_off": "off",
    "process_mb": "whole process MB",
    "predicted_s": "predicted s",
    "measured_s": "measured s",
    "time_off": "off",
}


def measure(report: Report, *, quick: bool) -> None:
    """Add rows and claims to `report`, each case in a process of its own."""
    if not (STATUS.exists() and RESET.exists()):
        report.skip("predictions: peaks are read from Linux's /proc")
        return

    cases = dict(list(CASES.items())[:1]) if quick else CASES
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = standard_library(folder / "text.jsonl", records=200)
        for name, shape in (("large", QUICK), ("small", SMALL)):
            write_model(folder / name, shape, "float32")
        rows = [_row(name, case, folder, text) for name, case in cases.items()]

    report.rows += rows
    show("Predictions", COLUMNS, rows)
    for key, bar in (("memory_off", BAR_MEMORY), ("time_off", BAR_TIME)):
        worst = max(abs(row[key]) for row in rows)
        claim = f"{key.removesuffix('_off')} predicted, largest error of {len(rows)} plans"
        report.claims.append(Claim(claim, worst, bar, "at most"))


def _table(case: dict[str, Any], text: Path) -> dict[str, Any]:
    """Return the configuration of a case, without its model."""
    return {
        "rounds": 1,
        "data": {
            "source": str(text),
            "form": "text",
            "max_length": LENGTH,
            "max_heldout": 1,
            "partition": {"by": "iid", "sites": 1},
        },
        "lora": {
            "r": RANK,
            "lora_alpha": RANK,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
        },
        "train": {
            "learning_rate": 1e-3,
            "per_device_train_batch_size": case["batch"],
            "max_steps": STEPS,
        },
        "evaluate": {"sample_tokens": 1},
        "fleet": {"workers": 1, "threads": 1},
        "method": {
            "name": "fedpipe",
            "replan_every": 0,
            "planner": {
                "selection": "all",
                "ranks": [case["rank"]],
                "batches": [*SMALL_BATCHES, case["batch"]],
                "critical_batch": 1e9,  # so that the plan has the batch of the case
                "eighths": [8],
                "checkpointing": case["checkpointing"],
            },
        },
    }


def _row(name: str, case: dict[str, Any], folder: Path, text: Path) -> Row:
    table = _table(case, text)
    config = folder / "config.json"
    config.write_text(
        json.dumps(
            [
                table | {"model": {"name_or_path": str(folder / size), "dtype": "float32"}}
                for size in ("small", "large")
            ]
        )
    )
    found = answer_of("benchmarks.fedpipe.predictions", config, environment=ALLOCATOR)
    seconds = found["predicted"]["seconds"]
    memory = found["predicted"]["memory_bytes"]["predicted"]
    measured = 4 * layout_of(QUICK).numel + found["growth_bytes"]
    return {
        "part": "predictions",
        "case": name,
        "batch": found["plan"]["batch"],
        "checkpointing": found["plan"]["checkpointing"],
        "memory_mb": memory / 1e6,
        "peak_mb": measured / 1e6,
        "memory_off": memory / measured - 1,
        "process_mb": found["peak_bytes"] / 1e6,
        "predicted_s": seconds["predicted"],
        "measured_s": seconds["measured"],
        "time_off": seconds["predicted"] / seconds["measured"] - 1,
    }


# -- a run, in a process of its own --------------------------------------------------------------


def _run(table: dict[str, Any]) -> dict[str, Any]:
    """Make a run of one round; return its first record with its plan, and the peak of training."""
    from benchmarks.fedpipe.clock import enforced
    from fluvial.methods.fedpipe import tasks
    from fluvial.runs.checkpoint import RunFolder
    from fluvial.runs.config import parse
    from fluvial.runs.run import execute

    peak = [0, 0]

    def metered(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            gc.collect()
            RESET.write_text("5")
            peak[0] = status("VmRSS")
            result = function(*arguments, **named)
            peak[1] = status("VmHWM")
            return result

        return run

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(enforced({}))
        stack.enter_context(
            mock.patch.object(tasks, "train_locally", metered(vars(tasks)["train_locally"]))
        )
        path = Path(folder) / "run"
        first, *_ = execute(parse(table, "benchmark"), path)
        (record,) = RunFolder(path).metrics()

    (predicted,) = record["predicted"].values()
    (plan,) = first.values["plans"].values()
    start_bytes, peak_bytes = peak
    return {
        "predicted": predicted,
        "plan": plan,
        "peak_bytes": peak_bytes,
        "growth_bytes": peak_bytes - start_bytes,
    }


def main(path: str) -> None:
    """See the module."""
    small, large = json.loads(Path(path).read_text(encoding="utf-8"))
    _run(small)
    gc.collect()
    before = status("VmRSS")
    found = _run(large)
    found["peak_bytes"] -= before
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
