"""Run a configuration in a test and read what it made."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fluvial.runs.config import parse
from fluvial.runs.run import execute
from fluvial.wire.tensors import Named


def run_table(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result of a whole run, with its folder under "folder"."""
    *_, last = execute(parse(table, "test"), folder)
    assert last.kind == "result"
    return last.values | {"folder": str(folder)}


def adapter_of(result: dict[str, Any]) -> Named:
    """The final adapter as PEFT wrote it, under our names."""
    tensors = load_file(Path(result["folder"]) / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
