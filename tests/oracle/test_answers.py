"""Scores of greedy answers in a run: equal to those of plain generation, whole model or split."""

from pathlib import Path
from typing import Any

import pytest

from fluvial.data import SiteTexts
from fluvial.models.pool import ModelPool
from fluvial.runs.config import parse
from fluvial.training.answer_scores import AnswerSums
from tests.support.models import with_fitting_model
from tests.support.questions import NEW_TOKENS, with_questions
from tests.support.runs import adapter_of, run_table

SCORES = ("exact_match", "f1", "rouge_1", "rouge_2", "rouge_l")


@pytest.mark.parametrize("method", ["fedavg", "flglm"])
def test_scores_of_a_run_are_those_of_plain_generation(
    method: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    train = {"learning_rate": 3e-2, "max_steps": 30, "per_device_train_batch_size": 4}
    table = with_questions(run_config | {"train": train}, tmp_path)
    table |= {"method": {"name": "flglm"}}
    table = with_fitting_model(table) | {"method": {"name": method}}
    result = run_table(table, tmp_path / "run")

    config = parse(table, "test")
    pool = ModelPool(config.model, config.lora)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    states = {"base": pool.base_state(), "final": adapter_of(result)}
    total = dict.fromkeys(states, AnswerSums())

    for site in texts.names:
        questions = texts.load(site).questions
        prompts = [question.prompt for question in questions]
        for name, state in states.items():
            answers = pool.generate(state, prompts, max_new_tokens=NEW_TOKENS)
            sums = AnswerSums.over(answers, questions)
            total[name] += sums
            row = result["heldout_by_site"][site][name]
            assert {key: row[key] for key in SCORES} == sums.means(len(questions))

    for name, sums in total.items():
        row = result["heldout_pooled"][name]
        assert {key: row[key] for key in SCORES} == sums.means(sums.questions)
    assert total["final"].f1 > total["base"].f1
