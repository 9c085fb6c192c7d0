"""Models read from disk: equal to models in memory, no graph below the block, and memory for the
block alone."""

import gc
import json
import logging
import weakref
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fluvial.codecs.quantise import NF4, Int8, Int8Settings, NF4Settings
from fluvial.errors import ConfigError
from fluvial.models.base_weights import open_weights
from fluvial.models.frozen import stream
from fluvial.models.loading import load_base, skeleton
from fluvial.models.pretrained import ModelConfig
from fluvial.models.tuning import checkpoint_layers
from fluvial.models.weight_sources import FileSource, FolderSource, MemorySource, Source, Sum
from fluvial.wire.tensors import Layout, Named
from tests.conftest import saved_model

logger = logging.getLogger(__name__)

TOKENS = torch.arange(3, 43).reshape(2, 20)


def config(folder: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig.model_validate(
        {"name_or_path": str(folder), "device": "cpu", "dtype": dtype}
    )


def weights(model: nn.Module) -> Named:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def block_of(named: Named, start: str) -> Named:
    """Copies of the tensors whose names begin with `start`, in a form that a site may train."""
    return {
        name: tensor.detach().clone() for name, tensor in named.items() if name.startswith(start)
    }


def folder_source(folder: Path, model: nn.Module) -> FolderSource:
    return FolderSource(folder, list(weights(model)))


def loss_of(model: nn.Module, *, bf16: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        logits = model(input_ids=TOKENS, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        return nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten())


def step(
    model: nn.Module, *, bf16: bool = False, checkpointing: bool = False
) -> tuple[Tensor, Named]:
    """The loss, and the gradients of what is trained."""
    if checkpointing:
        checkpoint_layers(model)
    loss = loss_of(model, bf16=bf16)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def assert_equal(
    found: tuple[Tensor, Named], expected: tuple[Tensor, Named], trained: Named
) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys() == trained.keys()
    for name, gradient in expected[1].items():
        assert gradient.any(), name
        assert found[1][name].dtype == gradient.dtype
        assert torch.equal(found[1][name], gradient), name


def in_memory(settings: ModelConfig, block: Named) -> nn.Module:
    """The ordinary model, its block replaced by a copy of `block` that is trained."""
    model = load_base(settings)
    for name, tensor in block.items():
        parameter = model.get_parameter(name)
        parameter.data = tensor.clone()
        parameter.requires_grad_(True)

    return model


@pytest.fixture(scope="module")
def tiny_untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        attention_bias=True,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return saved_model(LlamaForCausalLM, settings, tmp_path_factory.mktemp("tiny_untied_model"))


@pytest.fixture(params=["tiny_model", "tiny_untied_model", "tiny_gqa_model", "tiny_gpt2_model"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("dtype", "master", "bf16"),
    [
        ("float32", "float32", False),
        ("float32", "float32", True),
        ("bfloat16", "bfloat16", False),
        ("bfloat16", "float32", True),
    ],
)
def test_a_layer_trains_as_in_memory(
    folder: Path, place: int, dtype: str, master: str, *, bf16: bool, checkpointing: bool
) -> None:
    settings = config(folder, dtype)
    layer = f"transformer.h.{place}." if "gpt2" in folder.name else f"model.layers.{place}."
    block = {
        name: tensor.to(getattr(torch, master))
        for name, tensor in block_of(weights(load_base(settings)), layer).items()
    }
    expected = step(in_memory(settings, block), bf16=bf16, checkpointing=checkpointing)
    empty = skeleton(settings)
    model = stream(empty, folder_source(folder, empty), block)
    assert_equal(step(model, bf16=bf16, checkpointing=checkpointing), expected, block)


@pytest.mark.parametrize(
    ("model", "start"),
    [
        ("tiny_model", "model.embed_tokens."),
        ("tiny_model", "model.norm."),
        ("tiny_untied_model", "model.embed_tokens."),
        ("tiny_untied_model", "lm_head."),
        ("tiny_gpt2_model", "transformer.wte."),
        ("tiny_gpt2_model", "transformer.wpe."),
        ("tiny_gpt2_model", "transformer.ln_f."),
    ],
)
def test_other_blocks_train_as_in_memory_and_tied_weights_as_one(
    model: str, start: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    settings = config(folder)
    empty = skeleton(config(folder))
    block = block_of(weights(load_base(settings)), start)
    expected = step(in_memory(settings, block))
    assert_equal(step(stream(empty, folder_source(folder, empty), block)), expected, block)


def test_nothing_trained_makes_no_graph_and_leaves_the_skeleton_empty(folder: Path) -> None:
    empty = skeleton(config(folder))
    model = stream(empty, folder_source(folder, empty), {})
    loss = loss_of(model)
    assert not loss.requires_grad
    assert torch.equal(loss, loss_of(load_base(config(folder))))
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_step_of_training_moves_the_tensors_given(tiny_model: Path) -> None:
    empty = skeleton(config(tiny_model))
    block = block_of(weights(load_base(config(tiny_model))), "model.layers.1.")
    before = {name: tensor.clone() for name, tensor in block.items()}
    model = stream(empty, folder_source(tiny_model, empty), block)
    step(model)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in block.items())


class Watched(Source):
    """Counts how often each tensor is read, and how many tensors are alive at once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.names = source.names
        self._given: list[weakref.ref[Any]] = []
        self.reads: Counter[str] = Counter()
        self.most_alive = 0

    def get(self, name: str) -> Tensor:
        memory = (
            self._source.get(name).numpy().copy()
        )  # lives exactly as long as the tensor's storage
        self._given = [given for given in self._given if given() is not None] + [
            weakref.ref(memory)
        ]
        self.most_alive = max(self.most_alive, len(self._given))
        self.reads[name] += 1

        return torch.from_numpy(memory)

    def rows(self, name: str, index: Tensor) -> Tensor:
        self.reads[f"rows of {name}"] += 1
        return self._source.rows(name, index)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_block_stays_and_one_weight_at_a_time(
    folder: Path, *, checkpointing: bool
) -> None:
    empty = skeleton(config(folder))
    layer = "transformer.h.1." if "gpt2" in folder.name else "model.layers.1."
    block = block_of(weights(load_base(config(folder))), layer)
    source = Watched(folder_source(folder, empty))
    model = stream(empty, source, block)
    gc.disable()  # nothing may wait for the collector

    try:
        step(model, checkpointing=checkpointing)
    finally:
        gc.enable()

    assert source.most_alive == 1
    small = [
        tensor for name, tensor in weights(empty).items() if tensor.dim() < 2 and name not in block
    ]
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert held == sum(tensor.nbytes for tensor in [*block.values(), *small])


def test_the_backward_pass_reads_only_what_lies_above_the_block(tiny_untied_model: Path) -> None:
    empty = skeleton(config(tiny_untied_model))
    block = block_of(weights(load_base(config(tiny_untied_model))), "model.layers.1.self_attn.")
    source = Watched(folder_source(tiny_untied_model, empty))
    model = stream(empty, source, block)
    inputs: dict[int, bool] = {}

    for place, layer in enumerate(model.get_submodule("model.layers").children()):
        layer.register_forward_pre_hook(
            lambda _, x, place=place: inputs.update({place: x[0].requires_grad})
        )

    source.reads.clear()
    step(model)
    assert inputs == {0: False, 1: False}
    mlp = ("gate_proj", "up_proj", "down_proj")
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    below = {f"model.layers.0.mlp.{name}.weight": 1 for name in mlp}
    below |= {f"model.layers.0.self_attn.{name}.weight": 1 for name in attention}
    above = {f"model.layers.1.mlp.{name}.weight": 2 for name in mlp} | {"lm_head.weight": 2}
    assert source.reads == {"rows of model.embed_tokens.weight": 1} | below | above


def test_compressed_weights_from_one_file_and_a_change_in_memory(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = config(tiny_model)
    empty = skeleton(settings)
    stored = weights(load_base(settings))
    block = block_of(stored, "model.layers.1.")
    codecs: dict[str, Int8 | NF4] = {
        name: (NF4(NF4Settings(), layout) if ".mlp." in name else Int8(Int8Settings(), layout))
        for name, tensor in stored.items()
        if tensor.dim() == 2
        for layout in [Layout.of({name: tensor})]
    }
    frames = {name: codec.encode({name: stored[name]}) for name, codec in codecs.items()}
    file = tmp_path / "rest.safetensors"
    save_file(
        {name: tensor for name, tensor in stored.items() if name not in frames}
        | {
            name: torch.frombuffer(bytearray(frame), dtype=torch.uint8)
            for name, frame in frames.items()
        },
        file,
    )
    source = FileSource(file, lambda name, frame: codecs[name].decode(frame)[name])
    change = {name: torch.full_like(stored[name], 0.01) for name in list(stored)[:3]}
    rest = {
        name: codecs[name].decode(frames[name])[name] if name in frames else stored[name]
        for name in stored
    }
    rest = {
        name: tensor + change[name] if name in change else tensor for name, tensor in rest.items()
    } | block
    model = load_base(settings)

    for name, parameter in model.named_parameters():
        parameter.data = rest[name].clone()
        parameter.requires_grad_(name in block)

    assert_equal(step(stream(empty, Sum(source, MemorySource(change)), block)), step(model), block)


def test_sums_are_made_in_fp32_and_keep_the_stored_type() -> None:
    base = torch.randn(4, 3).bfloat16()
    change = 1e-3 * torch.randn(4, 3)
    both = Sum(MemorySource({"w": base, "v": base}), MemorySource({"w": change}))
    assert both.names == {"w", "v"}
    assert both.shape("w") == (4, 3)
    assert torch.equal(both.get("w"), (base.float() + change).bfloat16())
    assert torch.equal(
        both.rows("w", torch.tensor([[2, 0]])), both.get("w")[torch.tensor([[2, 0]])]
    )
    assert torch.equal(both.rows("v", torch.tensor([1])), base[[1]])


def test_shards_and_names_without_the_base_prefix_are_found(folder: Path, tmp_path: Path) -> None:
    names = weights(skeleton(config(folder)))
    stored = load_file(folder / "model.safetensors")
    shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}  # type: dict[str, Named]

    for number, (name, tensor) in enumerate(stored.items()):
        short = name if name.startswith("lm_head.") else name.partition(".")[2]
        list(shards.values())[number % 2][short] = tensor

    for file, tensors in shards.items():
        save_file(tensors, tmp_path / file)
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = skeleton(config(folder))
    source, whole = (open_weights(place, model, pytest.fail) for place in (tmp_path, folder))

    for name in names:
        assert source.shape(name) == whole.shape(name) == names[name].shape
        assert torch.equal(source.get(name), whole.get(name))


def test_folders_that_do_not_fit_are_refused(
    tiny_model: Path, tiny_gqa_model: Path, tmp_path: Path
) -> None:
    empty = skeleton(config(tiny_model))
    with pytest.raises(
        ConfigError, match=r"'model.layers.9.w' not found among its 20 .* save_pretrained"
    ):
        FolderSource(tiny_model, [*weights(empty), "model.layers.9.w"])

    with pytest.raises(
        ConfigError, match=r"k_proj.weight' has shape \(16, 32\), the model's has \(32, 32\)"
    ):
        stream(empty, folder_source(tiny_gqa_model, empty), {})

    with pytest.raises(ConfigError, match=r"lack 'model.embed_tokens.weight', .* and 16 more"):
        stream(empty, MemorySource({"model.norm.weight": torch.ones(32)}), {})
    with pytest.raises(ConfigError, match=r"neither model.safetensors nor"):
        FolderSource(tmp_path, ["w"])
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match=r"model.safetensors: is damaged or cut short"):
        FolderSource(tmp_path, ["w"])
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConfigError, match="no 'weight_map'"):
        FolderSource(tmp_path, ["w"])
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"w": "gone.safetensors"}}'
    )
    with pytest.raises(ConfigError, match=r"the shard 'gone.safetensors' .* is missing"):
        FolderSource(tmp_path, ["w"])


def test_tensors_that_are_not_floats_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(
        {"w": torch.zeros(2, 2, dtype=torch.int8), "f": torch.zeros(3, dtype=torch.uint8)}, file
    )
    whole = FileSource(file, lambda _name, frame: torch.tensor(list(frame)))

    for source in (FolderSource(tmp_path, ["w"]), whole):
        with pytest.raises(ConfigError, match=r"tensor 'w' is torch.int8, expected float32"):
            source.get("w")

    with pytest.raises(ConfigError, match=r"tensor 'f' is torch.int64"):
        whole.get("f")


def test_matrices_outside_linear_layers_are_read_when_they_are_asked_for() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.empty(2, 3, 4, device="meta"))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.up

    empty = nn.Sequential(Experts(), nn.Linear(4, 4, device="meta"))
    rest = MemorySource(
        {"1.weight": torch.eye(4), "1.bias": torch.zeros(4), "0.up": torch.ones(2, 3, 4)}
    )
    assert torch.equal(stream(empty, rest, {})(torch.ones(2, 5, 3)), torch.full((2, 5, 4), 3.0))
    model = stream(empty, rest, {"0.up": torch.ones(2, 3, 4)})
    assert torch.equal(model(torch.ones(2, 5, 3)), torch.full((2, 5, 4), 3.0))


def memory() -> dict[str, int]:
    """Memory of this process in bytes, as the kernel counts it: now and at its peak, mapped files
    included."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        line[0].rstrip(":"): 1024 * int(line[1])
        for line in lines
        if line[0].startswith(("VmRSS", "VmHWM", "Rss"))
    }


def train_streamed(folder: Path) -> dict[str, int]:
    """One forward and backward pass of the middle layer; the process's memory once all is built and
    done."""
    settings = config(folder)
    empty = skeleton(settings)
    middle = f"model.layers.{len(empty.get_submodule('model.layers')._modules) // 2}."
    source = folder_source(folder, empty)
    block = {name: source.get(name).clone() for name in source.names if name.startswith(middle)}
    _, gradients = step(stream(empty, source, block))
    assert gradients.keys() == block.keys()

    return memory() | {"block": sum(tensor.nbytes for tensor in block.values())}


def growth(small: Path, large: Path) -> dict[str, int]:
    """What `large` adds to a process that has seen `small`, bytes."""
    torch.set_num_threads(1)
    train_streamed(small)
    before = memory()
    after = train_streamed(large)

    return {"peak": after["VmHWM"] - before["VmRSS"], "block": after["block"]} | {
        name: after[name] - before[name] for name in ("RssAnon", "RssFile")
    }


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc"
)
def test_a_model_larger_than_memory_trains_in_a_third_of_its_size(
    tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig

    settings = LlamaConfig(
        vocab_size=2000,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        dtype="float32",
    )
    settings.save_pretrained(tmp_path)
    draw = torch.Generator().manual_seed(0)
    shards = {}

    for name, parameter in skeleton(config(tmp_path)).named_parameters():
        shards[name] = f"{name}.safetensors"
        save_file(
            {name: 0.02 * torch.randn(parameter.shape, generator=draw)}, tmp_path / shards[name]
        )

    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(growth, tiny_model, tmp_path).result()
    logger.info(
        "model %.1f MB; %s",
        size / 1e6,
        {name: f"{value / 1e6:.1f} MB" for name, value in found.items()},
    )
    assert size > 4e8
    assert found["peak"] < size / 3, found
