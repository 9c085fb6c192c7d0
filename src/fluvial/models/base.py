"""The frozen base of a pool in one precision: in memory once, quantised or not, or on disk tensor
by tensor."""

import copy
import threading
from collections.abc import Callable, Container
from functools import cached_property, partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fluvial.models.attention import attending
from fluvial.models.base_weights import open_weights, persistent_buffers
from fluvial.models.behaviour import check_behaviour
from fluvial.models.building import building
from fluvial.models.loading import (
    absent,
    fill,
    generation_settings,
    load_base,
    load_held,
    meta_base,
    resolve_device,
    skeleton,
    weights_folder,
)
from fluvial.models.pretrained import ModelConfig
from fluvial.models.quantisation import FLOAT, Quantisation
from fluvial.models.quantised import QuantisedLinear, check_library, formats
from fluvial.models.states import changed
from fluvial.models.weight_sources import Finite, Source
from fluvial.models.weights import check_finite, check_weights
from fluvial.wire.tensors import Named


class Base:
    """The base's weights in one precision; each way to hold them is loaded when it is first
    used."""

    def __init__(
        self,
        config: ModelConfig,
        holds: Callable[[str], bool] | None = None,
        quantisation: Quantisation = FLOAT,
    ) -> None:
        """Load nothing; weights that `holds` does not take by name are never read, and take no
        memory (see `absent`). A model to `share` is quantised."""
        self.config = config
        self._holds = holds
        self._quantisation = quantisation
        self._lock = threading.RLock()
        self._shared: WeakValueDictionary[str, nn.Parameter] = WeakValueDictionary()

    @cached_property
    def device(self) -> torch.device:
        """The device that models are made on."""
        return resolve_device(self.config.device)

    @cached_property
    def skeleton(self) -> nn.Module:
        """The base with parameters on the meta device and the buffers that no folder stores."""
        return skeleton(self.config, attending(self.config, self.device))

    # -- beside an adapter: held in memory ---------------------------------------------------------

    def share(self) -> nn.Module:
        """Return a model whose parameters are those of the one base in memory.

        Raises `ConfigError` if the base cannot be loaded, or behaves so that no run could use it.
        """
        with self._lock:
            model = self._model

        return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})

    @cached_property
    def _model(self) -> nn.Module:
        with building():  # a thread that initialises an adapter draws random numbers
            base = self._quantised() if self._quantisation else load_base(self.config)
            check_behaviour(base, self.config.name_or_path)

        base.generation_config = generation_settings(self.config)

        return base

    def held(self) -> nn.Module:
        """Return a new base that holds its own weights alone, quantised or not.

        Raises `ConfigError` if the base cannot be loaded.
        """
        if not self._quantisation:
            return self.make({}, own=True)
        with building():
            return self._quantised()

    def _quantised(self) -> nn.Module:
        """Return a new base with quantised weights, each read and quantised before the next one."""
        check_weights(self.config, meta_base(self.config))
        model = self.blank()
        kinds = {
            path: kind
            for path, kind in formats(model, self._quantisation).items()
            if self._is_held(f"{path}.weight")
        }
        if kinds:
            check_library()

        def read(name: str, parameter: nn.Parameter) -> Tensor:
            if not parameter.is_meta:  # codes and scales
                return parameter
            if not self._is_held(name):
                return absent(parameter, self.device)

            return self.source.get(name).to(self.device, parameter.dtype, copy=True)

        for path, kind in kinds.items():
            linear: Any = model.get_submodule(path)
            weight = read(f"{path}.weight", linear.weight)
            quantised = QuantisedLinear(
                weight if isinstance(linear, nn.Linear) else weight.t(),  # transformers' Conv1D
                linear.bias,
                kind,
                correction_rank=self.config.quantization_correction,
            )
            model.set_submodule(path, quantised)

        fill(model, read)
        return model.requires_grad_(False).eval().to(self.device)

    # -- where all weights are tuned: read from disk -----------------------------------------------

    @property
    def source(self) -> Source:
        """The base's weights on disk, in the model's names and types; all are finite."""
        with self._lock:
            return self._source

    @cached_property
    def _source(self) -> Source:
        in_memory = self.config.model_copy(update={"device": "cpu", "attn_implementation": None})
        folder = weights_folder(self.config)
        if self._holds is None:
            stored = open_weights(folder, self.skeleton, partial(load_base, in_memory))
        else:
            load = partial(load_held, in_memory, self._holds)
            stored = open_weights(folder, self.skeleton, load, self._holds)

        return Finite(stored, partial(check_finite, name=self.config.name_or_path))

    def blank(self) -> nn.Module:
        """Return a copy of the skeleton whose persistent buffers are the base's."""
        with self._lock:
            return copy.deepcopy(self._blank)

    @cached_property
    def _blank(self) -> nn.Module:
        for name, buffer in persistent_buffers(self.skeleton).items():
            if name in self.source.names:
                buffer.copy_(self.source.get(name))
        self.skeleton.generation_config = generation_settings(self.config)
        return self.skeleton

    def make(self, state: Named, *, own: bool | Container[str]) -> nn.Module:
        """Return a model with the base's weights plus the changes in `state`.

        Beside it, at most one weight is in memory. Weights without a change are its `own`, all or
        those of some names, or shared by all models that are made so and live at a time.
        """
        state = changed(state)

        def weight(name: str, parameter: nn.Parameter) -> Tensor:
            if not self._is_held(name):
                return absent(parameter, self.device)

            change = state.get(name)
            owned = own if isinstance(own, bool) else name in own
            if change is None and not owned:
                return self._share_weight(name)

            value = self.source.get(name)
            if change is None:
                return value.to(self.device, copy=True)
            if parameter.dtype != torch.float32:
                return (value.float() + change).to(self.device, parameter.dtype)

            return value.to(self.device, copy=True).add_(change.to(self.device))

        model = self.blank()
        fill(model, weight)
        return model.to(self.device)

    def _is_held(self, name: str) -> bool:
        return self._holds is None or self._holds(name)

    def _share_weight(self, name: str) -> Tensor:
        """Return an untrained weight, the same tensor as long as some model uses it."""
        with self._lock:
            held = self._shared.get(name)
            if held is None:
                held = nn.Parameter(self.source.get(name).to(self.device), requires_grad=False)
                self._shared[name] = held

            return held
