"""A task at a site, turn by turn: one answer, or a generator that exchanges turns with the server.

    def train(site, message):
        hidden = front(message)
        gradient = yield Payload({"hidden": hidden})    # a turn: the server half answers
        ...
        return Payload({"update": update})              # the reply

Locals live on between two turns. What the site keeps counts with the return.
"""

from collections.abc import Callable, Generator
from typing import Literal

import torch

from fluvial.errors import RefusalError, wrong_return
from fluvial.wire.payload import Payload

Talk = Generator[Payload, Payload, Payload]
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


class Running:
    """A task that was begun; one step for each message, each of which may be in another thread."""

    def __init__(self, begin: Callable[[Payload], Payload | Talk]) -> None:
        self._begin = begin
        self._talk: Talk | None = None
        self._grad = True

    def step(self, message: Payload) -> tuple[Payload, bool]:
        """Return the answer to a message, and whether it is the last; raises what the task
        raises."""
        # PyTorch's gradient mode belongs to a thread, and a task may yield under `no_grad`.
        torch.set_grad_enabled(self._grad)
        try:
            return self._step(message)
        finally:
            self._grad = torch.is_grad_enabled()

    def _step(self, message: Payload) -> tuple[Payload, bool]:
        first = self._talk is None
        if self._talk is None:
            answer = self._begin(message)
            if not isinstance(answer, Generator):
                return answer, True

            self._talk = answer

        try:
            turn = next(self._talk) if first else self._talk.send(message)
        except StopIteration as end:
            return end.value, True

        return turn, False

    def close(self) -> None:
        """End a task between two steps, so that its `finally` blocks run."""
        if self._talk is not None:
            self._talk.close()


def conversed(
    begin: Callable[[Payload], Payload | Talk],
    message: Payload,
    exchange: Callable[[Payload], Payload],
    task: str = "the task",
) -> Payload:
    """Return the reply of a task in this thread; `exchange` carries a turn to the server and
    returns its answer. `task` names the task and its method.

    Raises what the task and `exchange` raise, after the task's `finally` blocks have run.
    """
    running = Running(begin)
    try:
        answer, final = running.step(message)
        while not final:
            turn = checked_answer(answer, task, final=False)
            answer, final = running.step(exchange(turn))
    finally:
        running.close()

    return checked_answer(answer, task)
