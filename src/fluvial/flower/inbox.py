"""Replies of a Flower grid as they arrive, so that a reply in upload does not delay the others.

Flower lists a reply as soon as its upload begins, returns it once, and then blocks until the upload
is complete: as long as a slow link takes, and for minutes if the site was killed. So threads wait
for uploads, and when all of them wait, another is started. Flower answers a second request for the
same reply with the error that there is no such message.
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
"""Most threads, and so the most uploads that are waited for at the same time."""
_STUCK_S = 1.0
"""Seconds after which a request of a thread counts as waiting for an upload."""
_GROUPS = 16
"""Requests over which all messages are divided; a reply in upload delays those of its request."""
_LATER = 0.1
"""Delay of a reply as a share of the time since the last reply or the last `watch`.

A request costs the SuperLink 20 ms, and after a long training a longer delay does no harm."""
_LATEST_S = 5.0
"""Upper bound on that delay."""
_AHEAD = 2
"""Replies that are held for callers of `next`, so that memory does not grow with the number of
sites."""
_BACKOFF_S = {"initial_backoff": 0.1, "backoff_cap": 0.5}
"""Times of the requests for the rest of a reply in upload. Flower's own are after 1, 3, 7, 15 s and
so on, which would notice an upload of eight seconds only after fifteen."""
_OBJECT_S = 5.0
"""Seconds for which a reply with a missing object may delay the others."""
_fetching = threading.Semaphore(2)
"""Right to hold the objects of a reply, for two threads at a time."""


class Inbox:
    """Queue of the replies to watched messages, filled by threads."""

    def __init__(self, grid: Grid, *, poll_s: float) -> None:
        self._grid = grid
        self._poll_s = poll_s
        self._watched: dict[str, None] = {}
        self._changed = threading.Condition()
        self._turn = count()
        self._moved = time.monotonic()
        """Time of the last `watch` or reply."""
        self._asking: dict[int, tuple[float, frozenset[str]]] = {}
        """Time and message numbers of each thread's open request to the grid, by thread."""
        self._held: set[str] = set()
        """Messages whose replies are in upload, for which a thread waits."""
        self._threads = 0
        self._found: queue.Queue[Message | Exception] = queue.Queue(_AHEAD)

    def watch(self, number: str) -> None:
        """Request the reply to a message until it arrives."""
        with self._changed:
            self._watched[number] = None
            self._moved = time.monotonic()
            self._changed.notify_all()

    def forget(self, number: str) -> None:
        """Request the reply to a message no longer."""
        with self._changed:
            self._watched.pop(number, None)

    def next(self, timeout: float) -> Message | None:
        """Return the next reply, None if there is none within `timeout` seconds.

        Two replies to one message are possible. Raises the errors of the grid.
        """
        self._keep_asking()
        try:
            found = self._found.get(timeout=timeout) if timeout > 0 else self._found.get_nowait()
        except queue.Empty:
            return None

        if isinstance(found, Exception):
            raise found

        return found

    def _keep_asking(self) -> None:
        """Start a thread if there is none, or if all threads wait for uploads."""
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
                    reply for reply in found if isinstance(reply, Exception) or self._counts(reply)
                ]
                self._changed.notify_all()

                if found:
                    self._moved = time.monotonic()

                later = min(_LATEST_S, _LATER * (time.monotonic() - self._moved))

            if not found:
                time.sleep(max(self._poll_s, later / groups))

            while found:
                self._found.put(found.pop(0))  # this thread holds no reply while it waits

    def _counts(self, reply: Message) -> bool:
        """Return True for a reply, False for the error that another thread has received it."""
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
    """Return the objects of a reply after its upload, for at most two replies at a time.

    This replaces Flower's `pull_objects`, which holds the objects of all replies in upload. A site
    uploads the last object last, and it is small. Raises `ObjectPullError` if an object does not
    arrive.
    """
    *first, last = object_ids
    contents: dict[str, bytes] = pull_objects([last], pull_object_fn, **_BACKOFF_S)

    with _fetching, suppress(ObjectPullError):  # an object is late, or will never arrive
        contents |= pull_objects(first, pull_object_fn, max_time=_OBJECT_S, **_BACKOFF_S)
        return contents

    contents |= pull_objects(first, pull_object_fn, **_BACKOFF_S)
    return contents
