"""A site's verdict on its leakage: read with bounds, and added up over sites."""

from typing import Any

import pytest
import torch
from torch import nn

from fluvial.errors import WireError
from fluvial.methods.flglm.leakage.attacks import ON_HIDDEN
from fluvial.methods.flglm.leakage.bigrams import FrontWithBigrams
from fluvial.methods.flglm.leakage.meter import GRADIENTS, Leakage, Reading
from fluvial.methods.flglm.leakage.replies import read, together, values_of
from fluvial.wire.payload import Payload
from tests.support.leakage import embedded


def verdict(texts: int, tokens: int, right: int, *, gradients: bool = True) -> Leakage:
    """Return the verdict of a site whose attacks all name `right` tokens."""
    names = (*ON_HIDDEN, GRADIENTS) if gradients else ON_HIDDEN
    rouge = 1 / texts
    readings = tuple(Reading(name, right / tokens, rouge, rouge, rouge) for name in names)
    return Leakage(texts, tokens, 2 * texts, readings)


def reply(**changes: Any) -> Payload:
    values = values_of(verdict(2, 10, 7))
    return Payload.from_bytes(Payload(values=values | changes).to_bytes())


@pytest.mark.parametrize("gradients", [True, False])
def test_a_verdict_comes_as_it_was(gradients: bool) -> None:
    sent = verdict(3, 12, 5, gradients=gradients)
    wire = Payload(values=values_of(sent)).to_bytes()
    assert read("site", Payload.from_bytes(wire)) == sent


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 6},  # less than were read
        {"tokens": 0},
        {"texts": 0},
        {"uncounted": -1},
        {"extra": 1},
        {GRADIENTS: {"right": 7, "rouge_1": 1.5, "rouge_2": 0.0, "rouge_l": 0.0}},
        {GRADIENTS: {"right": -1, "rouge_1": 0.5, "rouge_2": 0.0, "rouge_l": 0.0}},
        {GRADIENTS: {"right": 7, "rouge_1": 0.5, "rouge_2": 0.0}},
        {ON_HIDDEN[0]: "text of the site"},
    ],
)
def test_what_no_honest_site_sends_is_refused(changes: dict[str, Any]) -> None:
    read("site", reply())
    with pytest.raises(WireError):
        read("site", reply(**changes))


def test_an_attack_on_hidden_states_must_be_there() -> None:
    values = {name: value for name, value in reply().values.items() if name != ON_HIDDEN[1]}
    with pytest.raises(WireError, match=ON_HIDDEN[1]):
        read("site", Payload(values=values))


def test_sites_count_by_tokens_and_rouge_by_texts() -> None:
    total = together([verdict(1, 10, 10), verdict(4, 30, 0, gradients=False)])
    assert total is not None
    assert (total.texts, total.tokens) == (5, 40)
    assert [each.attack for each in total.readings] == list(ON_HIDDEN)  # all sites ran these
    assert total.readings[0].accuracy == pytest.approx(10 / 40)
    assert total.readings[0].rouge_l == pytest.approx((1 * 1 + 4 * 0.25) / 5)
    assert together([]) is None


def test_the_sentence_tells_hidden_states_from_gradients() -> None:
    readings = (Reading("nearest token", 0.25, 0, 0, 0), Reading(GRADIENTS, 1.0, 1, 1, 1))
    assert Leakage(1, 4, 0, readings).sentence == (
        "the server could read 25 % of the tokens from hidden states (nearest token), 100 % from "
        "gradients"
    )


def test_pairs_are_mixed_with_single_tokens() -> None:
    """Witten-Bell by hand: after 5 came 6 twice and 7 once, two kinds in three pairs."""
    model: nn.Module = embedded()
    texts = [[5, 6, 5, 6], [5, 7]]
    front = FrontWithBigrams(model, 1, texts)
    vocabulary = front.vocabulary
    alone = (torch.bincount(torch.tensor([5, 6, 5, 6, 5, 7]), minlength=vocabulary) + 1).double()
    alone /= vocabulary + 6

    def prior(*ids: int) -> torch.Tensor:
        prefix = torch.tensor([list(ids)], dtype=torch.int64).view(1, -1)
        return front.prior(prefix)[0].exp()

    after_5 = prior(9, 5)
    assert float(after_5[6]) == pytest.approx(2 / 5 + 2 / 5 * float(alone[6]))
    assert float(after_5[7]) == pytest.approx(1 / 5 + 2 / 5 * float(alone[7]))
    assert float(after_5[8]) == pytest.approx(2 / 5 * float(alone[8]))
    assert float(after_5.sum()) == pytest.approx(1.0)
    assert torch.allclose(prior(7), alone)  # nothing was seen after 7
    assert torch.allclose(prior(), alone)
