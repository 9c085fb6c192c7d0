"""Passes of the server's layers over sequences of unequal length."""

from pathlib import Path

import pytest
import torch

from fluvial.methods.flglm.passes import length_groups, pass_groups, pass_rows
from fluvial.models.parts import PartPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.split import Cut
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from tests.support.models import four_layers

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([64] * 8, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ([64, 60, 64, 60], [[0, 1, 2, 3]]),  # 8 tokens of padding
        ([20, 96, 20, 20, 20], [[1], [0, 2, 3, 4]]),  # 4 * 76 tokens
        ([96, 20], [[0, 1]]),  # 76 tokens are less than a pass
        ([10, 250, 120, 10, 240], [[1, 4], [2], [0, 3]]),
    ],
)
def test_a_pass_is_worth_its_padding(lengths: list[int], groups: list[list[int]]) -> None:
    assert length_groups(lengths, CPU) == groups
    assert length_groups(lengths, torch.device("meta")) == [list(range(len(lengths)))]


def test_groups_give_what_one_padded_pass_gives(tmp_path: Path) -> None:
    """Hidden states and the gradients of rows and factors, without dropout."""
    model = ModelConfig(name_or_path=str(four_layers(tmp_path)), device="cpu")
    pool = PartPool(model, LoraSettings(r=4, lora_dropout=0.0), Cut(4, 1, 1), server=True)
    lengths = [3, 40, 2, 17, 40, 9]
    state = initial_state(pool.layout, 0)
    state = {name: tensor + 0.01 for name, tensor in state.items()}
    rows = torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    results = []

    for groups in ([], [[1, 4], [3], [0, 2, 5]]):
        received = rows.clone().requires_grad_()
        with pool.part(state, trainable=True) as part:
            if groups:
                sent = pass_groups(part, received, lengths, groups, 7)
            else:
                sent = pass_rows(part, received, lengths)
            torch.autograd.backward(sent, gradient)
            factors = [parameter.grad for parameter in part.tuned().values()]
        results.append([sent.detach(), received.grad, *factors])

    for joined, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, joined, rtol=1e-5, atol=1e-5)
