"""FedCyBGD's downloads: what a site holds after each form, and how many bytes were sent."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as runs
from hypothesis import strategies as st

from fluvial.codecs import build
from fluvial.methods.fedcybgd.download.holder import layouts_of
from fluvial.methods.fedcybgd.download.send import Sender, subset
from fluvial.wire.payload import Payload, payload_frame
from fluvial.wire.tensors import Layout
from tests.support.ledger import EXACT, FORMS, SEED, Scene, equal, rest_of


@pytest.mark.parametrize("kept_in", ["memory", "files"])
@pytest.mark.parametrize("kind", ["full", "bfloat16", "lora"])
@pytest.mark.parametrize("form", FORMS)
def test_a_site_has_the_block_exactly_and_of_an_exact_form_the_rest_too(
    form: str, kind: str, kept_in: str, scene: Callable[..., Scene], tmp_path: Path
) -> None:
    """Visits to all blocks, between which blocks move: some of them never, some often, some before
    any visit."""
    if kind == "lora" and form in ("proxy", "whole proxy"):
        pytest.skip("a proxy is of the base")

    made = scene(form, kind, folder=tmp_path if kept_in == "files" else None)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    for visited, moved in ((1, (0, 0, 1)), (3, ()), (1, (1, 3)), (0, (2,)), (1, (0,) * 7)):
        made.move(*moved)
        received = made.visit(visited)
        weights = made.weights
        block = made.parts.blocks[visited].layout
        assert equal(received.start, {name: weights[name] for name in block.names})
        others = [name for name in made.pool.layout.names if name not in block.names]

        if form in EXACT:
            assert equal(
                rest_of(received, others), {name: weights[name].to(dtype) for name in others}
            )
        else:
            found = [received.rest.get(name) for name in received.rest.names & set(others)]
            assert all(
                tensor.dtype == dtype and bool(torch.isfinite(tensor).all()) for tensor in found
            )


@pytest.mark.parametrize("codec", ["nf4", "int8", "int4", "bf16"])
def test_the_low_bit_rest_is_the_coded_matrices_and_the_exact_vectors(
    codec: str, scene: Callable[..., Scene], tmp_path: Path
) -> None:
    made = scene({"form": "low-bit", "codec": {"name": codec}}, folder=tmp_path)
    made.move(0, 2)
    received = made.visit(1)
    weights = made.weights
    sizes = 0

    for name in made.pool.layout.names:
        if name in received.start:
            continue

        found = received.rest.get(name)
        true = weights[name]
        if true.dim() < 2:
            assert torch.equal(found, true)
            continue

        matrix = build(made.download.codec, Layout.of({name: true}))
        frame = matrix.encode({name: true})
        assert torch.equal(found, matrix.decode(frame)[name])
        assert not torch.equal(found, true)
        sizes += len(frame)

    (row,) = {len(file.read_bytes()) for file in (tmp_path / "a").glob("rest-4-*")}
    assert sizes < 0.6 * sum(4 * w.numel() for n, w in weights.items() if n not in received.start)
    assert row < 0.6 * made.parts.fixed.raw_bytes, "and it is kept as it came, coded"


def test_a_stale_subset_refreshes_the_share_that_was_asked_for_and_leaves_the_base_elsewhere(
    scene: Callable[..., Scene],
) -> None:
    for share in (0.01, 0.25, 0.5, 0.75, 1.0):
        made = scene({"form": "stale-subset", "share": share})
        for moved in range(5):
            if moved:
                made.move(moved - 1)

            message = made.send(3)
            received = made.read(message, made.site())
            assert received is not None
            base = made.pool.weights(made.pool.base_state())
            weights = made.weights
            fresh = []

            for index, block in enumerate(made.parts.blocks):
                if index == 3:
                    continue

                found = rest_of(received, block.layout.names)
                is_base = equal(found, {name: base[name] for name in block.layout.names})
                is_new = equal(found, {name: weights[name] for name in block.layout.names})
                assert is_base or is_new
                assert is_new == (is_base if index not in made.ledger.changed else not is_base)

                if not is_base:
                    fresh.append(index)

            drawn = math.ceil(share * len(made.ledger.changed))
            assert len(fresh) in ((drawn - 1, drawn) if moved == 4 else (drawn,)), (
                "one drawn may be the trained"
            )
            assert equal(
                rest_of(received, made.parts.fixed.names),
                {n: base[n] for n in made.parts.fixed.names},
            )
            names = {
                name for index in (3, *fresh) for name in made.parts.blocks[index].layout.names
            }
            assert message.tensors.keys() == names


@given(
    changed=st.sets(st.integers(0, 40)).map(sorted),
    percent=st.integers(1, 100),
    visit=st.text(max_size=5),
    seed=st.integers(0, 2**32),
)
@example(changed=list(range(25)), percent=28, visit="", seed=0)  # 0.28 * 25 is more than 7
@runs(max_examples=25, deadline=None)
def test_a_subset_has_exactly_its_size(
    changed: list[int], percent: int, visit: str, seed: int
) -> None:
    drawn = subset(changed, percent / 100, seed, visit)
    assert len(drawn) == -(-percent * len(changed) // 100)
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(changed)
    assert subset(changed, percent / 100, seed, visit) == drawn


def test_every_visit_draws_anew_and_no_block_is_favoured() -> None:
    """1000 visits of 3 among 6: each block is drawn about 500 times; 5 standard deviations are
    79."""
    drawn = Counter(
        block for visit in range(1000) for block in subset([1, 2, 4, 5, 7, 9], 0.5, 0, str(visit))
    )
    assert set(drawn) == {1, 2, 4, 5, 7, 9}
    assert all(abs(count - 500) < 79 for count in drawn.values())


def test_a_full_subset_is_the_full_download(scene: Callable[..., Scene]) -> None:
    stale = scene({"form": "stale-subset", "share": 1.0})
    full = scene("full")
    for made in (stale, full):
        made.move(0, 2, 2)
    ours = stale.visit(1)
    theirs = full.visit(1)
    names = [name for name in full.pool.layout.names if name not in theirs.start]
    assert equal(ours.start, theirs.start)
    assert equal(rest_of(ours, names), rest_of(theirs, names))


def size(message: Payload) -> int:
    return len(message.to_bytes())


def test_the_full_download_is_the_whole_model(scene: Callable[..., Scene]) -> None:
    for kind, width in (("full", 4), ("bfloat16", 2)):
        made = scene("full", kind)
        block = made.parts.blocks[0].layout.numel
        whole = made.pool.layout.numel
        values = 4 * block + width * (whole - block)
        assert values < size(made.send(0)) < values + 200 * len(made.pool.layout.names)


def test_a_site_that_is_up_to_date_is_sent_no_weights_from_its_cache(
    scene: Callable[..., Scene],
) -> None:
    made = scene("cache")
    assert made.send(0).tensors == {}, "the base is there"
    made.move(0, 1)
    made.visit(0)

    for index in range(4):
        message = made.send(index)
        assert message.tensors == {}
        assert message.values["news"] == []
        assert size(message) < 200

    assert made.send(0, "b").tensors.keys() == {"f"}, "another site is not"


def test_a_cache_is_sent_the_commits_that_it_lacks_and_no_others(
    scene: Callable[..., Scene],
) -> None:
    made = scene("cache")
    made.move(0, 1, 2)
    made.visit(3)
    made.move(1, 1)
    message = made.send(0)
    table: Any = message.values["news"]
    assert [row[:3] for row in table] == [[1, 1, 3]]
    frames = [commit.frames[0] for commit in made.ledger.since(1, 1) or []]
    assert payload_frame(message) == b"".join(frames)
    assert size(message) < sum(map(len, frames)) + 200
    assert 3 * size(message) < 2 * made.parts.blocks[1].layout.raw_bytes, (
        "two commits of int8 are half a block"
    )


def test_where_the_commits_are_longer_the_block_itself_is_sent(scene: Callable[..., Scene]) -> None:
    made = scene("cache")
    raw = made.parts.blocks[2].layout.raw_bytes
    sizes = []

    for _ in range(6):
        made.move(2)
        sizes.append(len(payload_frame(made.send(0))))

    commit = made.ledger.log[2][6].size
    assert sizes == [commit, 2 * commit, 3 * commit, raw + 12, raw + 12, raw + 12]
    table: Any = made.send(0).values["news"]
    assert table == [[2, -1, 6, [[1.0, [raw + 12], [1]]]]]


def test_low_bit_sends_again_only_what_moved(scene: Callable[..., Scene]) -> None:
    made = scene("low-bit")
    layouts = layouts_of(made.parts)

    def parts_in(message: Payload) -> set[int]:
        return {
            number for number, layout in enumerate(layouts) if layout.names[0] in message.tensors
        }

    assert parts_in(made.send(1)) == {0, 1, 2, 3, 4}
    made.visit(1)
    made.move(0)
    assert parts_in(made.send(1)) == {0, 1}
    assert parts_in(made.send(2)) == {0, 1, 2}, "block 1 was exact, and is not there in few bits"
    made.visit(2)
    assert parts_in(made.send(1)) == {1}
    assert parts_in(made.send(3)) == {3}
    made.move(1, 3)
    assert parts_in(made.send(2)) == {1, 2, 3}
    assert parts_in(made.send(2, "b")) == {0, 1, 2, 3, 4}
    first = size(made.send(2, "b"))
    later = size(made.send(1))
    assert later < 0.75 * first


@pytest.mark.parametrize("form", ["cache", "low-bit"])
def test_who_holds_what_survives_a_restart(form: str, scene: Callable[..., Scene]) -> None:
    first = scene(form)
    first.move(0, 1)
    first.visit(1)
    again = Sender(first.download, first.ledger, SEED, lambda: first.pool, first.plan)
    again.restore(json.loads(json.dumps(first.sender.save())))
    first.move(0)

    for name in ("a", "b"):
        messages = [each.message(name, 2, "9/9", {}).to_bytes() for each in (first.sender, again)]
        assert messages[0] == messages[1]
