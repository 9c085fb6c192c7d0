"""What a site is sent for a visit: the block it trains, exact, and the others in one of five forms.

    form          what the others are                         the site must hold
    full          exact                                       nothing
    proxy         fewer layers, neurons, heads (the paper)    nothing
    stale-subset  the base's, but for a random share of       the base
                  those that have moved (the released code)
    low-bit       coded (int8, nf4, ...); what did not move   what it was sent before
                  since the site's last visit is not resent
    cache         exact: the base and all commits since;      the base, and what it was sent before
                  what the site has is not resent

Full, proxy and low-bit bring absolute weights, frozen ones in the model's type. With an adapter
"weights" are its factors, and the base is always there; a proxy of it makes no sense.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from fluvial.codecs import CodecConfig, CodecSettings, build
from fluvial.codecs.quantise import Identity, NF4Settings
from fluvial.errors import WireError
from fluvial.methods.fedcybgd.blocks import Partition
from fluvial.methods.fedcybgd.ledger import Commit, Ledger
from fluvial.methods.fedcybgd.memory import subset_size
from fluvial.methods.fedcybgd.proxy import Anatomy, Manifest, ProxySettings, cut, slim
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.models.weight_sources import FileSource, MemorySource, Source, Sum
from fluvial.seeds import generator
from fluvial.settings import Settings
from fluvial.wire.payload import Payload, Value, frame_payload, payload_frame, read_values
from fluvial.wire.tensors import Layout, Named, add, is_finite


class FullDownload(Settings):
    """Everything, exact: compression C = identity."""

    form: Literal["full"] = "full"


class ProxyDownload(ProxySettings):
    """The paper's: layer dropping and pruning, from scores on public text."""

    form: Literal["proxy"] = "proxy"


class StaleDownload(Settings):
    """The released code's `update_global`: of the blocks that have moved, a random share is
    refreshed."""

    form: Literal["stale-subset"] = "stale-subset"
    share: float = Field(0.5, gt=0, le=1)
    """ceil(share * moved blocks) are sent, and the trained block in any case; the code's default of
    -1 crashes."""


class LowBitDownload(Settings):
    """All layers, with fewer bits (ours)."""

    form: Literal["low-bit"] = "low-bit"
    codec: CodecConfig = NF4Settings()
    """For matrices; vectors, such as norms, go as they are."""


class CacheDownload(Settings):
    """A versioned cache of blocks, brought up to date by replaying commits (ours)."""

    form: Literal["cache"] = "cache"


DownloadConfig = Annotated[
    FullDownload | ProxyDownload | StaleDownload | LowBitDownload | CacheDownload,
    Field(discriminator="form"),
]
LOSSY = (ProxyDownload, StaleDownload, LowBitDownload)
"""Forms through which a site sees another model than the server's."""


class Holder(Protocol):
    """What the site's half needs of a site."""

    pool: ModelPool
    seed: int

    def recall(self, slot: str) -> Payload:
        """What was kept under `slot`, or an empty payload."""
        ...

    def keep(self, slot: str, payload: Payload, *, draft: bool = False) -> None:
        """Keep `payload`; a draft is written to a file at once."""
        ...

    def file(self, slot: str) -> Path | None:
        """The file with what was kept, where there is one."""
        ...


@dataclass
class Nobody:
    """A holder that has nothing, for the server to see what a site would see."""

    pool: ModelPool
    seed: int
    kept: dict[str, Payload] = field(default_factory=dict)

    def recall(self, slot: str) -> Payload:
        """What was kept."""
        return self.kept.get(slot, Payload())

    def keep(self, slot: str, payload: Payload, *, draft: bool = False) -> None:  # noqa: ARG002
        """In memory, as long as this lives."""
        self.kept[slot] = payload

    def file(self, slot: str) -> None:
        """There is none."""


@dataclass(frozen=True)
class Received:
    """A model as a site sees it; absolute weights by name (with an adapter: factors)."""

    start: Named
    """The block to train, fp32."""
    rest: Source
    """All other weights, in the model's type; maybe also others, which do not count."""
    manifest: Manifest | None = None
    """What is missing from a proxy."""


# -- the server's half ---------------------------------------------------------------------------


class Sender:
    """Makes messages.

    `holds` has, by site, the version of every block and of the fixed rest that it holds; -1 is
    nothing. A site that is not listed holds what it starts with: version 0, the base, under
    "cache", and nothing under "low-bit".
    """

    def __init__(
        self,
        config: Any,
        ledger: Ledger,
        seed: int,
        bench: Callable[[], ModelPool],
        plan: Callable[[int, str], Manifest],
    ) -> None:
        """`plan(block, visit)` says what of a proxy is kept."""
        self.config = config
        self.ledger = ledger
        self.seed = seed
        self.bench = bench
        self.plan = plan
        self.parts: Partition = ledger.parts
        self.holds: dict[str, list[int]] = {}
        self._sent: dict[str, list[int]] = {}

    def message(self, site: str, index: int, visit: str, values: dict[str, Value]) -> Payload:
        """Everything that `site` needs to train block `index`."""
        values = {**values, "block": index, "visit": visit}
        self._sent[site] = [*self.ledger.versions, 0]

        match self.config:
            case FullDownload():
                return Payload(self._block(index) | self._others(index), values)
            case ProxyDownload():
                manifest = self.plan(index, visit)
                others = cut(self._others(index), manifest)
                return Payload(
                    self._block(index) | others, values | {"manifest": manifest.values()}
                )
            case StaleDownload():
                refreshed = subset(self.ledger.changed, self.config.share, self.seed, visit)
                names = [
                    n for k in refreshed if k != index for n in self.parts.blocks[k].layout.names
                ]
                return Payload(self._block(index) | self._cast(self._weights(names)), values)
            case LowBitDownload():
                return self._low_bit(site, index, values)
            case CacheDownload():
                return self._replay(site, index, values)

        raise AssertionError(f"unknown form {self.config!r}")

    def acknowledge(self, site: str) -> None:
        """`site` has answered its last message."""
        self.holds[site] = self._sent[site]

    def forget(self, site: str) -> None:
        """`site` holds nothing that could be built on."""
        self.holds[site] = [-1] * (len(self.parts) + 1)

    def save(self) -> dict[str, Value]:
        """Who holds what."""
        return {site: list(versions) for site, versions in self.holds.items()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Inverse of `save`."""
        self.holds = dict(saved)

    def _names(self, index: int) -> tuple[str, ...]:
        return self.parts.blocks[index].layout.names

    def _weights(self, names: Iterable[str]) -> Named:
        return self.bench().weights({name: self.ledger.state[name] for name in names})

    def _block(self, index: int) -> Named:
        return self._weights(self._names(index))

    def _others(self, index: int) -> Named:
        trained = set(self._names(index))
        return self._cast(
            self._weights(name for name in self.ledger.layout.names if name not in trained)
        )

    def _cast(self, weights: Named) -> Named:
        kinds = self.bench().outline.dtypes
        return {name: tensor.to(kinds[name]) for name, tensor in weights.items()}

    def _low_bit(self, site: str, index: int, values: dict[str, Value]) -> Payload:
        """The block, and of every other part that the site does not hold in this version the coded
        weights."""
        held = self.holds.get(site, [-1] * (len(self.parts) + 1))
        tensors = self._block(index)
        versions = [*self.ledger.versions, 0]

        for number, layout in enumerate(parts_of(self.parts)):
            if number != index and held[number] != versions[number]:
                tensors |= coded(self._cast(self._weights(layout.names)), self.config.codec)

        self._sent[site][index] = held[index]  # it gets the block itself, not its coded image
        return Payload(tensors, values | {"versions": [*versions]})

    def _replay(self, site: str, index: int, values: dict[str, Value]) -> Payload:
        """What leads from the versions that the site holds to the newest, as one run of bytes and
        its table."""
        held = self.holds.get(site, [0] * (len(self.parts) + 1))
        news: list[Value] = []
        data = []

        for number, block in enumerate(self.parts.blocks):
            if held[number] == self.ledger.versions[number]:
                continue

            commits = self.ledger.since(number, held[number])
            if commits is None or sum(each.size for each in commits) > block.layout.raw_bytes:
                data.append(Identity.of(block.layout).encode(self.ledger.block(number)))
                news.append(
                    [number, -1, self.ledger.versions[number], [[1.0, [len(data[-1])], [1]]]]
                )
                continue

            table: list[Value] = []
            for commit in commits:
                data += commit.frames
                table.append(
                    [commit.factor, [len(frame) for frame in commit.frames], list(commit.weights)]
                )

            news.append([number, held[number], self.ledger.versions[number], table])

        values = values | {
            "news": news,
            "versions": [*self.ledger.versions],
            "crc": crc(self.ledger.block(index)),
        }
        joined = b"".join(data)
        return frame_payload(joined, **values) if joined else Payload(values=values)


def subset(changed: list[int], share: float, seed: int, visit: str) -> list[int]:
    """ceil(share * n) of the n blocks that have moved, drawn anew for every visit."""
    count = subset_size(share, len(changed))
    drawn = torch.randperm(len(changed), generator=generator(seed, "subset", visit)).tolist()
    return sorted(changed[place] for place in drawn[:count])


def parts_of(parts: Partition) -> list[Layout]:
    """The blocks, and last the fixed rest."""
    return [*(block.layout for block in parts.blocks), parts.fixed]


def crc(tensors: Named) -> int:
    """CRC-32 of values, to tell whether two ends hold the same block."""
    return zlib.crc32(Layout.of(tensors).flatten(tensors).numpy().tobytes())


def coded(weights: Named, settings: CodecSettings) -> Named:
    """Matrices as codec frames of their own (1-D uint8), vectors as they are."""
    return {
        name: tensor
        if tensor.dim() < 2
        else torch.frombuffer(
            bytearray(_matrix_codec(settings, name, tensor.shape).encode({name: tensor})),
            dtype=torch.uint8,
        )
        for name, tensor in weights.items()
    }


def _matrix_codec(settings: CodecSettings, name: str, shape: Iterable[int]) -> Any:
    return build(settings, Layout(((name, tuple(shape)),)))


# -- the site's half -----------------------------------------------------------------------------


def receive(
    config: Any, holder: Holder, message: Payload, parts: Partition, *, codec: CodecSettings
) -> Received | None:
    """The model that `message` brings; None if it builds on something that the site does not hold.

    `codec` is of what sites send up, which a cache replays.
    """
    index = message.value("block", int)
    if not 0 <= index < len(parts):
        raise WireError(f"visit: block {index}, and there are {len(parts)}")

    layout = holder.pool.layout
    block = parts.blocks[index].layout
    if isinstance(config, CacheDownload):
        return _replayed(holder, message, parts, index, codec)

    start = {name: message.tensors[name] for name in block.names if name in message.tensors}
    block.check(start, f"block {index}")
    others = {name: tensor for name, tensor in message.tensors.items() if name not in start}

    if isinstance(config, LowBitDownload):
        rest = _decoded(config, holder, others, message.value("versions", list), parts, index)
        return None if rest is None else Received(start, rest)

    kinds = holder.pool.outline.dtypes
    manifest = None
    expected = {name: shape for name, shape in layout.shapes if name not in start}
    rest = MemorySource(others)

    if isinstance(config, ProxyDownload):
        blank = holder.pool.blank()
        anatomy = Anatomy.of(blank, config.prune)
        manifest = Manifest.from_values(
            message.value("manifest", dict), anatomy, parts.blocks[index].layers
        )
        left = slim(blank, manifest).named_parameters()
        expected = {name: tuple(each.shape) for name, each in left if name not in start}

    if isinstance(config, StaleDownload):
        rest = _Over(_base(holder), [MemorySource(others)])
        expected = {name: shape for name, shape in expected.items() if name in others}

    _check(others, expected, kinds)
    return Received(start, rest, manifest)


def _check(
    found: Named, expected: Mapping[str, tuple[int, ...]], kinds: Mapping[str, torch.dtype]
) -> None:
    """Raise `WireError` unless `found` has the names, shapes and types expected, and is finite."""
    if found.keys() != expected.keys():
        raise WireError(
            f"visit: other tensors than expected, first {sorted(found.keys() ^ expected.keys())[:2]}"
        )

    for name, tensor in found.items():
        if tuple(tensor.shape) != expected[name] or tensor.dtype != kinds[name]:
            what = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise WireError(f"visit: {name!r} is {what}, expected {kinds[name]} {expected[name]}")

    if not is_finite(found):
        raise WireError("visit: NaN or Inf among the weights")


def _base(holder: Holder) -> Source:
    """The weights that a site has from the start: the base's files, or an adapter's initial
    factors."""
    bench = holder.pool
    return bench.base if bench.full else MemorySource(initial_state(bench.layout, holder.seed))


class _Over(Source):
    """A source with others laid over it."""

    def __init__(self, below: Source, above: Iterable[Source]) -> None:
        self._places = dict.fromkeys(below.names, below) | {
            name: each for each in above for name in each.names
        }
        self.names = frozenset(self._places)

    def get(self, name: str) -> Tensor:
        """From the uppermost that has it."""
        return self._places[name].get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The same."""
        return self._places[name].shape(name)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """The same."""
        return self._places[name].rows(name, index)


def _decoded(
    config: LowBitDownload,
    holder: Holder,
    came: Named,
    versions: list[Any],
    parts: Partition,
    index: int,
) -> Source | None:
    """All parts but the trained one: from the message, or as the site keeps them; None if it keeps
    another version."""
    layouts = parts_of(parts)
    if len(versions) != len(layouts):
        raise WireError(f"visit: versions of {len(versions)} parts, expected {len(layouts)}")

    strange = came.keys() - {name for layout in layouts for name in layout.names}
    if strange:
        raise WireError(f"visit: tensors of no block, first {sorted(strange)[:2]}")

    kinds = holder.pool.outline.dtypes
    shapes = dict(holder.pool.layout.shapes)

    def decode(name: str, frame: bytes) -> Tensor:
        weight: Tensor = (
            _matrix_codec(config.codec, name, shapes[name]).decode(frame)[name].to(kinds[name])
        )
        return weight

    found: list[Source] = []
    for number, layout in enumerate(layouts):
        if number == index or not layout.names:
            continue

        here = {name: came[name] for name in layout.names if name in came}
        if here:
            _check(
                {
                    name: _vector_or_frame(name, tensor, layout, decode)
                    for name, tensor in here.items()
                },
                dict(layout.shapes),
                kinds,
            )
            holder.keep(f"rest-{number}", Payload(here, {"version": versions[number]}), draft=True)

        version, rest = _kept(holder, f"rest-{number}", decode)
        if rest is None or version != versions[number]:
            return None

        found.append(rest)

    return _Over(MemorySource({}), found)


def _vector_or_frame(
    name: str, tensor: Tensor, layout: Layout, decode: Callable[[str, bytes], Tensor]
) -> Tensor:
    """What a tensor of a low-bit message stands for; raises `WireError` for a frame that cannot be
    decoded."""
    if len(dict(layout.shapes)[name]) < 2:
        return tensor
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise WireError(
            f"visit: {name!r} is {tensor.dtype} with {tensor.dim()} axes, expected a coded matrix"
        )

    return decode(name, tensor.numpy().tobytes())


def _kept(
    holder: Holder, slot: str, decode: Callable[[str, bytes], Tensor]
) -> tuple[int | None, Source | None]:
    """What a site keeps of a block and its version: read from its file when it is asked for, where
    there is a file."""
    file = holder.file(slot)
    if file is not None:
        return read_values(file).get("version"), FileSource(file, decode)  # type: ignore[return-value]

    kept = holder.recall(slot)
    if not kept.tensors:
        return None, None

    tensors = {
        name: decode(name, tensor.numpy().tobytes()) if tensor.dtype == torch.uint8 else tensor
        for name, tensor in kept.tensors.items()
    }
    return kept.value("version", int), MemorySource(tensors)


@dataclass
class _Reader:
    """Takes frames from one run of bytes."""

    data: bytes
    place: int = 0

    def take(self, size: object) -> bytes:
        """The next `size` bytes; raises `WireError`."""
        if type(size) is not int or not 0 < size <= len(self.data) - self.place:
            raise WireError(
                f"visit: a frame of {size!r:.20} bytes, {len(self.data) - self.place} are left"
            )

        self.place += size
        return self.data[self.place - size : self.place]


@dataclass(frozen=True)
class _News:
    """What happened to one block since a site last held it: commits, or for base -1 the block
    itself."""

    base: int
    version: int
    commits: list[Commit]


def _replayed(
    holder: Holder, message: Payload, parts: Partition, index: int, codec: CodecSettings
) -> Received | None:
    reader = _Reader(payload_frame(message) if message.tensors else b"")
    news = dict(_news(entry, reader, len(parts)) for entry in message.value("news", list))
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
            now = _brought_forward(holder, slot, block.layout, news[number], codec)
            if now is None:
                return None
            holder.keep(slot, Payload(now, {"version": news[number].version}), draft=True)

        version, source = _kept(holder, slot, _no_frame)
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

    base = _base(holder)
    over = _Over(MemorySource({}), held)
    rest = Sum(base, over) if holder.pool.full else _Over(base, held)

    return Received(holder.pool.weights(trained), rest)


def _brought_forward(
    holder: Holder, slot: str, layout: Layout, news: _News, codec: CodecSettings
) -> Named | None:
    """A block after its commits; None if they start from another version than the site's."""
    if news.base == -1:
        return Identity.of(layout).decode(news.commits[0].frames[0])

    version, source = _kept(holder, slot, _no_frame)
    if news.base != (version or 0):
        return None

    source = source or MemorySource(initial_state(layout, holder.seed))
    now = {name: source.get(name) for name in layout.names}
    layout.check(now, f"{slot} as the site keeps it")

    for commit in news.commits:
        now = add(now, commit.step(build(codec, layout)))
    return now


def _no_frame(name: str, _frame: bytes) -> Tensor:
    raise WireError(f"{name!r}: a site keeps changes as they are, and here is a frame")


def _news(entry: Any, reader: _Reader, blocks: int) -> tuple[int, _News]:
    """One row of the table of a replay, checked: a block and what happened to it."""
    if (
        not isinstance(entry, list)
        or len(entry) != 4
        or not all(type(each) is int for each in entry[:3])
    ):
        raise WireError(f"visit: {entry!r:.60} is no row of news")

    block, base, version, table = entry
    if not 0 <= block < blocks or not isinstance(table, list) or not table:
        raise WireError(f"visit: news of block {block} of {blocks}")

    commits = []
    for row in table:
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

    return block, _News(base, version, commits)
