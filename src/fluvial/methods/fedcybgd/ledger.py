"""The server's store: every block with its version, the commits that led there, and what was
already counted.

A block moves by *commits*: a factor times the weighted mean of what some sites sent for it. The
server decodes what the sites sent, so a site that replays the same commits holds the same block,
bit for bit, and needs no other download.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fluvial.codecs import Codec
from fluvial.errors import WireError
from fluvial.methods.fedcybgd.blocks import Partition
from fluvial.wire.payload import Payload, Value
from fluvial.wire.tensors import Layout, Named, WeightedMean, add, scale


@dataclass(frozen=True)
class Commit:
    """One step of one block: factor * weighted mean of what the frames decode to."""

    factor: float
    """Damping times what the acceptance test left of the step."""
    frames: tuple[bytes, ...]
    weights: tuple[int, ...]
    """Sample counts, or 1 for all."""

    @property
    def size(self) -> int:
        """Bytes of its frames."""
        return sum(map(len, self.frames))

    def step(self, codec: Codec) -> Named:
        """Return what a commit adds to the block; raises `WireError` for frames that are
        damaged."""
        mean = WeightedMean()
        for frame, weight in zip(self.frames, self.weights, strict=True):
            update = codec.decode(frame)
            WeightedMean.check(update, weight)
            mean.add(update, weight)

        return mean.mean() if self.factor == 1 else scale(mean.mean(), self.factor)


class Ledger:
    """The global state by blocks.

    `log[k]` has the commits of block k by the version that they made, as many as are worth their
    bytes: a site that holds an older version than `oldest[k]` gets the block itself.
    """

    def __init__(self, parts: Partition, codecs: Sequence[Codec], state: Named) -> None:
        self.parts = parts
        self.codecs = codecs
        self.state = state
        self.layout = Layout.of(state)
        self.versions = [0] * len(parts)
        self.oldest = [0] * len(parts)
        self.log: list[dict[int, Commit]] = [{} for _ in parts.blocks]
        self._round, self._seen = 0, set[str]()

    def block(self, index: int) -> Named:
        """Return the state of a block."""
        return {name: self.state[name] for name in self.parts.blocks[index].layout.names}

    def _names(self, index: int) -> tuple[str, ...]:
        return self.parts.blocks[index].layout.names

    @property
    def changed(self) -> list[int]:
        """Blocks that have moved since the start."""
        return [index for index, version in enumerate(self.versions) if version]

    def claim(self, visit: str, round: int) -> bool:
        """Return whether `visit` counts: False if it was counted before, or belongs to a round that
        is over."""
        if round < self._round or visit in self._seen:
            return False
        if round > self._round:
            self._round, self._seen = round, set()
        self._seen.add(visit)
        return True

    def moved(self, index: int, commit: Commit) -> Named:
        """Return the block as it would be after `commit`."""
        return add(self.block(index), commit.step(self.codecs[index]))

    def commit(self, index: int, commit: Commit) -> None:
        """Move a block and remember how."""
        self.state = {**self.state, **self.moved(index, commit)}
        self.versions[index] += 1
        log = self.log[index]
        log[self.versions[index]] = commit

        while sum(each.size for each in log.values()) > self.parts.blocks[index].layout.raw_bytes:
            self.oldest[index] = min(log)
            del log[self.oldest[index]]

    def since(self, index: int, version: int) -> list[Commit] | None:
        """Return the commits that lead from `version` of a block to the newest; None if they are
        not all there."""
        if version < self.oldest[index]:
            return None
        return [commit for made, commit in sorted(self.log[index].items()) if made > version]

    def save(self) -> Payload:
        """Return the whole ledger, without the values of blocks that have not moved."""
        tensors = {
            f"state/{name}": self.state[name]
            for index in self.changed
            for name in self._names(index)
        }
        log: list[Value] = []

        for index, commits in enumerate(self.log):
            for version, commit in commits.items():
                log.append([index, version, commit.factor, list(commit.weights)])
                for number, frame in enumerate(commit.frames):
                    tensors[f"frame/{index}/{version}/{number}"] = torch.frombuffer(
                        bytearray(frame), dtype=torch.uint8
                    )

        values: dict[str, Value] = {
            "versions": list(self.versions),
            "oldest": list(self.oldest),
            "log": log,
            "round": self._round,
            "seen": [*sorted(self._seen)],
        }
        return Payload(tensors, values)

    def restore(self, saved: Payload) -> None:
        """Invert `save`; raises `WireError` for a checkpoint of other blocks."""
        versions = saved.value("versions", list)
        if len(versions) != len(self.parts):
            raise WireError(f"checkpoint: {len(versions)} blocks, expected {len(self.parts)}")

        state = dict(self.state)
        for index, version in enumerate(versions):
            if version:
                block = {name: saved.tensor(f"state/{name}") for name in self._names(index)}
                self.parts.blocks[index].layout.check(block, "checkpoint")
                state |= block

        self.state, self.versions, self.oldest = state, versions, saved.value("oldest", list)
        self.log = [{} for _ in self.parts.blocks]
        entries: list[Any] = saved.value("log", list)

        for index, version, factor, weights in entries:
            frames = (
                saved.tensor(f"frame/{index}/{version}/{number}") for number in range(len(weights))
            )
            self.log[index][version] = Commit(
                factor, tuple(f.numpy().tobytes() for f in frames), tuple(weights)
            )

        self._round, self._seen = saved.value("round", int), set(saved.value("seen", list))
