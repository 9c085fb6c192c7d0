"""Hugging Face causal language models, loaded once and shared by all sites of a process.

What is tuned is a LoRA adapter, whose factors travel as they are, or all weights, of which the change since the base
travels. Models are adapted from outside by PEFT; modelling code is never copied. transformers and peft are imported
where a model is loaded, so that other commands answer at once.
"""

import copy
import queue
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from fluvial.base_weights import compute_buffers, keep_types, open_weights, persistent_buffers
from fluvial.encoding import Encoder
from fluvial.errors import ConfigError
from fluvial.frozen import Source
from fluvial.seeds import derive, generator
from fluvial.settings import Settings
from fluvial.tensors import Layout, Named, factor

EMBEDDED = "embedded"
_PREFIX = "base_model.model."


class ModelConfig(Settings):
    """Which base model, and how it is held."""

    name_or_path: str = EMBEDDED
    """A hub id, a local folder, or "embedded": the small Llama that comes with the package."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; pin it, so that all sites hold the same base."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen base; adapters are always fp32."""
    device: str = "auto"
    """"auto" (cuda if there is one, else cpu), "cpu", "cuda" or "cuda:N"."""


class LoraSettings(Settings):
    """The adapter; names as in PEFT's `LoraConfig`, defaults of CG-FedLLM (Shepherd)."""

    r: int = Field(8, ge=1)
    lora_alpha: float = Field(16, gt=0)
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = Field(("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""


class SeededDropout(nn.Module):
    """Dropout whose mask depends only on its seed and its place in the model.

    `nn.Dropout` draws from one generator for the whole process, so two sites that train side by side would disturb
    each other's masks; it would also draw a second mask when gradient checkpointing repeats a forward pass.
    """

    def __init__(self, p: float, place: int) -> None:
        super().__init__()
        self.p, self.place, self.seed = p, place, 0

    def forward(self, hidden: Tensor) -> Tensor:
        """Zero a share `p` of `hidden` (any shape) and scale the rest, in training only."""
        if not self.training or self.p == 0:
            return hidden
        generator = torch.Generator(hidden.device).manual_seed(derive(self.seed, self.place))
        kept = torch.rand(hidden.shape, generator=generator, device=hidden.device) >= self.p
        return hidden * kept / (1 - self.p)


@dataclass(frozen=True)
class _Parts:
    """What every message and every step asks a model for."""

    tuned: dict[str, nn.Parameter]
    """The LoRA factors by name, or all parameters of a model that has none."""
    dropouts: list[SeededDropout]


_known: WeakKeyDictionary[nn.Module, _Parts] = WeakKeyDictionary()


def _parts(model: nn.Module) -> _Parts:
    """The parts of a model, found by one walk over its modules: what `adapt` returned keeps its structure."""
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
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"model.device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use 'auto'"
        )
    return device


def _quiet() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours is shown instead


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer, padding on the right; a missing pad token is replaced by EOS."""
    from transformers import AutoTokenizer

    tokenizer = _from_hub(AutoTokenizer.from_pretrained, config)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(config: ModelConfig) -> nn.Module:
    """The base model, frozen and without dropout (only `lora_dropout` acts), on its device."""
    from transformers import AutoModelForCausalLM

    _quiet()
    model: nn.Module = _from_hub(
        AutoModelForCausalLM.from_pretrained,
        config,
        config=_model_config(config),
        dtype=getattr(torch, config.dtype),
    )
    return model.requires_grad_(False).to(resolve_device(config.device))


def meta_base(config: ModelConfig) -> nn.Module:
    """The base model without weights, on the meta device: names and shapes for planning."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(_model_config(config))
    return model.requires_grad_(False)


def skeleton(config: ModelConfig) -> nn.Module:
    """The base model with parameters on the meta device and real buffers, to be filled with weights from elsewhere."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    kind = getattr(torch, config.dtype)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(_model_config(config), dtype=kind)
    model.tie_weights()  # what was moved to the meta device was no longer tied
    keep_types(model, kind)
    compute_buffers(model)
    with suppress(ConfigError):  # a folder need not have one
        model.generation_config = _from_hub(GenerationConfig.from_pretrained, config)
    whole: nn.Module = model.requires_grad_(False).eval()
    return whole


def weights_folder(config: ModelConfig) -> Path:
    """The folder that holds the base's weights as safetensors; of a hub id, downloaded or cached."""
    source = _source(config)
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download

    return Path(_from_hub(snapshot_download, config, allow_patterns=["*.json", "*.safetensors"]))


def fill(model: nn.Module, weight: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Give a `skeleton` its parameters, each cast to the type that it has there and used wherever it is tied.

    `weight` gives the value of a name; one that has the parameter's type already is not copied.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made = {
        name: nn.Parameter(weight(name, parameter).to(parameter.dtype), requires_grad=False)
        for name, parameter in model.named_parameters()
    }
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = made[names[id(parameter)]]


def checkpoint_layers(model: Any) -> None:
    """Switch gradient checkpointing on; below what is trained still no graph is built."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()  # which only the reentrant kind needs


def tuned_layout(base: nn.Module, lora: LoraSettings | None) -> Layout:
    """The layout of what is tuned: the adapter, injected into `base`, or all parameters; works on the meta device."""
    return read_shapes(base if lora is None else adapt(base, lora))


def context_length(model_config: Any) -> int | None:
    """Tokens that the model reads at most, where its configuration tells."""
    length: int | None = getattr(model_config, "max_position_embeddings", None)
    return length


def check_length(model_config: Any, max_length: int) -> None:
    """Raise `ConfigError` if sequences of `max_length` tokens are longer than the model reads."""
    longest = context_length(model_config)
    if longest is not None and max_length > longest:
        raise ConfigError(f"data.max_length={max_length}: the model reads at most {longest} tokens")


def adapt(base: nn.Module, lora: LoraSettings) -> nn.Module:
    """`base` with LoRA modules injected (in place) by PEFT; raises `ConfigError` naming what would fit."""
    linear = {
        name.rsplit(".", 1)[-1]: module
        for name, module in base.named_modules()
        if not isinstance(module, nn.Embedding) and getattr(module, "weight", torch.empty(0)).dim() == 2
    }
    for target in lora.target_modules:
        if target not in linear:
            raise ConfigError(
                f"lora.target_modules: the model has no linear module {target!r}; "
                f"it has {', '.join(sorted(linear)) or 'none'}"
            )
        smallest = min(linear[target].weight.shape)
        if lora.r > smallest:
            raise ConfigError(f"lora.r={lora.r} exceeds dimension {smallest} of {target!r}; choose at most {smallest}")
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        # PEFT corrects fan_in_fan_out for GPT-2's Conv1D by itself and warns that it did.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # PEFT 0.21 asks transformers 5.23 by a name that is going away.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model: nn.Module = get_peft_model(
            base,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.r,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                target_modules=list(lora.target_modules),
                use_rslora=lora.use_rslora,
            ),
        )
    for place, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, nn.Dropout) and ".lora_dropout." in name:
            parent, leaf = name.rsplit(".", 1)
            model.get_submodule(parent)._modules[leaf] = SeededDropout(lora.lora_dropout, place)
    return model


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA factors by name, as `model.layers.0.self_attn.q_proj.lora_A.weight`, or all parameters, each once."""
    return dict(_parts(model).tuned)


def read_weights(model: nn.Module) -> Named:
    """A copy of what is tuned on the CPU, fp32: the LoRA factors, or all weights."""
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in tuned_parameters(model).items()
    }


def read_shapes(model: nn.Module) -> Layout:
    """The layout of what is tuned; works on the meta device."""
    return Layout.of({name: parameter.detach() for name, parameter in tuned_parameters(model).items()})


@torch.no_grad()
def write_weights(model: nn.Module, weights: Named) -> None:
    """Put `weights` (everything that is tuned, or some of it) into the model, in its own type."""
    parameters = tuned_parameters(model)
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)


def initial_state(layout: Layout, seed: int) -> Named:
    """Where tuning starts, from a published seed: A uniform in +-1/sqrt(d_in) as PEFT has it (Kaiming, a = sqrt(5)),
    everything else zero: B, and the change of a weight that is tuned itself."""
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


class Workbench:
    """Models that share one frozen base; a site borrows one at a time.

    With an adapter every borrowed model is a copy whose frozen parameters are the base's own, so a further one costs an
    adapter. Where all weights are tuned the base stays on disk; every borrowed model is made from there, costs a base,
    and goes when it is given back.

    A *state* is what is learned, by name, fp32: the LoRA factors, or the change of weights since the base, where a
    weight without a change is the base's.
    """

    def __init__(self, model: ModelConfig, lora: LoraSettings | None) -> None:
        """Load tokenizer and base; without `lora` all weights are tuned.

        Raises `ConfigError` if something cannot be loaded or the adapter does not fit.
        """
        self.tokenizer = load_tokenizer(model)
        self.config, self.lora, self.full = model, lora, lora is None
        self._lock = threading.Lock()
        self._free: queue.SimpleQueue[nn.Module] = queue.SimpleQueue()
        self.device = resolve_device(model.device)
        like = self._blank if self.full else self._template
        self.model_config: Any = like.config
        self.layout = read_shapes(like)
        self.dtypes = {name: parameter.dtype for name, parameter in tuned_parameters(like).items()}
        self.base_parameters = sum(p.numel() for n, p in like.named_parameters() if factor(n) is None)
        if self.full:
            _ = self.base  # a folder that cannot be read is refused here

    @cached_property
    def _template(self) -> nn.Module:
        """What borrowed models with an adapter are copied from."""
        assert self.lora is not None, "where all weights are tuned, models are made from the base on disk"
        return adapt(load_base(self.config), self.lora).eval()

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

    @contextmanager
    def model(
        self,
        state: Named,
        *,
        trainable: Literal["none", "A and B", "B"] | Collection[str] = "none",
        checkpointing: bool = False,
    ) -> Iterator[nn.Module]:
        """Borrow a model that holds `state`, with the factors or names that are `trainable` requiring gradients.

        "A and B" is everything that is tuned.
        """
        model = self._take(state)
        for name, parameter in tuned_parameters(model).items():
            parameter.requires_grad_(_requires_grad(name, trainable))
        if checkpointing:
            checkpoint_layers(model)
        if model.training:
            model.eval()
        try:
            yield model
        finally:
            for parameter in tuned_parameters(model).values():
                parameter.grad = None
            if checkpointing:
                model.gradient_checkpointing_disable()  # type: ignore[operator]
            if not self.full:
                self._free.put(model)

    def weights(self, state: Named) -> Named:
        """The values that parameters of a model with `state` have, fp32, for the names of `state`."""
        if not self.full:
            return state
        return {name: self.base.get(name).float() + change for name, change in state.items()}

    def blank(self) -> nn.Module:
        """A skeleton of the base, for a site that was sent its weights (see `fill`)."""
        with self._lock:
            return copy.deepcopy(self._blank)

    def _take(self, state: Named) -> nn.Module:
        if self.full:
            return self._made(state)
        try:
            model = self._free.get_nowait()
        except queue.Empty:
            frozen = {id(p): p for n, p in self._template.named_parameters() if factor(n) is None}
            model = copy.deepcopy(self._template, dict(frozen))
        write_weights(model, state)
        return model

    def _made(self, state: Named) -> nn.Module:
        """A model from the base on disk and its change; beside it, at most one weight is in memory."""

        def weight(name: str, parameter: nn.Parameter) -> Tensor:
            value = self.base.get(name)
            change = state.get(name)
            if change is None:
                return value.to(self.device, copy=True)
            if parameter.dtype != torch.float32:
                return (value.float() + change).to(self.device, parameter.dtype)
            return value.to(self.device, copy=True).add_(change.to(self.device))

        model = self.blank()
        fill(model, weight)
        return model.to(self.device)

    def base_state(self) -> Named:
        """The state that changes nothing: all zero, and not to be written to."""
        return {name: no_change(shape) for name, shape in self.layout.shapes}

    def save(self, state: Named, folder: Path) -> None:
        """Write an adapter as a PEFT folder (adapter_config.json, adapter_model.safetensors, tokenizer), all weights as
        a model folder of transformers, in the base's type."""
        with self.model(state) as model:
            model.save_pretrained(str(folder))  # type: ignore[operator]
        self.tokenizer.save_pretrained(str(folder))

    def generate(self, state: Named, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """Greedy continuations of `prompts`, without the prompts and special tokens."""
        answers = []
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
                answers.append(self.tokenizer.decode(new, skip_special_tokens=True))
        return answers


def _requires_grad(name: str, trainable: Literal["none", "A and B", "B"] | Collection[str]) -> bool:
    if isinstance(trainable, str):
        return trainable == "A and B" or (trainable == "B" and factor(name) == "B")
    return name in trainable


def _source(config: ModelConfig) -> str:
    if config.name_or_path != EMBEDDED:
        return config.name_or_path
    return str(resources.files("fluvial") / "assets" / "tiny")


def _from_hub(load: Any, wanted: ModelConfig, /, **options: Any) -> Any:
    """Call a `from_pretrained`, turning its many errors into one that names the setting."""
    source = _source(wanted)
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise ConfigError(f"model.name_or_path: there is no folder {source!r}")
    try:
        return load(str(Path(source).expanduser()) if "~" in source else source, revision=wanted.revision, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model.name_or_path={wanted.name_or_path!r} cannot be loaded: {first} "
            "(it must be a local folder of transformers' form, or a hub id that this machine can reach or has cached)"
        ) from error


def _model_config(config: ModelConfig) -> Any:
    """The model's own configuration with every dropout at 0."""
    from transformers import AutoConfig

    settings = _from_hub(AutoConfig.from_pretrained, config)
    for key, value in settings.to_dict().items():
        if key.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(settings, key, 0.0)
    return settings
