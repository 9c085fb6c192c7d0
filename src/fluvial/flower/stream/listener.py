"""The server's end of the live stream: one port, at which sites continue their conversations.

The port is opened with the first message whose task may converse. A caller names its session, its
token and its turn in the metadata of the call, which is checked before anything is read.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from fluvial.errors import ConfigError, WireError
from fluvial.federation.transport import Arrival
from fluvial.flower.stream.chunks import MAX_CHUNK, MAX_TURN, Welcome, cut, join
from fluvial.flower.stream.invitation import Invitation, is_session
from fluvial.flower.stream.place import Place
from fluvial.flower.stream.seal import Seal, Transparent
from fluvial.flower.stream.session import Connection, Session
from fluvial.wire.payload import Limits

logger = logging.getLogger(__name__)

SERVICE = "fluvial.Stream"
METHOD = "Turns"
SESSION_KEY = "fluvial-session"
TOKEN_KEY = "fluvial-token-bin"
TURN_KEY = "fluvial-turn"
REFUSAL = (
    "the run has no such session: its process has ended or was started again, or it no longer "
    "waits for this task"
)
"""Answer to a caller without a session; the same for an unknown session and a wrong token."""
_ALIVE_MS = 20_000
"""Milliseconds after which a silent connection is tested, and again until it counts as lost."""
ALIVE_OPTIONS = (
    ("grpc.keepalive_time_ms", _ALIVE_MS),
    ("grpc.keepalive_timeout_ms", _ALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _ALIVE_MS // 2),
)
"""Options of both ends by which a lost connection is noticed."""
SIZE_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_CHUNK),
    ("grpc.max_send_message_length", MAX_CHUNK),
    ("grpc.max_metadata_size", 8192),
)
"""Options of both ends by which gRPC refuses a larger message before it allocates it."""
_OPTIONS = (
    *ALIVE_OPTIONS,
    *SIZE_OPTIONS,
    ("grpc.so_reuseport", 0),  # a second run must not share the port without notice
    ("grpc.max_concurrent_streams", 16),
)
_SPARE = 16
"""Calls beyond one old and one new connection of each site that are served at the same time."""


class StreamListener:
    """The port of a run's process and the sessions at it, shared by all fleets of the run."""

    def __init__(self, place: Place | None = None, *, limits: Limits | None = None) -> None:
        self._place = place or Place()
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._server: grpc.Server | None = None
        self._port = 0

    def __enter__(self) -> "StreamListener":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """Port at which the stream listens, 0 while it is not open."""
        return self._port

    def invite(
        self,
        number: int,
        arrived: Callable[[Arrival], None],
        *,
        num_sites: int,
        patience_s: float,
        window: int = 1,
        seal: Callable[[bytes], Seal] | None = None,
    ) -> tuple[Invitation, Session]:
        """Open a session for the exchange `number`, whose site may have `window` turns without an
        answer, and the port if it is not open yet.

        Raises `ConfigError` if the port cannot be opened.
        """
        with self._lock:
            if self._server is None:
                self._server, self._port = self._open(num_sites)

            invitation = Invitation.make(self._port, patience_s, sealed=seal is not None)
            here = Transparent() if seal is None else seal(invitation.token)
            session = Session(number, invitation.token, arrived, here, window=window)
            self._sessions[invitation.session] = session

        return invitation, session

    def end(self, invitation: Invitation) -> None:
        """End a session."""
        with self._lock:
            session = self._sessions.pop(invitation.session, None)
        if session is not None:
            session.close()

    def close(self) -> None:
        """End all sessions and close the port."""
        with self._lock:
            server = self._server
            sessions = list(self._sessions.values())
            self._sessions.clear()
            self._server = None
            self._port = 0

        for session in sessions:
            session.close()
        if server is not None:
            server.stop(None).wait()

    def _open(self, num_sites: int) -> tuple[grpc.Server, int]:
        calls = 2 * num_sites + _SPARE
        server = grpc.server(
            ThreadPoolExecutor(calls, thread_name_prefix="stream"),
            options=_OPTIONS,
            maximum_concurrent_rpcs=calls,
        )
        handler = grpc.stream_stream_rpc_method_handler(self._turns)  # bytes in, bytes out
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),)
        )
        place = self._place
        address = f"{place.host}:{place.port}"

        try:
            if place.certificate is None or place.key is None:
                port = server.add_insecure_port(address)
            else:
                pair = place.key.read_bytes(), place.certificate.read_bytes()
                port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"the live stream cannot listen on {address}: {error}; another run that converses "
                "may use the port: wait for its end, or set stream_port in server.toml"
            ) from None

        if port == 0:
            raise ConfigError(
                f"the live stream cannot listen on {address}; another program uses the port, or "
                "the host is no address of this machine; set stream_port in server.toml"
            )

        server.start()
        logger.info("the live stream listens on %s:%d", place.host, port)
        return server, port

    def _turns(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Carry the turns of one connection."""
        session, turn = self._admit(context)
        connection = Connection(context.cancel)
        if not context.add_callback(lambda: session.detach(connection)):
            return

        try:
            wanted = session.attach(connection, turn)
        except WireError as problem:
            session.fail(problem)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(problem))

        yield Welcome(turn, wanted).to_bytes()
        threading.Thread(
            target=self._receive,
            args=(session, connection, requests),
            daemon=True,
            name="stream: turns",
        ).start()

        try:
            while (answer := session.wait(connection, turn)) is not None:
                yield from cut(turn, answer)
                turn += 1
        except WireError as problem:
            connection.problem = problem
            session.fail(problem, connection)

        if connection.problem is not None:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(connection.problem))

    def _receive(self, session: Session, connection: Connection, requests: Iterator[bytes]) -> None:
        """Read and deliver turns, while answers leave, until the connection ends."""
        max_bytes = self._limits.max_bytes + session.overhead(self._limits.max_bytes)
        try:
            while (turn := session.next(connection)) is not None:
                sealed = join(requests, turn=turn, max_bytes=max_bytes)
                if sealed is None or not session.deliver(connection, turn, sealed):
                    return
        except WireError as problem:
            connection.problem = problem
            session.fail(problem, connection)
        except grpc.RpcError:
            return  # the connection is lost
        finally:
            session.detach(connection)

    def _admit(self, context: grpc.ServicerContext) -> tuple[Session, int]:
        """Return the session and turn of a caller, or end its call."""
        given: dict[str, str | bytes] = dict(context.invocation_metadata())
        name = given.get(SESSION_KEY, "")
        token = given.get(TOKEN_KEY, b"")
        turn = given.get(TURN_KEY, "")
        session = None

        if isinstance(name, str) and is_session(name) and isinstance(token, bytes):
            with self._lock:
                session = self._sessions.get(name)
        if session is None or not isinstance(token, bytes) or not session.admits(token):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, REFUSAL)
            raise AssertionError("`abort` raises")

        # A connection that breaks in its headers gives a call with the first of them only.
        if TURN_KEY not in given:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the call is not complete")

        # Another text is turn 0, which `attach` refuses as this site's failure.
        written = isinstance(turn, str) and len(turn) <= 10 and turn.isascii() and turn.isdigit()
        number = int(turn) if written else 0
        return session, number if number <= MAX_TURN else 0
