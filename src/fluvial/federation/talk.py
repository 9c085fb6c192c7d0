"""A task at a site, turn by turn: one answer, or a generator that exchanges turns with the server.

    def train(site, message):
        hidden = front(message)
        gradient = yield Payload({"hidden": hidden})    # a turn: the server half answers
        ...
        return Payload({"update": update})              # the reply

Locals live on between two turns. What the site keeps counts with the return. A task may go on while
the server works on its turns; answers come in the order of the turns:

    yield Ahead(first)
    yield Ahead(second)
    answer = yield Next()                               # that to the first
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal

import torch

from fluvial.errors import RefusalError, wrong_return
from fluvial.wire.payload import Payload


@dataclass(frozen=True)
class Ahead:
    """A turn after which the task goes on at once; the value of its `yield` is of no use."""

    turn: Payload


@dataclass(frozen=True)
class Next:
    """Request of a task for the oldest answer that it has not received."""


Talk = Generator[Payload | Ahead | Next, Payload, Payload]
"""Body of a conversation: it yields payloads to the server half, receives answers, and returns
the reply."""


def only_answer(answer: Payload | Talk, task: str = "the task") -> Payload:
    """Return the answer of a task that is not a conversation.

    Raises `RefusalError` for a conversation.
    """
    if isinstance(answer, Generator):
        raise RefusalError(
            "this task converses with the server, which asked for one answer only; its server half "
            "needs `Fleet.converse` in place of `Fleet.ask`"
        )

    return checked_answer(answer, task)


def checked_answer(answer: object, task: str, *, final: bool = True) -> Payload:
    """Return what a task returned, or yielded where that is not `final`.

    `task` names the task and its method. Raises `RefusalError` for what is no payload.
    """
    if not isinstance(answer, Payload):
        verb: Literal["returned", "yielded"] = "returned" if final else "yielded"
        raise RefusalError(wrong_return(task, answer, "a Payload", verb=verb))
    return answer


_NOTHING = Payload()


class Running:
    """A task that was begun; one step for each message, each of which may be in another thread."""

    def __init__(self, begin: Callable[[Payload], Payload | Talk]) -> None:
        self._begin = begin
        self._talk: Talk | None = None
        self._grad = True
        self._open = 0
        """Turns whose answer the task has not received."""

    def step(
        self, message: Payload, ahead: Callable[[Payload], None]
    ) -> tuple[Payload | None, bool]:
        """Go on with a message, the first or an answer, until the task waits or ends.

        `ahead` takes each turn after which the task goes on. Return the turn for whose answer it
        waits, None where that is a turn it sent ahead, and False; or its reply and True. Raises
        what the task raises, and `RefusalError` for a turn out of order.
        """
        # PyTorch's gradient mode belongs to a thread, and a task may yield under `no_grad`.
        torch.set_grad_enabled(self._grad)
        try:
            return self._step(message, ahead)
        finally:
            self._grad = torch.is_grad_enabled()

    def _step(
        self, message: Payload, ahead: Callable[[Payload], None]
    ) -> tuple[Payload | None, bool]:
        first = self._talk is None
        if self._talk is None:
            answer = self._begin(message)
            if not isinstance(answer, Generator):
                return answer, True

            self._talk = answer

        try:
            said = next(self._talk) if first else self._received(message)
            while isinstance(said, Ahead):
                self._open += 1
                ahead(said.turn)
                said = self._talk.send(_NOTHING)
        except StopIteration as end:
            if self._open:
                raise RefusalError("the task has ended before its turns were answered") from None
            return end.value, True

        if isinstance(said, Next):
            if not self._open:
                raise RefusalError("the task waits for an answer, and has sent no turn")
            return None, False

        if said is None or self._open:
            reason = "None is no turn" if said is None else "answers to turns ahead are due first"
            raise RefusalError(f"the task waits for the answer to a turn: {reason}")
        self._open = 1
        return said, False

    def _received(self, answer: Payload) -> Payload | Ahead | Next:
        """Return what the task yields after an answer."""
        assert self._talk is not None, "the task has begun"
        self._open -= 1
        return self._talk.send(answer)

    def close(self) -> None:
        """End a task between two steps, so that its `finally` blocks run."""
        if self._talk is not None:
            self._talk.close()


def conversed(
    begin: Callable[[Payload], Payload | Talk],
    message: Payload,
    send: Callable[[Payload], None],
    receive: Callable[[], Payload],
    task: str = "the task",
) -> Payload:
    """Return the reply of a task in this thread; `send` carries a turn to the server, and `receive`
    returns the next answer. `task` names the task and its method.

    Raises what the task, `send` and `receive` raise, after the task's `finally` blocks have run.
    """

    def checked(turn: object) -> None:
        send(checked_answer(turn, task, final=False))

    running = Running(begin)
    try:
        answer, final = running.step(message, checked)
        while not final:
            if answer is not None:
                checked(answer)
            answer, final = running.step(receive(), checked)
    finally:
        running.close()

    return checked_answer(answer, task)
