"""The cache of blocks at a site, brought up to date by replaying the commits since its last
visit."""

import zlib
from dataclasses import dataclass
from typing import Any

from fluvial.codecs import CodecSettings, build
from fluvial.codecs.quantise import Identity
from fluvial.errors import WireError
from fluvial.methods.fedcybgd.blocks import Partition
from fluvial.methods.fedcybgd.download.holder import (
    Holder,
    Overlay,
    Received,
    base_source,
    held_weights,
    refuse_frame,
)
from fluvial.methods.fedcybgd.ledger import Commit
from fluvial.models.states import initial_state
from fluvial.models.weight_sources import MemorySource, Source, Sum
from fluvial.wire.payload import Payload, payload_frame
from fluvial.wire.tensors import Layout, Named, add


def crc(tensors: Named) -> int:
    """Return CRC-32 of values, to tell whether two ends hold the same block."""
    return zlib.crc32(Layout.of(tensors).flatten(tensors).numpy().tobytes())


@dataclass
class FrameReader:
    """Takes frames from one run of bytes."""

    data: bytes
    place: int = 0

    def take(self, size: object) -> bytes:
        """Return the next `size` bytes; raises `WireError`."""
        if type(size) is not int or not 0 < size <= len(self.data) - self.place:
            raise WireError(
                f"visit: a frame of {size!r:.20} bytes, {len(self.data) - self.place} are left"
            )

        self.place += size
        return self.data[self.place - size : self.place]


@dataclass(frozen=True)
class BlockNews:
    """Changes of one block since a site last held it: commits, or for base -1 the block itself."""

    base: int
    version: int
    commits: list[Commit]


def replay(
    holder: Holder, message: Payload, parts: Partition, index: int, codec: CodecSettings
) -> Received | None:
    """Return the model that `message` leads to; None where the site lacks what it builds on."""
    reader = FrameReader(payload_frame(message) if message.tensors else b"")
    news = dict(read_news(entry, reader, len(parts)) for entry in message.value("news", list))
    if reader.place != len(reader.data):
        raise WireError(f"visit: {len(reader.data) - reader.place} bytes belong to no block")

    versions = message.value("versions", list)
    if len(versions) != len(parts):
        raise WireError(f"visit: versions of {len(versions)} blocks, expected {len(parts)}")

    held: list[Source] = []
    trained: Named = {}
    for number, block in enumerate(parts.blocks):
        slot = f"block-{number}"
        if number in news:
            state = brought_forward(holder, slot, block.layout, news[number], codec)
            if state is None:
                return None
            holder.keep(slot, Payload(state, {"version": news[number].version}), draft=True)

        version, source = held_weights(holder, slot, refuse_frame)
        if (version or 0) != versions[number]:
            return None
        if number == index:
            source = source or MemorySource(initial_state(block.layout, holder.seed))
            trained = {name: source.get(name) for name in block.layout.names}
            block.layout.check(trained, f"block {index} as the site keeps it")
        elif source is not None:
            held.append(source)

    if crc(trained) != message.value("crc", int):
        return None

    base = base_source(holder)
    over = Overlay(MemorySource({}), held)
    rest = Sum(base, over) if holder.pool.full else Overlay(base, held)

    return Received(holder.pool.weights(trained), rest)


def brought_forward(
    holder: Holder, slot: str, layout: Layout, news: BlockNews, codec: CodecSettings
) -> Named | None:
    """Return a block after its commits; None if they start from another version than the site's."""
    if news.base == -1:
        return Identity.of(layout).decode(news.commits[0].frames[0])

    version, source = held_weights(holder, slot, refuse_frame)
    if news.base != (version or 0):
        return None

    source = source or MemorySource(initial_state(layout, holder.seed))
    state = {name: source.get(name) for name in layout.names}
    layout.check(state, f"{slot} as the site keeps it")

    for commit in news.commits:
        state = add(state, commit.step(build(codec, layout)))
    return state


def read_news(entry: Any, reader: FrameReader, blocks: int) -> tuple[int, BlockNews]:
    """Return one row of the table of a replay, checked: a block and what happened to it."""
    if (
        not isinstance(entry, list)
        or len(entry) != 4
        or not all(type(number) is int for number in entry[:3])
    ):
        raise WireError(f"visit: {entry!r:.60} is no row of news")

    block, base, version, rows = entry
    if not 0 <= block < blocks or not isinstance(rows, list) or not rows:
        raise WireError(f"visit: news of block {block} of {blocks}")

    commits = []
    for row in rows:
        if (
            not isinstance(row, list)
            or len(row) != 3
            or type(row[0]) is not float
            or not 0 < row[0] <= 1
        ):
            raise WireError(f"visit: {row!r:.60} is no commit")

        sizes = row[1]
        weights = row[2]
        if (
            not isinstance(sizes, list)
            or not isinstance(weights, list)
            or not 0 < len(sizes) == len(weights)
        ):
            raise WireError(f"visit: {row!r:.60} is no commit")

        if not all(type(weight) is int and 1 <= weight <= 2**31 for weight in weights):
            raise WireError(f"visit: weights {weights!r:.60} are out of range")

        commits.append(Commit(row[0], tuple(reader.take(size) for size in sizes), tuple(weights)))

    return block, BlockNews(base, version, commits)
