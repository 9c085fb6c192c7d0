"""Sites and servers that break the order of micro-batches in flight."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fluvial.wire.payload import Payload
from tests.contract.test_hostile_site import LIAR, with_values
from tests.contract.test_hostile_split import (
    check_only_the_liar_fails,
    check_the_site_refuses,
    said,
    table_of,
)
from tests.support.conversations import Conversed, SharedRounds, shared_rounds


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedRounds]:
    """Rounds that the tests of this file share."""
    with shared_rounds(tmp_path_factory.mktemp("rounds")) as rounds:
        yield rounds


@pytest.fixture
def open_rounds(run_config: dict[str, Any], opened: SharedRounds) -> Callable[[str], Conversed]:
    """Return the rounds of a method, whose steps have four micro-batches, two of them in flight."""

    def of(method: str) -> Conversed:
        whole = table_of(run_config, method)
        micro = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        return opened.of(method, whole | {"train": whole["train"] | micro})

    return of


def out_of_order(seen: dict[tuple[str, int], bytes], kind: str) -> Iterator[tuple[str, bytes]]:
    """Yield other turns in the place of the second forward or backward one."""
    values = Payload.from_bytes(seen[kind, 2]).values
    assert values["micro"] == 1
    yield "the same number twice", seen[kind, 1]
    yield "the same number with other rows", with_values(seen[kind, 2], values | {"micro": 0})
    yield "one left out", seen[kind, 3]
    yield "a micro-batch that is not", with_values(seen[kind, 2], values | {"micro": 4})
    yield "another step", with_values(seen[kind, 2], values | {"step": 1})
    other = "backward" if kind == "forward" else "forward"
    yield "the other kind, too early", seen[other, 4]


@pytest.mark.parametrize("method", ["sequential", "client-batch", "hierarchical"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_site_that_breaks_the_order_fails_alone(
    method: str, kind: str, open_rounds: Callable[[str], Conversed]
) -> None:
    rounds = open_rounds(method)
    seen = said(rounds)
    assert check_only_the_liar_fails(rounds, kind, 2, out_of_order(seen, kind)) == 6


@pytest.mark.parametrize("method", ["client-batch", "hierarchical"])
def test_hidden_states_beyond_those_in_flight_are_that_sites_failure(
    method: str, open_rounds: Callable[[str], Conversed]
) -> None:
    """A third micro-batch in the place of the first gradient, with two in flight."""
    rounds = open_rounds(method)
    seen = said(rounds)
    lies = iter([("beyond", seen["forward", 3])])
    assert check_only_the_liar_fails(rounds, "backward", 1, lies) == 1


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("micro", [0, 2])
def test_a_site_refuses_the_answer_to_another_micro_batch(
    kind: str, micro: int, open_rounds: Callable[[str], Conversed]
) -> None:
    check_the_site_refuses(
        open_rounds("hierarchical, own ends"),
        kind,
        lambda answer: Payload(answer.tensors, answer.values | {"micro": micro}),
    )


def test_an_honest_round_has_two_micro_batches_in_flight(
    open_rounds: Callable[[str], Conversed],
) -> None:
    turns: list[tuple[str, int]] = []

    def note(site: str, kind: str, _: int, data: bytes) -> bytes:
        values = Payload.from_bytes(data).values
        if site == LIAR and values.get("step") == 0 and kind != "average":
            turns.append((kind, Payload.from_bytes(data).value("micro", int)))
        return data

    open_rounds("hierarchical").again(note)
    assert turns == [
        *[("forward", 0), ("forward", 1), ("backward", 0), ("forward", 2)],
        *[("backward", 1), ("forward", 3), ("backward", 2), ("backward", 3)],
    ]
