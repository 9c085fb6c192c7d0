"""The parts of a cut model in one process, to borrow one at a time, with or without LoRA.

A pool reads from disk what its part holds and nothing else: a server's neither embedding nor head,
a site's no layer of the middle.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from torch import nn

from fluvial.models.adapters import SavedLora, adapt
from fluvial.models.base import Base
from fluvial.models.loading import absent
from fluvial.models.outline import Outline
from fluvial.models.part_tuning import PartTuning, Tuning, adapt_parts
from fluvial.models.pretrained import ModelConfig
from fluvial.models.split import Cut, Part, check_part, decoder_layers
from fluvial.models.states import base_state
from fluvial.models.tuning import tuned_parameters, write_weights
from fluvial.models.weights import check_finite, check_weights
from fluvial.wire.tensors import Layout, Named, factor


class PartPool:
    """Parts to borrow, all of one end: of a site (A and C), or of the server (B).

    Where no weight of the base is tuned, the borrowed parts of a process share all of them, so a
    further one costs an adapter. Where some are, a borrowed part is made from the folder and goes
    when it is given back; such parts share the weights that they do not train.
    """

    def __init__(self, config: ModelConfig, tuning: Tuning, cut: Cut, *, server: bool) -> None:
        """Load nothing."""
        assert not isinstance(tuning, SavedLora), "a saved adapter is measured, and not trained"
        self.config = config
        self.tuning = tuning
        self.cut = cut
        self.server = server
        self.outline = Outline(config, tuning)
        self._lock = threading.RLock()
        self._free: list[Part] = []
        self._checked = False

    @cached_property
    def layout(self) -> Layout:
        """Layout of what is tuned in this part, from shapes alone.

        Its names are those of the whole model's, so the layouts of both ends are a whole model's.
        """
        whole = self.outline.assignment.layout
        return Layout(tuple((name, shape) for name, shape in whole.shapes if self._holds(name)))

    @cached_property
    def _weights(self) -> frozenset[str]:
        """Names of the base's weights that are tuned in this part."""
        return frozenset(name for name in self.layout.names if factor(name) is None)

    def load(self) -> None:
        """Load the part now; raises `ConfigError` where it cannot be used."""
        with self.part(base_state(self.layout), trainable=False):
            pass

    @contextmanager
    def part(self, state: Named, *, trainable: bool, checkpointing: bool = False) -> Iterator[Part]:
        """Borrow a part that holds `state`: LoRA factors, or changes of the base's weights.

        Its tuned parameters require gradients if it is `trainable`. Raises `ConfigError` where the
        base cannot be cut.
        """
        assert state.keys() == set(self.layout.names), "a state of another part"

        with self._take(state, trainable) as part:
            tuned = part.tuned().values()
            for parameter in tuned:
                parameter.requires_grad_(trainable)
            part.switch_dropout(active=False)

            try:
                part.switch_checkpointing(checkpointing)
                yield part
            finally:
                part.switch_checkpointing(active=False)
                for parameter in tuned:
                    parameter.grad = None

    @contextmanager
    def _take(self, state: Named, trainable: bool) -> Iterator[Part]:
        factors = {name: tensor for name, tensor in state.items() if name not in self._weights}
        if self._weights:
            with self._lock:
                base = self._base
            own = self._weights if trainable else ()
            model = base.make({name: state[name] for name in self._weights}, own=own)
            self._adapt(model)
            write_weights(model, factors)
            yield self._wrap(model)
            return

        with self._lock:
            part = self._free.pop() if self._free else self._copy()

        write_weights(part.model, factors)
        try:
            yield part
        finally:
            with self._lock:
                self._free.append(part)

    def _copy(self) -> Part:
        """Return a further part, which shares the frozen weights of the template."""
        parameters = tuned_parameters(self._template)
        tuned = {id(parameters[name]) for name in self.layout.names}
        shared = {id(p): p for p in self._template.parameters() if id(p) not in tuned}
        return self._wrap(copy.deepcopy(self._template, dict(shared)))

    @cached_property
    def _base(self) -> Base:
        check_weights(self.config, self.outline.base)
        return Base(self.config, self._holds, self.config.quantisation)

    @cached_property
    def _template(self) -> nn.Module:
        """The part's weights and its adapter, to copy; the layers have no gates."""
        base = self._base.held()
        self._adapt(base)
        return base

    def _adapt(self, base: nn.Module) -> None:
        """Put the adapter into `base`, where its layout has one; PEFT puts its modules into the
        base itself, whose forward pass is the one to cut.

        Factors of other parts are there too, absent, so that dropout has the places of a whole
        model.
        """
        if self.tuning is None or not any(factor(name) for name in self.layout.names):
            return

        if isinstance(self.tuning, PartTuning):
            adapted = adapt_parts(base, self.tuning)
        else:
            adapted = adapt(base, self.tuning)

        for name, parameter in tuned_parameters(adapted).items():
            if not self._holds(name):
                parameter.data = absent(parameter, self._base.device)

    def _wrap(self, model: nn.Module) -> Part:
        """Return a model as a part; the first one is checked."""
        part = Part(model, self.cut, server=self.server, tuned=self.layout.names)
        with self._lock:
            if not self._checked:
                check_finite(part.own_weights(), self.config.name_or_path)
                check_part(part)
                self._checked = True

        return part

    @cached_property
    def _path(self) -> str:
        """Path of the list of decoder layers."""
        path, layers = decoder_layers(self.outline.base)
        assert len(layers) == self.cut.layers, "a cut of another model"
        return path

    def _holds(self, name: str) -> bool:
        return self.cut.at_server(self._path, name) == self.server
