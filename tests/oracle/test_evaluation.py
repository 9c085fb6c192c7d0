"""What is measured equals what transformers says, one text and one question at a time."""

import json
import math
from pathlib import Path
from typing import cast

import pytest
import torch
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.data import IGNORE_INDEX, Example
from fluvial.data.multiple_choice import Choice, Scoring, render
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import initial_state
from fluvial.seeds import generator
from fluvial.training.choice_prompts import prepare
from fluvial.training.choice_scores import score
from fluvial.training.evaluate import heldout
from fluvial.training.folders import kind_of
from fluvial.wire.tensors import Named
from tests.unit.training.test_evaluate import LORA, WATER


@pytest.fixture(scope="module")
def pool(tiny_model: Path) -> ModelPool:
    return ModelPool(ModelConfig(name_or_path=str(tiny_model), device="cpu"), LORA)


@pytest.fixture(scope="module")
def changed(pool: ModelPool) -> Named:
    """An adapter that moves the logits a good deal."""
    start = initial_state(pool.layout, 0)
    return {name: torch.randn(t.shape, generator=generator(1, name)) for name, t in start.items()}


def test_heldout_loss_is_that_of_transformers(pool: ModelPool) -> None:
    ids = list(pool.tokenizer("The river carries the water of many small streams.")["input_ids"])
    labels = [IGNORE_INDEX] * 5 + ids[5:]
    with pool.model(pool.base_state()) as model, torch.no_grad():
        ours = heldout(model, [Example(ids, labels)], pad_token_id=0)
        theirs = float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss)

    assert ours.loss == pytest.approx(theirs, rel=1e-6)  # another order of summation
    assert ours.perplexity == math.exp(ours.loss)
    assert ours.label_tokens == len(ids) - 5


@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_scores_equal_one_question_at_a_time(
    pool: ModelPool, changed: Named, scoring: Scoring
) -> None:
    endings = {
        "letter": [(f" {letter}", 1) for letter in "ABCD"],
        "text": [(f" {text}", len(text)) for text in WATER.choices],
    }[scoring]
    others = [Choice(f"{n}", "Why? " * n, ("1", "22", "333", "4444"), 0) for n in range(1, 5)]
    with pool.model(changed) as model, torch.no_grad():
        sheet = prepare([*others, WATER], pool.tokenizer, context=None, scoring=scoring)
        together = score(model, sheet.prompts, pad_token_id=0)
        for (ending, size), found in zip(endings, together[-1], strict=True):
            before = pool.tokenizer(render(WATER, [], scoring, "en"))["input_ids"]
            ids = pool.tokenizer(render(WATER, [], scoring, "en") + ending)["input_ids"]
            likely = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            alone = (
                sum(float(likely[at - 1, ids[at]]) for at in range(len(before), len(ids))) / size
            )
            assert found == pytest.approx(alone, abs=1e-5)  # padding changes the order of summation


def _plain_loss(folder: Path, texts: list[str]) -> tuple[float, int]:
    """Mean cross-entropy by transformers alone, one text after the other, each with EOS."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total = 0.0
    count = 0

    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            tokens = ids.shape[1] - 1
            total += float(model(input_ids=ids, labels=ids).loss) * tokens
            count += tokens

    return total / count, count


@pytest.mark.parametrize("name", ["tiny_model", "tiny_gpt2_model"])
def test_a_bare_model_is_what_transformers_says(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Batched and padded against one by one; GPT-2 has dropout in its configuration."""
    folder = cast(Path, request.getfixturevalue(name))
    texts = ["The river " + "carries water " * n for n in range(1, 9)]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["evaluate", str(folder), "--data", str(data), "--set", "data.max_length=120"]
    result = CliRunner().invoke(app, [*command, "--format", "json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    loss, tokens = _plain_loss(folder, texts)
    assert kind_of(str(folder)) == "model"
    assert found["data"]["label_tokens"] == tokens
    assert found["data"]["model"]["loss"] == pytest.approx(
        loss, abs=2e-5
    )  # padding changes the order of summation
    assert found["data"]["model"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert not {"base", "adapter"} & set(found["data"])
