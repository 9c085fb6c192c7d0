"""How fast turns travel over the live stream, between two processes over loopback.

    python -m benchmarks.stream [--quick] [--out FILE.json]

A site sends a turn of random bytes and receives an answer of the same size; one exchange is both. A
site of a deployment is a process of its own, and so it is here. Three kinds of stream: in plain
text as in the simulation, with TLS, and with TLS and the secure channel inside it as in a
deployment. Flower's own messages are compared from their stored benchmark, which was another run.
The rounds of the kinds alternate, so that all of them meet the same machine; a figure
is the median over the rounds. `MB/s` counts both directions.
"""

import json
import multiprocessing
import os
import queue
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Literal

from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show
from fluvial.federation.transport import Arrival
from fluvial.flower import certificates
from fluvial.flower.stream.caller import StreamCaller
from fluvial.flower.stream.invitation import Invitation
from fluvial.flower.stream.listener import StreamListener
from fluvial.flower.stream.place import Place
from fluvial.flower.stream.seal import ServerSeal, SiteSeal, terms_of
from fluvial.wire.channel import Identity, PublicIdentity, ServerHandshake, SiteHandshake

RESULTS = Path(__file__).parents[1] / "results"
Kind = Literal["plain text", "TLS", "TLS and channel"]
KINDS: tuple[Kind, ...] = ("plain text", "TLS", "TLS and channel")
SIZES = {"100 B": 100, "1 MB": 10**6, "16 MB": 16 * 10**6}
FLOWER = RESULTS / "engine_rounds.json"
"""Rounds of a deployment, of which each is one exchange by Flower's messages."""
BAR_TIMES = 100.0
"""Bar for the slowest kind at 1 MB against an exchange by Flower's messages."""
RUN = "benchmark"
SITE = "north"
COLUMNS = {
    "size": "turn",
    "kind": "stream",
    "exchanges_s": "exchanges a second",
    "mb_s": "MB/s, both ways",
    "ms": "ms an exchange",
    "slowest_ms": "slowest round, ms",
    "exchanges": "exchanges",
}


@dataclass(frozen=True)
class Call:
    """Request to the process of a site for one round of exchanges."""

    invitation: Invitation
    authority: bytes | None
    key: Path | None
    """Private key of the site, None without a channel."""
    fingerprint: str
    size: int
    count: int


def site(pipe: Connection) -> None:
    """Make rounds of exchanges until the pipe brings None; send the seconds of each."""
    while (call := pipe.recv()) is not None:
        seal = None
        if call.key is not None:
            terms = terms_of(RUN, call.invitation.token)
            identity = Identity.load(call.key)
            seal = SiteSeal(SiteHandshake(identity, call.fingerprint, SITE, terms))

        turn = os.urandom(call.size)
        port = call.invitation.port
        with StreamCaller(
            call.invitation, "127.0.0.1", port, authority=call.authority, seal=seal
        ) as stream:
            stream.exchange(turn)  # which connects
            started = time.perf_counter()
            for _ in range(call.count):
                stream.exchange(turn)
            pipe.send(time.perf_counter() - started)


class Bench:
    """A listener of each kind, and the process of a site."""

    def __init__(self, folder: Path) -> None:
        certificates.make_authority(folder)
        certificates.make_server_certificate(folder, ["127.0.0.1"])
        private, public = certificates.make_node_key(folder, SITE)
        secure = Place(certificate=folder / "server.crt", key=folder / "server.key")
        self._authority = (folder / "ca.crt").read_bytes()
        self._key = private
        self._pins = {SITE: PublicIdentity.parse(public.read_bytes())}
        self._identity = Identity.generate()
        self._plain = StreamListener()
        self._secure = StreamListener(secure)
        spawn = multiprocessing.get_context("spawn")
        self._pipe, far = spawn.Pipe()
        self._process = spawn.Process(target=site, args=(far,), daemon=True)
        self._process.start()

    def close(self) -> None:
        """End the site's process and both listeners."""
        self._pipe.send(None)
        self._process.join()
        self._plain.close()
        self._secure.close()

    def seconds(self, kind: Kind, size: int, count: int) -> float:
        """Return the seconds of `count` exchanges after the first."""
        arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        listener = self._plain if kind == "plain text" else self._secure
        sealed = kind == "TLS and channel"
        invitation, session = listener.invite(
            1,
            arrivals.put,
            num_sites=1,
            patience_s=30.0,
            seal=self._seal if sealed else None,
        )
        authority = None if kind == "plain text" else self._authority
        key = self._key if sealed else None
        fingerprint = self._identity.public.fingerprint
        self._pipe.send(Call(invitation, authority, key, fingerprint, size, count))

        for turn in range(1, count + 2):
            arrival = arrivals.get(timeout=120)
            assert not arrival.problem, arrival.problem
            session.answer(turn, arrival.data)

        seconds: float = self._pipe.recv()
        listener.end(invitation)
        return seconds

    def _seal(self, token: bytes) -> ServerSeal:
        handshake = ServerHandshake(self._identity, self._pins, terms_of(RUN, token))
        return ServerSeal(handshake, SITE)


def rows_of(bench: Bench, name: str, rounds: int, seconds: float) -> list[Row]:
    """Return a row for each kind at one size; each round takes about `seconds`."""
    size = SIZES[name]
    counts = {}
    for kind in KINDS:
        one = bench.seconds(kind, size, 2) / 2
        counts[kind] = max(2, round(seconds / one))

    times: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            times[kind].append(bench.seconds(kind, size, counts[kind]) / counts[kind])

    return [
        {
            "size": name,
            "kind": kind,
            "exchanges_s": 1 / median(times[kind]),
            "mb_s": 2 * size / median(times[kind]) / 1e6,
            "ms": 1e3 * median(times[kind]),
            "slowest_ms": 1e3 * max(times[kind]),
            "exchanges": rounds * counts[kind],
        }
        for kind in KINDS
    ]


def main() -> None:
    """See the module."""
    parser = parser_of("stream", __doc__, quick="fewer and shorter rounds")
    arguments = parser.parse_args()
    started = os.getloadavg()
    rounds = 2 if arguments.quick else 7
    seconds = 0.1 if arguments.quick else 1.5
    report = Report(
        "stream", {"quick": arguments.quick, "rounds": rounds, "seconds_a_round": seconds}
    )

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        try:
            for name in SIZES:
                report.rows += rows_of(bench, name, rounds, seconds)
        finally:
            bench.close()

    show("Turns over the live stream", COLUMNS, report.rows)
    report.claims = claims(report.rows)
    report.finish(arguments.out, started)


def claims(rows: list[Row]) -> list[Claim]:
    """Return what the stream is held to."""
    rates = {(row["size"], row["kind"]): float(row["exchanges_s"]) for row in rows}
    slowest = min(rates["1 MB", kind] for kind in KINDS)

    return [
        Claim(
            "exchanges a second at 1 MB, slowest stream over Flower's messages",
            slowest * flower_s(),
            BAR_TIMES,
            "at least",
        )
    ]


def flower_s() -> float:
    """Return the stored seconds of an exchange of 1 MB by Flower's messages with a warm site."""
    rows = json.loads(FLOWER.read_text(encoding="utf-8"))["rows"]
    times: list[float] = [
        row["apart_s"]
        for row in rows
        if row["what"] == "Flower deployed, warm" and row["payload_mb"] == 1
    ]
    return min(times)
