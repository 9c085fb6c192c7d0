"""What both ends hold: bounded, dropped by one rule, saved and restored."""

import random

import pytest
import torch
from torch import Tensor

from fluvial.codecs.activations.samples import SAMPLE_BYTES, Held, SampleBatch, SampleMemory
from fluvial.errors import WireError
from fluvial.wire.payload import Payload

WIDTH = 4
ROW = WIDTH * 4
"""Bytes of a row in fp32."""


def room(*lengths: int) -> int:
    return sum(SAMPLE_BYTES + length * ROW for length in lengths)


def filled(max_bytes: int, *batches: SampleBatch) -> SampleMemory:
    memory = SampleMemory.empty(WIDTH, torch.float32, max_bytes)
    for batch in batches:
        memory = memory.add(batch, torch.randn(batch.tokens, WIDTH))
    return memory


def test_the_sample_added_longest_ago_is_dropped() -> None:
    held = Held(ROW, room(3, 3, 3)).add(SampleBatch((1, 2, 3), (3, 3, 3)))
    assert list(held.lengths) == [1, 2, 3]
    assert list(held.add(SampleBatch((1,), (3,))).lengths) == [2, 3, 1]
    assert list(held.add(SampleBatch((4,), (2,))).lengths) == [2, 3, 4]
    assert list(held.add(SampleBatch((4, 5), (3, 3))).lengths) == [3, 4, 5]
    assert list(held.lengths) == [1, 2, 3], "what is added gives a new value"


def test_a_sample_without_room_is_never_held() -> None:
    held = Held(ROW, room(3)).add(SampleBatch((1,), (3,)))
    assert list(held.add(SampleBatch((2,), (4,))).lengths) == [1]
    assert not held.add(SampleBatch((1,), (4,))).lengths, "its old rows are no longer of use"
    assert not Held(ROW, 0).add(SampleBatch((1,), (0,))).lengths


def test_a_sample_of_another_length_is_another() -> None:
    held = Held(ROW, room(9, 9)).add(SampleBatch((1, 2), (3, 0)))
    batch = SampleBatch((2, 1, 3), (0, 4, 5))
    assert held.known(batch) == SampleBatch((2,), (0,))
    assert held.unknown(batch) == SampleBatch((1, 3), (4, 5))


def test_bytes_stay_within_the_bound_whatever_comes() -> None:
    """Against a list that is searched, over 500 batches of any sizes, empty samples included."""
    draw = random.Random(0)
    most = room(10, 10, 10)
    held = Held(ROW, most)
    plain: list[tuple[int, int]] = []

    for _ in range(500):
        samples = draw.sample(range(12), draw.randint(0, 4))
        lengths = [draw.choice([0, 1, 5, 10, 200]) for _ in samples]
        held = held.add(SampleBatch(tuple(samples), tuple(lengths)))

        for sample, length in zip(samples, lengths, strict=True):
            plain = [pair for pair in plain if pair[0] != sample]
            plain += [(sample, length)] if room(length) <= most else []
        while room(*(length for _, length in plain)) > most:
            plain.pop(0)

        assert list(held.lengths.items()) == plain
        assert held.bytes_held == room(*(length for _, length in plain)) <= most


def test_rows_are_those_last_added_and_do_not_hold_their_batch() -> None:
    memory = filled(room(3, 3), SampleBatch((1, 2), (3, 2)))
    rows = torch.randn(5, WIDTH)
    memory = memory.add(SampleBatch((3, 2), (3, 2)), rows)
    assert list(memory.rows) == [3, 2]
    assert torch.equal(memory.join(SampleBatch((2, 3), (2, 3)), "cpu"), rows[[3, 4, 0, 1, 2]])
    assert all(piece.untyped_storage().nbytes() == piece.nbytes for piece in memory.rows.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_memory_is_restored_from_a_payload(dtype: torch.dtype) -> None:
    memory = SampleMemory.empty(WIDTH, dtype, room(9, 9, 9))
    batch = SampleBatch((7, 2, 5), (3, 0, 6))
    memory = memory.add(batch, torch.randn(9, WIDTH).to(dtype))
    data = Payload(memory.tensors()).to_bytes()
    again = SampleMemory.empty(WIDTH, dtype, room(9, 9, 9)).restored(
        Payload.from_bytes(data).tensors
    )

    assert again.held == memory.held
    assert list(again.held.lengths) == [7, 2, 5]
    assert all(torch.equal(again.rows[sample], memory.rows[sample]) for sample in memory.rows)
    assert all(piece.untyped_storage().nbytes() == piece.nbytes for piece in again.rows.values())


def test_an_empty_memory_is_restored() -> None:
    empty = SampleMemory.empty(WIDTH, torch.float32, 10)
    again = empty.restored(Payload.from_bytes(Payload(empty.tensors()).to_bytes()).tensors)
    assert again == empty


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("samples", None),
        ("samples", torch.tensor([7.0, 2.0])),
        ("samples", torch.tensor([7, 7])),
        ("samples", torch.tensor([7])),
        ("lengths", torch.tensor([-3, 12])),
        ("lengths", torch.tensor([2**62, 2**62])),
        ("lengths", torch.tensor([[3, 6]])),
        ("rows", None),
        ("rows", torch.zeros(8, WIDTH)),
        ("rows", torch.zeros(9, WIDTH, dtype=torch.float64)),
        ("rows", torch.full((9, WIDTH), torch.nan)),
    ],
)
def test_a_damaged_state_is_refused(name: str, tensor: Tensor | None) -> None:
    memory = filled(room(9, 9), SampleBatch((7, 2), (3, 6)))
    tensors = memory.tensors()
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(WireError, match="samples"):
        memory.restored(tensors)


def test_a_state_larger_than_the_bound_is_refused() -> None:
    tensors = filled(room(9, 9), SampleBatch((7, 2), (3, 6))).tensors()
    with pytest.raises(WireError, match="more than"):
        SampleMemory.empty(WIDTH, torch.float32, room(9)).restored(tensors)


@pytest.mark.parametrize(
    ("samples", "lengths"),
    [((1, 2), (3,)), ((1, 1), (3, 3)), ((-1,), (3,)), ((1,), (-3,)), ((2**63,), (3,))],
)
def test_a_batch_from_outside_is_checked(
    samples: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    with pytest.raises(WireError, match="samples"):
        SampleBatch(samples, lengths)
