"""FedCyBGD's store of blocks and its five downloads: what is counted, what is sent again, what a
site makes of it."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as runs
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fluvial.codecs import CodecSettings, build, read_settings
from fluvial.codecs.quantise import IdentitySettings, Int8Settings
from fluvial.data import Example
from fluvial.errors import WireError
from fluvial.federation.sites import Site
from fluvial.federation.store import StateStore
from fluvial.methods.fedcybgd.blocks import Partition, partition
from fluvial.methods.fedcybgd.download import (
    DownloadConfig,
    Received,
    Sender,
    crc,
    parts_of,
    receive,
    subset,
)
from fluvial.methods.fedcybgd.ledger import Commit, Ledger
from fluvial.methods.fedcybgd.proxy import Anatomy, Manifest, cut, measure, plan_proxy
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.models.weight_sources import MemorySource
from fluvial.seeds import generator
from fluvial.training.train import TrainConfig
from fluvial.wire.payload import Payload, payload_frame
from fluvial.wire.tensors import Layout, Named, add
from tests.support.models import four_layers

SEED = 3
FORMS: dict[str, dict[str, Any]] = {
    "full": {"form": "full"},
    "proxy": {"form": "proxy", "kept": 0.5, "prune": "neurons and heads"},
    "whole proxy": {"form": "proxy", "kept": 1.0, "drop": 0.0},
    "stale-subset": {"form": "stale-subset", "share": 0.5},
    "low-bit": {"form": "low-bit"},
    "cache": {"form": "cache"},
}
EXACT = ("full", "whole proxy", "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_layers(tmp_path_factory.mktemp("four_layers"))


@pytest.fixture(scope="module")
def benches(folder: Path) -> Callable[[str], ModelPool]:
    """Models by what is tuned, "full" or "lora", or by the type of all weights."""
    made: dict[str, ModelPool] = {}

    def get(kind: str) -> ModelPool:
        if kind not in made:
            dtype = {"full": "float32", "lora": "float32"}.get(kind, kind)
            config = ModelConfig.model_validate(
                {"name_or_path": str(folder), "device": "cpu", "dtype": dtype}
            )
            made[kind] = ModelPool(config, LoraSettings(r=4) if kind == "lora" else None)

        return made[kind]

    return get


@dataclass
class Scene:
    """A server whose blocks have moved, and its sites."""

    bench: ModelPool
    download: Any
    codec: CodecSettings
    store: StateStore
    parts: Partition = field(init=False)
    ledger: Ledger = field(init=False)
    sender: Sender = field(init=False)
    visits: int = 0

    def __post_init__(self) -> None:
        self.parts = partition(self.bench.layout)
        codecs = [build(self.codec, block.layout) for block in self.parts.blocks]
        self.ledger = Ledger(self.parts, codecs, initial_state(self.bench.layout, SEED))
        self.sender = Sender(self.download, self.ledger, SEED, lambda: self.bench, self.plan)

    def plan(self, index: int, visit: str) -> Manifest:
        anatomy = Anatomy.of(self.bench.blank(), self.download.prune)
        examples = [Example(ids, ids) for ids in ([1, 5, 9, 12, 7], [1, 44, 3, 80])]
        with self.bench.model(self.bench.base_state()) as model:
            scores = measure(model, anatomy, examples, pad_token_id=0)
        layers = self.parts.blocks[index].layers
        return plan_proxy(
            scores, anatomy, trained=layers, settings=self.download, seed=SEED, visit=visit
        )

    def move(self, *blocks: int, size: float = 1e-3) -> None:
        """One commit of one site to each of `blocks`."""
        for index in blocks:
            self.ledger.commit(index, commit_of(self.ledger, index, size=size))

    def site(self, name: str = "a") -> Site:
        data: Any = None
        return Site(
            name=name,
            seed=SEED,
            pool=self.bench,
            load=data,
            train=TrainConfig(),
            codec=self.codec,
            method=None,
            downlink=None,
            store=self.store,
            rounds=9,
        )

    def send(self, index: int, name: str = "a") -> Payload:
        """The next message to a site, as it comes out of the wire."""
        self.visits += 1
        message = self.sender.message(
            name, index, f"1/{self.visits}", {"round": 1, "rate": 1.0, "visits": 1}
        )

        return Payload.from_bytes(message.to_bytes())

    def read(self, message: Payload, site: Site) -> Received | None:
        return receive(self.download, site, message, self.parts, codec=self.codec)

    def visit(self, index: int, name: str = "a") -> Received:
        """One visit that succeeds: both ends remember it."""
        site = self.site(name)
        received = self.read(self.send(index, name), site)
        assert received is not None
        names = received.rest.names - received.start.keys()
        seen = Received(received.start, MemorySource(rest_of(received, names)), received.manifest)

        for slot, kept in site.kept.items():
            site.store.write(name, slot, kept, self.visits)
        self.sender.acknowledge(name)
        return seen

    @property
    def weights(self) -> Named:
        """What the server holds, absolute."""
        return self.bench.weights(self.ledger.state)


def commit_of(
    ledger: Ledger,
    index: int,
    *,
    size: float = 1e-3,
    factor: float = 1.0,
    weights: tuple[int, ...] = (5,),
) -> Commit:
    """Random updates of a block, one for each weight, drawn from the version that they make."""
    draw = generator(SEED, "commit", index, ledger.versions[index])
    codec = ledger.codecs[index]
    layout = ledger.parts.blocks[index].layout
    updates = [
        {name: size * torch.randn(shape, generator=draw) for name, shape in layout.shapes}
        for _ in weights
    ]

    return Commit(factor, tuple(codec.encode(update) for update in updates), weights)


@pytest.fixture
def scene(benches: Callable[[str], ModelPool]) -> Callable[..., Scene]:
    """Make a scene: the name of a form or its settings, what is tuned, how updates are coded, where
    sites keep."""

    def make(
        form: str | dict[str, Any],
        kind: str = "full",
        codec: CodecSettings | None = None,
        folder: Path | None = None,
    ) -> Scene:
        settings = FORMS[form] if isinstance(form, str) else form
        download: Any = TypeAdapter(DownloadConfig).validate_python(settings)
        return Scene(benches(kind), download, codec or Int8Settings(), StateStore(folder))

    return make


def equal(left: Named, right: Named) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def shapes_of(tensors: Named) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def rest_of(received: Received, names: Any) -> Named:
    return {name: received.rest.get(name).clone() for name in names}


# -- the ledger ----------------------------------------------------------------------------------


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


# -- what is sent, and what a site makes of it ---------------------------------------------------


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
        others = [name for name in made.bench.layout.names if name not in block.names]

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

    for name in made.bench.layout.names:
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
            base = made.bench.weights(made.bench.base_state())
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
    names = [name for name in full.bench.layout.names if name not in theirs.start]
    assert equal(ours.start, theirs.start)
    assert equal(rest_of(ours, names), rest_of(theirs, names))


# -- bytes ---------------------------------------------------------------------------------------


def size(message: Payload) -> int:
    return len(message.to_bytes())


def test_the_full_download_is_the_whole_model(scene: Callable[..., Scene]) -> None:
    for kind, width in (("full", 4), ("bfloat16", 2)):
        made = scene("full", kind)
        block = made.parts.blocks[0].layout.numel
        whole = made.bench.layout.numel
        values = 4 * block + width * (whole - block)
        assert values < size(made.send(0)) < values + 200 * len(made.bench.layout.names)


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
    layouts = parts_of(made.parts)

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
    again = Sender(first.download, first.ledger, SEED, lambda: first.bench, first.plan)
    again.restore(json.loads(json.dumps(first.sender.save())))
    first.move(0)

    for name in ("a", "b"):
        messages = [each.message(name, 2, "9/9", {}).to_bytes() for each in (first.sender, again)]
        assert messages[0] == messages[1]


# -- what is lost or lies ------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["cache", "low-bit"])
def test_a_site_that_lost_what_it_kept_says_so_and_is_sent_everything(
    form: str, scene: Callable[..., Scene]
) -> None:
    made = scene(form)
    made.move(0, 1)
    made.visit(1)
    made.move(1)
    kept = made.store
    made.store = StateStore(None)
    assert made.read(made.send(2), made.site()) is None
    made.store = kept
    made.visit(2)
    made.store = StateStore(None)
    assert made.read(made.send(2), made.site()) is None, "though nothing has moved since"
    made.sender.forget("a")
    received = made.visit(2)
    block = made.parts.blocks[2].layout
    assert equal(received.start, {name: made.weights[name] for name in block.names})
    assert made.read(made.send(3), made.site()) is not None


@pytest.mark.parametrize("form", ["cache", "low-bit"])
def test_a_site_that_holds_another_version_does_not_build_on_it(
    form: str, scene: Callable[..., Scene]
) -> None:
    made = scene(form)
    made.move(0, 1)
    made.visit(1)
    made.visit(3)
    made.move(0, 0)
    assert made.read(made.send(2), made.site()) is not None
    made.sender.holds["a"][0] = 2 if form == "cache" else 3  # and it has version 1
    assert made.read(made.send(2), made.site()) is None


def test_a_block_that_is_not_the_servers_is_noticed_by_its_checksum(
    scene: Callable[..., Scene],
) -> None:
    made = scene("cache")
    made.move(1)
    message = made.send(1)
    assert message.values["crc"] == crc(made.ledger.block(1))
    wrong = Payload(message.tensors, {**message.values, "crc": message.value("crc", int) ^ 1})
    assert made.read(wrong, made.site()) is None


def mutated(message: Payload, draw: np.random.Generator) -> Payload:
    """One thing about a message is changed: some bytes of it, a value, or a tensor. May raise
    `WireError`."""
    if draw.random() < 0.4:
        data = bytearray(message.to_bytes())
        header = (
            8 + int.from_bytes(data[:4], "little") if data[4:8] == bytes(4) else min(len(data), 400)
        )
        for _ in range(draw.integers(1, 4)):
            place = draw.integers(header if draw.random() < 0.7 else len(data))
            data[place] ^= 1 << draw.integers(8)

        return Payload.from_bytes(bytes(data))

    values = json.loads(json.dumps(message.values))
    tensors = dict(message.tensors)
    if not tensors or draw.random() < 0.6:
        _mutate_value(values, draw)
    else:
        name = str(draw.choice(sorted(tensors)))
        tensor = tensors.pop(name)
        kind = draw.integers(7)

        if kind == 1:
            tensors[name + "x"] = tensor
        elif kind == 2:
            tensors[name] = tensor.reshape(-1)[:-1]
        elif kind == 3:
            tensors[name] = tensor.to(
                torch.float16 if tensor.dtype != torch.float16 else torch.int64
            )
        elif kind == 4:
            tensors[name] = tensor.unsqueeze(0)
        elif kind == 5 and tensor.is_floating_point():
            tensors[name] = (
                tensor.clone()
                .reshape(-1)
                .index_fill(0, torch.tensor([0]), math.nan)
                .view_as(tensor)
            )
        elif kind == 6:
            tensors[name] = torch.zeros(0, dtype=tensor.dtype)

    return Payload.from_bytes(Payload(tensors, values).to_bytes())


_JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2,
        5,
        2**31,
        2**70,
        -(2**70),
        0.5,
        1.0,
        -2.0,
        1e300,
        5e-324,
        "",
        "a",
        "ff",
        [],
        {},
    ),
    *([0], [[]], [1, 2, 3, 4], {"0": 1.5}, {"1": "00"}),
)


def _mutate_value(values: Any, draw: np.random.Generator) -> None:
    """Replace, remove or repeat something in a nest of values."""
    keys = sorted(values) if isinstance(values, dict) else list(range(len(values)))
    key: Any = keys[draw.integers(len(keys))]
    inside = values[key]

    if isinstance(inside, dict | list) and inside and draw.random() < 0.8:
        _mutate_value(inside, draw)
    elif draw.random() < 0.1:
        del values[key]
    elif isinstance(values, list) and draw.random() < 0.1:
        values.append(inside)
    else:
        values[key] = _JUNK[draw.integers(len(_JUNK))]


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        *((form, "full") for form in FORMS if form != "whole proxy"),
        ("stale-subset", "lora"),
        ("cache", "lora"),
    ],
)
def test_mutated_messages_are_refused_or_bring_a_model(
    form: str, kind: str, scene: Callable[..., Scene]
) -> None:
    """Whatever comes in, a site raises `WireError`, or says that it cannot follow, or has finite
    weights that fit."""
    made = scene(form, kind)
    made.move(0, 1, 3)
    made.visit(1)
    made.move(0, 0, 0, 0, 2, 2, 3)
    made.ledger.commit(2, commit_of(made.ledger, 2, factor=0.5, weights=(3, 4)))
    whole = dict(made.bench.layout.shapes)
    message = made.send(2)
    draw = np.random.default_rng(len(form))
    outcomes = Counter[str]()
    assert made.read(message, made.site()) is not None

    for _ in range(300):
        try:
            received = made.read(mutated(message, draw), made.site())
        except WireError:
            outcomes["refused"] += 1
            continue

        outcomes["stale" if received is None else "received"] += 1
        if received is None:
            continue

        shapes = (
            whole if received.manifest is None else shapes_of(cut(made.weights, received.manifest))
        )
        assert all(t.dtype == torch.float32 for t in received.start.values())
        assert shapes_of(received.start).items() <= shapes.items()

        for name in shapes.keys() - received.start.keys():
            tensor = received.rest.get(name)
            assert tuple(tensor.shape) == shapes[name]
            assert bool(torch.isfinite(tensor).all())

        assert all(bool(torch.isfinite(tensor).all()) for tensor in received.start.values())

    assert outcomes["refused"] > 100
    assert outcomes["received"] > 10


@pytest.mark.parametrize(
    "row",
    [
        [0, 0, 1],
        [4, 0, 1, [[1.0, [8], [1]]]],
        [-1, 0, 1, [[1.0, [8], [1]]]],
        [True, 0, 1, [[1.0, [8], [1]]]],
        [0, 0, 1, []],
        [0, 0, 1, [[1, [8], [1]]]],
        [0, 0, 1, [[0.0, [8], [1]]]],
        [0, 0, 1, [[1.5, [8], [1]]]],
        [0, 0, 1, [[-1.0, [8], [1]]]],
        [0, 0, 1, [[1.0, [], []]]],
        [0, 0, 1, [[1.0, [8], [1, 1]]]],
        [0, 0, 1, [[1.0, [8], [0]]]],
        [0, 0, 1, [[1.0, [8], [2**31 + 1]]]],
        [0, 0, 1, [[1.0, [2**40], [1]]]],
        [0, 0, 1, [[1.0, [0], [1]]]],
        [0, 0, 1, [[1.0, [8.0], [1]]]],
        {},
    ],
    ids=str,
)
def test_news_that_make_no_sense_are_refused(row: Any, scene: Callable[..., Scene]) -> None:
    made = scene("cache")
    made.move(0)
    message = made.send(1)

    with pytest.raises(WireError):
        made.read(Payload(message.tensors, {**message.values, "news": [row]}), made.site())


def test_bytes_that_belong_to_no_commit_are_refused(scene: Callable[..., Scene]) -> None:
    made = scene("cache")
    made.move(0)
    message = made.send(1)
    frame = payload_frame(message)

    for data in (frame + b"x", frame[:-1]):
        with pytest.raises(WireError):
            made.read(
                Payload(
                    {"f": torch.frombuffer(bytearray(data), dtype=torch.uint8)}, message.values
                ),
                made.site(),
            )


@pytest.mark.parametrize("form", [form for form in FORMS if form != "cache"])
def test_a_tensor_too_many_or_too_few_is_refused(form: str, scene: Callable[..., Scene]) -> None:
    made = scene(form)
    made.move(1, 2)
    message = made.send(0)
    block = made.parts.blocks[0].layout.names
    lacking = [
        {name: tensor for name, tensor in message.tensors.items() if name != gone}
        for gone in (
            block if form == "stale-subset" else message.tensors
        )  # which of the others come is its choice
    ]
    strange = [
        {**message.tensors, f"model.layers.{n}.mlp.up_proj.weight": torch.zeros(2)} for n in (4, 10)
    ]

    for tensors in lacking + strange:
        with pytest.raises(WireError):
            made.read(Payload(tensors, message.values), made.site())


@pytest.mark.parametrize("form", FORMS)
def test_a_block_that_is_not_there_is_refused(form: str, scene: Callable[..., Scene]) -> None:
    made = scene(form)
    message = made.send(0)
    for block in (-1, 4, 2**40, True, 1.0, "0", None):
        with pytest.raises(WireError):
            made.read(Payload(message.tensors, {**message.values, "block": block}), made.site())
