"""Part "enforced" of `benchmarks.fedpipe`: sites in processes that cannot exceed their memory.

    python -m benchmarks.fedpipe.enforced CASE.json

is one site: it answers the messages of a run as a deployed site does (`SiteProcess`), and prints
one JSON object. Before, it has answered those of the same run with a tiny model. Then the kernel's
limit on its writable memory (RLIMIT_DATA, which needs no rights) is set to what the process has,
the site's limit, and `RESERVE_MB`; it holds for everything that follows: reading the base, profile,
probe, plan and training. An allocation beyond it fails. The messages are those that the same site
of a run in one process got: one run of FedPipe, which plans by the limits, and one of uniform LoRA
(FedIT) with the rank, the batch and the layers in memory that the site without a limit holds.

The measured peak is what the resident memory grows by (VmHWM). Freed memory goes back at once.
"""

import gc
import json
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.child import answer_of
from benchmarks.fedcybgd.memory import ALLOCATOR, RESET, STATUS, status
from benchmarks.fedcybgd.shapes import SMALL, Shape, write_model
from benchmarks.flglm.bed import standard_library
from benchmarks.report import Claim, Report, Row, show

if TYPE_CHECKING:
    from fluvial.site_process.journal import Header

RESERVE_MB = 64.0
"""Memory of a process beside what a plan counts: its records, messages as they are read, written
and stored, and the allocator's."""
LARGE = Shape(hidden=192, intermediate=512, layers=12, heads=6, key_value_heads=6, vocabulary=2048)
"""The model: 23 MB of weights, and many activations for the time that it takes."""
LENGTH = 128
RANK = 16
BATCH = 16
LIMITS_MB = (None, 260.0, 160.0, 90.0, 60.0)
"""Memory of the sites; uniform LoRA fits the first alone."""
QUICK_LIMITS_MB = (None, 60.0)
NO_MEMORY = "no memory"
TRAINED = "trained"
COLUMNS = {
    "site": "site",
    "limit_mb": "limit MB",
    "ranks": "ranks of the plan",
    "batch": "batch",
    "checkpointing": "checkpointing",
    "predicted_mb": "predicted MB",
    "peak_mb": "measured MB",
    "outcome": "planned",
    "uniform_peak_mb": "uniform LoRA, measured MB",
    "uniform_outcome": "uniform LoRA",
}


@dataclass(frozen=True)
class Recording:
    """The messages of a run."""

    config: Path
    """The run's configuration."""
    plans: dict[str, Any]
    """Plan by site; empty without."""
    messages: dict[str, list[tuple[str, int, str]]]
    """Task, round and file of each message by site, in their order."""


def measure(report: Report, *, quick: bool) -> None:
    """Add a row for each site, and claims, to `report`."""
    if not (STATUS.exists() and RESET.exists()):
        report.skip(
            "enforced: RLIMIT_DATA counts what is meant, and peaks are read, on Linux alone"
        )
        return

    limits = QUICK_LIMITS_MB if quick else LIMITS_MB
    sites = {f"site-{number}": limit for number, limit in enumerate(limits)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = standard_library(folder / "text.jsonl", records=200)
        runs = {}
        for size, shape in (("small", SMALL), ("large", LARGE)):
            write_model(folder / size, shape, "float32")
            for method in ("fedpipe", "fedavg"):
                table = _table(method, folder / size, text, sites)
                runs[method, size] = recorded(table, folder / f"{method}-{size}")
        rows = [_row(site, limit, runs, folder) for site, limit in sites.items()]

    report.rows += rows
    show("Enforced limits", COLUMNS, rows)
    limited = [row for row in rows if row["limit_mb"] is not None]
    trained = sum(row["outcome"] == TRAINED for row in rows)
    ended = sum(row["uniform_outcome"] == NO_MEMORY for row in limited)
    report.claims += [
        Claim(f"sites of {len(rows)} that train by their plan", trained, len(rows), "at least"),
        Claim(
            f"sites with a limit, of {len(limited)}, without memory for uniform LoRA",
            ended,
            len(limited),
            "at least",
        ),
    ]


def _table(method: str, model: Path, text: Path, sites: dict[str, float | None]) -> dict[str, Any]:
    """Return the configuration of a run by `method`."""
    table: dict[str, Any] = {
        "rounds": 1,
        "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {
            "source": str(text),
            "form": "text",
            "max_length": LENGTH,
            "max_heldout": 1,
            "partition": {"by": "iid", "sites": len(sites)},
        },
        "lora": {
            "r": RANK,
            "lora_alpha": RANK,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
        },
        "train": {
            "learning_rate": 1e-3,
            "per_device_train_batch_size": BATCH,
            "max_steps": 1,  # of so large a batch; smaller ones make more
        },
        "evaluate": {"sample_tokens": 1},
        "fleet": {"workers": 1, "threads": 1},
        "method": {"name": "fedavg"},
    }
    if method == "fedpipe":
        large = model.name == "large"
        budgets = [
            {"site": site, "memory_mb": limit} for site, limit in sites.items() if large and limit
        ]
        table["method"] = {
            "name": "fedpipe",
            "replan_every": 0,
            "probe_steps": 2,
            "budgets": budgets,
            "planner": {
                "ranks": [2, 4, 8, RANK],
                "batches": [1, 4, BATCH],
                "critical_batch": 1e9,  # so that the fastest batch is the best one
            },
        }
    return table


def recorded(table: dict[str, Any], folder: Path) -> Recording:
    """Run a configuration; return the messages of its method to each site."""
    from benchmarks.fedpipe.clock import enforced
    from fluvial.methods import METHODS
    from fluvial.runs.config import parse
    from fluvial.runs.run import execute

    folder.mkdir()
    messages: dict[str, list[tuple[str, int, str]]] = {}

    def recording(task: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def answered(site: Any, message: Any) -> Any:
            own = messages.setdefault(site.name, [])
            path = folder / f"{site.name}-{len(own)}"
            path.write_bytes(message.to_bytes())
            round = message.values.get("round", 0)
            own.append((task, round if isinstance(round, int) else 0, str(path)))
            return function(site, message)

        return answered

    name = table["method"]["name"]
    entry = METHODS[name]
    tasks = {task: recording(task, function) for task, function in entry.tasks.items()}
    with mock.patch.dict(METHODS, {name: replace(entry, tasks=tasks)}), enforced({}):
        first, *_ = execute(parse(table, "benchmark"), folder / "run")

    config = folder / "config.json"
    config.write_text(json.dumps(table), encoding="utf-8")
    return Recording(config, first.values.get("plans", {}), messages)


def _row(
    site: str, limit: float | None, runs: dict[tuple[str, str], Recording], folder: Path
) -> Row:
    plan = runs["fedpipe", "large"].plans[site]
    ranks = list(plan["ranks"].values())
    planned, uniform = (
        _outcome(site, limit, runs[method, "small"], runs[method, "large"], folder)
        for method in ("fedpipe", "fedavg")
    )
    return {
        "part": "enforced",
        "site": site,
        "limit_mb": limit,
        "ranks": [min(ranks), max(ranks)],
        "weights": len(ranks),
        "batch": plan["batch"],
        "checkpointing": plan["checkpointing"],
        "predicted_mb": plan["prediction"]["memory_bytes"] / 1e6,
        "peak_mb": planned["peak_mb"],
        "outcome": planned["outcome"],
        "why": planned["why"],
        "uniform_peak_mb": uniform["peak_mb"],
        "uniform_outcome": uniform["outcome"],
        "uniform_why": uniform["why"],
    }


def _outcome(
    site: str, limit: float | None, small: Recording, large: Recording, folder: Path
) -> dict[str, Any]:
    """Return how a site's process ended, and its peak."""
    case = folder / "case.json"
    with tempfile.TemporaryDirectory(dir=folder) as state:
        case.write_text(
            json.dumps(
                {
                    "site": site,
                    "state": state,
                    "limit_mb": None if limit is None else limit + RESERVE_MB,
                    "runs": [
                        [json.loads(run.config.read_text("utf-8")), run.messages[site]]
                        for run in (small, large)
                    ],
                }
            ),
            encoding="utf-8",
        )
        return answer_of("benchmarks.fedpipe.enforced", case, environment=ALLOCATOR)


# -- a site, in a process of its own ---------------------------------------------------------------


def _messages(
    name: str, config: dict[str, Any], messages: list[Any]
) -> Iterator[tuple["Header", bytes]]:
    """Yield the messages of a run, the one with its configuration first."""
    from fluvial.site_process.journal import Header
    from fluvial.site_process.process import JOIN
    from fluvial.wire.payload import Payload

    joining = Payload(values={"config": config}).to_bytes()
    every = [(JOIN, 0, joining), *((t, r, Path(path).read_bytes()) for t, r, path in messages)]
    for number, (task, round, wire) in enumerate(every, start=1):
        yield Header(name, task, round, "server", number, number - 1, -1), wire


def main(path: str) -> None:
    """See the module."""
    from fluvial.site_process.process import SiteProcess
    from fluvial.site_process.site_file import SiteFile

    case = json.loads(Path(path).read_text(encoding="utf-8"))
    allow = {"run_paths": ["*"]}
    process = SiteProcess(
        SiteFile.model_validate(
            {"name": case["site"], "folder": case["state"], "device": "cpu", "allow": allow}
        )
    )
    small, large = case["runs"]
    for header, wire in _messages("small", *small):
        process.answer(header, wire)
    gc.collect()
    if case["limit_mb"] is not None:
        most = status("VmData") + int(1e6 * case["limit_mb"])
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    RESET.write_text("5")
    before = status("VmRSS")

    outcome, why = TRAINED, ""
    for header, wire in _messages("large", *large):
        try:
            process.answer(header, wire)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                raise
            outcome, why = NO_MEMORY, f"{header.task}: {error!r:.200}"
            break

    peak_mb = (status("VmHWM") - before) / 1e6
    sys.stdout.write(json.dumps({"outcome": outcome, "why": why, "peak_mb": peak_mb}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
