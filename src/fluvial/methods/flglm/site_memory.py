"""The site's hidden states by sample between rounds, and the numbers by which it names samples."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fluvial.codecs.activations.samples import SampleNumbers
from fluvial.data import Example
from fluvial.federation.sites import Site
from fluvial.methods.flglm.coding import Coding
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.hidden import (
    HiddenStates,
    empty_memory,
    memory_tensors,
    restored_memory,
)
from fluvial.methods.flglm.turns import MOST_STEPS
from fluvial.wire.payload import Payload

SLOT = "memory"
"""Slot of the site's state."""


@dataclass
class SiteMemory:
    """The memory of one conversation, at the site."""

    config: FlGlmConfig
    hidden: HiddenStates
    data: str
    """Digest of the site's sequences, by whose places samples are known."""
    held: int = 0
    """Round of the memory with which the conversation began; 0 for an empty one."""
    numbers: SampleNumbers = field(default_factory=SampleNumbers)

    @classmethod
    def begin(
        cls, site: Site, message: Payload, coding: Coding, examples: Sequence[Example]
    ) -> "SiteMemory":
        """Return the memory that the site holds, if the server has the same by its `message` and
        the sequences have not changed, else an empty one; raises `WireError`."""
        config: FlGlmConfig = site.method
        empty = empty_memory(config, coding, server=False)
        if not config.remembers:
            return cls(config, HiddenStates(config, coding, empty), "")

        held = message.whole("held", 0, MOST_STEPS)
        data = _digest(examples)
        saved = site.recall(SLOT)
        if not held or saved.values != {"round": held, "data": data}:
            return cls(config, HiddenStates(config, coding, empty), data)

        tensors = dict(saved.tensors)
        places = tensors.pop("places").tolist()
        memory = restored_memory(empty, tensors)
        numbers = SampleNumbers({place: number for number, place in enumerate(places)})
        return cls(config, HiddenStates(config, coding, memory), data, held, numbers)

    def samples(self, places: Sequence[int]) -> tuple[int, ...] | None:
        """Return the numbers of the sequences at `places`; None where turns name no samples."""
        if not self.config.remembers:
            return None
        return self.numbers.of(places)

    def keep(self, site: Site, round: int) -> None:
        """Keep the memory after a conversation of `round`, once the site's reply counts."""
        if not self.config.remembers:
            return

        places = torch.tensor(list(self.numbers.by_place), dtype=torch.int64)
        tensors = {**memory_tensors(self.hidden.memory), "places": places}
        site.keep(SLOT, Payload(tensors, {"round": round, "data": self.data}), draft=True)


def _digest(examples: Sequence[Example]) -> str:
    """Return a digest of sequences in their order."""
    hashed = hashlib.sha256()
    for example in examples:
        hashed.update(len(example.input_ids).to_bytes(8, "little"))
        hashed.update(torch.tensor(example.input_ids, dtype=torch.int64).numpy().tobytes())

    return hashed.hexdigest()
