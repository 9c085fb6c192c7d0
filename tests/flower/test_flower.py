"""The same run over Flower: what the fleet makes of bad sites, Flower's inside, simulation and
deployment."""

import importlib
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, pull_objects
from flwr.supercore.task_identity import TaskIdentity

import fluvial.flower.inbox
import fluvial.flower.nodes
from fluvial.codecs import build, read_settings
from fluvial.data import POOLED
from fluvial.errors import ClientError, ConfigError, WireError
from fluvial.federation.fleet import Fleet, Reply
from fluvial.federation.in_process import local_fleet
from fluvial.federation.line import FLOWER
from fluvial.federation.replies import read_update
from fluvial.flower.certificates import make_authority
from fluvial.flower.envelope import SMALL, STYPE, pack, unpack
from fluvial.flower.executor import OutOfStepError
from fluvial.flower.inbox import pull_complete
from fluvial.flower.site import site_process
from fluvial.flower.transport import flower_fleet
from fluvial.methods import METHODS
from fluvial.models.pool import ModelPool
from fluvial.runs.config import parse
from fluvial.runs.run import execute
from fluvial.site_process.fingerprints import fingerprints
from fluvial.site_process.journal import Header
from fluvial.site_process.process import JOIN, UNKNOWN_RUN, SiteProcess
from fluvial.site_process.site_file import Allowed, SiteFile
from fluvial.wire.payload import Limits, Payload, frame_payload
from tests.conftest import saved_model
from tests.contract.test_methods import SETTINGS
from tests.support.flower_lab import FLUVIAL, Deployment, deployment, toml
from tests.support.runs import run_table

pytestmark = pytest.mark.flower

NAMES = ("north", "south", "west")
Answer = Callable[[str, Header, bytes], RecordDict | Error | None]
"""What a site makes of a message: its reply's content, Flower's error, or silence."""


# -- the policy, on a grid that is not there -----------------------------------------------------


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
    """Whether `answer` hears greetings too."""
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


def refusal(text: str) -> RecordDict:
    return pack(b"", {"error": text})


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

    bench: ModelPool
    table: dict[str, Any]

    def __call__(
        self,
        answer: Answer,
        limits: Limits | None = None,
        names: tuple[str, ...] = NAMES,
        registered: Callable[[], dict[int, str]] = dict,
        **policy: Any,
    ) -> tuple[Fleet, FakeGrid]:
        grid = FakeGrid(answer, fingerprints(self.bench))
        config = parse(self.table | {"fleet": policy}, "test")
        made = flower_fleet(
            cast(Grid, grid),
            config,
            "run",
            names,
            self.bench,
            registered=registered,
            join_timeout_s=0.5,
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


def test_who_was_refused_may_come_when_it_is_mended(
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


def test_replies_nobody_waits_for_change_nothing(stand: Stand) -> None:
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


def test_a_reply_that_is_being_uploaded_holds_up_nobody_else(
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
    codec = build(read_settings({"name": "int8"}), stand.bench.layout)
    update = {name: torch.full(shape, value) for name, shape in stand.bench.layout.shapes}
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
    codec = build(read_settings({"name": "identity"}), stand.bench.layout)
    update = {name: torch.full(shape, 0.1) for name, shape in stand.bench.layout.shapes}
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


# -- Flower's inside -----------------------------------------------------------------------------

INTERNAL = {
    "flwr.app": ("Context", "Message"),
    "flwr.common.constant": ("ErrorCode",),
    "flwr.common.serde": ("context_from_proto",),
    "flwr.proto.message_pb2": ("ConfirmMessageReceivedRequest", "PullObjectRequest"),
    "flwr.proto.node_pb2": ("Node",),
    "flwr.proto.runtime_pb2": (
        "AcquireTaskRequest",
        "PullAppMessagesRequest",
        "PullTaskInputRequest",
    ),
    "flwr.serverapp": ("Grid", "ServerApp"),
    "flwr.supercore.constant": ("TaskType",),
    "flwr.supercore.heartbeat": ("HeartbeatSender", "make_task_heartbeat_fn_http"),
    "flwr.supercore.inflatable.inflatable_object": ("iterate_object_tree",),
    "flwr.supercore.inflatable.inflatable_utils": (
        "ObjectPullError",
        "inflate_object_from_contents",
        "pull_objects",
    ),
    "flwr.supercore.interceptors": ("RuntimeTokenHttpInterceptor", "RuntimeVersionHttpInterceptor"),
    "flwr.supercore.retry": ("make_simple_http_retry_invoker",),
    "flwr.supercore.runtime": ("RuntimeHttpClient",),
    "flwr.supercore.task_identity": ("TaskIdentity",),
    "flwr.superlink.grid": ("http_grid",),
    "flwr.supernode.runtime.run_clientapp": ("push_message", "push_task_output"),
}
"""What three modules take from Flower, most of it from inside; another release may have moved
it."""


def test_flowers_inside_is_where_we_look_for_it() -> None:
    from importlib.metadata import version

    assert version("flwr").startswith("1.41.")
    for module, names in INTERNAL.items():
        for name in names:
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"

    from flwr.common.constant import ErrorCode
    from flwr.supercore.constant import TaskType
    from flwr.supercore.runtime import RuntimeHttpClient

    assert hasattr(TaskType, "CLIENT_APP")
    assert ErrorCode.MESSAGE_UNAVAILABLE == 3
    assert hasattr(RuntimeHttpClient, "AcquireTask")
    assert hasattr(RuntimeHttpClient, "from_server_address")


def test_nothing_else_is_taken_from_flowers_inside() -> None:
    folder = Path(fluvial.flower.inbox.__file__).parent
    found: dict[str, set[str]] = {}
    for name in ("executor", "inbox", "server"):
        for module, names in re.findall(
            r"from (flwr[\w.]*) import ([\w, ]+)", (folder / f"{name}.py").read_text()
        ):
            found.setdefault(module, set()).update(name.strip() for name in names.split(","))

    assert found == {module: set(names) for module, names in INTERNAL.items()}


def test_the_server_asks_for_the_rest_of_an_upload_in_its_own_time() -> None:
    asked: list[float] = []

    def late(_: str) -> bytes:
        asked.append(time.monotonic())
        if asked[-1] - asked[0] < 1.5:
            raise ObjectUnavailableError("late")
        return b"there"

    assert pull_complete(["last"], late) == {"last": b"there"}
    assert asked[-1] - asked[0] < 1.5 + 1.2 * 0.5 + 0.5


def test_a_reply_is_fetched_when_its_last_part_is_there() -> None:
    asked: list[str] = []

    def pull(part: str) -> bytes:
        asked.append(part)
        if asked.count("root") < 3:
            raise ObjectUnavailableError(part)
        return part.encode()

    found = pull_complete(object_ids=["a", "b", "root"], pull_object_fn=pull)  # as Flower calls it
    assert found == {part: part.encode() for part in ("a", "b", "root")}
    assert asked[:3] == ["root"] * 3
    assert sorted(asked[3:]) == ["a", "b"]


def test_replies_whose_last_part_overtook_another_hold_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fluvial.flower.inbox, "_OBJECT_S", 0.2)
    dead = threading.Event()

    def half(part: str) -> bytes:
        if part == "a" and not dead.wait(0.05):
            raise ObjectUnavailableError(part)
        return b"there"

    stuck = [
        threading.Thread(target=pull_complete, args=(["a", "root"], half), daemon=True)
        for _ in range(4)
    ]
    for thread in stuck:
        thread.start()
    time.sleep(0.5)
    began = time.monotonic()
    assert len(pull_complete(["b", "root"], lambda part: part.encode())) == 2
    assert time.monotonic() - began < 5
    assert all(thread.is_alive() for thread in stuck)
    dead.set()

    for thread in stuck:
        thread.join(10)
        assert not thread.is_alive()


def test_the_server_takes_the_place_of_flowers_pull() -> None:
    from flwr.superlink.grid import http_grid

    assert vars(http_grid)["pull_objects"] is pull_objects  # which the server's process replaces
    assert "pull_objects" in http_grid.HttpGrid.pull_messages.__code__.co_names


@dataclass
class Runtime:
    """What a SuperNode says of one task; the message, and each part of it, is there after so many
    questions."""

    message: Message
    after: float = 1
    lost: bool = False
    asked: dict[str, float] = field(default_factory=dict)
    confirmed: list[str] = field(default_factory=list)

    def PullTaskInput(self, _: Any) -> Any:  # noqa: N802 - Flower's name
        from flwr.app import Context
        from flwr.common.serde import context_to_proto
        from flwr.proto.run_pb2 import Run
        from flwr.proto.runtime_pb2 import PullTaskInputResponse

        context = Context(run_id=7, node_id=3, node_config={}, state=RecordDict(), run_config={})

        return PullTaskInputResponse(
            context=context_to_proto(context), run=Run(run_id=7), task_id=5
        )

    def PullMessages(self, _: Any) -> Any:  # noqa: N802 - Flower's name
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.runtime_pb2 import PullAppMessagesResponse
        from flwr.supercore.inflatable.inflatable_object import get_object_tree

        if not self._there("message"):
            return PullAppMessagesResponse()

        bare = message_to_proto(remove_content_from_message(self.message))
        return PullAppMessagesResponse(
            messages_list=[bare], message_object_trees=[get_object_tree(self.message)]
        )

    def PullObject(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        from flwr.proto.message_pb2 import PullObjectResponse
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

        assert (request.run_id, request.node.node_id) == (7, 3)
        found = not self.lost
        there = self._there(request.object_id)
        content = (
            get_all_nested_objects(self.message)[request.object_id].deflate()
            if found and there
            else b""
        )

        return PullObjectResponse(
            object_found=found, object_available=found and there, object_content=content
        )

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802 - Flower's name
        self.confirmed.append(request.message_object_id)

    def _there(self, what: str) -> bool:
        self.asked[what] = self.asked.get(what, 0) + 1
        return self.asked[what] >= self.after


class Waiting:
    """The SuperNode's next task comes after so many questions."""

    def __init__(self, after: float = math.inf) -> None:
        self.after = after
        self.asked = 0

    def AcquireTask(self, _: Any) -> Any:  # noqa: N802 - Flower's name
        from flwr.proto.runtime_pb2 import AcquireTaskResponse

        self.asked += 1
        return AcquireTaskResponse(token="the next" if self.asked > self.after else "")


@pytest.fixture
def coming(monkeypatch: pytest.MonkeyPatch) -> Message:
    from fluvial.flower import executor

    for identity in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, identity, 1)
    monkeypatch.setattr(executor, "POLL_S", 0.001)
    return Message(
        pack(b"payload" * 1000, {"task": "train"}), dst_node_id=3, message_type="train", ttl=60.0
    )


def test_a_message_is_answered_when_all_of_it_is_there(coming: Message) -> None:
    from fluvial.flower.executor import Tasks, pull

    runtime = Runtime(coming, after=2)
    message, context = pull(cast(Any, runtime), Tasks(cast(Any, Waiting())))
    assert unpack(message, max_bytes=10_000) == (b"payload" * 1000, {"task": "train"})
    assert (message.metadata.message_id, context.node_id) == (coming.object_id, 3)
    assert runtime.confirmed == [coming.object_id]
    assert (TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id) == (5, 7, 3)


def test_a_message_that_the_supernode_dropped_gives_way_to_the_next(coming: Message) -> None:
    from fluvial.flower.executor import Tasks, pull

    runtime = Runtime(coming, after=math.inf)
    tasks = Tasks(cast(Any, Waiting(after=20)))

    with pytest.raises(ClientError, match="the SuperNode dropped an incomplete message"):
        pull(cast(Any, runtime), tasks)

    assert runtime.confirmed == []
    assert tasks.next() == "the next"


def test_a_message_that_nobody_waits_for_any_more_is_given_up(coming: Message) -> None:
    from fluvial.flower.executor import Tasks, pull

    coming.metadata.ttl = 0.05
    runtime = Runtime(coming, after=math.inf, asked={"message": math.inf})

    with pytest.raises(ClientError, match="the SuperNode dropped an incomplete message"):
        pull(cast(Any, runtime), Tasks(cast(Any, Waiting())))


class Outbox:
    """A SuperNode that holds a reply for so many questions before it has sent it."""

    def __init__(self, held: float) -> None:
        self.held = held
        self.asked = 0

    def PullObject(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        from flwr.proto.message_pb2 import PullObjectResponse

        self.asked += 1
        return PullObjectResponse(object_found=self.asked <= self.held)


@pytest.mark.parametrize(
    ("held", "next_task", "error", "given"),
    [
        (3, math.inf, None, 1),
        (0, math.inf, None, 1),
        (math.inf, 0, ClientError, 0),  # which is still in time
        (math.inf, 3, OutOfStepError, 1),
        (2, 2, None, 1),  # sent between two questions, and the next message after it
    ],
)
def test_a_reply_to_a_message_that_was_dropped_is_not_given(
    held: float,
    next_task: float,
    error: type[Exception] | None,
    given: int,
    coming: Message,
    monkeypatch: Any,
) -> None:
    from fluvial.flower import executor

    pushed: list[Message] = []
    monkeypatch.setattr(executor, "push_message", lambda *given: pushed.append(given[1]))
    tasks = executor.Tasks(cast(Any, Waiting(after=next_task)))

    with pytest.raises(error) if error else nullcontext():
        executor._hand_over(cast(Any, Outbox(held)), tasks, coming, cast(Any, None))
    assert len(pushed) == given
    if next_task < math.inf:
        assert tasks.next() == "the next"


def test_a_part_that_the_supernode_lost_is_told(coming: Message) -> None:
    from fluvial.flower.executor import Tasks, pull

    with pytest.raises(ClientError, match="has lost an object of a message"):
        pull(cast(Any, Runtime(coming, lost=True)), Tasks(cast(Any, Waiting())))


def test_the_time_of_a_round_is_predicted_for_this_envelope() -> None:
    assert FLOWER.inline == SMALL


@pytest.mark.parametrize(("size", "objects"), [(0, 3), (SMALL, 3), (SMALL + 1, 6), (2**23, 7)])
def test_a_message_is_as_few_objects_as_its_size_allows(
    size: int, objects: int, coming: Message
) -> None:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    data = random.Random(1).randbytes(size)
    message = Message(pack(data, {"task": "train"}), dst_node_id=1, message_type="train")
    assert unpack(message, max_bytes=size) == (data, {"task": "train"})
    assert len(get_all_nested_objects(message)) == objects

    with pytest.raises(WireError, match=f"message of {size} bytes exceeds the limit"):
        unpack(message, max_bytes=size - 1)


# -- equal to the run in one process -------------------------------------------------------------


@pytest.fixture
def tables(run_config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Runs whose sites keep something from round to round."""
    data = run_config["data"] | {"heldout_share": 0.2}
    # A server that has no text of the sites shows the model on this prompt.
    run_config = run_config | {"evaluate": {"sample_tokens": 2, "sample_prompt": "the river"}}

    return {
        "fedavg": run_config | {"codec": {"name": "top_k", "rate": 8, "error_feedback": True}},
        "cgfedllm": run_config
        | {
            "rounds": 4,
            "method": {
                "name": "cgfedllm",
                "tgap": {"source": "public", "rounds": 4, "simulated_sites": 2},
            },
            "codec": {"name": "klt", "rate": 8, "error_feedback": True},
        },
        "fedcybgd": run_config
        | {
            "rounds": 3,
            "tune": "full",
            "data": data,
            "method": {"name": "fedcybgd", "download": {"form": "cache"}},
            "codec": {"name": "identity"},
        },
    }


CASES = [f"{name} {tune}" for name in sorted(METHODS) for tune in METHODS[name].traits.tunes]


@pytest.mark.parametrize("case", CASES)
def test_every_method_interrupted_at_every_event_equals_in_process(
    case: str, run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites know their folders and the bytes of messages, and the server its checkpoint; nothing
    else."""
    for identity in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, identity, 1)
    name, tune = case.split()
    table = run_config | {"method": {"name": name}, "tune": tune} | SETTINGS.get(name, {})
    table = table if tune == "lora" else without_lora(table)
    own = run_table(table, tmp_path / "own")

    def answer(site: str, header: Header, wire: bytes) -> RecordDict:
        allow = Allowed(run_paths=("*",))
        own = SiteFile(name=site, folder=tmp_path / "sites" / site, device="cpu", allow=allow)
        found = SiteProcess(own).answer(header, wire)
        return pack(found.data, {"error": "", "kept": found.kept})

    grid = FakeGrid(answer, {}, dict(enumerate(sorted(own["heldout_by_site"]), 1)), whole=True)

    def assemble(each: Any, _: object, bench: ModelPool, texts: Any) -> Fleet:
        names = (POOLED,) if each.entry.traits.pooled else texts.names
        return flower_fleet(
            cast(Grid, grid), each, name, names, bench, join_timeout_s=30, poll_s=0.001
        )

    config = parse(table, "test")
    for event_number in range(config.rounds + 2):
        folder = tmp_path / "over"
        again = event_number > 0
        event = next(
            execute(config, folder, resume=again, assemble=assemble)
        )  # then everything is thrown away

    assert event.kind == "result"
    same(event.values, own)


def without_lora(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != "lora"}


def same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Two results with the same weights, measures, bytes and text."""
    for key in ("adapter_sha256", "model_sha256", "heldout_by_site", "bytes", "samples"):
        assert found[key] == wanted[key], key
    assert found["adapter_sha256"] or found["model_sha256"] or found["method"] == "local"


class Simulated:
    """`fluvial run --fleet flower` in a process group of its own."""

    def __init__(self, table: Mapping[str, Any], out: Path) -> None:
        self.config = out.with_suffix(".toml")
        self.out = out
        self.config.write_text(toml(table))

    def run(self, *, resume: bool = False, until: Path | None = None) -> dict[str, Any]:
        """The result, or {} when it was interrupted because `until` was there."""
        command = [*FLUVIAL, "run", str(self.config), "--fleet", "flower", "--out", str(self.out)]
        log = self.out.with_suffix(".log")

        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, *(["--resume"] if resume else [])],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        stop = time.monotonic() + 600
        try:
            while process.poll() is None and not (until and until.exists()):
                assert time.monotonic() < stop, log.read_text()
                time.sleep(0.05)

            if until:
                assert process.poll() is None, log.read_text()
                process.send_signal(signal.SIGINT)
                process.wait(120)
                return {}

            assert process.returncode == 0, log.read_text()
            return cast(dict[str, Any], json.loads((self.out / "result.json").read_text()))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


@pytest.mark.parametrize("name", ["fedavg", "fedcybgd"])
def test_simulated_equals_in_process(
    name: str, tables: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    table = without_lora(tables[name]) if name == "fedcybgd" else tables[name]
    same(Simulated(table, tmp_path / "ray").run(), run_table(table, tmp_path / "own"))


def test_simulated_interrupted_and_resumed_equals_in_process(
    tables: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    table = tables["cgfedllm"]
    out = tmp_path / "ray"
    simulated = Simulated(table, out)
    simulated.run(until=out / "checkpoints" / "round-000001.safetensors")
    assert not (out / "result.json").exists()
    found = simulated.run(resume=True)
    own = run_table(table, tmp_path / "own")
    same(found, own)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server and three warm sites with TLS and node keys."""
    with deployment(tmp_path_factory.mktemp("deployed"), dict.fromkeys(NAMES, "")) as made:
        yield made


@pytest.mark.parametrize("name", ["fedavg", "fedcybgd"])
def test_deployed_equals_in_process(
    name: str, tables: dict[str, dict[str, Any]], deployed: Deployment, tmp_path: Path
) -> None:
    table = without_lora(tables[name]) if name == "fedcybgd" else tables[name]
    own = run_table(table, tmp_path / "own")
    out = tmp_path / f"deployed-{name}"
    number = deployed.submit(table, out)
    same(deployed.wait(out), own)
    assert deployed.finished(number)["status"] == "finished:completed"
    logged = [
        json.loads(line)
        for each in NAMES
        for line in (deployed.site(each) / "outgoing.jsonl").read_text().splitlines()
    ]
    run = [
        entry
        for entry in logged
        if entry["run"].startswith(f"{out.name} ") and entry["task"] != JOIN
    ]
    assert sum(entry["bytes"] for entry in run) == sum(
        size for kind, size in own["bytes"]["by_kind"].items() if kind.startswith("up ")
    )


def test_bytes_are_those_that_flower_counts(
    deployed: Deployment, three_sites: Path, tmp_path: Path
) -> None:
    """An adapter of 0.5 MB, uncoded: within 2 % of Flower's own meter, each way."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = saved_model(
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=300,
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        tmp_path / "model",
    )
    table = {
        "seed": 1,
        "rounds": 2,
        "model": {"name_or_path": str(model)},
        "lora": {"r": 64},
        "data": {
            "source": str(three_sites),
            "form": "text",
            "max_length": 32,
            "partition": {"by": "column", "column": "client"},
        },
        "train": {"learning_rate": 1e-2, "max_steps": 1, "per_device_train_batch_size": 4},
        "evaluate": {"sample_tokens": 2},
    }
    number = deployed.submit(table, tmp_path / "deployed")
    result = deployed.wait(tmp_path / "deployed")
    assert result["bytes"]["up_raw"] / 6 > 300_000
    deployed.finished(number)
    meter = deployed.run(number)["network-traffic"]

    for way, counted in (("up", meter["inbound-bytes"]), ("down", meter["outbound-bytes"])):
        ours = sum(
            size for kind, size in result["bytes"]["by_kind"].items() if kind.startswith(f"{way} ")
        )
        assert 1 <= counted / ours < 1.02, (way, ours, counted)


def test_a_key_that_is_not_registered_is_told(deployed: Deployment) -> None:
    deployed.make_site("stranger", register=False)
    process = deployed.start_site("stranger")
    try:
        assert process.wait(90) != 0
        assert "this site's key is not registered" in deployed.log("stranger").read_text()
        assert deployed.online() == 3
    finally:
        deployed.end("stranger")


def test_a_site_cannot_take_anothers_name(
    deployed: Deployment, tables: dict[str, Any], tmp_path: Path
) -> None:
    deployed.make_site("liar")
    settings = deployed.site("liar") / "site.toml"
    settings.write_text(settings.read_text().replace('name = "liar"', 'name = "north"'))
    deployed.start_site("liar")

    try:
        deployed.wait_online(4)
        table = tables["fedavg"] | {"rounds": 1}
        out = tmp_path / "run"
        number = deployed.submit(table, out)
        same(deployed.wait(out), run_table(table, tmp_path / "own"))
        assert "says that it is 'north', and its key was registered for 'liar'" in deployed.logs(
            number
        )
    finally:
        deployed.end("liar")


def test_a_client_without_tls_is_refused(deployed: Deployment) -> None:
    folder = deployed.site("plain")
    deployed.command(
        "site",
        "init",
        str(folder),
        "--name",
        "plain",
        "--server",
        f"127.0.0.1:{deployed.port}",
        "--insecure",
    )
    said = deployed.command("site", "start", str(folder), fails=True)
    assert "uses TLS; get its ca.crt and name it in site.toml" in " ".join(said.split())


def test_a_certificate_of_somebody_else_is_refused(deployed: Deployment, tmp_path: Path) -> None:
    make_authority(tmp_path)
    folder = deployed.site("misled")
    ca = str(tmp_path / "ca.crt")
    server = f"127.0.0.1:{deployed.port}"
    deployed.command(
        "site", "init", str(folder), "--name", "misled", "--server", server, "--ca", ca
    )
    said = " ".join(deployed.command("site", "start", str(folder), fails=True).split())
    assert "is not valid: " in said
    assert "certificate" in said.partition("is not valid: ")[2]


@pytest.mark.slow
def test_stock_execution_gives_the_same(one_site: dict[str, Any], tmp_path: Path) -> None:
    table = one_site | {"rounds": 1, "evaluate": {"sample_tokens": 2, "sample_prompt": "the river"}}
    own = run_table(table, tmp_path / "own")
    with deployment(tmp_path / "lab", {"west": ""}, insecure=True, stock=True) as made:
        made.submit(table, tmp_path / "deployed")
        same(made.wait(tmp_path / "deployed", timeout=400), own)
