"""Gathering of a round's replies: sites that lack something are asked again, once."""

from collections.abc import Sequence
from typing import Any

import pytest

from fluvial.errors import ClientError, WireError
from fluvial.exchange import STALE, Gathering, Readable, is_stale, to_all
from fluvial.federation.config import FleetConfig
from fluvial.federation.fleet import Fleet
from fluvial.federation.mock import Mock
from fluvial.wire.payload import Payload

SITES = ("north", "south", "west")
FRESH = Payload(values={"everything": False})
EVERYTHING = Payload(values={"everything": True})
SKIP: dict[str, Any] = {"on_failure": "skip", "quorum": 0.6}


class Server:
    """The server half of a test: it sends everything to each site in `forgotten`."""

    def __init__(self, lost: Sequence[str], always: bool = False, **settings: Any) -> None:
        self.lost = lost
        self.always = always
        self.asked: list[tuple[str, bool]] = []
        self.mock = Mock(SITES, self.answer)
        config = FleetConfig.model_validate(settings)
        self.fleet = Fleet(self.mock, config, clock=self.mock.clock)
        self.forgotten: set[str] = set()
        self.acknowledged: list[str] = []

    def answer(self, site: str, _task: str, message: Payload) -> Payload:
        everything = message.value("everything", bool)
        self.asked.append((site, everything))
        if site in self.lost and (self.always or not everything):
            return STALE
        return Payload(values={"n": len(site)})

    def messages(self, sites: Sequence[str]) -> dict[str, Payload]:
        return {site: EVERYTHING if site in self.forgotten else FRESH for site in sites}

    def gathering(self) -> Gathering[str]:
        return Gathering(
            self.fleet,
            "train",
            3,
            messages=self.messages,
            read=lambda site, reply: Readable(site, 1.0, reply.whole("n", 1, 9)),
            answered=self.acknowledged.append,
            forget=self.forgotten.update,
        )

    def gather(self) -> dict[str, int]:
        return {reply.content: reply.weight for reply in self.gathering().of(SITES)}


@pytest.mark.parametrize("value", [1, 1.0, False, "true", None])
def test_only_the_exact_answer_is_stale(value: Any) -> None:
    assert is_stale(STALE)
    assert not is_stale(Payload(values={"stale": value}))
    assert not is_stale(Payload(values={"stale": True, "n": 1}))


def test_a_stale_site_is_asked_again_and_counts() -> None:
    server = Server(lost=["south"])
    assert server.gather() == {"north": 5, "south": 5, "west": 4}
    asked = [(site, False) for site in SITES]
    assert sorted(server.asked) == sorted([*asked, ("south", True)])
    assert server.forgotten == {"south"}
    assert sorted(server.acknowledged) == list(SITES)
    assert server.fleet.failures == []


def test_all_sites_may_be_stale_at_once() -> None:
    server = Server(lost=SITES)
    assert server.gather() == {"north": 5, "south": 5, "west": 4}
    assert len(server.asked) == 6


def test_a_site_that_stays_stale_fails_and_the_round_goes_on() -> None:
    server = Server(lost=["south"], always=True, **SKIP)
    assert server.gather() == {"north": 5, "west": 4}
    assert server.asked.count(("south", True)) == 1
    (failure,) = server.fleet.failures
    assert (failure.site, failure.round, failure.task) == ("south", 3, "train")
    assert "cannot follow even after everything was sent again" in failure.reason
    assert "south" not in server.acknowledged
    assert server.mock.accepted.count("south") == 1  # what it kept when it said that it was stale


def test_a_site_that_stays_stale_stops_the_run_with_its_reason() -> None:
    server = Server(lost=["south"], always=True)
    reason = r"round 3, train: site 'south' failed: .*cannot follow even after everything was sent"
    with pytest.raises(ClientError, match=reason):
        server.gather()


def test_both_asks_have_one_quorum() -> None:
    server = Server(lost=["south", "west"], always=True, **SKIP)
    with pytest.raises(ClientError, match=r"1 of 3 sites answered, fleet\.quorum=0\.6"):
        server.gather()


@pytest.mark.parametrize("values", [{"stale": True, "n": 4}, {"stale": False}, {"stale": 1.5}])
def test_an_answer_that_is_nearly_stale_is_read_as_a_reply(values: dict[str, Any]) -> None:
    read: list[str] = []

    def refuse(site: str, reply: Payload) -> Readable[str]:
        read.append(site)
        raise WireError(f"values {sorted(reply.values)}")

    mock = Mock(SITES, lambda *_: Payload(values=values))
    fleet = Fleet(mock, FleetConfig.model_validate(SKIP), clock=mock.clock)

    def messages(sites: Sequence[str]) -> dict[str, Payload]:
        return to_all(sites, FRESH)

    with pytest.raises(ClientError, match="0 of 3 sites answered"):
        list(Gathering(fleet, "train", 1, messages, refuse).of(SITES))
    assert sorted(read) == list(SITES)


def test_a_site_without_a_message_is_missing_from_the_round() -> None:
    server = Server(lost=[], **SKIP)
    everyone = server.messages

    def without_west(sites: Sequence[str]) -> dict[str, Payload]:
        return {site: message for site, message in everyone(sites).items() if site != "west"}

    server.messages = without_west  # type: ignore[method-assign]
    assert server.gather() == {"north": 5, "south": 5}
    assert "west" not in [site for site, _ in server.asked]
