"""Samples of a run whose records are elsewhere."""

from types import SimpleNamespace
from typing import Any, cast

from fluvial.methods.exporting import samples
from fluvial.methods.measuring import EvaluateConfig


def test_a_deployed_run_without_a_prompt_shows_no_sample() -> None:
    texts = SimpleNamespace(sample_from=None)  # nothing else of it is asked for
    reporting = SimpleNamespace(evaluate=EvaluateConfig(), heldout=True, texts=texts)
    assert samples(cast(Any, reporting), {}) == []
