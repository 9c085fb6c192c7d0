"""Nodes that are refused: when they are asked again, and how often the log tells it."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flwr.app import Message, RecordDict

from fluvial.flower import nodes
from fluvial.flower.envelope import pack
from fluvial.flower.site import respond
from fluvial.site_process.journal import Header
from fluvial.site_process.process import JOIN
from fluvial.site_process.site_file import Allowed, SiteFile
from fluvial.wire.payload import Limits, Payload

NODE = 7


def message(content: RecordDict, number: str = "") -> Message:
    metadata = SimpleNamespace(reply_to_message_id=number)
    return cast(
        Message, SimpleNamespace(content=content, metadata=metadata, has_error=lambda: False)
    )


def hello(base: str = "a") -> RecordDict:
    values: dict[str, Any] = {"site": "south", "prints": {"base": base}, "known": False}
    return pack(Payload(values=values).to_bytes(), {"error": ""})


def failure(text: str, **header: bool) -> RecordDict:
    return pack(b"", {"error": text, **header})


class Stand:
    """A run with the site 'south', whose node answers at once."""

    def __init__(self) -> None:
        self.present = [NODE]
        self.asked = 0
        self.nodes = nodes.Nodes(
            cast(Any, SimpleNamespace(get_node_ids=lambda: self.present)),
            ["south"],
            {"base": "a"},
            greet=self._greet,
            forget=lambda _: None,
            registered=dict,
            join_timeout_s=60.0,
            look_s=0.0,
            limits=Limits(),
        )

    def _greet(self, _: int) -> str:
        self.asked += 1
        return str(self.asked)

    def look(self, answer: RecordDict) -> None:
        before = self.asked
        self.nodes.look()
        if self.asked > before:
            self.nodes.hear(message(answer, str(self.asked)))


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(nodes, "_AGAIN_S", 0.0)
    caplog.set_level(logging.WARNING)


@pytest.mark.parametrize(
    "refusal",
    [
        failure("RefusalError: no part in fedavg", refuses=True),
        hello(base="b"),
        pack(b"", {"error": 0}),
    ],
    ids=["by the site", "by the server", "of another version"],
)
def test_a_refused_site_is_asked_again_when_it_has_been_started_again_only(
    refusal: RecordDict, caplog: pytest.LogCaptureFixture
) -> None:
    stand = Stand()
    for _ in range(5):
        stand.look(refusal)
    assert stand.asked == 1
    (told,) = caplog.messages
    assert "node 7 does not take part: " in told
    assert told.endswith("; it is asked again when it has been started again")

    stand.present = []
    stand.look(refusal)
    stand.present = [NODE]
    stand.look(hello())
    assert stand.asked == 2
    assert stand.nodes.node("south") == NODE


def test_a_site_that_failed_is_asked_again_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The number under which its own log has the error differs each time."""
    stand = Stand()
    for number in range(5):
        stand.look(failure(f"KeyError at a.py:1 (reference {number} in the site's own errors.log)"))
    assert stand.asked == 5
    (told,) = caplog.messages
    assert told.endswith("; it is asked again every 0 s")
    stand.look(hello())
    assert stand.nodes.missing == []


def test_a_site_says_whether_it_refuses_or_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = SiteFile(name="south", folder=tmp_path / "s", allow=Allowed(methods=("fedsa",)))
    config: dict[str, Any] = {"model": {"name_or_path": "embedded"}, "method": {"name": "fedavg"}}
    header = Header("run fedavg 1", JOIN, 0, "s", 1, 0, -1).values()
    asked = pack(Payload(values={"config": config}).to_bytes(), header)
    _, told = respond(site, message(asked))
    assert told["error"].startswith("RefusalError: site 'south' takes no part")
    assert told["refuses"] is True

    def broken(*_: Any) -> None:
        raise KeyError("x")

    monkeypatch.setattr("fluvial.site_process.process.at_site", broken)
    _, told = respond(site, message(asked))
    assert told["error"].startswith("KeyError at ")
    assert told["refuses"] is False
