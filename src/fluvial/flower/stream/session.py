"""The server's end of a conversation with one site: turns in order, each delivered once.

A site and its server take turns, so each end has at most one message that the other may not have
received. The number of the turn tells which: the site names its turn when it connects, and the
server then asks for the turn, or sends its answer again.
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


class Session:
    """One attempt at one site; see the module."""

    def __init__(
        self, number: int, token: bytes, arrived: Callable[[Arrival], None], seal: Seal
    ) -> None:
        """Begin with the first turn; `arrived` receives the turns and the failure of the exchange
        `number`."""
        self.number = number
        self._token = token
        self._arrived = arrived
        self._seal = seal
        self._changed = threading.Condition()
        self._connection: Connection | None = None
        self._delivered = 0
        """Number of the last turn that arrived."""
        self._answered = 0
        """Number of the last turn that was answered."""
        self._answer = b""
        """Sealed answer to that turn."""
        self._greetings = int(isinstance(seal, ServerSeal))
        """Turns of the stream before the first of the conversation."""
        self._closed = False
        self._early: Arrival | None = None
        """End of the exchange that came while the server had a turn to answer."""

    # -- the server half --------------------------------------------------------------------------

    def answer(self, turn: int, data: bytes) -> None:
        """Send the answer to a turn, or report the failure that came before."""
        turn += self._greetings
        with self._changed:
            assert turn == self._delivered == self._answered + 1, "turns are answered in order"
            early = self._early
            if early is None:
                self._answer = self._seal.seal(data)
                self._answered = turn
                self._changed.notify_all()

        if early is not None:
            self._arrived(early)

    def postpone(self, arrival: Arrival) -> bool:
        """Keep the end of the exchange until its open turn is answered; return False where the
        server waits for the site, so that the end counts now."""
        with self._changed:
            if self._answered == self._delivered:
                return False

            reason = arrival.problem or "it answered the task while its turn had no answer"
            self._early = Arrival(arrival.number, arrival.data, reason)
            return True

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

    def attach(self, connection: Connection, turn: int) -> bool:
        """Take a connection in place of the one before; return True if the turn is wanted, False if
        only its answer is.

        Raises `WireError` for a turn that can be neither.
        """
        with self._changed:
            if self._closed:
                raise WireError("stream: the session has ended")

            wanted = turn == self._delivered + 1 and self._answered == self._delivered
            if not wanted and (turn != self._delivered or turn == 0):
                raise WireError(
                    f"stream: the site is at turn {turn}, the server at {self._delivered}"
                )

            before = self._connection
            self._connection = connection
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

    def deliver(self, connection: Connection, turn: int, sealed: bytes) -> bool:
        """Hand a turn to the server half; return False if another connection came meanwhile.

        Raises `WireError` for a turn that the other end has not sealed.
        """
        with self._changed:
            if self._connection is not connection:
                return False

            assert turn == self._delivered + 1, "`join` has read no other"
            if isinstance(self._seal, ServerSeal) and not self._seal.greeted:
                self._answer = self._seal.greet(sealed)
                self._answered = turn
                self._delivered = turn
                return True

            data = self._seal.open(sealed)
            self._delivered = turn

        self._arrived(Arrival(self.number, data, final=False))
        return True

    def wait(self, connection: Connection, turn: int) -> bytes | None:
        """Return the sealed answer to a turn, None once the connection or the session has ended."""
        with self._changed:
            while self._connection is connection and self._answered != turn:
                self._changed.wait()
            return self._answer if self._connection is connection else None

    def fail(self, problem: Exception, connection: Connection | None = None) -> None:
        """Make a violation the failure of the site, unless its connection was replaced since."""
        arrival = Arrival(self.number, b"", unreadable(problem))
        with self._changed:
            if self._closed or (connection is not None and self._connection is not connection):
                return

        self.close(aborted=connection)
        if not self.postpone(arrival):
            self._arrived(arrival)
