"""One run of the embedded model in this process, and what it took."""

import json
import sysconfig
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.flglm.cloze import cloze
from benchmarks.report import Row
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import parse
from fluvial.runs.run import execute

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "attention"}
"""The adapter of FedSEA-LLaMA's timing (its Table 7)."""


@dataclass(frozen=True)
class Outcome:
    """The figures of one run."""

    seconds: float
    """Mean seconds of a round, without the first, in which models are loaded."""
    server_cpu_s: float
    """Mean CPU seconds of the server's thread in a round, without the first; with one round 0."""
    sites_cpu_s: float
    """Those of all other threads, which are the sites'."""
    bytes_up: int
    """Bytes up of all sites in all rounds, without those of measuring."""
    bytes_down: int
    loss: float
    """Held-out loss at the end, nats per label token, mean over the sites."""
    result: dict[str, Any]
    cloze: Row
    """Scores of the right answer among all; empty where they were not asked for."""


def table(
    *, source: str, sites: int, length: int, rounds: int, seed: int = 0, **more: Any
) -> dict[str, Any]:
    """Return a configuration on the text of `source`, dealt to `sites` at random."""
    return {
        "seed": seed,
        "rounds": rounds,
        "model": {"dtype": "float32", "device": "cpu"},
        "lora": LORA,
        "data": {
            "source": source,
            "form": "text",
            "max_length": length,
            "max_heldout": 32,
            "partition": {"by": "iid", "sites": sites},
        },
        "train": {"learning_rate": 3e-3, "per_device_train_batch_size": 1},
        "evaluate": {"sample_tokens": 1},
        "fleet": {"workers": 2},
    } | more


def quickstart(rounds: int) -> dict[str, Any]:
    """Return model, data and training of configs/stdlib.toml, for `rounds` rounds."""
    path = Path(__file__).parents[2] / "configs" / "stdlib.toml"
    stored = tomllib.loads(path.read_text(encoding="utf-8"))
    return {key: stored[key] for key in ("model", "data", "lora", "train")} | {
        "rounds": rounds,
        "evaluate": {"sample_tokens": 1},
    }


def standard_library(path: Path, records: int = 600, characters: int = 1500) -> Path:
    """Write pieces of Python's own library as records, and return the file."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    pieces: list[str] = []

    for file in sorted(folder.glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        pieces += [text[at : at + characters] for at in range(0, len(text), characters)]

    chosen = pieces[:: max(1, len(pieces) // records)][:records]
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in chosen))
    return path


def run(configuration: dict[str, Any], *, cloze_field: str | None = None) -> Outcome:
    """Run it in a folder that goes afterwards; `cloze_field` asks for the scores of `cloze`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        events = [
            (event, time.thread_time(), time.process_time())
            for event in execute(parse(configuration, "benchmark"), path)
        ]
        rows = list(RunFolder(path).metrics())
        scores = {}
        if cloze_field is not None:
            scores = cloze(configuration, path / "adapter", cloze_field)

    later = [row["seconds"] for row in rows[1:]] or [row["seconds"] for row in rows]
    last, _, _ = events[-1]
    clocks = [(server, process) for event, server, process in events if event.kind == "round"]
    rounds = max(1, len(clocks) - 1)
    server_s = (clocks[-1][0] - clocks[0][0]) / rounds
    process_s = (clocks[-1][1] - clocks[0][1]) / rounds
    return Outcome(
        sum(later) / len(later),
        server_s,
        process_s - server_s,
        sum(row["bytes_up"] for row in rows),
        sum(row["bytes_down"] for row in rows),
        last.values["heldout"]["final"]["loss"],
        last.values,
        scores,
    )
