"""Error feedback between rounds whose adapters have other factors or other ranks."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fluvial.codecs import build, read_settings
from fluvial.codecs.base import Codec
from fluvial.exchange.feedback import RESIDUAL
from fluvial.exchange.moving import START, MovingFeedback, project
from fluvial.exchange.uplink import coder_of
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, only

A, B = "q.lora_A.weight", "q.lora_B.weight"
ROWS, COLUMNS = 11, 13


def pair(seed: int, rank: int) -> Named:
    draw = torch.Generator().manual_seed(seed)
    return {
        A: torch.randn(rank, COLUMNS, generator=draw),
        B: torch.randn(ROWS, rank, generator=draw),
    }


def lacking(residual: Named, start: Named) -> Tensor:
    """What the weights lack, to first order."""
    zero = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    error = zero | residual
    return start[B].double() @ error[A].double() + error[B].double() @ start[A].double()


def turned(start: Named) -> Named:
    """The same product in other factors: a rotation, as a product SVD makes."""
    q, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(9)))
    return {A: q.T @ start[A], B: start[B] @ q}


def codec_of(rank: int) -> Codec:
    settings = read_settings({"name": "int4", "error_feedback": True})
    return build(settings, Layout.of(pair(0, rank)))


def test_a_rotation_loses_nothing() -> None:
    start = pair(1, 4)
    residual = pair(2, 4)
    after = project(residual, start, turned(start), Layout.of(start))
    expected = lacking(residual, start)
    # fp32 factors.
    assert torch.allclose(lacking(after, turned(start)), expected, atol=1e-4)
    naive = lacking(residual, turned(start))
    assert float((naive - expected).norm()) > 0.5 * float(expected.norm())


@pytest.mark.parametrize("rank", [2, 7])
def test_another_rank_keeps_all_that_it_can_express(rank: int) -> None:
    """The remainder is (I - P) T (I - Q), for the columns P of B' and the rows Q of A'."""
    start, residual, received = pair(1, 4), pair(2, 4), pair(3, rank)
    after = project(residual, start, received, Layout.of(received))
    assert Layout.of(after) == Layout.of(received)

    target = lacking(residual, start)
    columns, rows = received[B].double(), received[A].double()
    outside = torch.eye(ROWS, dtype=torch.float64) - columns @ torch.linalg.pinv(columns)
    beyond = torch.eye(COLUMNS, dtype=torch.float64) - torch.linalg.pinv(rows) @ rows
    lost = target - lacking(after, received)
    assert torch.allclose(lost, outside @ target @ beyond, atol=1e-4)


def test_a_padded_rank_keeps_everything() -> None:
    """Components that were there stay; a new B of zero makes nothing infinite."""
    start, residual = pair(1, 4), pair(2, 4)
    more = pair(5, 2)
    received = {
        A: torch.cat([start[A], more[A]]),
        B: torch.cat([start[B], torch.zeros(ROWS, 2)], dim=1),
    }
    after = project(residual, start, received, Layout.of(received))
    assert torch.allclose(lacking(after, received), lacking(residual, start), atol=1e-4)


def test_only_b_is_sent() -> None:
    start = pair(1, 4)
    residual = only(pair(2, 4), "B")
    after = project(residual, start, turned(start), Layout.of(residual))
    assert torch.allclose(lacking(after, turned(start)), lacking(residual, start), atol=1e-4)


def test_a_module_without_residual_begins_with_zero() -> None:
    start = pair(1, 4)
    layout = Layout.of({name.replace("q", "v"): tensor for name, tensor in start.items()})
    received = {name.replace("q", "v"): tensor for name, tensor in start.items()}
    after = project(pair(2, 4), start, received, layout)
    assert not any(bool(tensor.any()) for tensor in after.values())
    assert Layout.of(after) == layout


def rounds(ranks: Mapping[int, int], *, feedback: bool) -> float:
    """The distance of the decoded sum of product changes from the true one, relative."""
    true = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    decoded = torch.zeros_like(true)
    state: dict[str, Payload] = {}

    for number, rank in ranks.items():
        received = pair(0, rank)
        update = {name: 1e-2 * tensor for name, tensor in pair(1, rank).items()}
        coder = coder_of(codec_of(rank), received, basis="moving")
        frame, state = coder.encode(update, state if feedback else {}, round=number)
        state = {slot: Payload.from_bytes(each.to_bytes()) for slot, each in state.items()}
        true += lacking(update, received)
        decoded += lacking(coder.decode(frame), received)

    return float((true - decoded).norm() / true.norm())


def test_feedback_survives_changes_of_rank() -> None:
    """Over rounds whose rank changes, the sum of what is decoded stays nearer to the sum that was
    meant than without feedback, as with one rank."""
    for ranks in ([4] * 12, [4, 4, 6, 6, 3, 3] * 2):
        by_round = dict(enumerate(ranks, 1))
        assert rounds(by_round, feedback=True) < 0.6 * rounds(by_round, feedback=False)


def test_the_slots_are_those_that_encode_returns() -> None:
    coder = coder_of(codec_of(4), pair(0, 4), basis="moving")
    assert isinstance(coder, MovingFeedback)
    _, state = coder.encode(pair(1, 4), round=1)
    assert set(coder.slots) == set(state) == {RESIDUAL, START}
