"""Blocks of FedCyBGD: named after layers, disjoint, and together the whole model."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fluvial.codecs.quantise import Int8Settings
from fluvial.errors import ConfigError
from fluvial.methods.fedcybgd import check_blocks
from fluvial.methods.fedcybgd.blocks import partition
from fluvial.methods.fedcybgd.config import CentralCyclicConfig, FedCyBgdConfig
from fluvial.methods.fedcybgd.download import ProxyDownload
from fluvial.models.targets import LoraSettings
from fluvial.models.tuning import tuned_layout
from tests.support.layouts import MODELS, TIED, assert_parts, layout_of, meta, named, stack


@pytest.mark.parametrize("family", MODELS)
def test_layers_are_blocks_and_with_the_extra_ones_nothing_is_left(family: str) -> None:
    layout = layout_of(family)
    parts = partition(layout)
    assert_parts(parts, layout)
    assert len(parts) == parts.num_layers == 12
    assert [block.layers for block in parts.blocks] == [(layer,) for layer in range(12)]
    assert len({block.numel for block in parts.blocks}) == 1

    for layer, block in enumerate(parts.blocks):
        assert all(name.startswith(f"{parts.prefix}{layer}.") for name in block.layout.names)
    everything = partition(
        layout, extra=("embeddings", "norm") if family in TIED else ("embeddings", "norm", "head")
    )
    assert_parts(everything, layout)
    assert not everything.fixed.shapes
    assert [block.layout for block in everything.blocks[:12]] == [
        block.layout for block in parts.blocks
    ]
    assert all(not block.layers for block in everything.blocks[12:])


def test_layer_1_is_not_layer_10() -> None:
    parts = partition(layout_of("llama"))
    assert not any(
        "layers.10." in name or "layers.11." in name for name in parts.blocks[1].layout.names
    )
    assert all(name.startswith("model.layers.10.") for name in parts.blocks[10].layout.names)


@pytest.mark.parametrize("family", sorted(TIED))
def test_a_tied_head_is_no_block_and_the_weight_is_counted_once(family: str) -> None:
    layout = layout_of(family)
    assert not any("lm_head" in name for name in layout.names)
    with pytest.raises(ConfigError, match="no 'head'.*tied head is part of the embeddings"):
        partition(layout, extra=("head",))
    (embeddings,) = partition(layout, extra=("embeddings",)).blocks[12:]
    assert embeddings.numel == 64 * 32 + (
        32 * 32 if family == "gpt2" else 0
    )  # GPT-2 has positions besides


def test_extra_blocks_come_in_the_order_asked_for_and_once() -> None:
    layout = layout_of("llama")
    parts = partition(layout, extra=("head", "norm", "head"))
    assert [block.name for block in parts.blocks[12:]] == ["head", "norm"]
    assert parts.blocks[12].layout.names == ("lm_head.weight",)
    assert parts.blocks[13].layout.names == ("model.norm.weight",)
    assert parts.fixed.names == ("model.embed_tokens.weight",)


@pytest.mark.parametrize(
    ("layers_per_block", "sizes"), [(1, [1] * 12), (5, [5, 5, 2]), (12, [12]), (100, [12])], ids=str
)
def test_consecutive_layers_share_a_block_and_the_last_takes_what_is_left(
    layers_per_block: int, sizes: list[int]
) -> None:
    layout = layout_of("llama")
    parts = partition(layout, layers_per_block=layers_per_block)
    assert_parts(parts, layout)
    assert [len(block.layers) for block in parts.blocks] == sizes
    assert [layer for block in parts.blocks for layer in block.layers] == list(range(12))
    assert parts.num_layers == 12


def test_more_layers_in_a_block_than_there_are_is_refused() -> None:
    layout = layout_of("llama")
    check_blocks(FedCyBgdConfig(layers_per_block=12), Int8Settings(), layout)
    with pytest.raises(
        ConfigError, match="layers_per_block=13: the model has 12 layers; choose at most as many"
    ):
        check_blocks(FedCyBgdConfig(layers_per_block=13), Int8Settings(), layout)


@given(layers=st.integers(1, 130), layers_per_block=st.integers(1, 140))
@examples(max_examples=40, deadline=None)
def test_any_number_of_layers_is_parted(layers: int, layers_per_block: int) -> None:
    layout = stack("transformer.h.", layers)
    parts = partition(layout, layers_per_block=layers_per_block)
    assert_parts(parts, layout)
    assert len(parts) == -(-layers // layers_per_block)
    assert parts.fixed.names == ("beside.weight",)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("count", [1, 5, 17])
def test_a_number_of_blocks_has_the_smallest_largest_block(family: str, count: int) -> None:
    """As a greedy filling shows: no smaller limit is enough for so many blocks."""
    layout = layout_of(family)
    parts = partition(layout, extra=("embeddings", "norm"), num_blocks=count)
    assert_parts(parts, layout)
    assert len(parts) == count
    assert parts.num_layers == 12
    assert all(
        first.layers[-1:] <= second.layers[:1] or not second.layers
        for first, second in pairwise(parts.blocks)
    )
    layers = (name.removeprefix(parts.prefix).split(".")[:-1] for name in layout.names)
    matrices = {tuple(words[:3]) for words in layers if words[0].isdigit()}
    most = len(matrices) + 2
    ordered = partition(layout, extra=("embeddings", "norm"), num_blocks=most).blocks
    limit = max(block.numel for block in parts.blocks)
    assert _filled([block.numel for block in ordered], limit) <= count
    assert _filled([block.numel for block in ordered], limit - 1) > count


def _filled(sizes: list[int], limit: int) -> int:
    """Return how many blocks hold the sizes in order when each takes as much as `limit` allows."""
    if max(sizes) > limit:
        return len(sizes) + 1

    blocks = 1
    room = limit
    for size in sizes:
        if size > room:
            blocks += 1
            room = limit
        room -= size

    return blocks


def test_as_many_blocks_as_layers_of_nothing_else_are_the_layers() -> None:
    layout = layout_of("llama")
    cut = partition(layout, num_blocks=12)
    assert [block.layout for block in cut.blocks] == [
        block.layout for block in partition(layout).blocks
    ]


def test_norms_stand_beside_what_they_normalise() -> None:
    assert leaves("llama", 9) == [
        "input_layernorm",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
        "post_attention_layernorm",
        "mlp.down_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ]
    assert leaves("gpt2", 6) == [
        "ln_1",
        "attn.c_attn",
        "attn.c_proj",
        "ln_2",
        "mlp.c_fc",
        "mlp.c_proj",
    ]


def leaves(family: str, count: int) -> list[str]:
    """Return the modules of the first layer, each a block of its own, where a layer has `count`."""
    blocks = partition(layout_of(family), num_blocks=12 * count).blocks[:count]
    return [block.name.removeprefix("layer 0 ") for block in blocks]


def test_experts_stay_together() -> None:
    layout = named(
        **{
            f"model__layers__{layer}__mlp__{leaf}__weight": (4, 4)
            for layer in range(2)
            for leaf in ("gate", "experts__0__up_proj", "experts__1__up_proj")
        }
    )
    blocks = partition(layout, num_blocks=4).blocks
    assert [block.numel for block in blocks] == [32, 16, 32, 16]


def test_more_blocks_than_modules_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_blocks=109: the model has 108 modules"):
        partition(layout_of("llama"), num_blocks=109)


def test_a_number_of_blocks_goes_with_no_other_cut() -> None:
    with pytest.raises(ValueError, match="layers_per_block: without effect beside num_blocks"):
        FedCyBgdConfig(num_blocks=3, layers_per_block=2)
    with pytest.raises(ValueError, match="layers_per_block: without effect beside num_blocks"):
        CentralCyclicConfig(num_blocks=3, layers_per_block=2)
    with pytest.raises(ValueError, match="num_blocks: a proxy drops whole layers"):
        FedCyBgdConfig(num_blocks=3, download=ProxyDownload())


def test_whole_is_one_block_of_everything() -> None:
    layout = layout_of("gpt2")
    parts = partition(layout, whole=True)
    assert_parts(parts, layout)
    assert len(parts) == 1
    assert parts.blocks[0].layout == layout
    assert parts.blocks[0].layers == tuple(range(12))


def test_chatglm_names() -> None:
    layers = {
        f"transformer__encoder__layers__{layer}__{leaf}": shape
        for layer in range(28)
        for leaf, shape in {
            "self_attention__query_key_value__weight": (24, 8),
            "input_layernorm__weight": (8,),
        }.items()
    }
    layout = named(
        **layers,
        transformer__embedding__word_embeddings__weight=(64, 8),
        transformer__encoder__final_layernorm__weight=(8,),
        transformer__output_layer__weight=(64, 8),
    )
    parts = partition(layout, extra=("embeddings", "norm", "head"))
    assert_parts(parts, layout)
    assert parts.prefix == "transformer.encoder.layers."
    assert [block.numel for block in parts.blocks] == [200] * 28 + [512, 8, 512]


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_attn",)), ("glm4", ("gate_up_proj",))],
)
def test_blocks_of_an_adapter_have_both_factors_of_their_layers(
    family: str, targets: tuple[str, ...]
) -> None:
    layout = tuned_layout(meta(*MODELS[family]), LoraSettings(r=2, target_modules=targets))
    parts = partition(layout)
    assert_parts(parts, layout)
    assert len(parts) == 12
    assert not parts.fixed.shapes
    assert {len(block.layout.names) for block in parts.blocks} == {2 * len(targets)}

    with pytest.raises(ConfigError, match="nothing but layers"):
        partition(layout, extra=("embeddings",))


def test_experts_inside_a_layer_belong_to_it() -> None:
    layers = {
        f"model__layers__{layer}__mlp__experts__{e}__w": (4, 4)
        for layer in range(3)
        for e in range(8)
    }
    parts = partition(named(**layers, model__norm__weight=(4,)))
    assert parts.prefix == "model.layers."
    assert [block.numel for block in parts.blocks] == [128] * 3


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="order = 'full'"):
        partition(named(weight=(3, 3), bias=(3,)))
