"""Fleets whose sites converse over the real live stream on loopback, and lines that break."""

import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from fluvial.errors import FluvialError
from fluvial.federation.config import FleetConfig
from fluvial.federation.fleet import Fleet
from fluvial.federation.sites import Site, Task
from fluvial.federation.talk import conversed
from fluvial.federation.transport import Arrival, Request
from fluvial.flower.stream.caller import StreamCaller
from fluvial.flower.stream.chunks import CHUNK
from fluvial.flower.stream.conversations import Conversations
from fluvial.flower.stream.invitation import Invitation
from fluvial.flower.stream.listener import (
    METHOD,
    SERVICE,
    SESSION_KEY,
    TOKEN_KEY,
    TURN_KEY,
    StreamListener,
)
from fluvial.flower.stream.seal import Seal
from fluvial.wire.payload import Limits, Payload, Value

Caller = Callable[[str, Invitation], StreamCaller]
"""Make the site's end of a conversation."""


ServerSeals = Callable[[str, bytes], Seal]
"""Make the server's end of a sealed session, from the name of the site and the session's token."""


class _Conversations(Conversations):
    """Conversations whose seals do not come from a server's folder."""

    seals: ServerSeals | None = None

    def _seal(self, site: str) -> Callable[[bytes], Seal] | None:
        return None if self.seals is None else partial(self.seals, site)


class OverStream:
    """Sites in threads: the first message and the reply go by a queue, the turns by the stream; see
    `Transport`."""

    def __init__(
        self,
        names: Sequence[str],
        open_site: Callable[[str], Site],
        tasks: Mapping[str, Task],
        listener: StreamListener,
        *,
        caller: Caller | None = None,
        seal: ServerSeals | None = None,
        patience_s: float = 10.0,
    ) -> None:
        self.sites = tuple(names)
        self.slots = len(names)
        self._open_site = open_site
        self._tasks = tasks
        self._caller = caller or (
            lambda _, invitation: StreamCaller(
                invitation, "127.0.0.1", invitation.port, authority=None
            )
        )
        self._conversations = _Conversations(
            listener, run=lambda: "run", num_sites=len(names), patience_s=patience_s
        )
        self._conversations.seals = seal
        self._replies: queue.SimpleQueue[Arrival] = queue.SimpleQueue()

    def send(self, request: Request) -> None:
        if request.turn:
            self._conversations.answer(request)
            return

        invitation = Invitation.read(self._conversations.invite(request))
        assert invitation is not None
        threading.Thread(target=self._work, args=(request, invitation), daemon=True).start()

    def next(self, timeout_s: float | None) -> Arrival | None:
        waited_s = 0.0
        while timeout_s is None or waited_s <= timeout_s:
            arrival = None
            with suppress(queue.Empty):
                arrival = self._replies.get_nowait()
            arrival = arrival or self._conversations.next(0.01)
            waited_s += 0.01
            if arrival is not None:
                return arrival

        return None

    def accept(self, arrival: Arrival) -> None:
        self._conversations.end(arrival.number)

    def drop(self, request: Request) -> None:
        self._conversations.end(request.number)

    def error_log(self, site: str) -> Path | None:
        return None

    def close(self) -> None:
        pass

    def state(self) -> dict[str, Value]:
        return {}

    def restore(self, state: dict[str, Any], round: int) -> None:
        pass

    def _work(self, request: Request, invitation: Invitation) -> None:
        site = self._open_site(request.site)
        try:
            with self._caller(request.site, invitation) as stream:
                reply = conversed(
                    partial(self._tasks[request.task], site),
                    Payload.from_bytes(request.data),
                    lambda turn: stream.send(turn.to_bytes()),
                    lambda: Payload.from_bytes(stream.receive()),
                )
        except FluvialError as problem:
            text = f"{type(problem).__name__}: {problem}"
            self._replies.put(Arrival(request.number, b"", text))
        else:
            self._replies.put(Arrival(request.number, reply.to_bytes()))


def stream_fleet(transport: OverStream, **settings: Any) -> Fleet:
    """Return a fleet over `transport`."""
    return Fleet(transport, FleetConfig.model_validate(settings))


class BreakingLine:
    """A port whose connections lead to another port and break after some bytes each."""

    def __init__(self, port: int, breaks_after: Sequence[int]) -> None:
        """`breaks_after` are bytes in both directions of the first connections, in their order;
        later ones do not break."""
        self.connections = 0
        """Connections so far."""
        self.seen = b""
        """All bytes that went through, in both directions."""
        self._port = port
        self._breaks_after = list(breaks_after)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Close the port and all connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Break all connections."""
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return

            number = self.connections
            self.connections += 1
            try:
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:  # the port behind this line is closed
                near.close()
                continue

            self._sockets += [near, far]
            left = [self._breaks_after[number] if number < len(self._breaks_after) else 2**62]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(one, other, left), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, left: list[int]) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                data = data[: max(left[0], 0)]
                left[0] -= len(data)
                self.seen += data
                sink.sendall(data)
                if left[0] <= 0:
                    break

        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


Arrivals = queue.SimpleQueue[Arrival]
WAIT_S = 20.0
LIMITS = Limits(max_bytes=3 * CHUNK)


def call_site(invitation: Invitation, port: int = 0, **settings: Any) -> StreamCaller:
    port = port or invitation.port
    return StreamCaller(invitation, "127.0.0.1", port, **({"authority": None} | settings))


class Desk:
    """A listener with one open session."""

    def __init__(
        self,
        listener: StreamListener,
        *,
        patience_s: float = 5.0,
        window: int = 1,
        seal: Callable[[bytes], Seal] | None = None,
    ) -> None:
        self.listener = listener
        self.arrivals: Arrivals = queue.SimpleQueue()
        self.invitation, self.session = listener.invite(
            7, self.arrivals.put, num_sites=2, patience_s=patience_s, window=window, seal=seal
        )

    def next(self) -> Arrival:
        return self.arrivals.get(timeout=WAIT_S)

    def serve(self, turns: int, change: Callable[[bytes], bytes] = lambda data: data) -> None:
        for turn in range(1, turns + 1):
            arrival = self.next()
            assert (arrival.number, arrival.problem, arrival.final) == (7, "", False)
            self.session.answer(turn, change(arrival.data))


@contextmanager
def in_thread(work: Callable[[], Any]) -> Iterator[queue.SimpleQueue[Any]]:
    """Run `work` beside the block; its result or error is in the queue."""
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put(work())
        except FluvialError as problem:
            done.put(problem)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield done
    thread.join(WAIT_S)
    assert not thread.is_alive()


def raw(
    invitation: Invitation,
    messages: Iterable[bytes],
    heard: threading.Semaphore | None = None,
    **changes: Any,
) -> tuple[list[bytes], "grpc.StatusCode | None"]:
    """Send messages as any program may; return the answers and the code of the end.

    `heard` is released once for each message of the server, its welcome included.
    """
    given = {
        SESSION_KEY: invitation.session,
        TOKEN_KEY: invitation.token,
        TURN_KEY: "1",
        **{key.replace("_", "-"): value for key, value in changes.items()},
    }
    metadata = [(key, value) for key, value in given.items() if value is not None]
    answers = []

    with grpc.insecure_channel(f"127.0.0.1:{invitation.port}") as channel:
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        answering = call(iter(messages), metadata=metadata, timeout=WAIT_S)
        try:
            for answer in answering:
                answers.append(answer)
                if heard is not None:
                    heard.release()
        except grpc.RpcError:
            return answers, answering.code()

    return answers, None


def chunk(turn: int, size: int, data: bytes, kind: int = 2) -> bytes:
    return struct.pack(">BIQ", kind, turn, size) + data
