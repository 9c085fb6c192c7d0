"""Hugging Face causal language models, loaded once and shared by all sites of a process.

What is tuned is a LoRA adapter, whose factors travel as they are, or all weights, of which the
change since the base travels. Models are adapted from outside by PEFT; modelling code is never
copied. transformers and peft are imported where a model is loaded, so that other commands answer at
once.
"""

import copy
import queue
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from fluvial.errors import ConfigError
from fluvial.models.adapters import SavedLora, SeededDropout, adapt
from fluvial.models.base_weights import (
    compute_buffers,
    keep_types,
    open_weights,
    persistent_buffers,
)
from fluvial.models.encoding import Encoder
from fluvial.models.frozen import Source
from fluvial.models.pretrained import ModelConfig as ModelConfig
from fluvial.models.pretrained import (
    check_tokenizer,
    context_length,
    dtype_of,
    from_hub,
    from_settings,
    local_folder,
    num_embeddings,
    read_config,
)
from fluvial.models.pretrained import load_tokenizer as load_tokenizer
from fluvial.models.probe import check_behaviour
from fluvial.models.targets import LoraSettings as LoraSettings
from fluvial.models.weights import check_finite, check_info, check_weights, quiet
from fluvial.seeds import generator
from fluvial.wire.tensors import Layout, Named, factor

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Parts:
    """What every message and every step asks a model for."""

    tuned: dict[str, nn.Parameter]
    """The LoRA factors by name, or all parameters of a model that has none."""
    dropouts: list[SeededDropout]


_known: WeakKeyDictionary[nn.Module, _Parts] = WeakKeyDictionary()


def _parts(model: nn.Module) -> _Parts:
    """The parts of a model, found by one walk over its modules: what `adapt` returned keeps its
    structure."""
    found = _known.get(model)
    if found is None:
        adapter = {
            name.removeprefix(_PREFIX).replace(".default.", "."): parameter
            for name, parameter in model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }
        dropouts = [module for module in model.modules() if isinstance(module, SeededDropout)]
        found = _known[model] = _Parts(adapter or dict(model.named_parameters()), dropouts)

    return found


def switch_dropout(model: nn.Module, active: bool) -> None:
    """Switch every `SeededDropout` of `model` on, for training, or off; its base stays in
    evaluation mode."""
    for module in _parts(model).dropouts:
        module.training = active


def reseed_dropout(model: nn.Module, seed: int) -> None:
    """Give every `SeededDropout` of `model` a new mask."""
    for module in _parts(model).dropouts:
        module.seed = seed


def resolve_device(name: str) -> torch.device:
    """The device that `model.device` names; raises `ConfigError` when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")

    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"model.device={name!r}: choose 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(
            f"model.device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use 'auto'"
        )

    return device


def load_base(config: ModelConfig) -> nn.Module:
    """Return the base model on its device, frozen, and in evaluation mode for good.

    Thus nothing but `lora_dropout` is random: no dropout, jitter or layer drop of the base's own.
    Raises `ConfigError` if a weight is missing, has another shape or is not finite.
    """
    from transformers import AutoModelForCausalLM

    check_weights(config, meta_base(config))

    with quiet():
        model, info = from_hub(
            AutoModelForCausalLM.from_pretrained,
            config,
            config=read_config(config),
            dtype=dtype_of(config),
            trust_remote_code=False,
            weights_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )

    check_info(info, model, config.name_or_path)
    check_finite(model, config.name_or_path)
    base: nn.Module = model.requires_grad_(False).eval()

    return base.to(resolve_device(config.device))


def meta_base(config: ModelConfig) -> nn.Module:
    """Return the base model without weights, on the meta device: names and shapes for planning."""
    from transformers import AutoModelForCausalLM

    with quiet(), torch.device("meta"):
        model: nn.Module = from_settings(AutoModelForCausalLM.from_config, config)
    return model.requires_grad_(False).eval()


def skeleton(config: ModelConfig) -> nn.Module:
    """The base model with parameters on the meta device and real buffers, to be filled with weights
    from elsewhere."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    kind = dtype_of(config)

    with init_empty_weights(include_buffers=False):
        model: Any = from_settings(AutoModelForCausalLM.from_config, config)
    model.tie_weights()  # what was moved to the meta device was no longer tied
    keep_types(model, kind)
    compute_buffers(model)
    model.generation_config = GenerationConfig()  # see `Workbench.save`
    whole: nn.Module = model.requires_grad_(False).eval()

    return whole


def weights_folder(config: ModelConfig) -> Path:
    """The folder that holds the base's weights as safetensors; of a hub id, downloaded or
    cached."""
    folder = local_folder(config)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    return Path(from_hub(snapshot_download, config, allow_patterns=["*.json", "*.safetensors"]))


def fill(model: nn.Module, weight: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Give a `skeleton` its parameters, each cast to the type that it has there and used wherever
    it is tied.

    `weight` gives the value of a name; one that has the parameter's type already is not copied.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made = {}

    for name, parameter in model.named_parameters():
        value = weight(name, parameter).to(parameter.dtype)
        made[name] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )

    for module in model.modules():
        for leaf, empty in module._parameters.items():
            if empty is not None:
                module._parameters[leaf] = made[names[id(empty)]]


def checkpoint_layers(model: nn.Module) -> None:
    """Switch gradient checkpointing on; below what is trained still no graph is built.

    transformers' own works in training mode only, in which a base may draw random numbers. Raises
    `ConfigError` where the architecture has no layers for it.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]

    if not layers:
        raise ConfigError(
            "train.gradient_checkpointing: transformers has none for this architecture; remove it"
        )

    for layer in layers:
        # An attribute of this one layer, which hides its class's `forward` until `whole_layers`
        # removes it.
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def whole_layers(model: nn.Module) -> None:
    """Switch gradient checkpointing off."""
    for module in model.modules():
        module.__dict__.pop("forward", None)


def tuned_layout(base: nn.Module, lora: LoraSettings | SavedLora | None) -> Layout:
    """The layout of what is tuned: the adapter, injected into `base`, or all parameters; works on
    the meta device."""
    return read_shapes(base if lora is None else adapt(base, lora))


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA factors by name, as `model.layers.0.self_attn.q_proj.lora_A.weight`, or all
    parameters, each once."""
    return dict(_parts(model).tuned)


def read_weights(model: nn.Module) -> Named:
    """A copy of what is tuned on the CPU, fp32: the LoRA factors, or all weights."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in tuned_parameters(model).items()
    }


def read_shapes(model: nn.Module) -> Layout:
    """The layout of what is tuned; works on the meta device."""
    return Layout.of(
        {name: parameter.detach() for name, parameter in tuned_parameters(model).items()}
    )


@torch.no_grad()
def write_weights(model: nn.Module, weights: Named) -> None:
    """Put `weights` (everything that is tuned, or some of it) into the model, in its own type."""
    parameters = tuned_parameters(model)
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)


def initial_state(layout: Layout, seed: int) -> Named:
    """Where tuning starts, from a published seed: A uniform in +-1/sqrt(d_in) as PEFT has it
    (Kaiming, a = sqrt(5)), everything else zero: B, and the change of a weight that is tuned
    itself."""
    adapter = {}
    for name, shape in layout.shapes:
        if factor(name) == "A":
            uniform = torch.rand(shape, generator=generator(seed, "lora", name))
            adapter[name] = (2 * uniform - 1) / shape[1] ** 0.5
        else:
            adapter[name] = torch.zeros(shape) if factor(name) else no_change(shape)

    return adapter


def no_change(shape: Sequence[int]) -> Tensor:
    """Return zeros of `shape`, fp32, that take no memory and must not be written to."""
    return torch.zeros(()).expand(tuple(shape))


def changed(state: Named) -> Named:
    """Return the tensors of `state` that are not `no_change`."""
    return {
        name: tensor for name, tensor in state.items() if tensor.numel() < 2 or any(tensor.stride())
    }


class Workbench:
    """Models that share one frozen base; a site borrows one at a time.

    With an adapter every borrowed model is a copy whose frozen parameters are the base's own, so a
    further one costs an adapter. Where all weights are tuned the base stays on disk; every borrowed
    model is made from there, costs a base, and goes when it is given back.

    A *state* is what is learned, by name, fp32: the LoRA factors, or the change of weights since
    the base, where a weight without a change is the base's.
    """

    def __init__(self, model: ModelConfig, lora: LoraSettings | SavedLora | None) -> None:
        """Load tokenizer and base; without `lora` all weights are tuned.

        Raises `ConfigError` if something cannot be loaded or the adapter does not fit.
        """
        self.dtype = dtype_of(model)
        self.tokenizer = load_tokenizer(model)
        self.config = model
        self.lora = lora
        self.full = lora is None
        self._lock = threading.Lock()
        self._free: queue.SimpleQueue[nn.Module] = queue.SimpleQueue()
        self._frozen: WeakValueDictionary[str, nn.Parameter] = WeakValueDictionary()
        self.device = resolve_device(model.device)

        if self.full:
            check_weights(model, self._empty)

        like = self._blank if self.full else self._template
        check_tokenizer(self.tokenizer, like, model.name_or_path)
        self.context, self.num_embeddings = context_length(like), num_embeddings(like)
        self.layout = read_shapes(like)
        self.dtypes = {name: parameter.dtype for name, parameter in tuned_parameters(like).items()}
        self.base_parameters = sum(
            p.numel() for n, p in like.named_parameters() if factor(n) is None
        )

        if self.full:
            _ = self.base  # a folder that cannot be read is refused here

    @cached_property
    def _template(self) -> nn.Module:
        """The model that borrowed ones with an adapter are copied from."""
        from transformers import GenerationConfig

        assert self.lora is not None, (
            "where all weights are tuned, models are made from the base on disk"
        )
        base = load_base(self.config)
        check_behaviour(base, self.config.name_or_path)
        # `generate` fills what a call leaves open from here: a folder's own would sample, forbid or
        # force tokens.
        base.generation_config = GenerationConfig()

        return adapt(base, self.lora).eval()

    @cached_property
    def _empty(self) -> nn.Module:
        return skeleton(self.config)

    @cached_property
    def _blank(self) -> nn.Module:
        """A skeleton whose persistent buffers are the base's, where all weights are tuned."""
        buffers = persistent_buffers(self._empty) if self.full else {}
        for name, buffer in buffers.items():
            buffer.copy_(self.base.get(name))
        return self._empty

    @cached_property
    def base(self) -> Source:
        """The base's weights on disk, in the model's names and types."""
        in_memory = self.config.model_copy(update={"device": "cpu"})
        return open_weights(weights_folder(self.config), self._empty, partial(load_base, in_memory))

    def check_behaviour(self) -> None:
        """Raise `ConfigError` for a base that no run could repeat, or that is no causal language
        model."""
        if self.full:  # beside an adapter the base is looked at where it is loaded
            with self.model({}) as model:
                check_behaviour(model, self.config.name_or_path)

    @contextmanager
    def model(
        self,
        state: Named,
        *,
        trainable: Literal["none", "A and B", "B"] | Collection[str] = "none",
        checkpointing: bool = False,
    ) -> Iterator[nn.Module]:
        """Borrow a model that holds `state`, with the factors or names that are `trainable`
        requiring gradients.

        "A and B" is everything that is tuned.
        """
        model = self._take(state, trainable)
        for name, parameter in tuned_parameters(model).items():
            parameter.requires_grad_(_requires_grad(name, trainable))
        switch_dropout(model, active=False)
        if model.training:
            model.eval()
        if checkpointing:
            checkpoint_layers(model)

        try:
            yield model
        finally:
            for parameter in tuned_parameters(model).values():
                parameter.grad = None
            if checkpointing:
                whole_layers(model)
            if not self.full:
                self._free.put(model)

    def weights(self, state: Named) -> Named:
        """The values that parameters of a model with `state` have, fp32, for the names of
        `state`."""
        if not self.full:
            return state
        return {name: self.base.get(name).float() + change for name, change in state.items()}

    def blank(self) -> nn.Module:
        """A skeleton of the base, for a site that was sent its weights (see `fill`)."""
        with self._lock:
            return copy.deepcopy(self._blank)

    def _take(
        self, state: Named, trainable: Literal["none", "A and B", "B"] | Collection[str]
    ) -> nn.Module:
        if self.full:
            return self._made(state, own=trainable != "none")

        try:
            model = self._free.get_nowait()
        except queue.Empty:
            frozen = {id(p): p for n, p in self._template.named_parameters() if factor(n) is None}
            model = copy.deepcopy(self._template, dict(frozen))

        write_weights(model, state)
        return model

    def _made(self, state: Named, *, own: bool) -> nn.Module:
        """A model from the base on disk and its change; beside it, at most one weight is in memory.

        Weights without a change are its `own`, or shared by all models that are borrowed at a time.
        """

        state = changed(state)

        def weight(name: str, parameter: nn.Parameter) -> Tensor:
            change = state.get(name)
            if change is None and not own:
                return self._shared(name)

            value = self.base.get(name)
            if change is None:
                return value.to(self.device, copy=True)
            if parameter.dtype != torch.float32:
                return (value.float() + change).to(self.device, parameter.dtype)

            return value.to(self.device, copy=True).add_(change.to(self.device))

        model = self.blank()
        fill(model, weight)
        return model.to(self.device)

    def _shared(self, name: str) -> Tensor:
        """A weight of the base that nobody trains, as long as somebody uses it."""
        with self._lock:
            held = self._frozen.get(name)
            if held is None:
                held = nn.Parameter(self.base.get(name).to(self.device), requires_grad=False)
                self._frozen[name] = held

            return held

    def base_state(self) -> Named:
        """The state that changes nothing: all zero, and not to be written to."""
        return {name: no_change(shape) for name, shape in self.layout.shapes}

    def save(self, state: Named, folder: Path) -> None:
        """Write an adapter as a PEFT folder (adapter_config.json, adapter_model.safetensors,
        tokenizer), all weights as a model folder of transformers, in the base's type and with the
        generation settings of the base's folder. An adapter's folder has no tokenizer where
        `exports_tokenizer` is false."""
        with self.model(state) as model:
            if self.full:
                model.save_pretrained(str(folder))  # type: ignore[operator]
            else:
                # PEFT would add the whole matrix of a head or embedding that is adapted.
                model.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]

        if self.full:
            _copy_generation(weights_folder(self.config), folder)
        if self.exports_tokenizer():
            self.tokenizer.save_pretrained(str(folder))

    def exports_tokenizer(self) -> bool:
        """Return whether a written folder holds the tokenizer.

        AutoPeftModelForCausalLM adds a row to the model for each token of the adapter's folder that
        the model has no row for, which changes all probabilities. A class such as Qwen's adds
        tokens by itself, so the tokenizer of such a base stays in the base's folder.
        """
        return self.full or len(self.tokenizer) <= self.num_embeddings

    def generate(self, state: Named, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """Greedy continuations of `prompts`, without the prompts and special tokens."""
        return list(self.answers(state, prompts, max_new_tokens=max_new_tokens))

    def answers(
        self, state: Named, prompts: Sequence[str], *, max_new_tokens: int
    ) -> Iterator[str]:
        """Yield what `generate` returns one by one; a model is borrowed until the last."""
        encoder = Encoder.of(self.tokenizer)
        with self.model(state) as model, torch.no_grad():
            for prompt in prompts:
                tokens = torch.tensor([encoder.prompt(prompt)], device=self.device)
                output = model.generate(  # type: ignore[operator]
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=self.tokenizer.pad_token_id,
                    eos_token_id=self.tokenizer.eos_token_id,
                )
                new = output[0, tokens.shape[1] :]
                yield self.tokenizer.decode(new, skip_special_tokens=True)


def _copy_generation(base: Path, folder: Path) -> None:
    """Give `folder` the generation settings of the `base` folder, or none if that has none."""
    name = "generation_config.json"
    (folder / name).unlink(missing_ok=True)

    if (base / name).is_file():
        shutil.copyfile(base / name, folder / name)


def _requires_grad(name: str, trainable: Literal["none", "A and B", "B"] | Collection[str]) -> bool:
    if isinstance(trainable, str):
        return trainable == "A and B" or (trainable == "B" and factor(name) == "B")
    return name in trainable
