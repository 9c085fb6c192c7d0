"""The same run over Flower: what the fleet makes of bad sites, Flower's inside, simulation and
deployment."""

import itertools
import json
import logging
import math
import random
import re
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

import fluvial.flower.inbox
import fluvial.flower.nodes
from fluvial.codecs import build, read_settings
from fluvial.errors import ClientError, ConfigError
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import local_fleet
from fluvial.federation.replies import read_update
from fluvial.federation.turns import Reply
from fluvial.flower.envelope import STYPE, pack, unpack
from fluvial.flower.server import _plain
from fluvial.flower.site import site_process
from fluvial.flower.transport import flower_fleet
from fluvial.models.fingerprints import fingerprints
from fluvial.models.pool import ModelPool
from fluvial.report.round_lines import round_line
from fluvial.runs.config import parse
from fluvial.site_process.journal import Header
from fluvial.site_process.process import JOIN, UNKNOWN_RUN
from fluvial.site_process.site_file import Allowed, SiteFile
from fluvial.wire.payload import Limits, Payload, frame_payload

pytest.importorskip("flwr")


pytestmark = pytest.mark.flower
NAMES = ("north", "south", "west")
Answer = Callable[[str, Header, bytes], RecordDict | Error | None]
"""What a site makes of a message: its reply's content, Flower's error, or silence."""


@dataclass
class FakeGrid:
    """A grid whose sites are functions; a reply is there as soon as the message was pushed."""

    answer: Answer
    prints: dict[str, str]
    nodes: dict[int, str] = field(default_factory=lambda: dict(enumerate(NAMES, 1)))
    refused: set[int] = field(default_factory=set)
    """Nodes that Flower takes no message for."""
    ready: dict[str, list[Message]] = field(default_factory=dict)
    stray: list[Message] = field(default_factory=list)
    """Delivered with the next replies, whatever was asked for."""
    taken: dict[str, Message] = field(default_factory=dict)
    """Messages whose replies were handed out."""
    seen: list[tuple[int, Header, bytes]] = field(default_factory=list)
    greet: Callable[[int], RecordDict | None] | None = None
    pushed: dict[str, Message] = field(default_factory=dict)
    half: str = ""
    """A site whose reply is shown before it is there; whoever asks for it waits."""
    there: threading.Event = field(default_factory=threading.Event)
    whole: bool = False
    """Whether `answer` receives greetings too."""
    known: bool = True
    """Whether sites say that they answered before."""

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        given = []
        for message in messages:
            node = message.metadata.dst_node_id
            number = f"m{len(self.seen)}"
            wire, header = unpack(message, max_bytes=2**31)
            read = Header.read(header)
            self.seen.append((node, read, wire))
            message.metadata.__dict__["_message_id"] = number

            if node not in self.nodes or node in self.refused:
                given.append("")
                continue

            given.append(number)
            found: RecordDict | Error | None
            if read.task == JOIN and self.greet is not None:
                found = self.greet(node)
            elif read.task == JOIN and not self.whole:
                found = self.hello(self.nodes[node])
            else:
                found = self.answer(self.nodes[node], read, wire)

            if found is not None:
                self.ready[number] = [reply(found, message)]
                self.pushed[number] = message

        return given

    def pull_messages(self, numbers: Iterable[str]) -> list[Message]:
        found = []
        for number in numbers:
            if number in self.taken:
                found.append(
                    reply(Error(3, "the requested message could not be found"), self.taken[number])
                )
            elif number in self.ready:
                found += self.ready.pop(number)
                self.taken[number] = self.pushed[number]

        if any(self.nodes.get(each.metadata.src_node_id) == self.half for each in found):
            self.there.wait(30)

        stray = self.stray
        self.stray = []
        return stray + found

    def hello(self, name: str, **changes: str) -> RecordDict:
        return content(
            Payload(
                values={"site": name, "prints": {**self.prints, **changes}, "known": self.known}
            )
        )


def reply(found: RecordDict | Error, message: Message) -> Message:
    return Message(found, reply_to=message)


def content(answer: Payload, **header: Any) -> RecordDict:
    return pack(answer.to_bytes(), {"error": "", **header})


def refusal(text: str, *, refuses: bool = False) -> RecordDict:
    return pack(b"", {"error": text, "refuses": refuses})


def echo(site: str, header: Header, wire: bytes) -> RecordDict:
    return content(Payload(Payload.from_bytes(wire).tensors, {"site": site}))


def at(
    name: str, found: Callable[[], RecordDict | Error | None], others: RecordDict | None = None
) -> Answer:
    """One site does otherwise than the others, which echo or say the same."""
    return lambda site, header, wire: (
        found() if site == name else others or echo(site, header, wire)
    )


@dataclass
class Stand:
    """Makes a fleet on a fake grid."""

    pool: ModelPool
    table: dict[str, Any]

    def __call__(
        self,
        answer: Answer,
        limits: Limits | None = None,
        names: tuple[str, ...] = NAMES,
        registered: Callable[[], dict[int, str]] = dict,
        join_timeout_s: float = 0.5,
        **policy: Any,
    ) -> tuple[Fleet, FakeGrid]:
        grid = FakeGrid(answer, fingerprints(self.pool))
        config = parse(self.table | {"fleet": policy}, "test")
        made = flower_fleet(
            cast(Grid, grid),
            config,
            "run",
            names,
            self.pool,
            registered=registered,
            join_timeout_s=join_timeout_s,
            poll_s=0.001,
            limits=limits,
        )

        return made, grid


@pytest.fixture
def stand(run_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Stand:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    config = parse(run_config, "test")
    return Stand(ModelPool(config.model, config.adapter), run_config)


SKIP: dict[str, Any] = {"on_failure": "skip", "quorum": 0.3}
MESSAGE = Payload({"x": torch.arange(3.0)})


def ask(fleet: Fleet, names: Iterable[str] = NAMES, **changes: Any) -> list[Reply[Payload]]:
    settings: dict[str, Any] = {"round": 1, "read": lambda _, reply: reply, **changes}
    return list(fleet.ask("train", dict.fromkeys(names, MESSAGE), **settings))


def met(fleet: Fleet) -> Fleet:
    fleet.restore({}, -1)
    return fleet


def test_every_site_is_met_and_answers(stand: Stand) -> None:
    fleet, grid = stand(echo)
    found = ask(met(fleet))
    assert sorted(str(each.content.values["site"]) for each in found) == list(NAMES)
    assert {each.bytes_down for each in found} == {len(MESSAGE.to_bytes())}
    headers = [header for _, header, _ in grid.seen]
    assert [header.task for header in headers] == [JOIN] * 3 + ["train"] * 3
    assert [header.seq for header in headers] == list(range(1, 7))
    assert {header.session for header in headers} == {headers[0].session}
    ask(fleet)
    assert sorted(header.ack for _, header, _ in grid.seen[6:]) == [4, 5, 6]


def test_what_a_site_says_is_told(stand: Stand) -> None:
    fleet, _ = stand(at("south", lambda: refusal("RuntimeError: the disk of south is on fire")))
    with pytest.raises(
        ClientError, match="round 1, train: site 'south' failed: .*the disk of south is on fire"
    ):
        ask(met(fleet))


def test_flowers_own_error_is_told(stand: Stand) -> None:
    fleet, _ = stand(at("south", lambda: Error(8, "ClientApp stopped responding")), **SKIP)
    assert len(ask(met(fleet))) == 2
    assert "Flower's error 8: ClientApp stopped responding" in fleet.failures[0].reason
    assert fleet.failures[0].bytes_up == 0, "Flower's text is not the site's"


def test_the_log_of_a_run_has_no_markup() -> None:
    record = {"round": 3, "loss": 1.5, "seconds": 2.0, "sites": 2, "bytes_up": 9, "bytes_down": 9}
    line = _plain(round_line(record | {"missing": [{"site": "north"}]}))
    assert line.endswith("missing north")


def test_a_silent_site_is_missed_after_the_deadline(stand: Stand) -> None:
    fleet, _ = stand(at("west", lambda: None), deadline_s=0.2, **SKIP)
    started = time.monotonic()
    assert sorted(each.site for each in ask(met(fleet))) == ["north", "south"]
    assert 0.2 < time.monotonic() - started < 2
    assert [(each.site, each.reason) for each in fleet.failures] == [
        ("west", "no answer within fleet.deadline_s=0.2")
    ]


def test_the_quorum_names_the_missing(stand: Stand) -> None:
    fleet, _ = stand(lambda *_: refusal("no"), on_failure="skip", quorum=0.5)
    with pytest.raises(
        ClientError, match=r"0 of 3 sites answered.*missing: north, south, west.*: no"
    ):
        ask(met(fleet))

    fleet, _ = stand(lambda *_: refusal("no"), on_failure="skip", quorum=0.5)
    assert ask(met(fleet), alone=False) == []


def test_retry_asks_again_and_counts_only_what_was_accepted(stand: Stand) -> None:
    calls = itertools.count()
    fleet, grid = stand(
        at("north", lambda: refusal("not yet") if next(calls) < 2 else content(Payload())),
        on_failure="retry",
    )
    assert len(ask(met(fleet))) == 3
    tries = [header for node, header, _ in grid.seen if node == 1 and header.task == "train"]
    assert [header.ack for header in tries] == [0, 0, 0]
    assert fleet.state()["acks"]["north"] == tries[-1].seq  # type: ignore[index, call-overload]


def test_a_site_that_never_came_is_named(stand: Stand) -> None:
    fleet, _ = stand(echo, names=(*NAMES, "east"))
    with pytest.raises(ClientError, match=r"sites east have not joined within 0\.5 s"):
        met(fleet)
    fleet, _ = stand(echo, names=(*NAMES, "east"), **SKIP)
    assert len(ask(met(fleet), (*NAMES, "east"))) == 3
    assert [(each.site, each.reason) for each in fleet.failures] == [("east", "is not connected")]


@pytest.mark.parametrize("what", ["fluvial", "base", "tokenizer", "template", "layout"])
def test_what_differs_is_refused_with_the_reason(what: str, stand: Stand) -> None:
    fleet, grid = stand(echo)
    grid.greet = lambda node: grid.hello(NAMES[node - 1], **({what: "other"} if node == 2 else {}))
    with pytest.raises(
        ClientError, match=rf"sites south have not.*site 'south' has another {what} \('other', here"
    ):
        met(fleet)


def test_a_site_that_refuses_says_why(stand: Stand) -> None:
    fleet, grid = stand(echo)
    grid.greet = lambda node: (
        refusal("does not allow method 'fedavg'") if node == 2 else grid.hello(NAMES[node - 1])
    )
    with pytest.raises(
        ClientError, match="sites south have not joined.*does not allow method 'fedavg'"
    ):
        met(fleet)


def test_a_run_that_is_unknown_is_told_again(stand: Stand) -> None:
    first = itertools.count()
    fleet, grid = stand(
        at("north", lambda: content(UNKNOWN_RUN) if not next(first) else content(Payload()))
    )
    assert len(ask(met(fleet))) == 3
    assert [header.task for node, header, _ in grid.seen if node == 1] == [
        JOIN,
        "train",
        JOIN,
        "train",
    ]


def test_a_site_that_does_not_know_the_run_twice_has_failed(stand: Stand) -> None:
    fleet, _ = stand(at("north", lambda: content(UNKNOWN_RUN)), **SKIP)
    found = ask(met(fleet), read=lambda _, reply: reply.value("site", str))
    assert sorted(each.site for each in found) == ["south", "west"]
    assert [each.site for each in fleet.failures] == ["north"]


def test_a_site_that_lost_what_it_kept_is_refused(stand: Stand) -> None:
    fleet, grid = stand(at("north", lambda: content(Payload(), kept=True)), **SKIP)
    ask(met(fleet))
    saved = fleet.state()
    assert saved["keepers"] == ["north"]
    grid.known = False  # whoever kept nothing may come without it
    later, other = stand(echo, **SKIP)
    other.known = False
    later.restore(saved, 1)
    assert sorted(each.site for each in ask(later)) == ["south", "west"]
    assert "site 'north' has lost what it kept for this run" in later.failures[0].reason


def test_a_run_goes_on_under_its_name_and_never_with_other_sites(stand: Stand) -> None:
    fleet, grid = stand(echo)
    ask(met(fleet))
    later, other = stand(echo)
    later.restore(fleet.state(), 1)
    ask(later)
    assert {header.run for _, header, _ in grid.seen} == {header.run for _, header, _ in other.seen}

    with pytest.raises(ConfigError, match="begun in one process.*resume it with --fleet process"):
        later.restore({}, 1)
    with pytest.raises(ConfigError, match="begun with other sites.*resume it by --fleet flower"):
        later.restore(fleet.state() | {"simulated": True}, 1)
    with pytest.raises(ConfigError, match="begun over Flower"):
        local_fleet(NAMES, cast(Any, None), {}).restore(fleet.state(), 1)
    fresh, third = stand(echo)
    ask(met(fresh))
    assert third.seen[0][1].run != grid.seen[0][1].run


def test_a_name_belongs_to_its_key(stand: Stand) -> None:
    fleet, _ = stand(echo, registered=lambda: {1: "north", 2: "east", 3: "west"})
    with pytest.raises(
        ClientError,
        match="sites south have not.*says that it is 'south', and its key was registered",
    ):
        met(fleet)


def test_the_log_names_the_site_of_a_registered_key(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal says which site it is of, also where the site's own words do not."""
    fleet, grid = stand(echo, registered=lambda: {1: "north", 2: "south"})
    grid.greet = lambda node: (
        refusal("KeyError at a.py:1") if node > 1 else grid.hello(NAMES[node - 1])
    )
    with pytest.raises(ClientError, match="; site 'south': KeyError at a.py:1"):
        met(fleet)
    for who in ("site 'south'", "node 3"):
        line = f"{who} does not take part: KeyError at a.py:1; it is asked again every 10 s"
        assert line in caplog.messages


def greetings(grid: FakeGrid, node: int) -> int:
    """Return how often a node was invited."""
    return sum(each == node and header.task == JOIN for each, header, _ in grid.seen)


def test_the_return_of_a_refused_site_is_seen_while_others_answer(stand: Stand) -> None:
    """It leaves and comes back within a round, as the same node."""
    late = at("west", lambda: None)
    fleet, grid = stand(late, join_timeout_s=0.05, deadline_s=0.1, **SKIP)
    grid.greet = lambda node: (
        refusal("no", refuses=True) if node == 2 else grid.hello(NAMES[node - 1])
    )
    met(fleet)
    grid.greet = None
    looks = itertools.count()
    seen = grid.get_node_ids
    grid.get_node_ids = lambda: (  # type: ignore[method-assign]
        [node for node in seen() if node != 2] if next(looks) == 1 else seen()
    )
    assert len(ask(fleet, ("north", "west"))) == 1
    assert greetings(grid, 2) == 2
    assert len(ask(fleet, ("north", "south"), round=2)) == 2


def test_who_failed_may_come_when_it_is_mended(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fluvial.flower.nodes, "_AGAIN_S", 0.05)
    tries = itertools.count()
    fleet, grid = stand(echo)
    grid.greet = lambda node: (
        refusal("not yet") if node == 2 and next(tries) < 2 else grid.hello(NAMES[node - 1])
    )
    assert len(ask(met(fleet))) == 3


def test_retry_waits_for_a_site_that_went(stand: Stand) -> None:
    fleet, grid = stand(echo, on_failure="retry", retries=1)
    met(fleet)
    del grid.nodes[2]
    back = threading.Timer(0.2, lambda: grid.nodes.update({2: "south"}))
    back.start()
    assert sorted(each.site for each in ask(fleet)) == list(NAMES)
    assert fleet.failures == []
    del grid.nodes[2]  # and does not come
    assert sorted(each.site for each in ask(fleet)) == ["north", "west"]
    assert {each.reason for each in fleet.failures} == {"is not connected"}


def test_replies_that_are_not_awaited_change_nothing(stand: Stand) -> None:
    fleet, grid = stand(echo)
    met(fleet)
    kept: list[Message] = []
    grid.answer = lambda site, header, wire: echo(site, header, wire)
    push = grid.push_messages

    def twice(messages: Iterable[Message]) -> list[str]:
        numbers = push(messages)
        for number in numbers:
            kept.extend(grid.ready[number])
            grid.ready[number] *= 2  # the same reply twice in one pull

        return numbers

    grid.push_messages = twice  # type: ignore[method-assign]
    assert len(ask(fleet)) == 3
    grid.stray = kept[:2]  # replayed after their round
    assert sorted(each.site for each in ask(fleet, round=2)) == list(NAMES)
    assert fleet.failures == []


def test_a_node_that_flower_takes_nothing_for_is_a_failure_of_its_site(stand: Stand) -> None:
    fleet, grid = stand(echo, **SKIP)
    met(fleet)
    grid.refused = {2}
    assert sorted(each.site for each in ask(fleet)) == ["north", "west"]
    assert fleet.failures[0].site == "south"


def test_a_reply_that_is_being_uploaded_delays_no_other_site(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fluvial.flower.inbox, "_STUCK_S", 0.05)
    fleet, grid = stand(echo, deadline_s=0.5, **SKIP)
    met(fleet)
    grid.half = "south"
    started = time.monotonic()
    assert sorted(each.site for each in ask(fleet)) == ["north", "west"]
    assert time.monotonic() - started < 5
    assert [(each.site, each.reason) for each in fleet.failures] == [
        ("south", "no answer within fleet.deadline_s=0.5")
    ]
    grid.half = ""
    grid.there.set()  # now it is there, and too late
    assert sorted(each.site for each in ask(fleet, round=2)) == list(NAMES)


def test_a_site_may_come_back_as_another_node(stand: Stand) -> None:
    fleet, grid = stand(echo)
    met(fleet)
    grid.nodes = {1: "north", 3: "west", 9: "south"}
    assert sorted(each.site for each in ask(fleet)) == list(NAMES)
    assert [node for node, header, _ in grid.seen if header.task == JOIN] == [1, 2, 3, 9]


def test_a_site_that_came_back_within_a_round_is_asked_again_there(stand: Stand) -> None:
    fleet, grid = stand(echo, on_failure="retry", retries=1)
    met(fleet)

    def gone() -> Error:
        grid.nodes = {1: "north", 3: "west", 9: "south"}
        return Error(5, "NODE_UNAVAILABLE")

    grid.answer = lambda site, header, wire: (
        gone() if 2 in grid.nodes and site == "south" else echo(site, header, wire)
    )
    assert sorted(each.site for each in ask(fleet)) == list(NAMES)


def test_of_two_nodes_with_one_name_one_counts_and_the_other_is_told_of(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    fleet, grid = stand(echo)
    grid.nodes = {1: "north", 2: "north", 3: "west"}
    with pytest.raises(
        ClientError, match="sites south have not joined.*two nodes say that they are site 'north'"
    ):
        met(fleet)

    fleet, grid = stand(echo)
    grid.nodes |= {4: "west"}
    assert len(ask(met(fleet))) == 3
    assert fleet.failures == []


def test_a_payload_that_is_too_large_is_refused(stand: Stand) -> None:
    big = Payload({"x": torch.zeros(5000)})
    fleet, _ = stand(at("south", lambda: content(big)), Limits(max_bytes=10_000), **SKIP)
    assert len(ask(met(fleet))) == 2
    assert re.search(r"message of \d+ bytes exceeds the limit of 10000", fleet.failures[0].reason)


def test_an_announced_size_is_not_believed(stand: Stand) -> None:
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}}
    ).encode()
    lie = pack(len(header).to_bytes(8, "little") + header, {"error": ""})
    fleet, _ = stand(at("south", lambda: lie), **SKIP)
    assert len(ask(met(fleet))) == 2
    assert "WireError" in fleet.failures[0].reason


def update_of(stand: Stand, round: int, value: float = 0.1) -> tuple[Any, Payload]:
    codec = build(read_settings({"name": "int8"}), stand.pool.layout)
    update = {name: torch.full(shape, value) for name, shape in stand.pool.layout.shapes}
    return codec, frame_payload(codec.encode(update, seed=1, round=round), n=3, loss=1.0)


def test_the_update_of_another_round_is_refused(stand: Stand) -> None:
    codec, old = update_of(stand, 1)
    _, now = update_of(stand, 2)
    fleet, _ = stand(at("south", lambda: content(old), content(now)), **SKIP)
    assert len(ask(met(fleet), round=2, read=partial(read_update, codec=codec, round=2))) == 2
    assert [each.site for each in fleet.failures] == ["south"]
    assert "round" in fleet.failures[0].reason


def test_an_update_that_is_not_finite_is_refused(stand: Stand) -> None:
    """A frame of raw values, the last of which was made NaN on the way."""
    codec = build(read_settings({"name": "identity"}), stand.pool.layout)
    update = {name: torch.full(shape, 0.1) for name, shape in stand.pool.layout.shapes}
    frame = codec.encode(update, seed=1, round=1)
    good = content(frame_payload(frame, n=3, loss=1.0))
    bad = content(frame_payload(frame[:-4] + struct.pack("<f", math.nan), n=3, loss=1.0))
    fleet, _ = stand(at("west", lambda: bad, good), **SKIP)
    assert len(ask(met(fleet), read=partial(read_update, codec=codec, round=1))) == 2
    assert [each.site for each in fleet.failures] == ["west"]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A frame with a byte changed, cut, grown, or filled with noise."""
    found = bytearray(data)
    kind = chance.randrange(6)
    where = chance.randrange(max(len(found), 1)) if chance.random() < 0.5 else chance.randrange(64)
    where = min(where, max(len(found) - 1, 0))

    if kind == 0:
        found[where] ^= 1 << chance.randrange(8)
    elif kind == 1:
        found = found[:where]
    elif kind == 2:
        found[where:where] = chance.randbytes(chance.randrange(1, 9))
    elif kind == 3:
        found[where : where + 8] = chance.randbytes(8)
    elif kind == 4:
        found = bytearray(chance.randbytes(chance.randrange(200)))
    else:
        found[where : where + 4] = (chance.choice([0, 2**31 - 1, 2**32 - 1])).to_bytes(4, "little")

    return bytes(found)


def mangled(data: bytes, chance: random.Random) -> RecordDict:
    """A reply whose records are not those of a site."""
    array = Array("uint8", (len(data),), STYPE, data)
    header = ConfigRecord({"error": chance.choice(["", 0, 1.5, b"\xff", ["a"], [1, 2]])})

    return chance.choice(
        [
            RecordDict({}),
            RecordDict({"payload": ArrayRecord({"p": array})}),
            RecordDict({"header": ArrayRecord({"p": array})}),
            RecordDict({"header": header}),
            RecordDict(
                {
                    "header": ConfigRecord(
                        {"error": "", "payload": chance.choice([1, "text", [data]])}
                    )
                }
            ),
            RecordDict({"payload": header, "header": header}),
            RecordDict({"payload": ArrayRecord({"q": array}), "header": header}),
            RecordDict({"payload": ArrayRecord({"p": array, "q": array}), "header": header}),
            RecordDict(
                {
                    "payload": ArrayRecord({"p": Array("float32", (9,), STYPE, data)}),
                    "header": header,
                }
            ),
            RecordDict(
                {
                    "payload": ArrayRecord({"p": Array("uint8", (9,), "numpy.ndarray", data)}),
                    "header": header,
                }
            ),
            RecordDict(
                {
                    "payload": ArrayRecord({"p": Array("uint8", (2**40,), STYPE, data)}),
                    "header": header,
                }
            ),
        ]
    )


@pytest.mark.parametrize("form", ["frame", "tensors", "records"])
def test_ten_thousand_garbled_answers_are_failures_and_nothing_worse(
    form: str, stand: Stand
) -> None:
    codec, good = update_of(stand, 1)
    if form == "tensors":
        good = Payload(
            {"x": torch.randn(20), "y": torch.ones(3, 4)},
            {"n": 1, "text": "ä", "deep": [[{"a": 1.5}]]},
        )

    data = good.to_bytes()
    chance = random.Random(5)
    heard: list[bytes] = []

    def garble(site: str, header: Header, wire: bytes) -> RecordDict:
        heard.append(mutated(data, chance))
        return mangled(data, chance) if form == "records" else pack(heard[-1], {"error": ""})

    def read(site: str, reply: Payload) -> Any:
        return reply if form == "tensors" else read_update(site, reply, codec, 1)

    fleet, _ = stand(garble, **SKIP)
    met(fleet)
    logging.getLogger("fluvial").setLevel(logging.ERROR)

    try:
        taken = 0
        for _ in range(1000 if form == "records" else 4500 // 3 + 1):
            taken += len(ask(fleet, read=read, alone=False))
    finally:
        logging.getLogger("fluvial").setLevel(logging.NOTSET)

    assert taken + len(fleet.failures) == len(heard)
    assert len(fleet.failures) > 0.5 * len(heard)
    kinds = {failure.reason.split(":")[0] for failure in fleet.failures}
    assert kinds <= {"WireError", "ClientError"}, kinds


def test_a_site_is_the_same_in_its_process_as_in_its_file(tmp_path: Path) -> None:
    """Defaults that were not given do not come back as given."""
    allow = Allowed(run_paths=("*",))
    site = SiteFile(name="north", folder=tmp_path, device="cpu", allow=allow)
    assert site_process(site).site == site
