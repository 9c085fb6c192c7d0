"""Samples of a run: none where its records are elsewhere, and as long as what is scored."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from fluvial.data import Question
from fluvial.methods.exporting import samples
from fluvial.methods.measuring import EvaluateConfig


def test_a_deployed_run_without_a_prompt_shows_no_sample() -> None:
    texts = SimpleNamespace(sample_from=None)  # nothing else of it is asked for
    reporting = SimpleNamespace(evaluate=EvaluateConfig(), heldout=True, texts=texts)
    assert samples(cast(Any, reporting), {}) == []


@pytest.mark.parametrize(
    ("settings", "prompted", "expected"),
    [
        ({"max_new_tokens": 3}, False, 3),
        ({"max_new_tokens": 3}, True, 40),  # a text of one's own is no question
        ({}, False, 40),  # no answer is scored
        ({"max_new_tokens": 3, "sample_tokens": 5}, False, 5),
    ],
)
def test_a_sample_is_as_long_as_the_answers_that_are_scored(
    settings: dict[str, Any], prompted: bool, expected: int
) -> None:
    lengths: list[int] = []

    class Pool:
        def base_state(self) -> dict[str, Any]:
            return {}

        def generate(self, *_: object, max_new_tokens: int, **__: object) -> list[str]:
            lengths.append(max_new_tokens)
            return ["text"]

    record = SimpleNamespace(questions=[Question("Who?", "It")], heldout=[])
    texts = SimpleNamespace(sample_from="site", sample=lambda: record)
    own = {"sample_prompt": "Once"} if prompted else {}
    evaluate = EvaluateConfig.model_validate(settings | own)
    reporting = SimpleNamespace(evaluate=evaluate, heldout=True, texts=texts, pool=Pool())
    samples(cast(Any, reporting), {})
    assert lengths == [expected, expected]
