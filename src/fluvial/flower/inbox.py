"""Replies of a Flower grid as they arrive, so that one which is still being uploaded holds up
nobody else.

Flower shows a reply as soon as its upload begins, hands it out once, and then waits for the rest of
it: as long as a thin link takes, and for minutes where the site died. So the waiting is done in
threads, and where all of them wait, another goes on asking. To whoever asks second for the same
reply Flower says that there is no such message.
"""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_objects

_THREADS = 32
"""At most; as many uploads can be waited for at the same time."""
_STUCK_S = 1.0
"""A thread that has asked for this long waits for an upload."""
_GROUPS = 16
"""Questions in which all messages are asked for; a reply that is being uploaded holds up what came
in one answer."""
_LATER = 0.1
"""A reply is noticed later by at most this share of the time since the last one, or since the last
was watched for: a question costs the SuperLink 20 ms, and answers to a long training are no more
urgent than to a short one."""
_LATEST_S = 5.0
"""And by at most so much."""
_AHEAD = 2
"""Replies that are held for whoever calls `next`, so that memory does not grow with the number of
sites."""
_ASK_S = {"initial_backoff": 0.1, "backoff_cap": 0.5}
"""When the rest of a reply that is being uploaded is asked for. Flower asks after 1, 3, 7, 15 s and
so on, so that an upload of eight seconds is noticed in the fifteenth."""
_PART_S = 5.0
"""For which a reply with a missing part may hold up the others."""
_fetching = threading.Semaphore(2)


class Inbox:
    """Asks for the replies to the messages that are watched."""

    def __init__(self, grid: Grid, *, poll_s: float) -> None:
        self._grid = grid
        self._poll_s = poll_s
        self._watched: dict[str, None] = {}
        self._changed = threading.Condition()
        self._turn = count()
        self._moved = time.monotonic()
        """When a message was last watched for, or a reply came."""
        self._asking: dict[int, tuple[float, frozenset[str]]] = {}
        """By thread, since when it has been waiting for an answer of the grid, and what it asked
        for."""
        self._held: set[str] = set()
        """Messages whose replies a thread has that is still waiting for the rest."""
        self._threads = 0
        self._found: queue.Queue[Message | Exception] = queue.Queue(_AHEAD)

    def watch(self, number: str) -> None:
        """Ask for the reply to this message until it is there."""
        with self._changed:
            self._watched[number] = None
            self._moved = time.monotonic()
            self._changed.notify_all()

    def forget(self, number: str) -> None:
        """Ask no more."""
        with self._changed:
            self._watched.pop(number, None)

    def next(self, timeout: float) -> Message | None:
        """A reply, of which there may be two to one message; None if none came in time. Raises what
        the grid raised."""
        self._keep_asking()
        try:
            found = self._found.get(timeout=timeout) if timeout > 0 else self._found.get_nowait()
        except queue.Empty:
            return None

        if isinstance(found, Exception):
            raise found

        return found

    def _keep_asking(self) -> None:
        """Start a thread where none asks: at first, and when all wait for uploads."""
        now = time.monotonic()
        with self._changed:
            waiting = sum(now - since > _STUCK_S for since, _ in self._asking.values())
            if self._watched and waiting == self._threads < _THREADS:
                self._threads += 1
                threading.Thread(
                    target=self._ask, daemon=True, name=f"inbox-{self._threads}"
                ).start()

    def _ask(self) -> None:
        own = threading.get_ident()
        while True:
            with self._changed:
                while not (
                    numbers := [number for number in self._watched if number not in self._held]
                ):
                    self._changed.wait()

                groups = min(_GROUPS, len(numbers))
                mine = numbers[next(self._turn) % groups :: groups]
                self._asking[own] = time.monotonic(), frozenset(mine)

            found: list[Message | Exception]
            try:
                found = list(self._grid.pull_messages(mine))
            except Exception as error:
                found = [error]

            with self._changed:
                del self._asking[own]
                self._held.difference_update(mine)
                found = [
                    each for each in found if isinstance(each, Exception) or self._counts(each)
                ]
                self._changed.notify_all()

                if found:
                    self._moved = time.monotonic()

                later = min(_LATEST_S, _LATER * (time.monotonic() - self._moved))

            if not found:
                time.sleep(max(self._poll_s, later / groups))

            while found:
                self._found.put(found.pop(0))  # and not held here while the next is waited for

    def _counts(self, reply: Message) -> bool:
        """Whether this is the reply to a message, and not the news that another thread has it."""
        number = reply.metadata.reply_to_message_id
        if reply.has_error() and reply.error.code == ErrorCode.MESSAGE_UNAVAILABLE:
            if number not in self._watched:
                return False
            if any(number in numbers for _, numbers in self._asking.values()):
                self._held.add(number)
                return False

        self._watched.pop(number, None)
        return True


def pull_complete(
    object_ids: list[str], pull_object_fn: Callable[[str], bytes]
) -> dict[str, bytes]:
    """The parts of a reply once it has been uploaded, and of two replies at a time.

    Flower's own `pull_objects`, whose place this takes, holds the parts of all replies that are on
    their way. A site uploads the last part last, and it is small. Raises `ObjectPullError` if a
    part does not come.
    """
    *parts, last = object_ids
    found: dict[str, bytes] = pull_objects([last], pull_object_fn, **_ASK_S)

    with _fetching, suppress(ObjectPullError):  # one part is late, or will never come
        found |= pull_objects(parts, pull_object_fn, max_time=_PART_S, **_ASK_S)
        return found

    found |= pull_objects(parts, pull_object_fn, **_ASK_S)
    return found
