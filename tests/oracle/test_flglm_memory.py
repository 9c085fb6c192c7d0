"""Hidden states that the ends of split learning hold by sample: equal at both ends, to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.codecs.activations.samples import SampleBatch
from fluvial.data import SiteTexts
from fluvial.errors import DivergenceError
from fluvial.federation.store import StateStore
from fluvial.methods.flglm import tasks
from fluvial.methods.flglm.hidden import HiddenStates, Way
from fluvial.methods.flglm.memories import Memories
from fluvial.methods.flglm.site_memory import SLOT
from fluvial.methods.flglm.turns import Backward, Content
from fluvial.models.tokenizers import load_tokenizer
from fluvial.runs.config import parse
from fluvial.wire.payload import Payload
from tests.support.models import UNMEASURED, four_layers
from tests.support.runs import run_table, run_with_stops

MODES = ("sequential", "hierarchical", "client-batch")
CACHED: dict[str, Any] = {"parts": {"front": "frozen"}}
CHANGES: dict[str, Any] = {"recurring": "changes", "hidden": {"name": "int4"}}
ROW = 4 * 32
"""Bytes of an exact hidden state."""
SOME = 20_000
"""Bytes for some samples of a site, and not for all."""
ROUNDS = 3
RESULTS = ("adapter_sha256", "heldout", "heldout_by_site", "bytes")


@pytest.fixture
def table(run_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Rounds of one epoch each, over three sites."""
    return run_config | {
        "rounds": ROUNDS,
        "model": {"name_or_path": str(four_layers(tmp_path / "model"))},
        "train": {"learning_rate": 1e-2, "per_device_train_batch_size": 4},
    }


def with_method(table: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return table | {"method": UNMEASURED | settings}


@contextmanager
def frames() -> Iterator[dict[Way, list[int]]]:
    """Note the bytes of all hidden states of training, in their order."""
    encode = HiddenStates.encode
    sizes: dict[Way, list[int]] = {"up": [], "down": []}

    def noted(self: HiddenStates, way: Way, batch: SampleBatch, rows: torch.Tensor) -> bytes:
        frame = encode(self, way, batch, rows)
        sizes[way].append(len(frame))
        return frame

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HiddenStates, "encode", noted)
        yield sizes


def by_round(sizes: list[int]) -> list[int]:
    """Return the bytes of each round, all of which have as many micro-batches."""
    each = len(sizes) // ROUNDS
    return [sum(sizes[start : start + each]) for start in range(0, len(sizes), each)]


def tokens_of(table: dict[str, Any]) -> int:
    """Return the tokens of an epoch of all sites."""
    config = parse(table, "test")
    texts = SiteTexts(config.data, load_tokenizer(config.model), seed=config.seed)
    return sum(len(each.input_ids) for site in texts.names for each in texts.load(site).train)


@pytest.mark.parametrize("mode", MODES)
def test_a_cached_front_changes_no_bit(table: dict[str, Any], tmp_path: Path, mode: str) -> None:
    """Sent once, sent again where there was no room, and sent always: the same weights. Of the
    four tensors of a step, none belongs to the front from the second epoch on."""
    results = []
    sent = []
    for room in (0, SOME, None):
        settings = CACHED | {"mode": mode} | ({} if room is None else {"memory_bytes": room})
        with frames() as sizes:
            results.append(run_table(with_method(table, **settings), tmp_path / f"room {room}"))
        sent.append(by_round(sizes["up"]))

    for result in results[1:]:
        for key in ("adapter_sha256", "heldout", "heldout_by_site"):
            assert result[key] == results[0][key]

    epoch = tokens_of(table) * ROW
    assert sent[0] == [epoch, epoch, epoch]
    assert sent[1][0] == epoch
    assert 0 < sent[1][1] < epoch
    assert sent[2] == [epoch, 0, 0]


def test_changes_are_as_small_as_their_codec(table: dict[str, Any], tmp_path: Path) -> None:
    """First passes are exact; later ones have the codec's bytes, 16 for levels and a scale of 2."""
    with frames() as sizes:
        run_table(with_method(table, **CHANGES), tmp_path / "run")

    tokens = tokens_of(table)
    coded = tokens * (16 + 2)
    for way in ("up", "down"):
        assert by_round(sizes[way]) == [tokens * ROW, coded, coded]


def test_the_error_of_changes_falls_with_the_steps(
    one_site: dict[str, Any], table: dict[str, Any], tmp_path: Path
) -> None:
    """Codes of states have one error in each epoch; that of changes falls as learning rates do."""
    decode = HiddenStates.decode
    encode = HiddenStates.encode
    errors: dict[str, list[float]] = {"states": [], "changes": []}
    true: dict[SampleBatch, torch.Tensor] = {}
    epochs = 6

    def noted(self: HiddenStates, way: Way, batch: SampleBatch, rows: torch.Tensor) -> bytes:
        if way == "up":
            true[batch] = rows
        return encode(self, way, batch, rows)

    def compared(self: HiddenStates, way: Way, batch: SampleBatch, frame: bytes) -> torch.Tensor:
        rows = decode(self, way, batch, frame)
        if way == "up":
            errors[recurring].append(float((rows - true[batch]).norm() / true[batch].norm()))
        return rows

    alone = table | {
        "rounds": 1,
        "data": one_site["data"],
        "train": table["train"] | {"num_train_epochs": epochs},
    }
    for recurring in errors:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HiddenStates, "encode", noted)
            patch.setattr(HiddenStates, "decode", compared)
            settings = CHANGES | {"recurring": recurring}
            run_table(with_method(alone, **settings), tmp_path / recurring)

    states, changes = (
        [float(part.mean()) for part in torch.tensor(found).chunk(epochs)]
        for found in errors.values()
    )
    assert changes[0] == 0
    assert all(later < before for before, later in pairwise(changes[1:])), changes
    assert changes[-1] < min(states) / 2, (states, changes)


@pytest.mark.parametrize("mode", MODES)
def test_resume_begins_with_the_memory_of_the_round(
    table: dict[str, Any], tmp_path: Path, mode: str
) -> None:
    """Stop after every event in turn, and go on: the same bits and the same bytes."""
    table = with_method(table, **CACHED, **CHANGES, mode=mode, memory_bytes=SOME)
    straight = run_table(table, tmp_path / "straight")
    result = run_with_stops(table, tmp_path / "stopped", (2, 1, 1, 99))
    for key in RESULTS:
        assert result[key] == straight[key]


@contextmanager
def one_failure(round: int) -> Iterator[list[str]]:
    """Let one site fail once, in the second step of a round; the list names it then."""
    send = tasks._Visit.send
    failed: list[str] = []

    def watched(self: Any, content: Content) -> Any:
        due = isinstance(content, Backward) and content.step == 1
        if due and self.memory.held == round - 1 and not failed:
            failed.append("once")
            raise DivergenceError("the test ends this site")
        yield from send(self, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks._Visit, "send", watched)
        yield failed


@pytest.mark.parametrize("mode", ["sequential", "hierarchical"])
def test_a_site_that_begins_again_has_the_memory_of_the_round(
    table: dict[str, Any], tmp_path: Path, mode: str
) -> None:
    table = with_method(table, **CHANGES, mode=mode)
    with one_failure(round=2) as failed:
        retried = run_table(
            table | {"fleet": {"on_failure": "retry", "workers": 1}}, tmp_path / "retried"
        )
    assert failed
    undisturbed = run_table(table, tmp_path / "undisturbed")
    for key in ("adapter_sha256", "heldout", "heldout_by_site"):
        assert retried[key] == undisturbed[key]


def test_a_site_that_missed_a_round_goes_on_from_its_last_one(
    table: dict[str, Any], tmp_path: Path
) -> None:
    """A client batch goes on without it; the memories of both ends are those of the first round."""
    table = with_method(table, **CHANGES) | {"fleet": {"on_failure": "skip"}}
    with one_failure(round=2) as failed, frames() as sizes:
        run_table(table, tmp_path / "run")

    assert failed
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [row.count('"sites": 2') for row in rows] == [0, 1, 0]
    last = sum(sizes["up"][-len(sizes["up"]) // ROUNDS :])
    assert last < tokens_of(table) * ROW / 4


def test_a_memory_that_one_end_has_lost_is_dropped_at_both(
    table: dict[str, Any], tmp_path: Path
) -> None:
    """Sites that lost theirs, and a server that says that it holds nothing: all is sent again."""
    table = with_method(table, **CACHED)
    usual = run_table(table, tmp_path / "usual")
    read = StateStore.read

    def lost(self: StateStore, site: str, slot: str) -> Payload:
        return Payload() if slot == SLOT else read(self, site, slot)

    for what in ("sites", "server"):
        with pytest.MonkeyPatch.context() as patch, frames() as sizes:
            if what == "sites":
                patch.setattr(StateStore, "read", lost)
            else:
                patch.setattr(Memories, "_round", lambda *_: 0)
            result = run_table(table, tmp_path / what)

        assert by_round(sizes["up"]) == [tokens_of(table) * ROW] * ROUNDS
        assert result["adapter_sha256"] == usual["adapter_sha256"]


def test_a_server_that_takes_no_gradient_receives_none(
    table: dict[str, Any], tmp_path: Path
) -> None:
    """With front and middle frozen only h_B crosses the cut after the first epoch, and the weights
    are those of one site's plain steps in any mode."""
    turns: list[Backward] = []
    send = tasks._Visit.send

    def noted(self: Any, content: Content) -> Any:
        if isinstance(content, Backward):
            turns.append(content)
        yield from send(self, content)

    results = []
    for mode in ("hierarchical", "client-batch"):
        with pytest.MonkeyPatch.context() as patch, frames() as sizes:
            patch.setattr(tasks._Visit, "send", noted)
            settings = {"parts": {"front": "frozen", "middle": "frozen"}, "mode": mode}
            results.append(run_table(with_method(table, **settings), tmp_path / mode))
        assert by_round(sizes["up"]) == [tokens_of(table) * ROW, 0, 0]

    assert turns
    assert all(content.frame == b"" for content in turns)
    for result in results:
        assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]
