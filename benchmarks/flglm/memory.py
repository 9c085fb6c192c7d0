"""Memory of a site and of the server in training: predicted by `fluvial check`, and measured.

Each measure is the peak of a process of its own (`benchmarks.flglm.probe`), on a random Llama whose
activations and weights are far above the noise of such a figure. Tenants are replicas of the
server's layers for several sites, on one frozen base.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import Claim, Report, Row, show
from fluvial.methods.flglm.choice import predicted_memory, profile
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.cuts import Candidate
from fluvial.models.outline import Outline
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import given
from tests.support.models import four_layers

SHAPE = {
    "vocab_size": 16_000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
}
LENGTH = 256
BATCH = 4
CHECKPOINTED = {"train": {"gradient_checkpointing": True}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "site, 1 + 1": ("site", {}),
    "site, 1 + 1, checkpointing": ("site", CHECKPOINTED),
    "site, 2 + 3": ("site", {"method": {"front": 2, "back": 3}}),
    "site, 1 + 1, bfloat16": ("site", {"model": {"dtype": "bfloat16"}}),
    "site, 1 + 1, all weights": ("site", {"tune": "full"}),
    "server, 6 layers": ("server", {}),
    "server, 6 layers, checkpointing": ("server", CHECKPOINTED),
}
TENANTS = (1, 2, 4, 8)
BAR = 0.1
"""Bar for a prediction: its share of error."""
BAR_TENANT = 1.1
"""Bar for a further tenant: times its adapter, optimizer and activations."""


def measure(report: Report, *, quick: bool) -> None:
    """Add rows and claims to `report`."""
    with tempfile.TemporaryDirectory() as folder:
        model = four_layers(Path(folder) / "model", **SHAPE)
        cases = dict(list(CASES.items())[:1]) if quick else CASES
        rows = [_row(name, _table(model, change), end, 1) for name, (end, change) in cases.items()]
        counts = TENANTS[:2] if quick else TENANTS
        short = {"train": {"per_device_train_batch_size": 1}}
        tenants = [_row("tenants", _table(model, short), "server", count) for count in counts]

    report.rows += [*rows, *tenants]
    columns = {
        "case": "case",
        "replicas": "replicas",
        "predicted_mb": "predicted, MB",
        "measured_mb": "measured, MB",
        "off": "off",
    }
    show("Memory in training", columns, [*rows, *tenants])
    worst = max(abs(row["off"]) for row in [*rows, *tenants])
    report.claims.append(Claim("prediction of memory, largest error", worst, BAR, "at most"))
    further = (tenants[-1]["measured_mb"] - tenants[0]["measured_mb"]) / (counts[-1] - counts[0])
    own = (tenants[-1]["predicted_mb"] - tenants[0]["predicted_mb"]) / (counts[-1] - counts[0])
    report.rows.append(
        {
            "part": "tenants",
            "case": "a further tenant",
            "measured_mb": further,
            "predicted_mb": own,
            "base_mb": tenants[0]["base_mb"],
        }
    )
    report.claims.append(
        Claim(
            "a further tenant, of its adapter, optimizer and activations",
            further / own,
            BAR_TENANT,
            "at most",
        )
    )


def _table(model: Path, change: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of hierarchical training."""
    table: dict[str, Any] = {
        "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
        "tune": "lora",
        "data": {"source": "none.jsonl", "form": "text", "max_length": LENGTH},
        "train": {"per_device_train_batch_size": BATCH, "max_steps": 3},
        "method": {"name": "flglm", "mode": "hierarchical"},
    }
    for name, value in change.items():
        table[name] = table[name] | value if isinstance(value, dict) else value
    return table


def _row(name: str, table: dict[str, Any], end: str, replicas: int) -> Row:
    """Return the prediction and the measure of one case."""
    config = parse(table, "benchmark")
    found = _predicted(config, replicas)
    memory = found.site if end == "site" else found.server
    measured = _measured(table, end, replicas)
    return {
        "part": "tenants" if name == "tenants" else "memory",
        "case": name,
        "replicas": replicas,
        "base_mb": memory.weights / 1e6,
        "optimizer_mb": memory.optimizer / 1e6,
        "passes_mb": memory.passes / 1e6,
        "predicted_mb": memory.total / 1e6,
        "measured_mb": measured / 1e6,
        "off": memory.total / measured - 1,
    }


def _predicted(config: RunConfig, replicas: int) -> Candidate:
    outline = Outline(config.model, config.adapter)
    facts = given(config, outline.assignment.layout, outline.base, replicas)
    method = config.method
    assert isinstance(method, FlGlmConfig)
    found = predicted_memory(method, partial(profile, method, replace(facts, sites=replicas)))
    assert isinstance(found, Candidate), found
    return found


def _measured(table: dict[str, Any], end: str, replicas: int) -> int:
    batch = table["train"]["per_device_train_batch_size"]
    content = {
        "config": table,
        "end": end,
        "steps": table["train"]["max_steps"],
        "replicas": replicas,
        "sequences": batch,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(content, file)
        file.flush()
        # Freed memory goes back at once, so that the process has what its tensors have.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.flglm.probe", file.name],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    peak: int = json.loads(done.stdout)["peak_bytes"]
    return peak
