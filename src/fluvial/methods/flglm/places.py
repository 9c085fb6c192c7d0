"""The tensors of a run by the part of the model that they belong to."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.models.part_tuning import PartNames, Place
from fluvial.models.split import Cut
from fluvial.wire.tensors import Layout, factor


@dataclass(frozen=True)
class Places:
    """Layouts of a run's tensors by part."""

    config: FlGlmConfig
    layout: Layout
    """All tensors that are tuned."""
    names: PartNames

    @classmethod
    def of(cls, config: FlGlmConfig, base: nn.Module, layout: Layout) -> "Places":
        """Return the places in `base`, which may be without weights."""
        return cls(config, layout, PartNames.of(base, *config.layers))

    @property
    def cut(self) -> Cut:
        """The cut of the model."""
        return self.names.cut

    def place(self, name: str) -> Place:
        """Return the part of a tensor; see `PartNames.place`."""
        return self.names.place(name)

    @cached_property
    def middle(self) -> Layout:
        """Return the layout of the server's tensors."""
        return self._of(lambda place: place == "middle")

    @cached_property
    def ends(self) -> Layout:
        """Return the layout of the site's tensors."""
        return self._of(lambda place: place != "middle")

    @cached_property
    def shared(self) -> Layout:
        """Return the layout of the sites' tensors where all sites share them; else none."""
        return self.ends if self.config.ends == "shared" else Layout(())

    @property
    def shares_weights(self) -> bool:
        """True where weights of the base itself are tuned in layers that the sites share."""
        return not all(factor(name) for name in self.shared.names)

    @property
    def needs_gradient(self) -> bool:
        """True where a tensor of the middle or the front is tuned, so that the server needs the
        gradient of its hidden states."""
        return bool(self.middle.shapes) or self.front_is_tuned

    @property
    def front_is_tuned(self) -> bool:
        """True where a tensor of the front is tuned, so that a site needs its gradient."""
        return any(self.place(name) == "front" for name in self.ends.names)

    def head_is_embedding(self, base: nn.Module) -> bool:
        """Return whether the head of `base` is its embedding too."""
        head = base.get_output_embeddings()  # type: ignore[operator]
        embedding = base.get_input_embeddings()  # type: ignore[operator]
        return head is not None and head.weight is embedding.weight

    def _of(self, chosen: Callable[[Place], bool]) -> Layout:
        return Layout(tuple(entry for entry in self.layout.shapes if chosen(self.place(entry[0]))))
