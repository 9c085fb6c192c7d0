"""What is measured is what it says: greedy is greedy, a number is a number, and held-out is held
out."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.data import IGNORE_INDEX, Example, SiteTexts
from fluvial.data.leaks import Leaks
from fluvial.errors import ConfigError
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from fluvial.training.evaluate import Heldout, heldout
from tests.unit.training.test_evaluate_as_trained import _evaluate


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _greedy(folder: Path, prompt: str, count: int) -> str:
    """The most likely token again and again, by nothing but forward passes of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = list(tokenizer(prompt)["input_ids"])
    start = len(ids)

    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break

    text: str = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return text


def test_greedy_is_greedy_whatever_the_folder_asks_for(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "sampling")
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 50,
        "repetition_penalty": 4.0,
    }
    settings |= {"no_repeat_ngram_size": 1, "min_new_tokens": 4, "bad_words_ids": [[5], [6]]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    prompts = [f"The river {n} carries" for n in range(3)]
    wanted = [_greedy(tiny_model, prompt, 5) for prompt in prompts]
    pool = ModelPool(ModelConfig(name_or_path=str(folder), device="cpu"), None)
    assert pool.generate({}, prompts, max_new_tokens=5) == wanted
    rows = [
        {"prompt": p, "completion": answer}
        for p, answer in zip(prompts, wanted, strict=True)
        if answer.strip()
    ]
    assert rows, "the random model must say something"
    found = _evaluate(
        folder, "--data", _lines(tmp_path / "d.jsonl", rows), "--set", "evaluate.max_new_tokens=5"
    )
    assert found["data"]["model"]["exact_match"] == 1.0
    assert found["data"]["model"]["f1"] == 1.0


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_padding_and_batches_do_not_change_the_loss(tiny_gpt2_model: Path, batch_size: int) -> None:
    pool = ModelPool(ModelConfig(name_or_path=str(tiny_gpt2_model), device="cpu"), None)
    ids = [[1, *range(10, 10 + n)] for n in (2, 30, 7, 1, 18)]
    examples = [Example(row, [IGNORE_INDEX, *row[1:]]) for row in ids]

    with pool.model({}) as model, torch.no_grad():
        found = heldout(model, examples, pad_token_id=0, batch_size=batch_size)
        sums = [
            float(model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss)
            * (len(row) - 1)
            for row in ids
        ]

    assert found.loss_sum == pytest.approx(
        math.fsum(sums), rel=2e-5
    )  # padding changes the order of summation


def test_no_measure_is_printed_that_is_no_number(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert Heldout(1e6, 0, 1).perplexity == math.inf
    folder = shutil.copytree(tiny_model, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = math.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    data = _lines(tmp_path / "d.jsonl", [{"text": "The river carries water."}])

    with pytest.raises(ConfigError, match="not finite|not numbers|damaged"):
        _evaluate(folder, "--data", data)


def test_a_perplexity_beyond_64_bits_is_said_to_be_so(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model, tmp_path / "steep")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    data = _lines(tmp_path / "d.jsonl", [{"text": "The river carries water."}])
    found = _evaluate(folder, "--data", data)["data"]["model"]
    assert found["loss"] > 710
    assert found["perplexity"] is None
    assert "over 1e308" in _evaluate(folder, "--data", data, text=True)


def test_files_that_hold_nothing_or_too_much(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.jsonl"):
        _evaluate(tiny_model, "--data", tmp_path / "empty.jsonl")
    long = _lines(
        tmp_path / "long.jsonl", [{"prompt": "The river. " * 60, "completion": "water"}] * 2
    )
    with pytest.raises(ConfigError, match="2 of 2 records are longer than data.max_length=100"):
        _evaluate(tiny_model, "--data", long, "--set", "data.max_length=100")
    told = _evaluate(
        tiny_model,
        "--data",
        long,
        "--set",
        "data.max_length=100",
        "--set",
        'data.overlong="shorten_prompt"',
    )
    assert (told["data"]["truncated_records"], told["data"]["questions_too_long"]) == (2, 2)
    assert told["data"]["model"]["exact_match"] == 0.0


def test_a_cut_held_out_set_says_so(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"River {n}? ", "completion": f"water {n}"} for n in range(9)]
    data = _lines(tmp_path / "d.jsonl", rows)
    found = _evaluate(tiny_model, "--data", data, "--set", "data.max_heldout=4")["data"]
    assert (found["sequences"], found["unmeasured_sequences"], found["questions"]) == (4, 5, 4)
    words = " ".join(
        _evaluate(tiny_model, "--data", data, "--set", "data.max_heldout=4", text=True).split()
    )
    assert "the first 4 sequences; 5 beyond data.max_heldout" in words
    assert "form prompt_completion (detected)" in words


# -- held-out text that is trained on ------------------------------------------------------------


def test_leaks_are_counted_over_all_sites() -> None:
    leaks = Leaks()
    one, two, three = (Example([1, n], [IGNORE_INDEX, n]) for n in (7, 8, 9))
    other_labels = Example([1, 7], [1, 7])
    leaks.add("a", [one, two], [three, other_labels])
    leaks.add("b", [three], [one, three])
    assert leaks.by_site() == {"a": 1, "b": 2}
    assert leaks.remarks() == [
        "3 of 4 held-out sequences are also trained on, token by token: held-out measures are "
        "too good ('b': 2, 'a': 1); remove the duplicates, or name other records in "
        "data.heldout_source"
    ]
    own_tables = "data.by_site.b.heldout_source, data.by_site.a.heldout_source"
    assert leaks.remarks("data.by_site.{}")[0].endswith(f"name other records in {own_tables}")
    assert Leaks().remarks() == []


def test_check_tells_of_a_leak_and_of_a_cut(
    run_config: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    rows = [
        {"client": "ab"[n % 2], "prompt": f"River {n % 12}? ", "completion": f"water {n % 12}"}
        for n in range(48)
    ]
    source = _lines(tmp_path / "d.jsonl", rows)
    held = _lines(
        tmp_path / "h.jsonl",
        [row | {"prompt": f"New {n}? "} for n, row in enumerate(rows[:8])] + rows[:2],
    )
    data = {"source": str(source), "heldout_source": str(held), "max_length": 64}
    data |= {"partition": {"by": "column", "column": "client"}}
    notes = " ".join(plan(parse(run_config | {"data": data}, "test"))["notes"])
    assert "2 of 10 held-out sequences are also trained on" in notes
    data["max_heldout"] = 3
    remarks = SiteTexts(parse(run_config | {"data": data}, "test").data, tokenizer, seed=0).check()
    assert any(
        "first 3 sequences of a site" in each and "4 of all sites are not measured" in each
        for each in remarks
    )
    assert not any(
        "also trained on" in each for each in remarks
    )  # those that leak are beyond the cut
