"""Tuning of a cut model part by part: LoRA in one, all weights of another, a third one frozen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fluvial.models.adapters import SavedLora, adapt
from fluvial.models.split import Cut, decoder_layers
from fluvial.models.targets import LoraSettings
from fluvial.wire.tensors import Layout, factor

Place = Literal["front", "middle", "back"]
"""A part of a cut model."""
PartKind = Literal["lora", "full", "frozen"]
"""The tuned weights of a part: those of an adapter, all, or none."""


KIND_WORDS: dict[PartKind, str] = {
    "lora": "a LoRA adapter",
    "full": "all weights",
    "frozen": "frozen",
}
"""The kinds, in words."""


@dataclass(frozen=True)
class PartNames:
    """The part that a tensor of a model belongs to, by its name."""

    cut: Cut
    path: str
    """Path of the list of layers, such as `model.layers`."""
    embeddings: tuple[str, ...]
    """Paths of the embedding modules."""

    @classmethod
    def of(cls, base: nn.Module, front: int, back: int) -> "PartNames":
        """Return the names under a cut of `base`, which may be without weights.

        Raises `ConfigError` for a model that cannot be cut there.
        """
        path, _ = decoder_layers(base)
        embeddings = tuple(
            f"{name}." for name, module in base.named_modules() if isinstance(module, nn.Embedding)
        )
        return cls(Cut.of(base, front, back), path, embeddings)

    def place(self, name: str) -> Place:
        """Return the part of a tensor; an embedding that is the head too belongs to the front."""
        if self.cut.at_server(self.path, name):
            return "middle"

        first = tuple(f"{self.path}.{index}." for index in self.cut.first)
        return "front" if name.startswith((*first, *self.embeddings)) else "back"


@dataclass(frozen=True)
class PartTuning:
    """The kind of tuning of each part, where the parts differ."""

    lora: LoraSettings
    """Settings of the adapter, for parts that have one."""
    front: PartKind
    middle: PartKind
    back: PartKind
    cut: tuple[int, int] | None
    """Layers of the front and of the back; None as long as they are to be chosen."""

    @property
    def kinds(self) -> Mapping[Place, PartKind]:
        """Return the kinds by part."""
        return {"front": self.front, "middle": self.middle, "back": self.back}

    def tunes(self, kind: PartKind) -> bool:
        """Return whether a part is of this kind."""
        return kind in self.kinds.values()

    @property
    def words(self) -> str:
        """Return the kinds by part in words; beside all weights of a part an adapter is merged."""
        merged = ", merged" if self.tunes("full") else ""
        return "; ".join(
            f"{place}: {KIND_WORDS[kind]}{merged if kind == 'lora' else ''}"
            for place, kind in self.kinds.items()
        )

    def within(self, layout: Layout, base: nn.Module, cut: tuple[int, int] | None = None) -> Layout:
        """Return the tensors of `layout`, factors and weights, that are tuned under `cut`, or under
        that of the settings.

        While the cut is open, they are those that some part may tune.
        """
        cut = cut or self.cut
        if cut is None:
            kinds = set(self.kinds.values())
            return Layout(tuple(each for each in layout.shapes if _kind(each[0]) in kinds))

        names = PartNames.of(base, *cut)
        return Layout(
            tuple(
                (name, shape)
                for name, shape in layout.shapes
                if self.kinds[names.place(name)] == _kind(name)
            )
        )


Tuning = LoraSettings | SavedLora | PartTuning | None
"""An adapter, the kinds of parts, or all weights (None)."""


def tunes_weights(tuning: Tuning) -> bool:
    """Return whether weights of the base itself are tuned, so that no adapter is the result."""
    return tuning is None or (isinstance(tuning, PartTuning) and tuning.tunes("full"))


def adapt_parts(base: nn.Module, tuning: PartTuning) -> nn.Module:
    """Return `base` with LoRA modules in its parts of the kind "lora"; see `adapt`."""
    assert tuning.cut is not None, "the cut is chosen before a model is made"
    names = PartNames.of(base, *tuning.cut)
    kinds = tuning.kinds
    return adapt(base, tuning.lora, within=lambda name: kinds[names.place(f"{name}.")] == "lora")


def _kind(name: str) -> PartKind:
    """Return the kind of tuning that has a tensor of this name."""
    return "lora" if factor(name) else "full"
