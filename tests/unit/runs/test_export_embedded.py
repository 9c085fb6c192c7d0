"""An adapter on the package's own model is exported with its base, so that PEFT loads both."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from fluvial.cli.export import _lines
from fluvial.runs.export import export_run
from fluvial.training.folders import read_adapter_folder
from tests.support.runs import run_table, small_table
from tests.unit.runs.test_export import logits


def test_the_adapter_loads_with_the_base_that_lies_within_it(
    three_sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any directory with PeftModel, and in the folder itself with AutoPeft."""
    table = small_table(Path("embedded"), three_sites) | {"rounds": 1}
    table["train"] = {"max_steps": 1, "per_device_train_batch_size": 2}
    table["data"] |= {"max_heldout": 1}
    table["evaluate"] = {"sample_tokens": 1, "max_new_tokens": 0}
    run_table(table, tmp_path / "run")
    out = tmp_path / "out"
    made = export_run(tmp_path / "run", out)

    base = AutoModelForCausalLM.from_pretrained(out / "base")
    plain = logits(base)
    model = PeftModel.from_pretrained(base, str(out))
    assert not torch.equal(logits(model), plain)
    monkeypatch.chdir(out)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(".")), logits(model))

    assert sum(path.stat().st_size for path in (out / "base").iterdir()) < 4_000_000
    told = json.loads((out / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "./base"
    assert read_adapter_folder(out).base == "embedded"
    card = (out / "README.md").read_text()
    assert "PeftModel.from_pretrained(base, folder)" in card
    assert str(tmp_path) not in card
    words = "\n".join(_lines(made))
    assert f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{out}/base')," in words
    assert f"vllm serve {out}/base --enable-lora" in words
