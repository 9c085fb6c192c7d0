"""FedCyBGD counts an answer once, and resumes a run that was killed inside a cycle."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from fluvial.federation.fleet import Fleet
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import norm
from tests.support.fedcybgd import FORMS, LAYERS, ONCE, Stage, differ, sent


def test_an_answer_that_comes_twice_counts_once(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods: list[dict[str, Any]] = [{}, {"order": "pairs", "parallel": 2}]
    tables = [stage.table(5, method, codec={"name": "int8"}, train=ONCE) for method in methods]
    undisturbed = [stage.play(table) for table in tables]
    ask = Fleet.ask

    def twice(self: Fleet, *args: Any, **rest: Any) -> Iterator[Any]:
        replies = list(ask(self, *args, **rest))
        return iter([*replies, *replies[::-1]])

    monkeypatch.setattr(Fleet, "ask", twice)
    for table, once in zip(tables, undisturbed, strict=True):
        again = stage.play(table)
        assert not differ(again.state, once.state)
        found, expected = (
            [
                (row["visit"], row["site"], row["loss"], row["share"])
                for record in each.rounds
                for row in record["visits"]
            ]
            for each in (again, once)
        )
        assert found == expected
        assert again.server.ledger.versions == once.server.ledger.versions


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize(
    ("form", "committed"),
    [("cache", True), ("low-bit, disk", False)],
    ids=["after a commit", "before it"],
)
def test_a_run_that_was_killed_within_a_cycle_goes_on_as_if_nothing_had_been(
    form: str, committed: bool, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = {"name": "int4", "error_feedback": True}
    table = stage.table(4, {"order": "latin", **FORMS[form]}, codec=codec, train=ONCE)
    straight = stage.play(table)
    folder = stage.folder()
    ask = Fleet.ask
    answers = 0

    def dies(self: Fleet, task: str, messages: Mapping[str, Payload], **rest: Any) -> Iterator[Any]:
        nonlocal answers
        if answers == 4 + 3 and committed:
            raise Killed
        for reply in ask(self, task, messages, **rest):
            answers += 1
            yield reply
            if answers == 4 + 3 and not committed:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Fleet, "ask", dies)
        with pytest.raises(Killed):
            stage.play(table, folder)

    resumed = stage.play(table, folder)
    assert [record["round"] for record in resumed.rounds] == [2]
    assert not differ(resumed.state, straight.state)
    assert resumed.server.state().to_bytes() == straight.server.state().to_bytes()
    assert [sent(resumed, way) for way in ("up", "down")] == [
        sent(straight, way) for way in ("up", "down")
    ]


def test_a_residual_is_kept_by_site_and_block(stage: Stage) -> None:
    table = stage.table(
        4, {"order": "latin"}, codec={"name": "int4", "error_feedback": True}, train=ONCE
    )
    played = stage.play(table)
    for client, site in enumerate(stage.oracle(table).sites):
        met = {(client + cycle) % LAYERS for cycle in range(2)}
        for block in range(LAYERS):
            kept = played.run.folder.store.read(site, f"residual-{block}")
            assert bool(kept.tensors) == (block in met)
            if kept.tensors:
                played.parts.blocks[block].layout.check(kept.tensors, "residual")
                assert norm(kept.tensors) > 0
