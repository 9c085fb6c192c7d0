"""FL-GLM's conversations with one end that lies: a site's lie is its own failure, and the lie of a
server ends the site's task with an error, and the site keeps nothing."""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.codecs.quantise import Identity
from fluvial.errors import ClientError, WireError
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import InProcess
from fluvial.federation.store import StateStore
from fluvial.federation.talk import Ahead, Next
from fluvial.methods.flglm import tasks
from fluvial.methods.flglm.turns import REJOIN, rejoin
from fluvial.runs.config import parse
from fluvial.runs.run import execute, in_process
from fluvial.wire.payload import Payload, frame_payload, payload_frame
from fluvial.wire.tensors import digest
from tests.contract.test_hostile_site import LIAR, forgeries, with_values
from tests.support.conversations import (
    Conversed,
    EarlyReplyError,
    Lie,
    SharedRounds,
    conversed,
    lying,
    shared_rounds,
    true,
)
from tests.support.models import with_fitting_model

METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"mode": "sequential"},
    "client-batch": {"mode": "client-batch"},
    "client-batch, own ends": {"mode": "client-batch", "ends": "own"},
    "hierarchical": {"mode": "hierarchical", "sync_steps": 1},
    "hierarchical, own ends": {"mode": "hierarchical", "ends": "own"},
    "memory": {
        "mode": "client-batch",
        "parts": {"front": "frozen"},
        "recurring": "changes",
        "hidden": {"name": "int4"},
    },
}
STEPS = 2
WIDTH = 32
"""Values of a hidden state of the model of the tests."""
FLOAT = 4
"""Bytes of each."""


def table_of(run_config: dict[str, Any], method: str) -> dict[str, Any]:
    """Return a configuration of one round of two steps over three sites."""
    return with_fitting_model(
        run_config
        | {
            "rounds": 1,
            "method": {"name": "flglm", **METHODS[method]},
            "train": {
                "learning_rate": 1e-2,
                "max_steps": STEPS,
                "per_device_train_batch_size": 2,
            },
        }
    )


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedRounds]:
    """Rounds that the tests of this file share."""
    with shared_rounds(tmp_path_factory.mktemp("rounds")) as rounds:
        yield rounds


@pytest.fixture
def open_rounds(run_config: dict[str, Any], opened: SharedRounds) -> Callable[[str], Conversed]:
    """Return the rounds of a method."""
    return lambda method: opened.of(method, table_of(run_config, method))


def said(rounds: Conversed, site: str = LIAR) -> dict[tuple[str, int], bytes]:
    """Return what a site says in an honest round, by kind and number."""
    seen: dict[tuple[str, int], bytes] = {}

    def note(who: str, kind: str, number: int, data: bytes) -> bytes:
        if who == site:
            seen[kind, number] = data
        return data

    rounds.again(note)
    return seen


def instead(kind: str, number: int, lie: bytes | EarlyReplyError | None) -> Lie:
    """Let the liar say `lie` in the place of one thing that it says."""

    def change(site: str, what: str, count: int, data: bytes) -> bytes | None:
        if (site, what, count) != (LIAR, kind, number):
            return data
        if isinstance(lie, EarlyReplyError):
            raise lie
        return lie

    return change


def check_only_the_liar_fails(
    rounds: Conversed, kind: str, number: int, lies: Iterator[tuple[str, Any]]
) -> int:
    """Assert that each lie has the effect of silence in its place; return how many there were."""
    silent, _, _ = rounds.again(instead(kind, number, None))
    expected = digest(silent.model())
    count = 0

    for what, lie in lies:
        server, fleet, _ = rounds.again(instead(kind, number, lie))
        assert [failure.site for failure in fleet.failures] == [LIAR], (kind, what)
        assert "Traceback" not in fleet.failures[0].reason, (kind, what)
        assert digest(server.model()) == expected, (kind, what)
        count += 1

    return count


# -- a site that lies ------------------------------------------------------------------------------


def rows_of(data: bytes) -> torch.Tensor:
    """Return hidden states or a gradient (tokens, width) in a turn."""
    frame = payload_frame(Payload.from_bytes(data))
    return torch.frombuffer(bytearray(frame), dtype=torch.float32).view(-1, WIDTH)


def with_rows(data: bytes, rows: torch.Tensor, **values: Any) -> bytes:
    """Return a turn with other rows, and some other values."""
    turn = Payload.from_bytes(data)
    frame = rows.contiguous().numpy().tobytes()
    return frame_payload(frame, **(turn.values | values)).to_bytes()


def spoiled(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield a turn with hidden states or gradients that no honest site sends."""
    rows = rows_of(data)
    for what, value in (("NaN", math.nan), ("infinite", math.inf), ("huge", 1e30)):
        changed = rows.clone()
        changed[0, 0] = value
        yield what, with_rows(data, changed)

    yield "a token less", with_rows(data, rows[:-1])
    yield "a token more", with_rows(data, torch.cat([rows, rows[:1]]))
    yield "another width", with_rows(data, rows[:, :-1])


def of_forward(said: dict[tuple[str, int], bytes]) -> Iterator[tuple[str, Any]]:
    """Yield lies in the place of the second step's hidden states."""
    data = said["forward", 2]
    rows = rows_of(data)
    values = Payload.from_bytes(data).values
    lengths: list[Any] = Payload.from_bytes(data).value("lengths", list)
    yield from spoiled(data)
    yield "backward", said["backward", 1]
    yield "the step before", said["forward", 1]
    yield "a reply", EarlyReplyError(said["reply", 1])
    yield "10 GB of header", (10 * 2**30).to_bytes(8, "little") + data
    header = json.dumps(
        {"f": {"dtype": "U8", "shape": [10 * 2**30], "data_offsets": [0, 10 * 2**30]}}
    ).encode()
    yield "10 GB of tensor", len(header).to_bytes(8, "little") + header + b"\0" * 64

    lies: dict[str, dict[str, Any]] = {
        "a step more": {"step": 2, "steps": 3},
        "a step less": {"step": 0},
        "a micro-batch that is not": {"micro": 1},
        "very many micro-batches": {"micro": 10**5},
        "very many steps": {"steps": 10**9},
        "a length too long": {"lengths": [lengths[0] + 1, *lengths[1:]]},
        "no length": {"lengths": []},
        "a length of nothing": {"lengths": [len(rows), 0]},
        "more sequences than a batch": {"lengths": [1] * len(rows)},
        "10 GB of lengths": {"lengths": [128] * 10**5},
        "beyond the context": {"lengths": [10**9]},
        "all the weight": {"tokens": 2**50},
        "more labels than tokens": {"tokens": len(rows) + 1},
        "no label": {"tokens": 0},
        "factor 2": {"factor": 2.0},
        "a negative factor": {"factor": -0.5},
    }
    if "samples" in values:
        first, second = Payload.from_bytes(data).value("samples", list)
        lies |= {
            "one sample twice": {"samples": [first, first]},
            "a sample less": {"samples": [first]},
            "a sample below 0": {"samples": [-1, second]},
            "a sample beyond 2^63": {"samples": [2**63, second]},
            "a sample that is no number": {"samples": [True, second]},
            "no samples": {"samples": None},
            "a sample that the server holds": {
                "samples": Payload.from_bytes(said["forward", 1]).values["samples"],
                "lengths": Payload.from_bytes(said["forward", 1]).values["lengths"],
            },
        }
        yield "no frame", Payload(values=values).to_bytes()

    for what, change in lies.items():
        yield what, with_values(data, values | change)


def of_backward(said: dict[tuple[str, int], bytes]) -> Iterator[tuple[str, Any]]:
    """Yield lies in the place of the second step's gradient."""
    data = said["backward", 2]
    values = Payload.from_bytes(data).values
    yield from spoiled(data)
    yield "the step before", said["backward", 1]
    yield "forward", said["forward", 2]
    yield "a reply", EarlyReplyError(said["reply", 1])
    yield "a step more", with_values(data, values | {"step": 2})
    yield "another micro-batch", with_values(data, values | {"micro": 1})


def of_meeting(kind: str, said: dict[tuple[str, int], bytes]) -> Iterator[tuple[str, Any]]:
    """Yield lies in the place of the first meeting."""
    data = said[kind, 1]
    meeting = Payload.from_bytes(data)
    values = meeting.values
    yield (
        "the other meeting",
        with_values(data, values | {"of": "average" if kind == "clip" else "clip"}),
    )
    yield "a step more", with_values(data, values | {"step": 1})
    yield "a huge norm", with_values(data, values | {"norm": 1e29})
    yield "factor 2", with_values(data, values | {"factor": 2.0})
    yield "no weight", with_values(data, values | {"n": 0})
    yield "a reply", EarlyReplyError(said["reply", 1])

    if meeting.tensors:
        yield "no frame", Payload(values=values).to_bytes()
    else:
        yield "a frame", frame_payload(b"1", **values).to_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_site_that_lies_fails_alone(method: str, open_rounds: Callable[[str], Conversed]) -> None:
    """Each lie is as if the site were silent from there on, for the bits of the model."""
    rounds = open_rounds(method)
    seen = said(rounds)
    count = check_only_the_liar_fails(rounds, "forward", 2, of_forward(seen))
    count += check_only_the_liar_fails(rounds, "backward", 2, of_backward(seen))

    for kind in ("clip", "average"):
        if (kind, 1) in seen:
            count += check_only_the_liar_fails(rounds, kind, 1, of_meeting(kind, seen))

    assert count > 35
    with pytest.raises(ClientError, match=f"site '{LIAR}' failed"):
        rounds.again(instead("backward", 1, seen["forward", 1]), on_failure="stop", quorum=0.5)


def test_a_memory_that_the_server_has_not_is_that_sites_failure(
    open_rounds: Callable[[str], Conversed],
) -> None:
    rounds = open_rounds("memory")
    data = said(rounds)["forward", 1]
    values = Payload.from_bytes(data).values
    lies = (
        (f"round {held!r}", with_values(data, values | {"held": held}))
        for held in (1, -1, 2**70, True, None)
    )
    assert check_only_the_liar_fails(rounds, "forward", 1, lies) == 5


@pytest.mark.parametrize("method", ["client-batch", "hierarchical"])
def test_shared_layers_that_are_too_large_are_that_sites_failure(
    method: str, open_rounds: Callable[[str], Conversed]
) -> None:
    rounds = open_rounds(method)
    seen = said(rounds)
    kind = "clip" if method == "client-batch" else "average"
    meeting = Payload.from_bytes(seen[kind, 1])
    server, _, _ = rounds.again()
    codec = Identity.of(server.setting.shared)
    sent = codec.decode(payload_frame(meeting))

    def lies() -> Iterator[tuple[str, bytes]]:
        huge = codec.encode({name: tensor + 1e25 for name, tensor in sent.items()})
        yield "huge", frame_payload(huge, **meeting.values).to_bytes()
        body = payload_frame(meeting)[:-8] + b"\0\0\xc0\x7f"  # the last value is NaN
        spoiled = body + zlib.crc32(body).to_bytes(4, "little")
        yield "NaN", frame_payload(spoiled, **meeting.values).to_bytes()

    assert check_only_the_liar_fails(rounds, kind, 1, lies()) == 2


def average_of(rounds: Conversed, seen: dict[tuple[str, int], bytes], factor: float) -> bytes:
    """Return the liar's first average with its update `factor` times as long."""
    meeting = Payload.from_bytes(seen["average", 1])
    server, _, _ = rounds.again()
    codec = Identity.of(server.setting.shared)
    update = codec.decode(payload_frame(meeting))
    longer = codec.encode({name: factor * tensor for name, tensor in update.items()})
    return frame_payload(longer, **meeting.values).to_bytes()


def test_an_average_within_a_round_is_bounded_as_that_at_its_end(
    open_rounds: Callable[[str], Conversed],
) -> None:
    """An update that is too long is its site's failure, before the others go on from it."""
    rounds = open_rounds("hierarchical")
    seen = said(rounds)
    lies = iter([("50 times", average_of(rounds, seen, 50.0))])
    assert check_only_the_liar_fails(rounds, "average", 1, lies) == 1

    lie = instead("average", 1, average_of(rounds, seen, 50.0))
    with pytest.raises(ClientError, match=f"site '{LIAR}' failed: .*max_update_growth"):
        rounds.again(lie, on_failure="stop", quorum=0.5)


def test_a_weight_in_an_average_within_a_round_is_at_most_its_share(
    open_rounds: Callable[[str], Conversed],
) -> None:
    rounds = open_rounds("hierarchical")
    seen = said(rounds)
    values = Payload.from_bytes(seen["average", 1]).values
    models = []
    for weight in (2**20, 2**31):
        heavy = with_values(seen["average", 1], values | {"n": weight})
        server, fleet, _ = rounds.again(instead("average", 1, heavy), max_weight_share=0.5)
        assert fleet.failures == []
        models.append(digest(server.model()))

    free, _, _ = rounds.again(instead("average", 1, heavy), max_weight_share=1.0)
    assert models[0] == models[1]
    assert digest(free.model()) != models[0]


@pytest.mark.parametrize("kind", ["forward", "backward", "average", "clip", "reply"])
def test_every_forged_turn_is_that_sites_failure(
    kind: str, open_rounds: Callable[[str], Conversed]
) -> None:
    """A sample of all forgeries of each thing that a site says."""
    rounds = open_rounds("client-batch" if kind == "clip" else "hierarchical")
    seen = said(rounds)
    data = seen[kind, 1]
    other = "forward" if kind == "backward" else "backward"
    harmless = {"n"} if kind == "clip" else set()
    forged = [
        (what, forgery)
        for what, forgery in forgeries(data, seen[other, 1])
        if forgery != data and what.split("=")[0] not in harmless
    ]
    assert check_only_the_liar_fails(rounds, kind, 1, iter(forged[::7])) > 5


# -- a site that lies while the model is measured -----------------------------------------------


LOOKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "another use": lambda _: {"of": "train"},
    "a length too long": lambda values: {"lengths": [values["lengths"][0] + 1]},
    "more sequences than a pass": lambda _: {"lengths": [1] * 100},
    "a text that did not begin": lambda _: {"of": "continue", "begins": False, "tokens": 1},
}


@pytest.mark.parametrize("what", LOOKS)
def test_a_lie_while_the_model_is_measured_is_that_sites_failure(
    what: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    def lie(site: str, kind: str, number: int, data: bytes) -> bytes:
        if (site, kind) != (LIAR, "look"):
            return data
        values = dict(Payload.from_bytes(data).values)
        changed = LOOKS[what](values)
        kept = {} if "of" in changed and changed["of"] == "continue" else values
        return with_values(data, kept | changed)

    def assemble(*given: Any) -> Fleet:
        fleet = in_process(*given)
        assert isinstance(fleet.transport, InProcess)
        fleet.transport.tasks = lying(fleet.transport.tasks, lie, true)
        return fleet

    table = table_of(run_config, "sequential") | {"fleet": {"on_failure": "skip", "quorum": 0.5}}
    table["method"] |= {"leakage": {"sites": "none"}}
    *_, last = execute(parse(table, "test"), tmp_path / "run", assemble=assemble)
    assert sorted(last.values["heldout_by_site"]) == ["north", "south"]


# -- a server that lies ----------------------------------------------------------------------------


def with_frame(answer: Payload, change: Callable[[torch.Tensor], torch.Tensor]) -> Payload:
    """Return an answer with other rows."""
    return Payload.from_bytes(with_rows(answer.to_bytes(), change(rows_of(answer.to_bytes()))))


def set_nan(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows with one NaN."""
    changed = rows.clone()
    changed[-1, -1] = math.nan
    return changed


Twist = Callable[[Payload], Payload]
TWISTS: dict[str, Twist] = {
    "another step": lambda answer: Payload(answer.tensors, answer.values | {"step": 7}),
    "another micro-batch": lambda answer: Payload(answer.tensors, answer.values | {"micro": 1}),
    "another turn": lambda answer: Payload(answer.tensors, answer.values | {"of": "look"}),
    "NaN": lambda answer: with_frame(answer, set_nan),
    "huge": lambda answer: with_frame(answer, lambda rows: rows + 1e30),
    "a token less": lambda answer: with_frame(answer, lambda rows: rows[:-1]),
    "another width": lambda answer: with_frame(answer, lambda rows: rows[:, :-1]),
    "no frame": lambda answer: Payload(values=answer.values),
    "nothing": lambda _: Payload(),
}
NORMS: dict[str, Any] = {"none": None, "text": "1", "negative": -1.0, "huge": 1e31, "whole": 1}


def check_the_site_refuses(rounds: Conversed, kind: str, twist: Twist) -> None:
    """Assert that the site whose second answer of a kind is twisted fails and keeps nothing."""

    def answer(site: str, what: str, number: int, payload: Payload) -> Payload:
        return twist(payload) if (site, what, number) == (LIAR, kind, 2) else payload

    _, fleet, _ = rounds.again(answer=answer)
    (failure,) = fleet.failures
    assert failure.site == LIAR
    assert failure.reason.startswith("WireError"), failure.reason
    assert rounds.store.names(LIAR) == []


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("twist", TWISTS)
def test_a_site_refuses_a_lie_of_its_server(
    twist: str, kind: str, open_rounds: Callable[[str], Conversed]
) -> None:
    check_the_site_refuses(open_rounds("hierarchical, own ends"), kind, TWISTS[twist])


@pytest.mark.parametrize("kind", ["backward", "clip"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_site_refuses_a_norm_that_is_none(
    norm: str, kind: str, open_rounds: Callable[[str], Conversed]
) -> None:
    check_the_site_refuses(
        open_rounds("client-batch, own ends"),
        kind,
        lambda answer: Payload(answer.tensors, answer.values | {"norm": NORMS[norm]}),
    )


@pytest.mark.parametrize(
    ("name", "value"), [("tokens", 0), ("tokens", 1.5), ("steps", 0), ("steps", 2**70)]
)
def test_a_site_refuses_a_common_step_that_does_not_contain_it(
    name: str, value: Any, open_rounds: Callable[[str], Conversed]
) -> None:
    check_the_site_refuses(
        open_rounds("client-batch, own ends"),
        "forward",
        lambda answer: Payload(answer.tensors, answer.values | {name: value}),
    )


REJOINS: dict[str, Payload] = {
    "a step that is over": rejoin(0, None),
    "a step beyond all": rejoin(2**70, None),
    "no step": Payload(values={"of": REJOIN}),
    "weights for the same step": rejoin(1, b"1"),
    "every step without this site": rejoin(STEPS, None),
    "weights that are none": rejoin(STEPS, b"1"),
}
"""Answers to hidden states: the third in the first step, others in the second."""


@pytest.mark.parametrize("method", ["client-batch", "client-batch, own ends", "sequential"])
@pytest.mark.parametrize("lie", REJOINS)
def test_a_site_refuses_to_rejoin_where_no_step_can_be(
    method: str, lie: str, open_rounds: Callable[[str], Conversed]
) -> None:
    """Under another mode than client-batch, no site rejoins at all."""
    rounds = open_rounds(method)
    due = 1 if lie == "every step without this site" else 2

    def answer(site: str, what: str, number: int, answer: Payload) -> Payload:
        lies = (site, what, number) == (LIAR, "forward", due)
        return REJOINS[lie] if lies else answer

    _, fleet, _ = rounds.again(answer=answer)
    (failure,) = fleet.failures
    assert failure.site == LIAR
    assert failure.reason.startswith("WireError"), failure.reason
    assert rounds.store.names(LIAR) == []


@pytest.mark.parametrize("noise", [None, {"clip": 1.0, "multiplier": 0.5}])
def test_a_site_does_not_begin_a_step_for_ever(
    noise: Any, run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends the same bytes again, with the same noise, and gives the server up in the end."""
    monkeypatch.setattr(tasks, "MOST_AGAIN", 5)
    table = table_of(run_config, "client-batch, own ends")
    method = table["method"] | {"noise": noise, "in_flight": 1}
    with conversed(table | {"method": method}, tmp_path) as rounds:
        rounds.store = StateStore(tmp_path / "store")
        talk = tasks.train(rounds.site(LIAR), Payload(values={"round": 1}))
        assert not isinstance(talk, Payload)
        first = next(talk)
        for _ in range(5):
            assert isinstance(talk.send(Payload()), Next)
            again = talk.send(rejoin(0, None))
            assert isinstance(first, Ahead)
            assert isinstance(again, Ahead)
            assert again.turn.to_bytes() == first.turn.to_bytes()

        assert isinstance(talk.send(Payload()), Next)

        with pytest.raises(WireError, match="more than 5 times"):
            talk.send(rejoin(0, None))


@pytest.mark.parametrize("method", ["client-batch", "client-batch, own ends"])
def test_a_site_that_skips_a_common_step_fails_alone(
    method: str, open_rounds: Callable[[str], Conversed]
) -> None:
    """Hidden states of the next step in the place of gradients that are to be clipped."""
    rounds = open_rounds(method)
    seen = said(rounds)
    lies = iter([("the next step", seen["forward", 2])])
    assert check_only_the_liar_fails(rounds, "clip", 1, lies) == 1


def test_an_honest_round_keeps_the_sites_own_layers(
    open_rounds: Callable[[str], Conversed],
) -> None:
    """Keeping nothing is seen only because an honest round keeps something."""
    rounds = open_rounds("hierarchical, own ends")
    rounds.again()
    assert len(rounds.store.names(LIAR)) == 1
