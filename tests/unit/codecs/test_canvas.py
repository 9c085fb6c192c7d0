"""The canvas of CG-FedLLM and the scales beside it."""

import warnings
from functools import cache

import pytest
import torch

from fluvial.codecs.learned.canvas import Canvas
from fluvial.codecs.learned.resnet import FrameBytes, ResNetSettings, frame_bytes
from fluvial.codecs.normalise import (
    BYTES_PER_SCALE,
    Normalisation,
    denormalise,
    measure,
    normalise,
    read_scales,
    scale_count,
    write_scales,
)
from fluvial.errors import ConfigError, WireError
from fluvial.wire.frame import OVERHEAD, Reader
from fluvial.wire.tensors import Layout

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
MODES: tuple[Normalisation, ...] = ("none", "global_rms", "factor_rms", "maxabs")


def square_layout(layers: int, d: int, rank: int, targets: tuple[str, ...] = TARGETS) -> Layout:
    shapes = {}
    for layer in range(layers):
        for module in targets:
            path = f"model.layers.{layer}.self_attn.{module}"
            shapes[f"{path}.lora_A.weight"] = (rank, d)
            shapes[f"{path}.lora_B.weight"] = (d, rank)

    return Layout(tuple(sorted(shapes.items())))


@cache
def meta_layout(model: str, rank: int) -> Layout:
    """The adapter layout of a real architecture; no weights are made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
        from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

        llama = LlamaConfig(
            hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, vocab_size=32
        )
        qwen = Qwen2Config(
            hidden_size=2048,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            vocab_size=32,
        )

        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(
                {"llama-7b": llama, "qwen1.5-1.8b": qwen}[model]
            )
            adapted = get_peft_model(base, LoraConfig(r=rank, target_modules=list(TARGETS)))

        return Layout.of(get_peft_model_state_dict(adapted))


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_square_is_a_bitwise_bijection(rank: int) -> None:
    layout = square_layout(16 // rank * 2, 128, rank)
    canvas = Canvas(layout, "square", 6)
    bits = torch.randint(-(2**31), 2**31, (layout.numel,), dtype=torch.int64).to(torch.int32)
    vector = bits.view(torch.float32)  # any bit pattern, NaN included
    canvases = canvas.pack(vector)
    assert [tuple(one.shape) for one in canvases] == canvas.shapes
    assert canvas.numel == layout.numel
    assert torch.equal(canvas.unpack(canvases).view(torch.int32), bits)


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_grouped_is_a_bitwise_bijection_beside_its_padding(rank: int) -> None:
    shapes = dict(square_layout(2, 96, rank, ("q_proj", "o_proj")).shapes)
    shapes |= {
        "model.layers.0.self_attn.k_proj.lora_A.weight": (rank, 96),
        "model.layers.0.self_attn.k_proj.lora_B.weight": (40, rank),
        "transformer.h.1.mlp.c_fc.lora_A.weight": (2, 96),
        "transformer.h.1.mlp.c_fc.lora_B.weight": (200, 2),
    }
    layout = Layout(tuple(sorted(shapes.items())))
    canvas = Canvas(layout, "grouped", 6)
    assert [rows for rows, _ in canvas.shapes] == [128, 128, 256]
    vector = torch.randn(layout.numel)
    canvases = canvas.pack(vector)
    assert sum(int((one != 0).sum()) for one in canvases) == layout.numel

    for one in canvases:
        one[one == 0] = 7.0  # the padding is not read
    assert torch.equal(canvas.unpack(canvases), vector)


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_markers_stand_where_the_formula_says(rank: int) -> None:
    layers = 8
    d = 128
    layout = square_layout(layers, d, rank)
    marked = layout.unflatten(torch.arange(layout.numel, dtype=torch.float32))
    (canvas,) = Canvas(layout, "square", 6).pack(layout.flatten(marked))

    for layer in range(layers):
        for number, module in enumerate(TARGETS):
            path = f"model.layers.{layer}.self_attn.{module}"
            for j in range(rank):
                column = ((layer * len(TARGETS) + number) * 2) * rank + j
                assert torch.equal(canvas[:, column], marked[f"{path}.lora_A.weight"][j])
                assert torch.equal(canvas[:, column + rank], marked[f"{path}.lora_B.weight"][:, j])


def test_layers_are_ordered_by_number_and_other_targets_by_name() -> None:
    layout = square_layout(11, 128, 8, ("up_proj", "v_proj", "down_proj", "q_proj"))
    placed = [slot.name for slot in Canvas(layout, "grouped", 6).slots]
    modules = [name.split(".")[4] for name in placed[::2]]
    assert modules == ["q_proj", "v_proj", "down_proj", "up_proj"] * 11
    assert [int(name.split(".")[2]) for name in placed[::8]] == list(range(11))


def test_grouped_query_attention_is_refused_in_square_and_fine_in_grouped() -> None:
    shapes = dict(square_layout(8, 128, 8).shapes)
    shapes["model.layers.3.self_attn.k_proj.lora_B.weight"] = (64, 8)
    layout = Layout(tuple(sorted(shapes.items())))

    with pytest.raises(
        ConfigError, match=r"layers.3.self_attn.k_proj.lora_B.* has 64 rows.*\"grouped\""
    ):
        Canvas(layout, "square", 6)

    vector = torch.randn(layout.numel)
    canvas = Canvas(layout, "grouped", 6)
    assert canvas.shapes == [(128, 128), (128, 512)]  # k's 64 rows and 8 columns are padded
    assert torch.equal(canvas.unpack(canvas.pack(vector)), vector)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (square_layout(8, 96, 8), "96 rows; 6 stages need a multiple of 64"),
        (square_layout(8, 64, 8), "64 rows; 6 stages need a multiple of 64, at least 128"),
        (square_layout(3, 128, 4), "96 columns"),
        (Layout((("lm_head.weight", (8, 8)),)), "'lm_head.weight' with shape"),
        (Layout(()), "no tensors"),
    ],
)
def test_what_has_no_square_canvas_is_named(layout: Layout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Canvas(layout, "square", 6)


@pytest.mark.parametrize(
    ("model", "rank", "shape", "raw", "latent"),
    [
        ("llama-7b", 8, (4096, 2048), 33_554_432, 524_288),
        ("llama-7b", 16, (4096, 4096), 67_108_864, 1_048_576),
        ("qwen1.5-1.8b", 8, (2048, 1536), 12_582_912, 196_608),
    ],
)
def test_byte_table_of_the_paper(
    model: str, rank: int, shape: tuple[int, int], raw: int, latent: int
) -> None:
    layout = meta_layout(model, rank)
    assert Canvas(layout, "square", 6).shapes == [shape]
    assert layout.raw_bytes == raw
    scales = BYTES_PER_SCALE * len(layout.shapes)
    assert frame_bytes(ResNetSettings(), layout) == FrameBytes(
        latent=latent, scales=scales, header=OVERHEAD
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1e-38, 1e-6, 1.0, 1e30])
def test_normalisation_round_trip(mode: Normalisation, size: float) -> None:
    layout = square_layout(2, 8, 4)
    vector = torch.randn(layout.numel, dtype=torch.float64).mul(size).float()
    scales = measure(vector, layout, mode)
    wire = write_scales(scales)
    assert len(wire) == BYTES_PER_SCALE * scale_count(layout, mode)
    received = read_scales(Reader(wire), scale_count(layout, mode))
    assert torch.equal(received, scales)
    values = normalise(vector, scales, layout, mode)
    back = denormalise(values, received, layout, mode)
    assert torch.allclose(back, vector, rtol=3e-7, atol=1e-44)


def test_normalised_sizes() -> None:
    layout = square_layout(2, 128, 4)
    vector = torch.randn(layout.numel) * 1e-4
    vector[: layout.sizes[0]] *= 100
    factors = normalise(vector, measure(vector, layout, "factor_rms"), layout, "factor_rms")

    for piece in torch.split(factors, list(layout.sizes)):
        assert float(piece.square().mean().sqrt()) == pytest.approx(1, abs=0.005)
    whole = normalise(vector, measure(vector, layout, "global_rms"), layout, "global_rms")
    assert float(whole.square().mean().sqrt()) == pytest.approx(1, abs=0.005)
    peak = normalise(vector, measure(vector, layout, "maxabs"), layout, "maxabs")
    assert float(peak.abs().max()) == pytest.approx(0.95, abs=0.005)
    assert normalise(vector, measure(vector, layout, "none"), layout, "none") is vector


@pytest.mark.parametrize("mode", MODES)
def test_zero_tensors_stay_zero(mode: Normalisation) -> None:
    layout = square_layout(2, 8, 4)
    vector = torch.randn(layout.numel)
    for zero in (slice(0, layout.sizes[0]), slice(None)):
        vector[zero] = 0
        scales = measure(vector, layout, mode)
        back = denormalise(normalise(vector, scales, layout, mode), scales, layout, mode)
        assert bool((back[zero] == 0).all())


@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0xBF80])
def test_impossible_scales_are_refused(bits: int) -> None:
    with pytest.raises(WireError, match="scale"):
        read_scales(Reader(bits.to_bytes(2, "little")), 1)
