"""How fast the secure channel is: seal and open on one core, and the handshake.

    python -m benchmarks.channel [--quick] [--out FILE.json]

Every repetition copies the message in memory, seals it and opens it, with each contender in turn,
so that all of them meet the same machine; a figure is the median over the repetitions, in seconds
of the processor, which do not count the time that other processes take. `MB/s a core` is the size
of the message over the seconds of seal and open together. The contenders beside the channel are
the library's ciphers alone, with a nonce and associated data of the same sizes; what the channel
adds to ChaCha20-Poly1305 is the difference to its row.

Frames and messages are new objects. By default, the C library returns memory beyond 128 KB to the
kernel and takes it again, and the first touch of such memory costs as much as the cipher, or more.
Each size is therefore measured in two processes: by default, and with memory that the process
keeps (GLIBC_TUNABLES). By default, which contender meets new memory is chance, so contenders are
compared in the second process only.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from statistics import median

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show
from fluvial.wire.channel import Identity, ServerHandshake, Session, SiteHandshake, Terms

SIZES = {"64 KB": 2**16, "256 KB": 2**18, "1 MB": 10**6, "30 MB": 30 * 10**6}
BAR_MB_S = 500.0
"""Bar for seal and open together on one core."""
BAR_SHARE = 0.9
"""Bar for the channel against its own cipher alone."""
HEADER = b"step 1, forward, 16 rows"
CHANNEL = "channel"
CIPHER = "ChaCha20-Poly1305 alone"
MEMORY = {
    "default": "",
    "kept": "glibc.malloc.trim_threshold=4294967296:glibc.malloc.mmap_threshold=4294967296",
}
"""Value of GLIBC_TUNABLES by what becomes of freed memory; other C libraries ignore it."""
COLUMNS = {
    "size": "message",
    "memory": "memory",
    "what": "contender",
    "seal_mb_s": "seal MB/s",
    "open_mb_s": "open MB/s",
    "both_mb_s": "both, MB/s a core",
    "share": "of a copy's speed",
    "repetitions": "repetitions",
}


@dataclass(frozen=True)
class Contender:
    """Two functions to time."""

    seal: Callable[[bytes], bytes]
    open: Callable[[bytes], bytes]


def connected(site: Identity, server: Identity) -> tuple[Session, Session]:
    """Return the sessions of a site and its server after a handshake."""
    here = SiteHandshake(site, server.public.fingerprint, "north", Terms("benchmark"))
    there = ServerHandshake(server, {"north": site.public}, Terms("benchmark"))
    finish, session = here.finish(there.answer(here.hello()))

    return session, there.finish(finish)


def contenders() -> dict[str, Contender]:
    """Return the contenders by name."""
    return {
        CHANNEL: _channel(),
        CIPHER: _alone(ChaCha20Poly1305(os.urandom(32))),
        "AES-256-GCM alone": _alone(AESGCM(os.urandom(32))),
    }


def _channel() -> Contender:
    site, server = connected(Identity.generate(), Identity.generate())
    return Contender(partial(site.seal, header=HEADER), partial(server.open, header=HEADER))


def _alone(cipher: ChaCha20Poly1305 | AESGCM) -> Contender:
    """Return a cipher of the library with numbers as nonces, without a channel around it."""
    sent = count()
    received = count()
    label = bytes(46) + HEADER

    return Contender(
        lambda data: cipher.encrypt(next(sent).to_bytes(12, "big"), data, label),
        lambda frame: cipher.decrypt(next(received).to_bytes(12, "big"), frame, label),
    )


def timed(call: Callable[..., bytes], data: bytes) -> tuple[float, bytes]:
    """Return the processor's seconds of a call and its result."""
    started = time.thread_time()
    result = call(data)
    return time.thread_time() - started, result


def timed_pair(contender: Contender, data: bytes) -> tuple[float, float]:
    """Return the seconds to seal and to open a message."""
    seal_s, frame = timed(contender.seal, data)
    open_s, message = timed(contender.open, frame)
    assert message == data

    return seal_s, open_s


def rows_of(size: str, seconds: float) -> list[Row]:
    """Return a row for each contender at one size, and one for the copy."""
    data = os.urandom(SIZES[size])
    entrants = contenders()
    seals: dict[str, list[float]] = {name: [] for name in entrants}
    opens: dict[str, list[float]] = {name: [] for name in entrants}
    copies: list[float] = []
    since = time.perf_counter()

    while len(copies) < 5 or time.perf_counter() - since < seconds:
        copies.append(timed(lambda message: memoryview(message).tobytes(), data)[0])
        for name, contender in entrants.items():
            seal_s, open_s = timed_pair(contender, data)
            seals[name].append(seal_s)
            opens[name].append(open_s)

    megabytes = len(data) / 1e6
    copy_s = median(copies)
    rows: list[Row] = [
        {"size": size, "what": "copy in memory", "seal_mb_s": megabytes / copy_s, "share": 1.0}
    ]
    for name in entrants:
        seal_s = median(seals[name])
        open_s = median(opens[name])
        rows.append(
            {
                "size": size,
                "what": name,
                "seal_mb_s": megabytes / seal_s,
                "open_mb_s": megabytes / open_s,
                "both_mb_s": megabytes / (seal_s + open_s),
                "share": copy_s / (seal_s + open_s),
            }
        )

    return [{**row, "repetitions": len(copies)} for row in rows]


def handshakes(seconds: float) -> list[Row]:
    """Return the milliseconds of a whole handshake, both ends on one core, by kind of site key."""
    rows: list[Row] = []
    server = Identity.generate()
    for kind, site in (
        ("Ed25519", Identity.generate()),
        ("ECDSA P-384", Identity(ec.generate_private_key(ec.SECP384R1()))),
    ):
        times: list[float] = []
        since = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - since < seconds:
            started = time.thread_time()
            connected(site, server)
            times.append(time.thread_time() - started)

        rows.append(
            {
                "size": "handshake",
                "what": f"both ends, key of the site {kind}",
                "milliseconds": 1e3 * median(times),
                "repetitions": len(times),
            }
        )

    return rows


def measured(memory: str, seconds: float) -> list[Row]:
    """Return the rows of all sizes, measured in a process on one core with memory of this kind."""
    command = [sys.executable, "-m", "benchmarks.channel", "--measure", str(seconds)]
    done = subprocess.run(
        command,
        env={**os.environ, "GLIBC_TUNABLES": MEMORY[memory]},
        capture_output=True,
        text=True,
        check=True,
    )
    rows: list[Row] = json.loads(done.stdout)

    return [{**row, "memory": memory} for row in rows]


def main() -> None:
    """See the module."""
    parser = parser_of("channel", __doc__, quick="short repetitions")
    parser.add_argument("--measure", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(json.dumps([row for size in SIZES for row in rows_of(size, options.measure)]))
        return

    load = os.getloadavg()
    seconds = 0.2 if options.quick else 10.0
    report = Report("channel", {"quick": options.quick, "cores": 1, "seconds": seconds})
    report.skip("XChaCha20-Poly1305 and libsodium's secretstream: `cryptography` has neither")

    for memory in MEMORY:
        rows = measured(memory, seconds)
        report.rows += rows
        show(f"Memory: {memory}", COLUMNS, rows)
        speed = {(row["size"], row["what"]): row["both_mb_s"] for row in rows if "both_mb_s" in row}
        for size in SIZES:
            both = speed[size, CHANNEL]
            what = f"{size}, memory {memory}"
            report.claims.append(
                Claim(f"{what}: seal and open, MB/s a core", both, BAR_MB_S, "at least")
            )
            if memory == "kept":
                share = both / speed[size, CIPHER]
                report.claims.append(
                    Claim(f"{what}: channel over its cipher alone", share, BAR_SHARE, "at least")
                )

    rows = handshakes(seconds)
    report.rows += rows
    columns = {"what": "handshake", "milliseconds": "ms", "repetitions": "repetitions"}
    show("Handshake", columns, rows)
    report.finish(options.out, load)
