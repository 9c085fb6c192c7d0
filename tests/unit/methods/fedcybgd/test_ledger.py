"""FedCyBGD's ledger of blocks: commits, claims, the log, checkpoints."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fluvial.codecs import CodecSettings, read_settings
from fluvial.codecs.quantise import IdentitySettings, Int8Settings
from fluvial.errors import WireError
from fluvial.methods.fedcybgd.ledger import Commit
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import add
from tests.support.ledger import Scene, commit_of, equal


def test_a_commit_moves_one_block_by_its_factor_times_the_weighted_mean(
    scene: Callable[..., Scene],
) -> None:
    ledger = scene("cache", codec=IdentitySettings()).ledger
    before = ledger.state
    commit = commit_of(ledger, 2, factor=0.25, weights=(3, 8))
    first, second = (ledger.codecs[2].decode(frame) for frame in commit.frames)
    ledger.commit(2, commit)
    names = ledger.parts.blocks[2].layout.names

    for name, tensor in ledger.state.items():
        if name not in names:
            assert tensor is before[name]
            continue

        mean = (3 * first[name].double() + 8 * second[name].double()) / 11
        assert torch.equal(tensor, before[name] + 0.25 * mean.float())

    assert (ledger.versions, ledger.changed) == ([0, 0, 1, 0], [2])


def test_what_would_be_moved_is_what_is_moved_and_asking_moves_nothing(
    scene: Callable[..., Scene],
) -> None:
    ledger = scene("cache").ledger
    commit = commit_of(ledger, 1, factor=0.5)
    before = ledger.state
    expected = ledger.moved(1, commit)
    assert ledger.state is before
    assert ledger.versions == [0] * 4
    ledger.commit(1, commit)
    assert equal(ledger.block(1), expected)


def test_a_visit_is_claimed_once_and_not_after_its_round(scene: Callable[..., Scene]) -> None:
    ledger = scene("cache").ledger
    assert [ledger.claim(visit, 1) for visit in ("1/0", "1/1", "1/0", "1/1")] == [
        True,
        True,
        False,
        False,
    ]
    assert ledger.claim("2/0", 2)
    assert not ledger.claim("1/2", 1), "its round is over"
    assert not ledger.claim("2/0", 2)
    assert ledger.claim("1/0", 3), "names are those of a round"


def test_what_is_saved_is_all_of_it(scene: Callable[..., Scene]) -> None:
    """After a restore the same bytes are saved, the same visits count, and the same messages are
    sent."""
    first = scene("cache")
    second = scene("cache")
    first.move(0, 2, 2)
    first.ledger.commit(3, commit_of(first.ledger, 3, factor=0.5, weights=(1, 7)))

    for visit in ("4/0", "4/1"):
        first.ledger.claim(visit, 4)
    saved = first.ledger.save().to_bytes()
    second.ledger.restore(Payload.from_bytes(saved))
    assert second.ledger.save().to_bytes() == saved

    for each in (first, second):
        assert not each.ledger.claim("4/1", 4)
        assert each.ledger.claim("4/2", 4)
        each.move(2, 1)

    assert first.send(2).to_bytes() == second.send(2).to_bytes()
    assert second.ledger.save().to_bytes() == first.ledger.save().to_bytes() != saved


def test_a_checkpoint_of_other_blocks_is_refused(scene: Callable[..., Scene]) -> None:
    ledger = scene("cache").ledger
    ledger.commit(1, commit_of(ledger, 1))  # of blocks that have not moved nothing is saved
    saved = ledger.save()

    for damaged in (
        Payload(saved.tensors, {**saved.values, "versions": [0, 0]}),
        Payload(dict(list(saved.tensors.items())[1:]), saved.values),
        Payload(
            saved.tensors, {**saved.values, "log": [[2, 1, 1.0, [1]]]}
        ),  # a commit without its frame
    ):
        with pytest.raises(WireError):
            ledger.restore(damaged)


@pytest.mark.parametrize(
    "codec", [Int8Settings(), read_settings({"name": "hadamard", "rate": 64})], ids=str
)
def test_the_log_is_never_longer_than_the_block_itself(
    codec: CodecSettings, scene: Callable[..., Scene]
) -> None:
    ledger = scene("cache", codec=codec).ledger
    raw = ledger.parts.blocks[1].layout.raw_bytes
    for made in range(1, 80):
        ledger.commit(1, commit_of(ledger, 1))
        kept = ledger.log[1]
        assert sum(commit.size for commit in kept.values()) <= raw
        assert sorted(kept) == list(range(ledger.oldest[1] + 1, made + 1)), "no commit is missing"
        commits = ledger.since(1, ledger.oldest[1])
        assert commits is not None
        assert len(commits) == len(kept)
        assert ledger.since(1, ledger.oldest[1] - 1) is None
        assert ledger.since(1, made) == []

    assert ledger.oldest[1] > 0
    assert len(ledger.log[1]) == raw // ledger.log[1][79].size, "as many as are worth their bytes"


def test_of_exact_commits_none_is_worth_keeping(scene: Callable[..., Scene]) -> None:
    """A frame of identity is the block and 12 bytes, so the block itself is shorter."""
    made = scene("cache", codec=IdentitySettings())
    made.move(1)
    assert made.ledger.log[1] == {}
    assert made.ledger.since(1, 0) is None


def test_a_replay_of_the_log_is_the_block(scene: Callable[..., Scene]) -> None:
    ledger = scene("cache").ledger
    states = [ledger.block(0)]
    for factor, weights in ((1.0, (4,)), (0.5, (2, 9)), (0.3, (1, 1, 1))):
        ledger.commit(0, commit_of(ledger, 0, factor=factor, weights=weights))
        states.append(ledger.block(0))

    for version in range(ledger.oldest[0], 4):
        block = states[version]
        for commit in ledger.since(0, version) or []:
            block = add(block, commit.step(ledger.codecs[0]))
        assert equal(block, ledger.block(0))


def test_frames_that_are_damaged_or_too_large_make_no_step(scene: Callable[..., Scene]) -> None:
    ledger = scene("cache", codec=IdentitySettings()).ledger
    layout = ledger.parts.blocks[0].layout
    codec = ledger.codecs[0]
    good = commit_of(ledger, 0).frames[0]
    nan, huge = (np.full(layout.numel, value, "<f4").tobytes() for value in (math.nan, 1e30))

    for frame in (good[:-1], good[:40] + b"\xff" + good[41:], codec.seal(nan), codec.seal(huge)):
        with pytest.raises(WireError):
            Commit(1.0, (frame,), (1,)).step(codec)
