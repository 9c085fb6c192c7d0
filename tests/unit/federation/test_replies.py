"""Readers of replies: sums of held-out measures and of the scores of answers."""

from dataclasses import asdict
from typing import Any

import pytest

from fluvial.errors import WireError
from fluvial.federation.replies import MOST_SAMPLES, measured
from fluvial.federation.sites import measures
from fluvial.training.answer_scores import MILLION, AnswerSums
from fluvial.training.evaluate import Heldout
from fluvial.wire.payload import Payload

HELDOUT = Heldout(12.5, 3, 8)
SCORES = (
    AnswerSums.of("red hat", ["red big hat"])
    + AnswerSums.of("hat", ["hat"])
    + AnswerSums(too_long=1, without_end=2)
)


def test_measures_are_read_as_they_were_sent() -> None:
    wire = measures(HELDOUT, SCORES).to_bytes()
    assert measured("a", Payload.from_bytes(wire), answers=True) == (HELDOUT, SCORES)
    assert measured("a", measures(HELDOUT), answers=True) == (HELDOUT, AnswerSums())
    assert measured("a", measures(HELDOUT), answers=False) == (HELDOUT, AnswerSums())


def test_scores_that_were_not_asked_for_are_refused() -> None:
    with pytest.raises(WireError, match="not expected"):
        measured("a", measures(HELDOUT, SCORES), answers=False)


@pytest.mark.parametrize(
    "changed",
    [
        {"questions": 0},
        {"questions": MOST_SAMPLES + 1},
        {"questions": 2.0},
        {"right": -1},
        {"right": 3},
        {"right": True},
        {"f1": MILLION - 1},
        {"f1": 2 * MILLION + 1},
        {"rouge_1": -1},
        {"rouge_2": 2 * MILLION + 1},
        {"rouge_l": 10**30},
        {"rouge_l": 0.5},
        {"too_long": -1},
        {"too_long": 3},
        {"without_end": 3},
        {"without_end": True},
        {"answer": "text of the site"},
    ],
)
def test_scores_that_no_honest_site_sends_are_refused(changed: dict[str, Any]) -> None:
    values = measures(HELDOUT, SCORES).values | changed
    with pytest.raises(WireError):
        measured("a", Payload(values=values), answers=True)


@pytest.mark.parametrize("name", list(asdict(SCORES)))
def test_no_score_is_left_out(name: str) -> None:
    values = dict(measures(HELDOUT, SCORES).values)
    del values[name]

    with pytest.raises(WireError, match="missing"):
        measured("a", Payload(values=values), answers=True)
