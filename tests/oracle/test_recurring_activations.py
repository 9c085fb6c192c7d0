"""Two ends of a split model hold equal rows of samples, to the bit, over epochs."""

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fluvial.codecs.activations import ActivationSettings, build_activation
from fluvial.codecs.activations.floats import ExactRowsSettings
from fluvial.codecs.activations.front_cache import FrontCache, FrontIndex
from fluvial.codecs.activations.levels import Int4RowsSettings, Int8RowsSettings
from fluvial.codecs.activations.recurring import Recurring
from fluvial.codecs.activations.samples import SAMPLE_BYTES, SampleBatch, SampleMemory
from fluvial.errors import DivergenceError, WireError
from fluvial.wire.payload import Payload
from tests.support.activations import DTYPES, VARIANTS, generator, some_rows

WIDTH = 40
LENGTHS = (5, 1, 9, 3, 7, 7, 0, 4, 6, 2)
"""Tokens of each sample, which its number is the place of."""
ALL = 10**9
"""Bytes for all samples."""


def some_room(dtype: torch.dtype) -> int:
    """Return bytes for about half of the samples."""
    return (len(LENGTHS) * SAMPLE_BYTES + sum(LENGTHS) * WIDTH * dtype.itemsize) // 2


def batches(epochs: int, seed: int = 0) -> Iterator[tuple[int, SampleBatch]]:
    """Yield epoch and batch, in another order in each epoch."""
    draw = random.Random(seed)
    for epoch in range(epochs):
        order = draw.sample(range(len(LENGTHS)), len(LENGTHS))
        for start in range(0, len(order), 3):
            samples = order[start : start + 3]
            yield epoch, SampleBatch(tuple(samples), tuple(LENGTHS[number] for number in samples))


def activations(batch: SampleBatch, epoch: int, dtype: torch.dtype, drift: float) -> Tensor:
    """Return rows of samples that change by `drift` of their size in each epoch."""
    rows = [torch.empty(0, WIDTH)]
    for number, length in zip(batch.samples, batch.lengths, strict=True):
        drawn = [some_rows(length, WIDTH, seed=1000 * step + number) for step in range(epoch + 1)]
        rows.append(drawn[0] + drift * torch.stack([*drawn[1:], drawn[0] * 0]).sum(0))

    return torch.cat(rows).to(dtype)


def recurring(
    change: ActivationSettings,
    dtype: torch.dtype = torch.float32,
    first: ActivationSettings | None = None,
) -> Recurring:
    return Recurring(
        build_activation(change, dtype), build_activation(first or ExactRowsSettings(), dtype)
    )


def equal(left: SampleMemory, right: SampleMemory) -> bool:
    return list(left.rows) == list(right.rows) and all(
        torch.equal(left.rows[sample], right.rows[sample]) for sample in left.rows
    )


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
def test_both_ends_are_equal_over_epochs(
    name: str, dtype: torch.dtype, unbiased: bool, bounded: bool
) -> None:
    codec = recurring(VARIANTS[name], dtype)
    draws = generator() if unbiased else None
    sender = SampleMemory.empty(WIDTH, dtype, some_room(dtype) if bounded else ALL)
    receiver = sender
    dropped = 0

    for epoch, batch in batches(4):
        rows = activations(batch, epoch, dtype, 0.02)
        expected = codec.size(sender, batch)
        new = sender.held.unknown(batch)
        dropped += epoch > 0 and len(new.samples) > 0

        data, sender = codec.encode(sender, batch, rows, generator=draws)
        received, receiver = codec.decode(receiver, batch, data)

        assert len(data) == expected
        assert equal(sender, receiver)
        assert receiver.held.bytes_held <= receiver.held.max_bytes
        assert received.dtype == dtype
        by_sample = batch.split(rows)
        sent = batch.split(received)
        assert all(torch.equal(sent[number], by_sample[number]) for number in new.samples)

    assert bool(dropped) == bounded


def test_the_first_pass_is_exact_and_later_ones_are_changes() -> None:
    """By hand: m <- m + Q(a - m), with the codec's own Q."""
    codec = recurring(Int4RowsSettings())
    batch = SampleBatch((3, 8), (2, 4))
    first = some_rows(6, WIDTH)
    second = first + 0.1 * some_rows(6, WIDTH, seed=1)
    memory = SampleMemory.empty(WIDTH, torch.float32, ALL)

    data, memory = codec.encode(memory, batch, first)
    assert torch.equal(memory.join(batch, "cpu"), first)
    assert len(data) == 6 * WIDTH * 4

    data, memory = codec.encode(memory, batch, second)
    change = codec.change.decode(codec.change.encode(second - first), 6, WIDTH)
    assert torch.equal(memory.join(batch, "cpu"), first + change)
    assert len(data) == codec.change.size(6, WIDTH)


def errors(change: ActivationSettings, drift: float, epochs: int) -> list[float]:
    """Return the relative error of each epoch."""
    codec = recurring(change, first=Int4RowsSettings())
    memory = SampleMemory.empty(WIDTH, torch.float32, ALL)
    lost = [0.0] * epochs
    energy = [0.0] * epochs

    for epoch, batch in batches(epochs):
        rows = activations(batch, epoch, torch.float32, drift)
        _, memory = codec.encode(memory, batch, rows)
        lost[epoch] += float((memory.join(batch, "cpu") - rows).square().sum())
        energy[epoch] += float(rows.square().sum())

    return [(each / whole) ** 0.5 for each, whole in zip(lost, energy, strict=True)]


def test_the_error_falls_where_activations_change_little() -> None:
    still = errors(Int4RowsSettings(), drift=0.0, epochs=4)
    assert all(later < earlier / 5 for earlier, later in pairwise(still))

    slow = errors(Int4RowsSettings(), drift=0.02, epochs=4)
    assert slow[0] == still[0]
    assert max(slow[1:]) < slow[0] / 5, "the error is that of the change, not of the activation"


def test_what_is_not_sent_is_not_remembered() -> None:
    """A step that is sent again, or fails, begins from the memory of before."""
    codec = recurring(Int8RowsSettings())
    batch = SampleBatch((3, 8), (2, 4))
    _, memory = codec.encode(
        SampleMemory.empty(WIDTH, torch.float32, ALL), batch, some_rows(6, WIDTH)
    )
    rows = some_rows(6, WIDTH, seed=1)
    data, after = codec.encode(memory, batch, rows)
    again, after_again = codec.encode(memory, batch, rows)
    assert data == again
    assert equal(after, after_again)

    rows[4, 2] = float("nan")
    with pytest.raises(DivergenceError, match="token 4, channel 2"):
        codec.encode(memory, batch, rows)
    with pytest.raises(WireError, match="same memory"):
        codec.decode(memory, batch, data[:-1])
    with pytest.raises(WireError, match="same memory"):
        codec.decode(SampleMemory.empty(WIDTH, torch.float32, ALL), batch, data)


def test_extremes_stay_finite() -> None:
    """A change from the lowest to the highest value is beyond the type's range."""
    for dtype in DTYPES:
        codec = recurring(Int8RowsSettings(), dtype)
        batch = SampleBatch((0,), (1,))
        memory = SampleMemory.empty(WIDTH, dtype, ALL)
        highest = torch.finfo(dtype).max
        for value in (-highest, highest, -highest):
            data, after = codec.encode(memory, batch, torch.full((1, WIDTH), value, dtype=dtype))
            received, memory = codec.decode(memory, batch, data)
            assert bool(received.isfinite().all())
            assert equal(after, memory)


def test_a_resumed_run_sends_the_same_bytes() -> None:
    codec = recurring(Int4RowsSettings())
    room = some_room(torch.float32)
    memory = SampleMemory.empty(WIDTH, torch.float32, room)
    draws = generator()
    straight = []
    saved = b""
    state = draws.get_state()

    for number, (epoch, batch) in enumerate(batches(4)):
        if number == 6:
            saved = Payload(memory.tensors()).to_bytes()
            state = draws.get_state()
        rows = activations(batch, epoch, torch.float32, 0.02)
        data, memory = codec.encode(memory, batch, rows, generator=draws)
        straight.append(data)

    resumed = SampleMemory.empty(WIDTH, torch.float32, room).restored(
        Payload.from_bytes(saved).tensors
    )
    draws.set_state(state)
    for number, (epoch, batch) in enumerate(batches(4)):
        if number >= 6:
            rows = activations(batch, epoch, torch.float32, 0.02)
            data, resumed = codec.encode(resumed, batch, rows, generator=draws)
            assert data == straight[number]

    assert equal(resumed, memory)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounded", [False, True])
def test_the_server_has_the_rows_of_a_frozen_front(dtype: torch.dtype, bounded: bool) -> None:
    """The site sends what its index misses and no more; both ends are saved and restored on the
    way."""
    room = some_room(dtype) if bounded else ALL
    index = FrontIndex.empty(WIDTH, dtype, room)
    cache = FrontCache.empty(WIDTH, dtype, room)
    sent = [0, 0, 0, 0]

    for epoch, batch in batches(4):
        missing = index.missing(batch)
        assert missing == cache.missing(batch)
        sent[epoch] += missing.tokens

        rows, cache = cache.complete(batch, activations(missing, 0, dtype, 0.0))
        index = index.after(batch)

        assert torch.equal(rows, activations(batch, 0, dtype, 0.0))
        assert list(index.held.lengths) == list(cache.memory.rows)
        assert cache.memory.held.bytes_held <= room
        index = FrontIndex.empty(WIDTH, dtype, room).restored(index.tensors())
        cache = FrontCache.empty(WIDTH, dtype, room).restored(cache.tensors())

    assert sent[0] == sum(LENGTHS)
    if bounded:
        assert 0 < sum(sent[1:]) < 3 * sum(LENGTHS)
    else:
        assert sent[1:] == [0, 0, 0]


@pytest.mark.parametrize("shape", [(2, WIDTH), (4, WIDTH), (3, WIDTH + 1)])
def test_other_rows_than_those_that_are_missing_are_refused(shape: tuple[int, int]) -> None:
    cache = FrontCache.empty(WIDTH, torch.float32, ALL)
    _, cache = cache.complete(SampleBatch((1,), (4,)), torch.zeros(4, WIDTH))
    with pytest.raises(WireError, match="same samples and bounds"):
        cache.complete(SampleBatch((1, 2), (4, 3)), torch.zeros(shape))
    with pytest.raises(WireError, match="float16"):
        cache.complete(SampleBatch((2,), (3,)), torch.zeros(3, WIDTH, dtype=torch.float16))
