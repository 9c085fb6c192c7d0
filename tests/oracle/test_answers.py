"""Scores of greedy answers in a run: equal to those of plain generation, whole model or split."""

import io
import logging
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fluvial.data import SiteTexts
from fluvial.models import generation
from fluvial.models.encoding import Encoder
from fluvial.models.pool import ModelPool
from fluvial.report.page import write_page
from fluvial.report.show import run_tables
from fluvial.runs.config import parse
from fluvial.storage.run_files import read_run
from fluvial.training import answer_scores
from fluvial.training.answer_scores import AnswerSums
from tests.support.models import UNMEASURED, shared_four_layers, with_fitting_model
from tests.support.questions import NEW_TOKENS, with_questions
from tests.support.runs import adapter_of, run_table

SCORES = ("exact_match", "f1", "rouge_1", "rouge_2", "rouge_l")


@pytest.mark.parametrize("method", ["fedavg", "flglm"])
def test_scores_of_a_run_are_those_of_plain_generation(
    method: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    train = {"learning_rate": 3e-2, "max_steps": 30, "per_device_train_batch_size": 4}
    table = with_questions(run_config | {"train": train}, tmp_path)
    table |= {"method": UNMEASURED}
    table = with_fitting_model(table) | {"method": {"name": method}}
    result = run_table(table, tmp_path / "run")

    config = parse(table, "test")
    pool = ModelPool(config.model, config.lora)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    states = {"base": pool.base_state(), "final": adapter_of(result)}
    total = dict.fromkeys(states, AnswerSums())
    without_end = dict.fromkeys(states, 0)

    for site in texts.names:
        questions = texts.load(site).questions
        prompts = [question.prompt for question in questions]
        for name, state in states.items():
            answers = pool.generate(state, prompts, max_new_tokens=NEW_TOKENS)
            sums = AnswerSums.over(answers, questions)
            total[name] += sums
            without_end[name] += sum(answer.cut for answer in answers)
            row = result["heldout_by_site"][site][name]
            assert {key: row[key] for key in SCORES} == sums.means(len(questions))

    for name, sums in total.items():
        row = result["heldout_pooled"][name]
        assert {key: row[key] for key in SCORES} == sums.means(sums.questions)
    assert total["final"].f1 > total["base"].f1
    assert result["answers_without_end"] == without_end["final"] < without_end["base"]


def test_lines_about_progress_name_the_model_whose_answers_are_written(
    run_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By a clock on which everything takes two seconds."""
    clock = SimpleNamespace(monotonic=partial(next, count(0, 2)))
    for module in (answer_scores, generation):
        monkeypatch.setattr(module, "time", clock)
    table = with_questions(run_config, tmp_path) | {"rounds": 2}
    table["evaluate"] = table["evaluate"] | {"every": 1, "sample_tokens": 1}
    with caplog.at_level(logging.INFO, "fluvial"):
        run_table(table, tmp_path / "run")
    lines = [text for text in caplog.messages if text.startswith("greedy answers of ")]
    named = {text.removeprefix("greedy answers of ").partition(":")[0] for text in lines}
    rounds = {f"the model after round {number}" for number in (1, 2)}
    assert named == {"the base model", *rounds, "the tuned model"}


@pytest.mark.parametrize("method", ["fedavg", "flglm"])
def test_prompts_without_room_for_an_answer_are_counted(
    method: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    """In a context of 16 tokens, 13 more fit behind a number of one digit only."""
    context, new_tokens = 16, 13
    table = with_questions(run_config | {"rounds": 1}, tmp_path) | {
        "model": {"name_or_path": str(shared_four_layers(max_position_embeddings=context))},
        "method": {"name": method},
    }
    table["data"] |= {"max_length": context}
    table["evaluate"] |= {"max_new_tokens": new_tokens}
    result = run_table(table, tmp_path / "run")

    config = parse(table, "test")
    pool = ModelPool(config.model, config.lora)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    questions = [question for site in texts.names for question in texts.load(site).questions]
    encoder = Encoder.of(pool.tokenizer)
    sizes = [len(encoder.prompt(question.prompt)) for question in questions]
    too_long = sum(size + new_tokens > context for size in sizes)
    assert 0 < too_long < len(questions)
    assert (result["questions"], result["questions_too_long"]) == (len(questions), too_long)

    run = read_run(tmp_path / "run")
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(run_tables(run))
    words = f"{too_long} of {len(questions)} prompts are too long for evaluate.max_new_tokens"
    assert words in " ".join(console.export_text().split())
    write_page(run, tmp_path / "page.html")
    assert words in (tmp_path / "page.html").read_text()
