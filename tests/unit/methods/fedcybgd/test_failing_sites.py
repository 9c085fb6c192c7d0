"""Sites of FedCyBGD that forget, lie, fail or are late."""

import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fluvial.errors import ClientError
from fluvial.exchange import STALE
from fluvial.federation.sites import Site, Task
from fluvial.methods.fedcybgd.server import FedCyBgdServer
from fluvial.wire.payload import Payload, frame_payload, payload_frame
from fluvial.wire.tensors import moved
from tests.support.fedcybgd import FORMS, ONCE, VISIT, Stage, codec_of, differ, sent


@pytest.mark.parametrize("form", ["cache", "cache, disk", "low-bit, disk"])
def test_a_site_that_lost_what_it_kept_is_sent_everything_and_nothing_else_changes(
    form: str, stage: Stage
) -> None:
    table = stage.table(4, {"order": "latin", **FORMS[form]}, codec={"name": "int8"}, train=ONCE)
    victim = stage.oracle(table).sites[1]

    def wipe(folder: Path) -> None:
        shutil.rmtree(folder / "sites" / victim)

    undisturbed = stage.play(table)
    forgetful = stage.play(table, after=wipe)
    assert not differ(forgetful.state, undisturbed.state)
    before, after = (sent(each, "down") for each in (undisturbed, forgetful))
    assert [more > less for less, more in zip(before, after, strict=True)] == [
        False,
        True,
        False,
        False,
    ]


def test_every_site_may_lose_everything(stage: Stage) -> None:
    table = stage.table(4, {"order": "latin"}, codec={"name": "int8"}, rounds=3, train=ONCE)
    wiped = stage.play(table, after=lambda folder: shutil.rmtree(folder / "sites"))
    assert not differ(wiped.state, stage.play(table).state)


def other_visit(reply: Payload, site: Site, message: Payload) -> Payload:
    return Payload(reply.tensors, {**reply.values, "visit": "2/7"})


def nobodys_visit(reply: Payload, site: Site, message: Payload) -> Payload:
    return Payload(reply.tensors, {**reply.values, "visit": 3})


def other_round(reply: Payload, site: Site, message: Payload) -> Payload:
    codec = codec_of(site, message)
    return frame_payload(codec.encode(codec.decode(payload_frame(reply)), round=7), **reply.values)


def other_block(reply: Payload, site: Site, message: Payload) -> Payload:
    codec = codec_of(site, message, beside=1)
    zero = {name: torch.zeros(shape) for name, shape in codec.layout.shapes}
    return frame_payload(codec.encode(zero, round=message.value("round", int)), **reply.values)


def not_a_number(reply: Payload, site: Site, message: Payload) -> Payload:
    return filled_with(math.nan, reply, site, message)


def too_large(reply: Payload, site: Site, message: Payload) -> Payload:
    return filled_with(1e20, reply, site, message)


def filled_with(value: float, reply: Payload, site: Site, message: Payload) -> Payload:
    codec = codec_of(site, message)
    body = torch.full((codec.layout.numel,), value).numpy().tobytes()
    return frame_payload(codec.seal(body, round=message.value("round", int)), **reply.values)


def cut_off(reply: Payload, site: Site, message: Payload) -> Payload:
    return frame_payload(payload_frame(reply)[:-5], **reply.values)


def bare(reply: Payload, site: Site, message: Payload) -> Payload:
    return Payload(values=reply.values)


def no_samples(reply: Payload, site: Site, message: Payload) -> Payload:
    return Payload(reply.tensors, {**reply.values, "n": 0})


def many_samples(reply: Payload, site: Site, message: Payload) -> Payload:
    return Payload(reply.tensors, {**reply.values, "n": 2**40})


def no_loss(reply: Payload, site: Site, message: Payload) -> Payload:
    return Payload(reply.tensors, {**reply.values, "loss": "small"})


def never_follows(reply: Payload, site: Site, message: Payload) -> Payload:
    return STALE


LIES = (
    *(other_visit, nobodys_visit, other_round, other_block, not_a_number, too_large, cut_off, bare),
    *(no_samples, many_samples, no_loss, never_follows),
)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_an_answer_that_lies_is_a_failure_of_its_site(
    lie: Callable[[Payload, Site, Payload], Payload], stage: Stage, task: Callable[[Task], None]
) -> None:
    """The others go on as if that site had not been there."""
    table = stage.table(4, rounds=1, train=ONCE, fleet={"workers": 1, "on_failure": "skip"})
    oracle = stage.oracle(table)
    liar = oracle.sites[2]

    def visit(site: Site, message: Payload) -> Payload:
        reply = VISIT.visit(site, message)
        return lie(reply, site, message) if site.name == liar else cast(Payload, reply)

    task(visit)
    played = stage.play(table)
    (record,) = played.rounds
    assert [row["site"] for row in record["missing"]] == [liar]
    assert "WireError" in record["missing"][0]["reason"]
    assert [row["site"] for row in record["visits"]] == [
        site for site in oracle.sites if site != liar
    ]
    state = oracle.start

    for client, site in enumerate(oracle.sites):
        if site != liar:
            state = moved(state, oracle.update(state, client, 1, site))

    assert not differ(played.state, state)
    assert played.server.ledger.versions == [1, 1, 0, 1]


def test_no_site_answers_for_another_site(stage: Stage, task: Callable[[Task], None]) -> None:
    """Two sites of one block are asked together, and the first sends its update under the second's
    visit."""
    table = stage.table(8, {"order": "pairs"}, rounds=1, train=ONCE)
    oracle = stage.oracle(table)

    def visit(site: Site, message: Payload) -> Payload:
        reply = cast(Payload, VISIT.visit(site, message))
        return (
            reply
            if site.name != oracle.sites[0]
            else Payload(reply.tensors, {**reply.values, "visit": "1/4"})
        )

    task(visit)
    played = stage.play(table)
    assert [row["site"] for row in played.rounds[0]["visits"] if row["block"] == "layer 0"] == [
        oracle.sites[4]
    ]
    update = oracle.update(oracle.start, 0, 1, oracle.sites[4])
    assert not differ({name: played.state[name] for name in update}, update)


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: None} for name in ("block", "round", "visits", "visit")),
        *({"round": round} for round in (0, -1, 1.0)),
        *({"visits": visits} for visits in (0, -1, True)),
    ],
    ids=str,
)
def test_a_site_takes_no_nonsense(wrong: dict[str, Any], stage: Stage) -> None:
    run = stage.opened(stage.table(1, rounds=1))
    server = cast(FedCyBgdServer, run.server)
    message = server.sender.message(run.fleet.sites[0], 0, "1/0", server._values(1) | wrong)
    message = Payload(message.tensors, {**message.values, **wrong})

    with pytest.raises(ClientError, match="WireError at fluvial/"):
        list(
            run.fleet.ask(
                "visit", {run.fleet.sites[0]: message}, round=1, read=lambda _, reply: reply
            )
        )


def test_a_dead_site_is_named_and_the_cycle_goes_on(
    stage: Stage, task: Callable[[Task], None]
) -> None:
    """A cache continues too: the blocks that others train reach every site that still runs."""
    table = stage.table(
        4, rounds=3, codec={"name": "int8"}, train=ONCE, fleet={"workers": 1, "on_failure": "skip"}
    )
    dead = stage.oracle(table).sites[1]
    task(dying(lambda name, round: name == dead and round == 2))
    cache = stage.play(table)
    full = stage.play(table | {"method": table["method"] | FORMS["full"]})

    for played in (cache, full):
        assert [[row["site"] for row in record["missing"]] for record in played.rounds] == [
            [],
            [dead],
            [],
        ]
        assert [record["sites"] for record in played.rounds] == [4, 3, 4]
        assert played.server.ledger.versions == [3, 2, 3, 3]

    assert not differ(cache.state, full.state)


def dying(when: Callable[[str, int], bool]) -> Task:
    """A visit that ends in an exception now and then, after everything was trained."""

    def visit(site: Site, message: Payload) -> Payload:
        reply = VISIT.visit(site, message)
        if when(site.name, message.value("round", int)):
            raise RuntimeError("out of power")
        return cast(Payload, reply)

    return visit


@pytest.mark.parametrize("quorum", [0.75, 0.8])
def test_the_quorum_is_of_the_cycle_and_not_of_a_group(
    quorum: float, stage: Stage, task: Callable[[Task], None]
) -> None:
    """Each group is one visit, and the group of the dead site is empty."""
    fleet = {"workers": 1, "on_failure": "skip", "quorum": quorum}
    table = stage.table(4, rounds=1, fleet=fleet)
    dead = stage.oracle(table).sites[0]
    task(dying(lambda name, _round: name == dead))

    if quorum == 0.75:
        assert stage.play(table).rounds[0]["sites"] == 3
    else:
        with pytest.raises(ClientError, match=rf"visit: 3 of 4 sites answered.*missing: {dead}"):
            stage.play(table)


def test_without_a_policy_a_dead_site_stops_the_run(
    stage: Stage, task: Callable[[Task], None]
) -> None:
    table = stage.table(4)
    task(dying(lambda name, _round: name == stage.oracle(table).sites[3]))
    with pytest.raises(ClientError, match="RuntimeError at test_failing_sites.py:") as caught:
        stage.play(table)
    log = Path(str(caught.value).rpartition(" is in ")[2])
    assert "out of power" in log.read_text()


def test_no_site_answers(stage: Stage, task: Callable[[Task], None]) -> None:
    task(dying(lambda _name, _round: True))
    with pytest.raises(ClientError, match="0 of 4 sites answered"):
        stage.play(stage.table(4, fleet={"workers": 1, "on_failure": "skip"}))


def test_a_site_that_answers_when_asked_again_leaves_no_trace(
    stage: Stage, task: Callable[[Task], None]
) -> None:
    """Not in the model, and not in what error feedback keeps, which is kept when an answer is
    accepted."""
    codec = {"name": "int4", "error_feedback": True}
    table = stage.table(4, codec=codec, train=ONCE, fleet={"workers": 1, "on_failure": "retry"})
    undisturbed = stage.play(table)
    tried = set[Any]()

    def first_time(*attempt: Any) -> bool:
        known = attempt in tried
        tried.add(attempt)
        return not known

    task(dying(first_time))
    again = stage.play(table)
    assert [len(record["missing"]) for record in again.rounds] == [0, 0]
    assert [len(record["asked_again"]) for record in again.rounds] == [4, 4]
    assert not differ(again.state, undisturbed.state)


def test_a_straggler_is_left_behind_at_its_deadline(
    stage: Stage, task: Callable[[Task], None]
) -> None:
    fleet = {"workers": 4, "on_failure": "skip", "deadline_s": 8.0}  # long, for a busy machine
    table = stage.table(4, {"parallel": 4}, rounds=1, fleet=fleet)
    slow = stage.oracle(table).sites[1]
    over = threading.Event()

    def visit(site: Site, message: Payload) -> Payload:
        while site.name == slow and not over.wait(0.1):
            pass  # in short waits, so that the end of the run can stop this thread
        return cast(Payload, VISIT.visit(site, message))

    task(visit)
    (record,) = stage.play(table).rounds
    over.set()
    assert [(row["site"], row["reason"]) for row in record["missing"]] == [
        (slow, "no answer within fleet.deadline_s=8")
    ]
    assert record["sites"] == 3
    assert 8 < record["seconds"] < 60
