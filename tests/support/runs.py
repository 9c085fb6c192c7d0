"""Run a configuration in a test and read what it made."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fluvial.runs.config import parse
from fluvial.runs.run import execute
from fluvial.wire.tensors import Named


def small_table(model: Path, sites: Path) -> dict[str, Any]:
    """A run of an adapter of rank 4 over text whose sites are in the column "client"."""
    return {
        "model": {"name_or_path": str(model)},
        "lora": {"r": 4, "lora_alpha": 16, "target_modules": "attention"},
        "data": {
            "source": str(sites),
            "form": "text",
            "max_length": 32,
            "partition": {"by": "column", "column": "client"},
        },
    }


def run_table(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result of a whole run, with its folder under "folder"."""
    *_, last = execute(parse(table, "test"), folder)
    assert last.kind == "result"
    return last.values | {"folder": str(folder)}


def run_with_stops(
    table: dict[str, Any], folder: Path, stops: Sequence[int], *, resume: bool = False
) -> dict[str, Any]:
    """The result of a run that is stopped after so many events, and again after so many further
    ones, and goes on each time with nothing but its folder."""
    for stop_after in stops:
        events = execute(parse(table, "test"), folder, resume=resume)
        for seen, event in enumerate(events, start=1):
            if seen == stop_after and event.kind != "result":
                break

        resume = True

    assert event.kind == "result"
    return event.values


def adapter_of(result: dict[str, Any]) -> Named:
    """The final adapter as PEFT wrote it, under our names."""
    tensors = load_file(Path(result["folder"]) / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def toml_of(table: dict[str, Any], prefix: str = "") -> str:
    """A table as TOML."""
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in plain.items())

    for key, value in table.items():
        if isinstance(value, dict):
            text += f"[{prefix}{key}]\n{toml_of(value, f'{prefix}{key}.')}"

    return text


def write_toml(path: Path, table: dict[str, Any]) -> Path:
    """A table as a TOML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(toml_of(table))
    return path
