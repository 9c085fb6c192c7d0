"""The site's end of the live stream, which survives lost connections.

The site opens the connection with its first turn, to the host of its own file, and encrypts it
exactly where its connection to the SuperLink is encrypted. After a loss it connects again, names
its turn, and sends the turn again only where the server does not have it.
"""

import logging
import queue
import random
import socket
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
        self._turn = 0
        self._connection: _Connection | None = None

    def __enter__(self) -> "StreamCaller":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exchange(self, data: bytes) -> bytes:
        """Send a turn and return the server's answer.

        Raises `RefusalError` if the run does not continue the conversation or cannot be reached,
        and `WireError` for bytes that break the protocol.
        """
        if isinstance(self._seal, SiteSeal) and not self._seal.established:
            self._seal.greeted(self._carry(self._seal.hello()))
        return self._seal.open(self._carry(self._seal.seal(data)))

    def _carry(self, sealed: bytes) -> bytes:
        """Send a sealed turn and return the sealed answer."""
        self._turn += 1
        patience = _Patience(self._invitation.patience_s, self._host, self._port)
        sent = False

        while True:
            try:
                connection = self._connected(patience, sent=sent)
                if connection.wanted:
                    sent = True  # at least a beginning of it
                    connection.send(cut(self._turn, sealed))

                answer = join(connection.answers, turn=self._turn, max_bytes=self._max_bytes)
                if answer is None:
                    raise _EndedError

                connection.wanted = True  # the next turn
                return answer
            except (grpc.RpcError, _EndedError) as error:
                self.close()
                patience.lose(error)
            except WireError:
                self.close()
                raise

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self, patience: "_Patience", *, sent: bool) -> "_Connection":
        """Return the connection, a new one after a loss.

        Raises `grpc.RpcError`, `_EndedError` and `WireError`.
        """
        if self._connection is None:
            self._connection = _Connection(self._channel(), self._invitation, self._turn)
            wanted = self._connection.welcome(self._turn)
            if not wanted and not sent:
                raise WireError(f"stream: the server has turn {self._turn}, which was not sent")
            patience.found()

        return self._connection

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

    def __init__(self, channel: grpc.Channel, invitation: Invitation, turn: int) -> None:
        self.wanted = True
        """True where the server waits for the turn, False where the site waits for its answer."""
        self._channel = channel
        self._chunks: queue.SimpleQueue[Iterator[bytes] | None] = queue.SimpleQueue()
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        metadata = (
            (SESSION_KEY, invitation.session),
            (TOKEN_KEY, invitation.token),
            (TURN_KEY, str(turn)),
        )
        self.answers: Any = call(self._requests(), metadata=metadata)

    def welcome(self, turn: int) -> bool:
        """Read the first message of the server; return True where it waits for the turn."""
        first = next(self.answers, None)
        if first is None:
            raise _EndedError

        welcome = Welcome.from_bytes(first)
        if welcome.turn != turn:
            raise WireError(f"stream: the server is at turn {welcome.turn}, the site at {turn}")

        self.wanted = welcome.wanted
        return welcome.wanted

    def send(self, chunks: Iterator[bytes]) -> None:
        """Send a message while its answer is awaited."""
        self._chunks.put(chunks)

    def close(self) -> None:
        """End the call, then the thread that sends."""
        self.answers.cancel()
        self._chunks.put(None)
        self._channel.close()

    def _requests(self) -> Iterator[bytes]:
        while (chunks := self._chunks.get()) is not None:
            yield from chunks


class _Patience:
    """How long a site goes on without a connection, during one turn."""

    def __init__(self, patience_s: float, host: str, port: int) -> None:
        self._patience_s = patience_s
        self._address = host.strip("[]"), port
        self._pause_s = _FIRST_PAUSE_S
        self._lost_s: float | None = None
        """Time of the loss after which there was no connection."""
        self._closed_s: float | None = None
        """Time since which the port refuses connections."""

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
