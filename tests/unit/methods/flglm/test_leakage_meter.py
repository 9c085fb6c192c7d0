"""The meter's figures by hand: ROUGE, token accuracy, the sentence."""

import json

import pytest
import torch
from torch import Tensor

from fluvial.data import Example
from fluvial.methods.flglm.audit import attacked
from fluvial.methods.flglm.leakage.meter import (
    Leakage,
    Observation,
    Reading,
    common_beginning,
    measure,
)


def observed(*ids: int) -> Observation:
    return Observation(torch.tensor(ids), torch.tensor(ids, dtype=torch.float32)[:, None])


def test_tokens_with_which_all_texts_begin_do_not_count() -> None:
    texts = [torch.tensor([1, 5, 7]), torch.tensor([1, 5, 8, 9])]
    assert common_beginning(texts) == 2
    assert common_beginning(texts[:1]) == 0
    assert common_beginning([texts[0], texts[0]]) == 2

    def constant(observation: Observation) -> Tensor:
        return torch.tensor([1, 5, 7, 7])[: len(observation.ids)]

    leakage = measure([observed(1, 5, 7), observed(1, 5, 8, 9)], {"constant": constant})
    assert (leakage.texts, leakage.tokens) == (2, 3)
    (reading,) = leakage.readings
    assert reading.accuracy == pytest.approx(1 / 3)
    assert reading.rouge_1 == pytest.approx((1 + 0) / 2)


def test_rouge_is_that_of_decoded_text_without_unread_tokens() -> None:
    names = {5: "river ", 6: "sea "}

    def attack(observation: Observation) -> Tensor:
        return torch.where(observation.ids == 5, 5, -1)

    leakage = measure(
        [observed(5, 6, 6)], {"half": attack}, lambda ids: "".join(names[i] for i in ids)
    )
    assert leakage.readings[0].rouge_1 == pytest.approx(2 * 1 / 4)
    assert leakage.readings[0].accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("accuracy", "share"),
    [(1.0, "100 %"), (0.9996, "more than 99 %"), (0.972, "97 %"), (0.0, "0 %")],
)
def test_the_sentence_is_about_the_worst_attack(accuracy: float, share: str) -> None:
    low = Reading("nearest token", 0.0, 0, 0, 0)
    high = Reading("exact causal search", accuracy, 1, 1, 1)
    leakage = Leakage(1, 10, 0, (high, low))
    assert leakage.sentence == (
        f"the server could read {share} of the tokens (exact causal search)"
    )
    values = json.loads(json.dumps(leakage.to_values()))
    assert values["accuracy"] == accuracy
    assert values["attacks"][1]["attack"] == "nearest token"


@pytest.mark.parametrize(
    ("labels", "start"),
    [(16 * [1], 0), (3 * [-100] + 13 * [1], 0), (10 * [-100] + 6 * [1], 8), (16 * [-100], 0)],
)
def test_the_attacked_tokens_have_a_label_where_the_text_has_one(
    labels: list[int], start: int
) -> None:
    """Without one no gradient is sent, and the attack on gradients would be left out."""
    window = attacked(Example(list(range(16)), labels), 4)
    assert window.input_ids == list(range(start, start + 4))
    assert window.learns == (1 in labels)
