"""The cross-site matrix: its diagonal, its last row, and a cell that transformers and PEFT compute
by themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from fluvial.data import SiteTexts
from fluvial.errors import ConfigError
from fluvial.federation.store import StateStore
from fluvial.models.pool import ModelPool
from fluvial.runs.config import parse
from fluvial.runs.run import execute, in_process
from fluvial.storage.run_files import SITES, read_run
from tests.support.questions import with_questions
from tests.support.runs import run_table

CROSSED = {"compare": ["local"], "evaluate": {"sample_tokens": 2, "cross_site": True}}


def of_site(run: dict[str, Any], which: str) -> dict[str, Any]:
    return {site: row[which] for site, row in run["heldout_by_site"].items()}


def test_diagonal_and_last_row_are_the_held_out_figures(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    table = with_questions(run_config | {"compare": ["local"]}, tmp_path)
    table["evaluate"] |= {"max_new_tokens": 3, "cross_site": True}
    result = run_table(table, tmp_path / "run")
    local = read_run(tmp_path / "run")["compare"]["local"]["result"]
    matrix = result["cross_site"]["local"]
    assert {site: row[site] for site, row in matrix.items()} == of_site(local, "final")
    assert result["cross_site"]["federated"] == of_site(result, "final")
    assert "exact_match" in matrix["a"]["b"]
    assert local["cross_site"] is None


def test_a_cell_is_the_loss_that_peft_computes(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Columns are the sites of the data: a model does best on the words that it was trained on."""
    table = run_config | CROSSED
    result = run_table(table, tmp_path / "run")
    matrix = result["cross_site"]["local"]

    config = parse(table, "test")
    pool = ModelPool(config.model, config.lora)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    store = StateStore(tmp_path / "run" / "compare" / "local" / SITES)
    base = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    own = store.read("south", "adapter").tensors
    modules = sorted({name.partition(".lora_")[0] for name in own})
    lora = LoraConfig(r=4, lora_alpha=config.lora.alpha, target_modules=modules)
    model = get_peft_model(base, lora).eval()
    loaded = set_peft_model_state_dict(model, {f"base_model.model.{k}": v for k, v in own.items()})
    assert not loaded.unexpected_keys

    total, count = 0.0, 0
    for example in texts.load("north").heldout:
        ids, labels = (torch.tensor([row]) for row in (example.input_ids, example.labels))
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss
        labelled = int((labels[:, 1:] != -100).sum())
        total += float(loss) * labelled
        count += labelled

    # Sums of fp32 in another order, and batches instead of single sequences.
    assert matrix["south"]["north"]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert matrix["north"]["south"]["loss"] != pytest.approx(total / count, rel=1e-4)


def test_models_of_single_sites_need_their_baseline_and_this_process(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    crossed = run_config | CROSSED
    with pytest.raises(ConfigError, match="evaluate.cross_site: without effect.*add it to compare"):
        parse(crossed | {"compare": ["fedavg"], "method": {"name": "cgfedllm"}}, "test")
    with pytest.raises(ConfigError, match="evaluate.cross_site: without effect.*'central'"):
        parse(crossed | {"method": {"name": "central"}}, "test")

    def elsewhere(*arguments: Any) -> Any:
        return in_process(*arguments)

    with pytest.raises(ConfigError, match="stay at their sites"):
        list(execute(parse(crossed, "test"), tmp_path / "run", assemble=elsewhere))
