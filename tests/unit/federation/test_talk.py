"""Answers of a task's turns: a turn or a reply of another type is a failure that names the task."""

from typing import Any

import pytest

from fluvial.errors import ClientError
from fluvial.federation.sites import Site
from fluvial.federation.turns import Turn
from fluvial.wire.payload import Payload
from tests.support.bare_sites import NAMES, site_fleet


@pytest.mark.parametrize(
    ("turn", "reply", "message"),
    [
        (3, Payload(), "task 'work' of method 'bare' yielded int; expected a Payload"),
        (Payload(), 3, "task 'work' of method 'bare' returned int; expected a Payload"),
        (Payload(), None, "task 'work' of method 'bare' returned NoneType; expected a Payload"),
    ],
)
def test_a_wrong_turn_or_reply_is_named_and_the_task_is_closed(
    turn: Any, reply: Any, message: str
) -> None:
    closed = []

    def task(site: Site, _: Payload) -> Any:
        try:
            yield turn
            return reply
        finally:
            closed.append(site.name)

    fleet = site_fleet(task, workers=1)
    messages = {NAMES[0]: Payload()}
    events = fleet.converse("work", messages, round=1, hear=lambda *_: None, read=lambda *_: None)

    def play() -> None:
        for event in events:
            if isinstance(event, Turn):
                event.answer(Payload())

    with pytest.raises(ClientError, match=message):
        play()

    assert closed == [NAMES[0]]
