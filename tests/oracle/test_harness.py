"""Tasks of lm-eval: their values are those of plain transformers and PEFT, of lm-eval on a merged
model by itself, and of our own questions with the same prompts."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.seeds import generator
from fluvial.training.harness import Harness, HarnessConfig
from fluvial.wire.tensors import Named
from tests.support.harness import QUESTIONS, lines, write_tasks
from tests.support.models import shared_four_layers

MODELS = ("base", "adapter")


CLOSE = 1e-4
"""Nats, because padding changes the order of sums."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


@pytest.fixture(scope="module")
def pool(tiny_model: Path) -> ModelPool:
    lora = LoraSettings(r=2, lora_alpha=4, lora_dropout=0.0)
    return ModelPool(ModelConfig(name_or_path=str(tiny_model), device="cpu"), lora)


@pytest.fixture(scope="module")
def state(pool: ModelPool) -> Named:
    """An adapter that moves the logits a good deal."""
    start = initial_state(pool.layout, 0)
    return {name: torch.randn(t.shape, generator=generator(1, name)) for name, t in start.items()}


@pytest.fixture(scope="module")
def adapter(pool: ModelPool, state: Named, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    pool.save(state, folder)
    return folder


@pytest.fixture(scope="module")
def measured(adapter: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the command says about all three tasks, and what it wrote."""
    out = tmp_path_factory.mktemp("out") / "results"
    command = ["evaluate", str(adapter), "--tasks", "texts,letters,written"]
    command += ["--include-path", str(tasks), "--out", str(out), "--format", "json"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)["tasks"] | {"out": out}


def _plain(tiny_model: Path, adapter: Path | None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def _likelihood(model: Any, tokenizer: Any, before: str, after: str) -> float:
    """log P(after | before) of one text, nats."""
    prompt = tokenizer(before)["input_ids"]
    ids = tokenizer(before + after)["input_ids"]
    assert ids[: len(prompt)] == prompt
    likely = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(likely[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))


def _scores(model: Any, tokenizer: Any, question: dict[str, Any]) -> list[float]:
    """The log-likelihoods of the answers to a question, by transformers alone."""
    before = f"{question['question']}\nAnswer:"
    return [_likelihood(model, tokenizer, before, f" {each}") for each in question["choices"]]


def _asked(sample: Mapping[str, Any]) -> list[float]:
    """The same as lm-eval has them."""
    return [score for score, _ in sample["filtered_resps"]]


def test_likelihoods_are_those_of_transformers_and_peft(
    pool: ModelPool, state: Named, tiny_model: Path, adapter: Path, tasks: Path
) -> None:
    """Every log-likelihood of every choice, and from them the accuracies that are reported."""
    harness = Harness(HarnessConfig(("texts",), include_path=tasks))
    states = {"base": pool.base_state(), "adapter": state}
    values = {}

    for name, path in (("base", None), ("adapter", adapter)):
        results, samples, cut, _ = harness._ask(pool, states[name], {"pretrained": "tiny"})
        plain = _plain(tiny_model, path)
        right = []
        normed = []

        for question, sample in zip(QUESTIONS, samples["texts"], strict=True):
            scores = _scores(plain, pool.tokenizer, question)
            assert _asked(sample) == pytest.approx(scores, abs=CLOSE)
            sizes = [len(choice) for choice in question["choices"]]
            by_size = [score / size for score, size in zip(scores, sizes, strict=True)]
            right.append(scores.index(max(scores)) == question["answer"])
            normed.append(by_size.index(max(by_size)) == question["answer"])

        row = results["results"]["texts"]
        assert row["acc,none"] == pytest.approx(sum(right) / len(right))
        assert row["acc_norm,none"] == pytest.approx(sum(normed) / len(normed))
        error = stdev(map(float, right)) / math.sqrt(len(right))
        assert row["acc_stderr,none"] == pytest.approx(error)
        assert cut == 0
        values[name] = row["acc,none"]

    assert len(set(values.values())) == 2  # the adapter changes something


def test_an_adapter_on_a_tied_head_is_asked_as_it_is(tasks: Path) -> None:
    config = ModelConfig(name_or_path=str(shared_four_layers()), device="cpu")
    lora = LoraSettings(r=2, lora_alpha=4, lora_dropout=0.0, target_modules=("lm_head",))
    pool = ModelPool(config, lora)
    start = initial_state(pool.layout, 0)
    state = {name: torch.randn(t.shape, generator=generator(1, name)) for name, t in start.items()}
    harness = Harness(HarnessConfig(("texts",), include_path=tasks, limit=3))
    _, samples, _, _ = harness._ask(pool, state, {"pretrained": "tiny"})

    with pool.model(state) as model:
        for question, sample in zip(QUESTIONS, samples["texts"], strict=False):
            scores = _scores(model, pool.tokenizer, question)
            assert _asked(sample) == pytest.approx(scores, abs=CLOSE)


def test_results_are_those_of_lm_eval_on_the_merged_model(
    measured: Any, tiny_model: Path, adapter: Path, tasks: Path, tmp_path: Path
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    merged = tmp_path / "merged"
    _plain(tiny_model, adapter).merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(merged)
    theirs = simple_evaluate(
        model=HFLM(pretrained=str(merged), device="cpu", batch_size=1),
        tasks=["texts", "letters", "written"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    ours = measured["results"]["adapter"]
    for task, metrics in theirs["results"].items():
        assert ours["results"][task] == metrics
    assert ours["versions"] == theirs["versions"]
    assert ours["n-samples"] == theirs["n-samples"]
    assert ours["configs"]["letters"]["doc_to_text"] == theirs["configs"]["letters"]["doc_to_text"]


def test_our_questions_with_the_same_prompts_give_the_same_accuracy(
    measured: Any, adapter: Path, tmp_path: Path
) -> None:
    questions = lines(tmp_path / "questions.jsonl", QUESTIONS)
    command = ["evaluate", str(adapter), "--choices", str(questions), "--format", "json"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    ours = json.loads(result.stdout)["choices"]
    (row,) = (row for row in measured["rows"] if row["task"] == "letters")
    for model in MODELS:
        assert row[model]["value"] == pytest.approx(ours[model]["accuracy"])
    assert row["difference"]["value"] == pytest.approx(ours["difference"]["accuracy"])


def test_the_files_have_the_form_of_lm_eval_and_name_the_weights(
    measured: Any, tiny_model: Path, adapter: Path
) -> None:
    files = {path.parent.name: path for path in measured["out"].glob("*/results_*.json")}
    assert sorted(map(str, files.values())) == sorted(measured["written"])
    assert len(files) == 2
    names = {
        model: str(path).replace("/", "__")
        for model, path in zip(MODELS, (tiny_model, adapter), strict=True)
    }  # as lm-eval names its folders

    for model, name in names.items():
        content = json.loads(files[name].read_text())
        expected = measured["results"][model]
        assert {"results", "configs", "versions", "n-shot", "n-samples", "config"} <= set(content)
        assert content["results"] == expected["results"]
        assert content["task_hashes"].keys() == content["results"].keys()
        assert content["config"]["model_args"]["pretrained"] == str(tiny_model)
        assert ("peft" in content["config"]["model_args"]) == (model == "adapter")
        assert len(content["config"]["model_sha"]) == 32
        assert ("peft_sha" in content["config"]) == (model == "adapter")


def test_a_difference_has_the_error_over_the_same_documents(
    pool: ModelPool, state: Named, tasks: Path
) -> None:
    harness = Harness(HarnessConfig(("texts",), include_path=tasks, limit=10))
    states = {"base": pool.base_state(), "adapter": state}
    names = {model: {"pretrained": "tiny"} for model in states}
    result = harness.measure(pool, states, names)
    asked = {model: harness._ask(pool, states[model], names[model])[1]["texts"] for model in states}
    gains = [
        after["acc_norm"] - before["acc_norm"]
        for before, after in zip(asked["base"], asked["adapter"], strict=True)
    ]
    (row,) = (row for row in result["rows"] if row["metric"] == "acc_norm")
    assert row["documents"] == len(gains) == 10
    assert row["difference"]["value"] == pytest.approx(sum(gains) / 10)
    assert row["difference"]["stderr"] == pytest.approx(stdev(gains) / math.sqrt(10))
