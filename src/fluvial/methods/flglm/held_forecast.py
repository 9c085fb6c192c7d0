"""Forecast of the samples whose hidden states the ends hold, and of the bytes that this saves."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fluvial.codecs.activations import build_activation
from fluvial.codecs.activations.floats import ExactRowsSettings
from fluvial.codecs.activations.front_cache import FrontIndex
from fluvial.codecs.activations.recurring import Recurring
from fluvial.codecs.activations.samples import Held, SampleBatch, SampleMemory, SampleNumbers
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.hidden import Way


@dataclass
class HeldForecast:
    """The samples of one site that both ends hold, while its turns are foreseen."""

    config: FlGlmConfig
    width: int
    dtype: torch.dtype
    held: int = 0
    """Round of the memory with which the site begins; 0 for an empty one."""
    numbers: SampleNumbers = field(default_factory=SampleNumbers)

    def __post_init__(self) -> None:
        self._hidden = build_activation(self.config.hidden, self.dtype)
        first = build_activation(ExactRowsSettings(), self.dtype)
        self._changes = Recurring(self._hidden, first)
        self._once = first if self.config.sends_changes else self._hidden
        nothing = Held(self.width * self.dtype.itemsize, self.config.memory_bytes)
        self._samples: dict[Way, Held] = {"up": nothing, "down": nothing}

    def batch(self, places: Sequence[int], lengths: Sequence[int]) -> SampleBatch:
        """Return the next micro-batch, the sequences at `places`."""
        return SampleBatch(self.numbers.of(places), tuple(lengths))

    def size(self, way: Way, batch: SampleBatch) -> int:
        """Return the bytes of the hidden states of a micro-batch, which are then held."""
        held = self._samples[way]
        if way == "up" and self.config.caches_front:
            index = FrontIndex(held)
            missing = index.missing(batch)
            self._samples[way] = index.after(batch).held
            return self._once.size(missing.tokens, self.width)

        if self.config.sends_changes:
            size = self._changes.size(SampleMemory(self.width, self.dtype, held), batch)
            self._samples[way] = held.add(batch)
            return size

        return self._hidden.size(batch.tokens, self.width)

    def complete(self, samples: int) -> bool:
        """Return whether all `samples` of the site are held, so that nothing will change."""
        ways = [self._samples["up"]]
        if self.config.sends_changes:
            ways.append(self._samples["down"])
        return len(self.numbers.by_place) == samples and all(
            len(way.lengths) == samples for way in ways
        )
