"""The site's end of the live stream, which survives lost connections.

The site opens the connection with its first turn, to the host of its own file, and encrypts it
exactly where its connection to the SuperLink is encrypted. After a loss it connects again, names
the first turn whose answer it lacks, and sends again the turns that the server does not have.
"""

import logging
import math
import queue
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from fluvial.errors import RefusalError, WireError
from fluvial.flower.stream.chunks import Welcome, cut, join
from fluvial.flower.stream.invitation import Invitation
from fluvial.flower.stream.listener import (
    ALIVE_OPTIONS,
    METHOD,
    SERVICE,
    SESSION_KEY,
    SIZE_OPTIONS,
    TOKEN_KEY,
    TURN_KEY,
)
from fluvial.flower.stream.seal import Seal, SiteSeal, Transparent
from fluvial.wire.payload import Limits

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
"""Seconds before the first attempt to connect again; each further pause is twice as long."""
_LONGEST_PAUSE_S = 5.0
"""Upper bound on that pause."""
_CLOSED_S = 15.0
"""Seconds after which a port that refuses connections means that the run's process has ended.

Its sessions end with the process, so a later one would not continue them."""
_FINAL = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
)
"""Codes after which another attempt would end in the same way."""
_OPTIONS = (
    *ALIVE_OPTIONS,
    *SIZE_OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),  # else a new channel inherits the pauses of the last
)


class StreamCaller:
    """Conversation of a site with the process of a run."""

    def __init__(
        self,
        invitation: Invitation,
        host: str,
        port: int,
        *,
        authority: bytes | None,
        limits: Limits | None = None,
        seal: Seal | None = None,
    ) -> None:
        """Connect to nothing yet; `authority` is the PEM certificate that signed the server's, None
        for plain text."""
        self._invitation = invitation
        self._host = host
        self._port = port
        self._authority = authority
        self._seal = seal or Transparent()
        max_bytes = (limits or Limits()).max_bytes
        self._max_bytes = max_bytes + self._seal.overhead(max_bytes)
        self._received = 0
        """Number of the last turn whose answer has come."""
        self._open: dict[int, bytes] = {}
        """Sealed turns without an answer, by number."""
        self._begun = 0
        """Number of the last turn of which at least a beginning was sent."""
        self._connection: _Connection | None = None
        self.within_s = math.inf
        """Seconds for which the site waits for an answer, whatever the server sends meanwhile."""

    def __enter__(self) -> "StreamCaller":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exchange(self, data: bytes) -> bytes:
        """Send a turn and return the server's answer; see `send` and `receive`."""
        self.send(data)
        return self.receive()

    def send(self, data: bytes) -> None:
        """Begin to send a turn.

        Raises as `receive`, where a connection is needed first.
        """
        if isinstance(self._seal, SiteSeal) and not self._seal.established:
            self._post(self._seal.hello())
            self._seal.greeted(self._collect())
        self._post(self._seal.seal(data))

    def receive(self) -> bytes:
        """Return the answer to the oldest turn whose answer was not received.

        Raises `RefusalError` if the run does not continue the conversation or cannot be reached,
        and `WireError` for bytes that break the protocol.
        """
        return self._seal.open(self._collect())

    def _post(self, sealed: bytes) -> None:
        """Begin to send a sealed turn."""
        turn = self._received + len(self._open) + 1
        self._open[turn] = sealed
        if self._connection is None:
            self._connected(self._patience())
        else:
            self._send(self._connection, turn)

    def _send(self, connection: "_Connection", turn: int) -> None:
        self._begun = max(self._begun, turn)
        connection.send(cut(turn, self._open[turn]))
        connection.expect(turn)

    def _collect(self) -> bytes:
        """Return the next sealed answer."""
        assert self._open, "every turn was answered"
        turn = self._received + 1
        patience = self._patience()

        while True:
            try:
                answer = self._connected(patience).receive(patience)
            except (grpc.RpcError, _EndedError) as error:
                self.close()
                patience.lose(error)
            except WireError:
                self.close()
                raise
            else:
                del self._open[turn]
                self._received = turn
                return answer

    def _patience(self) -> "_Patience":
        return _Patience(self._invitation.patience_s, self._host, self._port, self.within_s)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self, patience: "_Patience") -> "_Connection":
        """Return the connection, after a loss a new one, to which the turns without an answer have
        been given.

        Raises as `receive`.
        """
        while self._connection is None:
            try:
                self._connection = self._connect(patience)
                patience.found()
            except (grpc.RpcError, _EndedError) as error:
                self.close()
                patience.lose(error)

        return self._connection

    def _connect(self, patience: "_Patience") -> "_Connection":
        """Return a new connection.

        Raises `grpc.RpcError`, `_EndedError`, `WireError` and `RefusalError`.
        """
        first = self._received + 1
        connection = _Connection(self._channel(), self._invitation, first, self._max_bytes)
        try:
            wanted = connection.welcome(first, patience)
            if wanted > self._begun + 1:
                raise WireError(f"stream: the server has turn {wanted - 1}, which was not sent")
        except Exception:
            connection.close()
            raise

        for turn in self._open:
            if turn < wanted:
                connection.expect(turn)
            else:
                self._send(connection, turn)
        return connection

    def _channel(self) -> grpc.Channel:
        address = f"{self._host}:{self._port}"
        options: list[tuple[str, int]] = list(_OPTIONS)
        if self._host in ("127.0.0.1", "localhost", "[::1]"):
            options.append(("grpc.enable_http_proxy", 0))

        if self._authority is None:
            return grpc.insecure_channel(address, options=options)
        credentials = grpc.ssl_channel_credentials(root_certificates=self._authority)
        return grpc.secure_channel(address, credentials, options=options)


class _EndedError(Exception):
    """The server has ended the call without an error, before its answer was complete."""


class _Connection:
    """One gRPC call."""

    def __init__(
        self, channel: grpc.Channel, invitation: Invitation, turn: int, max_bytes: int
    ) -> None:
        """Begin with `turn`; an answer has at most `max_bytes`."""
        self._channel = channel
        self._max_bytes = max_bytes
        self._chunks: queue.SimpleQueue[Iterator[bytes] | None] = queue.SimpleQueue()
        self._expected: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        """Turns whose answers are to be read."""
        self._read: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        """The server's first message, then answers, or the error that ends them."""
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        metadata = (
            (SESSION_KEY, invitation.session),
            (TOKEN_KEY, invitation.token),
            (TURN_KEY, str(turn)),
        )
        self._answers: Any = call(self._requests(), metadata=metadata)
        threading.Thread(target=self._receive, daemon=True, name="stream: answers").start()

    def welcome(self, turn: int, patience: "_Patience") -> int:
        """Return the first turn that the server lacks, from its first message; raises as
        `receive`."""
        welcome = Welcome.from_bytes(self.receive(patience))
        if welcome.turn != turn:
            raise WireError(f"stream: the server is at turn {welcome.turn}, the site at {turn}")

        return welcome.wanted

    def send(self, chunks: Iterator[bytes]) -> None:
        """Send a message in a thread of gRPC's."""
        self._chunks.put(chunks)

    def expect(self, turn: int) -> None:
        """Read the answer to a turn when it comes, in a thread of its own, so that it is on the way
        while the site works."""
        self._expected.put(turn)

    def receive(self, patience: "_Patience") -> bytes:
        """Return the next answer.

        Raises `grpc.RpcError`, `_EndedError` and `WireError`, and `RefusalError` if it takes too
        long.
        """
        try:
            answer = self._read.get(timeout=patience.left_s())
        except queue.Empty:
            raise patience.late() from None

        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the call, then the threads that send and read."""
        self._answers.cancel()
        self._chunks.put(None)
        self._expected.put(None)
        self._channel.close()

    def _receive(self) -> None:
        try:
            first = next(self._answers, None)
            if first is None:
                raise _EndedError

            self._read.put(first)
            while (turn := self._expected.get()) is not None:
                answer = join(self._answers, turn=turn, max_bytes=self._max_bytes)
                if answer is None:
                    raise _EndedError
                self._read.put(answer)
        except (grpc.RpcError, _EndedError, WireError) as error:
            self._read.put(error)

    def _requests(self) -> Iterator[bytes]:
        while (chunks := self._chunks.get()) is not None:
            yield from chunks


class _Patience:
    """How long a site goes on without a connection, and without an answer, during one turn."""

    def __init__(self, patience_s: float, host: str, port: int, within_s: float) -> None:
        self._patience_s = patience_s
        self._within_s = within_s
        self._until_s = time.monotonic() + within_s
        self._address = host.strip("[]"), port
        self._pause_s = _FIRST_PAUSE_S
        self._lost_s: float | None = None
        """Time of the loss after which there was no connection."""
        self._closed_s: float | None = None
        """Time since which the port refuses connections."""

    def left_s(self) -> float | None:
        """Return the seconds that are left for the answer, None without a limit."""
        return None if self._until_s == math.inf else max(self._until_s - time.monotonic(), 0.0)

    def late(self) -> RefusalError:
        """Return the error of an answer that takes too long."""
        return RefusalError(
            f"the server has not answered a turn within {self._within_s:g} s, a limit that "
            "follows from the run's fleet.deadline_s"
        )

    def found(self) -> None:
        """Note that there is a connection."""
        self._lost_s = None
        self._closed_s = None

    def lose(self, error: Exception) -> None:
        """Pause before the next attempt; raise `RefusalError` where another makes no sense."""
        code = error.code() if isinstance(error, grpc.Call) else None
        reason = error.details() or "" if isinstance(error, grpc.Call) else "the call has ended"
        logger.warning("the live stream at %s:%d: %s", *self._address, reason)

        if code in _FINAL:
            raise RefusalError(
                f"the process of the run does not continue this conversation ({code.name})"
            )
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            raise RefusalError(
                "the certificate of the live stream is not valid for the address and the authority "
                "in this site's file; the site's log has the reason"
            )

        now = time.monotonic()
        self._lost_s = self._lost_s or now
        self._closed_s = (self._closed_s or now) if self._refuses() else None
        port = self._address[1]

        if self._closed_s is not None and now - self._closed_s > _CLOSED_S:
            raise RefusalError(
                f"port {port} of the live stream is closed: the process of the run has ended, or "
                "the site's file needs the address of the stream"
            )

        if now + self._pause_s - self._lost_s > self._patience_s:
            raise RefusalError(
                f"no connection to port {port} of the live stream within {self._patience_s:g} s; "
                "the site's log has the reason"
            )

        time.sleep(self._pause_s * random.uniform(0.5, 1.0))
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _refuses(self) -> bool:
        try:
            socket.create_connection(self._address, timeout=1.0).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False

        return False
