"""Prediction of a round's time over a slow line, from bytes and the line alone.

The engine's own constants were measured on Flower 1.41 without a line (`python -m benchmarks.engine
--part link`).
"""

import math
from dataclasses import dataclass

from pydantic import Field

from fluvial.settings import Settings


class Line(Settings):
    """Line between a site and the server, from which `fluvial check` predicts a round's time."""

    up_mbit_s: float = Field(ge=1e-6, le=1e9)
    """Rate from the site to the server, in 10^6 bits a second."""
    down_mbit_s: float = Field(ge=1e-6, le=1e9)
    """Rate from the server to the site, in 10^6 bits a second."""
    rtt_ms: float = Field(ge=0, le=1e6)
    """Round-trip time, in milliseconds."""
    loss: float = Field(0.0, ge=0, lt=0.5)
    """Share of the packets that do not arrive, in each direction."""
    shared: bool = False
    """True where all sites share the line, as when it is the server's; false where each site has a
    line of its own."""


@dataclass(frozen=True)
class Engine:
    """Cost of a round without a line, and the way Flower 1.41 uses a line."""

    fixed_s: float = 3.9
    """Seconds of a round of a small payload without training: the node's sleep of 3 s, its steps of
    0.5 s, one fork."""
    s_per_mb: float = 0.06
    """Seconds of packing, hashing and copying at both ends, for each MB of one site, up and down
    together."""
    exchanges: int = 4
    """Requests of one round and site that wait for each other: poll, receipt, announcement of the
    answer, and a poll in vain before the sleep; what moves objects comes on top."""
    small_objects: int = 5
    """Requests for what surrounds the chunks of a message: Flower sends each of these objects by a
    request of its own."""
    inline: int = 2**18
    """Bytes of a payload that travels within the header, so that only two other objects surround
    it."""
    kept_s: float = 5.0
    """Seconds after which an idle connection is opened anew, which costs two round trips."""
    connections: int = 2
    """Objects in flight at a time."""
    chunk: int = 5 * 1024 * 1024
    """Bytes of the largest object."""


MSS = 1448
"""Bytes of data in a packet of 1,500."""
WIRE = 1500 / MSS
"""Bytes on the line for each byte of data."""
FIRST_WINDOW = 10
"""Packets of a new or rested connection (RFC 6928)."""


FLOWER = Engine()


def round_s(
    down: int, up: int, *, sites: int, line: Line, engine: Engine = FLOWER, train_s: float = 0.0
) -> float:
    """Return the seconds of a round of `down` and `up` bytes for each of `sites`, and `train_s`.

    Sites are alike and work side by side, so the round is that of one site, with its share of a
    line that is shared:

        fixed + MB * s_per_mb + train + rtt * exchanges + objects(down) + objects(up)
    """
    rtt_s = line.rtt_ms / 1e3
    sharing = sites if line.shared else 1
    reopened = 2 if train_s > engine.kept_s else 0

    return (
        engine.fixed_s
        + (down + up) / 1e6 * engine.s_per_mb
        + train_s
        + rtt_s * (engine.exchanges + reopened)
        + objects_s(down, line.down_mbit_s / sharing, line, engine)
        + objects_s(up, line.up_mbit_s / sharing, line, engine)
    )


def objects_s(size: int, mbit_s: float, line: Line, engine: Engine) -> float:
    """Return the seconds in which all objects of a message pass, `connections` at a time.

    While one chunk passes, the small objects pass on the other connection; after several chunks
    they are still to come.
    """
    rtt_s = line.rtt_ms / 1e3
    chunks = math.ceil(size / engine.chunk)
    small = 2 if size <= engine.inline else engine.small_objects
    moving = transfer_s(size, mbit_s, line, engine)

    if chunks < engine.connections:
        return max(rtt_s + moving, rtt_s * small / (engine.connections - chunks))

    return moving + rtt_s * math.ceil((chunks + small) / engine.connections)


def transfer_s(size: int, mbit_s: float, line: Line, engine: Engine) -> float:
    """Return the seconds beyond one round trip in which `size` bytes arrive over `mbit_s`.

    The window doubles until the line is full (Cardwell, Savage and Anderson, "Modeling TCP
    Latency", INFOCOM 2000) or, with loss, until it has the mean that Mathis et al. (1997) give for
    random loss, sqrt(3 / 2p) packets, where it stays: connections live through rounds, and a
    threshold that a loss has set outlives the rest between them. Cubic keeps to that where its own
    is lower (RFC 9438, 4.3). Two objects travel at a time.
    """
    streams = max(1, min(engine.connections, math.ceil(size / engine.chunk)))
    rtt_s = line.rtt_ms / 1e3
    packets = math.ceil(size / MSS / streams)
    packets_per_s = mbit_s * 1e6 / 8 / (MSS * WIRE) / streams

    if line.loss and rtt_s:
        packets_per_s = min(packets_per_s, math.sqrt(1.5 / line.loss) / rtt_s)

    seconds = 0.0
    sent = 0.0
    window = float(FIRST_WINDOW)

    while sent + window < packets and window < packets_per_s * rtt_s:
        seconds += rtt_s
        sent += window
        window *= 2

    return seconds + (packets - sent) / packets_per_s
