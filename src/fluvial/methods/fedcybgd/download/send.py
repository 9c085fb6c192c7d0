"""The server's half of a download: makes the message that a site needs for a visit."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fluvial.codecs import CodecSettings
from fluvial.codecs.quantise import Identity
from fluvial.methods.fedcybgd.blocks import Partition
from fluvial.methods.fedcybgd.download import (
    CacheDownload,
    DownloadConfig,
    FullDownload,
    LowBitDownload,
    ProxyDownload,
    StaleDownload,
)
from fluvial.methods.fedcybgd.download.holder import layouts_of
from fluvial.methods.fedcybgd.download.low_bit import coded
from fluvial.methods.fedcybgd.download.replay import crc
from fluvial.methods.fedcybgd.ledger import Ledger
from fluvial.methods.fedcybgd.proxy import Manifest, cut
from fluvial.methods.fedcybgd.visit_sizes import subset_size
from fluvial.models.pool import ModelPool
from fluvial.seeds import generator
from fluvial.wire.payload import Payload, Value, frame_payload
from fluvial.wire.tensors import Named


class Sender:
    """The server's half of a download: makes the messages of visits.

    `holds` has, by site, the version of every block and of the fixed rest that it holds; -1 is
    nothing. A site that is not listed holds what it starts with: version 0, the base, under
    "cache", and nothing under "low-bit".
    """

    def __init__(
        self,
        config: DownloadConfig,
        ledger: Ledger,
        seed: int,
        open_pool: Callable[[], ModelPool],
        plan: Callable[[int, str], Manifest],
    ) -> None:
        """Take `plan(block, visit)`, which returns the manifest of a proxy."""
        self.config = config
        self.ledger = ledger
        self.seed = seed
        self.open_pool = open_pool
        self.plan = plan
        self.parts: Partition = ledger.parts
        self.holds: dict[str, list[int]] = {}
        self._sent: dict[str, list[int]] = {}

    def message(self, site: str, index: int, visit: str, values: dict[str, Value]) -> Payload:
        """Return the message with everything that `site` needs to train block `index`."""
        values = {**values, "block": index, "visit": visit}
        self._sent[site] = [*self.ledger.versions, 0]

        config = self.config
        match config:
            case FullDownload():
                return Payload(self._block(index) | self._others(index), values)
            case ProxyDownload():
                manifest = self.plan(index, visit)
                others = cut(self._others(index), manifest)
                return Payload(
                    self._block(index) | others, values | {"manifest": manifest.values()}
                )
            case StaleDownload():
                refreshed = subset(self.ledger.changed, config.share, self.seed, visit)
                names = [
                    n for k in refreshed if k != index for n in self.parts.blocks[k].layout.names
                ]
                return Payload(self._block(index) | self._cast(self._weights(names)), values)
            case LowBitDownload():
                return self._low_bit(site, index, values, config.codec)
            case CacheDownload():
                return self._replay(site, index, values)

        raise AssertionError(f"unknown form {self.config!r}")

    def acknowledge(self, site: str) -> None:
        """Record that `site` has answered its last message."""
        self.holds[site] = self._sent[site]

    def forget(self, site: str) -> None:
        """Record that `site` holds nothing that could be built on."""
        self.holds[site] = [-1] * (len(self.parts) + 1)

    def save(self) -> dict[str, Value]:
        """Return the versions that each site holds."""
        return {site: list(versions) for site, versions in self.holds.items()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Invert `save`."""
        self.holds = dict(saved)

    def _names(self, index: int) -> tuple[str, ...]:
        return self.parts.blocks[index].layout.names

    def _weights(self, names: Iterable[str]) -> Named:
        return self.open_pool().weights({name: self.ledger.state[name] for name in names})

    def _block(self, index: int) -> Named:
        return self._weights(self._names(index))

    def _others(self, index: int) -> Named:
        trained = set(self._names(index))
        return self._cast(
            self._weights(name for name in self.ledger.layout.names if name not in trained)
        )

    def _cast(self, weights: Named) -> Named:
        kinds = self.open_pool().outline.dtypes
        return {name: tensor.to(kinds[name]) for name, tensor in weights.items()}

    def _low_bit(
        self, site: str, index: int, values: dict[str, Value], codec: CodecSettings
    ) -> Payload:
        """Return the block, and of every other part that the site does not hold in this version the
        coded weights."""
        held = self.holds.get(site, [-1] * (len(self.parts) + 1))
        tensors = self._block(index)
        versions = [*self.ledger.versions, 0]

        for number, layout in enumerate(layouts_of(self.parts)):
            if number != index and held[number] != versions[number]:
                tensors |= coded(self._cast(self._weights(layout.names)), codec)

        self._sent[site][index] = held[index]  # it gets the block itself, not its coded image
        return Payload(tensors, values | {"versions": [*versions]})

    def _replay(self, site: str, index: int, values: dict[str, Value]) -> Payload:
        """Return the commits from the versions that the site holds to the newest, as one run of
        bytes and its table."""
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

            rows: list[Value] = []
            for commit in commits:
                data += commit.frames
                rows.append(
                    [commit.factor, [len(frame) for frame in commit.frames], list(commit.weights)]
                )

            news.append([number, held[number], self.ledger.versions[number], rows])

        values = values | {
            "news": news,
            "versions": [*self.ledger.versions],
            "crc": crc(self.ledger.block(index)),
        }
        joined = b"".join(data)
        return frame_payload(joined, **values) if joined else Payload(values=values)


def subset(changed: list[int], share: float, seed: int, visit: str) -> list[int]:
    """Return ceil(share * n) of the n blocks that have moved, drawn anew for every visit."""
    count = subset_size(share, len(changed))
    drawn = torch.randperm(len(changed), generator=generator(seed, "subset", visit)).tolist()
    return sorted(changed[place] for place in drawn[:count])
