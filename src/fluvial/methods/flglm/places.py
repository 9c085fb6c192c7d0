"""The tensors of a run by the part of the model that they belong to."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from fluvial.methods.flglm.config import FlGlmConfig, Place
from fluvial.models.split import Cut, decoder_layers
from fluvial.wire.tensors import Layout


@dataclass(frozen=True)
class Places:
    """Layouts of a run's tensors by part."""

    config: FlGlmConfig
    layout: Layout
    """All tensors of the run."""
    cut: Cut
    path: str
    """Path of the list of layers, such as `model.layers`."""
    embeddings: tuple[str, ...]
    """Paths of the embedding modules."""

    @classmethod
    def of(cls, config: FlGlmConfig, base: nn.Module, layout: Layout) -> "Places":
        """Return the places in `base`, which may be without weights."""
        path, layers = decoder_layers(base)
        embeddings = tuple(
            f"{name}." for name, module in base.named_modules() if isinstance(module, nn.Embedding)
        )
        cut = config.cut(len(layers))
        return cls(config, layout, cut, path, embeddings)

    def place(self, name: str) -> Place:
        """Return the part of a tensor; an embedding that is the head too belongs to the front."""
        if self.cut.at_server(self.path, name):
            return "middle"

        first = tuple(f"{self.path}.{index}." for index in self.cut.first)
        return "front" if name.startswith((*first, *self.embeddings)) else "back"

    @cached_property
    def middle(self) -> Layout:
        """Return the layout of the server's tensors, frozen ones among them."""
        return self._of(lambda place: place == "middle")

    @cached_property
    def ends(self) -> Layout:
        """Return the layout of the site's tensors, frozen ones among them."""
        return self._of(lambda place: place != "middle")

    @cached_property
    def tuned_middle(self) -> Layout:
        """Return the layout of the server's tensors that are tuned."""
        return self._of(lambda place: place == "middle" and place not in self.config.frozen)

    @cached_property
    def tuned_ends(self) -> Layout:
        """Return the layout of the site's tensors that are tuned."""
        return self._of(lambda place: place != "middle" and place not in self.config.frozen)

    @cached_property
    def shared(self) -> Layout:
        """Return the layout of the sites' tuned tensors where all sites share them; else none."""
        return self.tuned_ends if self.config.ends == "shared" else Layout(())

    @property
    def needs_gradient(self) -> bool:
        """True where a tensor of the middle or the front is tuned, so that the server needs the
        gradient of its hidden states."""
        return bool(self.tuned_middle.shapes) or self.front_is_tuned

    @property
    def front_is_tuned(self) -> bool:
        """True where a tensor of the front is tuned, so that a site needs its gradient."""
        return any(self.place(name) == "front" for name in self.tuned_ends.names)

    def _of(self, chosen: Callable[[Place], bool]) -> Layout:
        return Layout(tuple(entry for entry in self.layout.shapes if chosen(self.place(entry[0]))))
