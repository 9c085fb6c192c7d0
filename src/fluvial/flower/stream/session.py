"""The server's end of a conversation with one site: turns in order, each delivered once.

A site has at most a window of turns without an answer, so each end has few messages that the other
may not have received. Numbers tell which: the site names the first turn whose answer it lacks when
it connects, and the server the first turn that it lacks; both send again from there.
"""

import hmac
import threading
from collections.abc import Callable

from fluvial.errors import WireError
from fluvial.federation.failures import unreadable
from fluvial.federation.transport import Arrival
from fluvial.flower.stream.seal import Seal, ServerSeal


class Connection:
    """One connection of a site to its session."""

    def __init__(self, cancel: Callable[[], object]) -> None:
        """Begin a connection, which `cancel` ends from any thread."""
        self.cancel = cancel
        self.problem: WireError | None = None
        """Violation that ends the connection."""


class Session:
    """One attempt at one site; see the module."""

    def __init__(
        self,
        number: int,
        token: bytes,
        arrived: Callable[[Arrival], None],
        seal: Seal,
        *,
        window: int = 1,
    ) -> None:
        """Begin with the first turn; `arrived` receives the turns and the failure of the exchange
        `number`.

        No turn is read while `window` turns have no answer.
        """
        self.number = number
        self._window = window
        self._token = token
        self._arrived = arrived
        self._seal = seal
        self._changed = threading.Condition()
        self._connection: Connection | None = None
        self._delivered = 0
        """Number of the last turn that arrived."""
        self._answered = 0
        """Number of the last turn that was answered."""
        self._answers: dict[int, bytes] = {}
        """Sealed answers that the site may not have, by the number of the turn."""
        self._greetings = int(isinstance(seal, ServerSeal))
        """Turns of the stream before the first of the conversation."""
        self._closed = False

    # -- the server half --------------------------------------------------------------------------

    def answer(self, turn: int, data: bytes) -> None:
        """Send the answer to a turn."""
        turn += self._greetings
        assert turn == self._answered + 1 <= self._delivered, "turns are answered in order"
        sealed = self._seal.seal(data)  # without the lock: turns arrive meanwhile
        with self._changed:
            self._answers[turn] = sealed
            self._answered = turn
            self._changed.notify_all()

    def overhead(self, size: int) -> int:
        """Return the bytes by which a sealed turn of `size` bytes is larger at most."""
        return self._seal.overhead(size)

    def close(self, *, aborted: Connection | None = None) -> None:
        """End the session; connections of the site are refused from now on.

        The connection `aborted` is ended by its own thread, with a code that says why.
        """
        with self._changed:
            self._closed = True
            connection = self._connection
            self._connection = None
            self._changed.notify_all()

        if connection is not None and connection is not aborted:
            connection.cancel()

    # -- connections of the site ------------------------------------------------------------------

    def admits(self, token: bytes) -> bool:
        """Return True if the token is that of this session, in a time that does not depend on
        it."""
        return hmac.compare_digest(token, self._token)

    def attach(self, connection: Connection, turn: int) -> int:
        """Take a connection in place of the one before, of a site that has the answers to all turns
        before `turn`; return the first turn that is wanted.

        Raises `WireError` for a turn whose answer is not to come, or is here no more.
        """
        with self._changed:
            if self._closed:
                raise WireError("stream: the session has ended")

            if turn not in (*self._answers, self._answered + 1):
                raise WireError(
                    f"stream: the site is at turn {turn}, the server at {self._answered}"
                )

            before = self._connection
            self._connection = connection
            wanted = self._delivered + 1
            self._changed.notify_all()

        if before is not None:
            before.cancel()
        return wanted

    def detach(self, connection: Connection) -> None:
        """Forget a connection that was lost."""
        with self._changed:
            if self._connection is connection:
                self._connection = None
                self._changed.notify_all()

    def next(self, connection: Connection) -> int | None:
        """Wait until another turn may be read; return its number, None once the connection or the
        session has ended."""
        with self._changed:
            while (
                self._connection is connection and self._delivered - self._answered >= self._window
            ):
                self._changed.wait()
            return self._delivered + 1 if self._connection is connection else None

    def deliver(self, connection: Connection, turn: int, sealed: bytes) -> bool:
        """Hand a turn to the server half; return False if another connection came meanwhile.

        Raises `WireError` for a turn that the other end has not sealed.
        """
        with self._changed:
            if self._connection is not connection:
                return False

            assert turn == self._delivered + 1, "`join` has read no other"
            if isinstance(self._seal, ServerSeal) and not self._seal.greeted:
                self._answers[turn] = self._seal.greet(sealed)
                self._answered = turn
                self._delivered = turn
                self._changed.notify_all()
                return True

            data = self._seal.open(sealed)
            self._delivered = turn
            # A site sends a turn once it has the answers to all that are out of its window.
            for number in [each for each in self._answers if each <= turn - self._window]:
                del self._answers[number]
            self._arrived(Arrival(self.number, data, final=False))

        return True

    def wait(self, connection: Connection, turn: int) -> bytes | None:
        """Return the sealed answer to a turn, None once the connection or the session has ended.

        Raises `WireError` where the site went on without it.
        """
        with self._changed:
            while self._connection is connection and self._answered < turn:
                self._changed.wait()
            if self._connection is not connection:
                return None
            if turn not in self._answers:
                raise WireError(f"stream: the site went on without the answer to turn {turn}")
            return self._answers[turn]

    def fail(self, problem: Exception, connection: Connection | None = None) -> None:
        """Make a violation the failure of the site, unless its connection was replaced since."""
        arrival = Arrival(self.number, b"", unreadable(problem))
        with self._changed:
            if self._closed or (connection is not None and self._connection is not connection):
                return

        self.close(aborted=connection)
        self._arrived(arrival)
