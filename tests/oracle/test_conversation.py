"""A conversation gives, to the bit, the result of the same computation in one task."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import local_fleet
from fluvial.federation.sites import Site
from fluvial.federation.store import StateStore
from fluvial.federation.talk import Talk
from fluvial.federation.turns import Idle, Turn
from fluvial.seeds import generator
from fluvial.wire.payload import Payload
from tests.support.bare_sites import bare_site

pytestmark = pytest.mark.oracle

SITES = ("north", "south", "west")
STEPS = 3
WIDTH = 16
RATE = 0.1


def drawn(*shape: int, purpose: str) -> Tensor:
    return torch.randn(shape, generator=generator(0, purpose))


def front() -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        layer.weight.copy_(drawn(WIDTH, WIDTH, purpose="front"))
        layer.bias.zero_()
    return layer


def loss_at_server(hidden: Tensor) -> Tensor:
    """Loss of what the server computes from `hidden` (batch, WIDTH)."""
    return (torch.tanh(hidden) @ drawn(WIDTH, WIDTH, purpose="back")).square().mean()


def descend(layer: nn.Linear) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            assert parameter.grad is not None
            parameter.sub_(RATE * parameter.grad)
            parameter.grad = None


def weights(layer: nn.Linear) -> Payload:
    return Payload({name: tensor.detach() for name, tensor in layer.named_parameters()})


def whole(site: Site, message: Payload) -> Payload:
    """Task: all of the computation at the site."""
    layer = front()
    for step in range(STEPS):
        hidden = layer(drawn(4, WIDTH, purpose=f"{site.name} {step}"))
        loss_at_server(hidden).backward()  # type: ignore[no-untyped-call]
        descend(layer)

    return weights(layer)


def split(site: Site, message: Payload) -> Talk:
    """Task: the layer at the site, and the loss with its gradient from the server."""
    layer = front()
    for step in range(STEPS):
        hidden = layer(drawn(4, WIDTH, purpose=f"{site.name} {step}"))
        answer = yield Payload({"hidden": hidden.detach()})
        hidden.backward(answer.tensor("gradient"))
        descend(layer)

    return weights(layer)


def gradient(hidden: Tensor) -> Payload:
    received = hidden.clone().requires_grad_()
    loss_at_server(received).backward()  # type: ignore[no-untyped-call]
    assert received.grad is not None
    return Payload({"gradient": received.grad})


def play(task: Any, *, together: bool = False) -> dict[str, Payload]:
    """Return the replies of all sites in process; see `replies_of`."""
    fleet = local_fleet(SITES, lambda name: bare_site(name, StateStore(None)), {"train": task})
    return replies_of(fleet, together=together)


def replies_of(fleet: Fleet, *, together: bool = False) -> dict[str, Payload]:
    """Return the replies of all sites; `together` answers turns only when all sites wait."""
    messages = dict.fromkeys(SITES, Payload())
    waiting: list[Turn[Tensor]] = []
    replies = {}

    for event in fleet.converse(
        "train",
        messages,
        round=1,
        hear=lambda _, payload: payload.tensor("hidden"),
        read=lambda _, payload: payload,
    ):
        if isinstance(event, Turn):
            waiting.append(event)
        elif not isinstance(event, Idle):
            replies[event.site] = event.content

        if isinstance(event, Idle) or not together:
            for turn in waiting:
                turn.answer(gradient(turn.content))
            waiting.clear()

    return replies


@pytest.mark.parametrize("together", [False, True])
def test_a_task_of_several_exchanges_equals_the_same_in_one(together: bool) -> None:
    wanted = play(whole)
    found = play(split, together=together)
    assert wanted.keys() == found.keys() == set(SITES)

    for site in SITES:
        assert wanted[site].to_bytes() == found[site].to_bytes()
    assert wanted["north"].to_bytes() != wanted["south"].to_bytes()
