"""What `fluvial check` says of a frame's length: known from the layout, and in no time for a model
of any size."""

from typing import Any

import pytest
import torch

from fluvial.codecs import CODECS, build, must_learn, read_settings
from fluvial.codecs import forecast as module
from fluvial.codecs.forecast import frame_size, shrunk
from fluvial.errors import ConfigError
from fluvial.wire.tensors import Layout

UNFITTED = [name for name, kind in CODECS.items() if not kind.learned]
RATED = ["top_k", "ternary", "hadamard", "eden", "trellis", "dct_top_k", "powersgd"]


def layout_of(hidden: int, layers: int, inner: int, experts: int = 0) -> Layout:
    """The layout of a decoder's layers, with a head; no two sizes are powers of two."""
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (7 * hidden, hidden)}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        shapes |= {f"{start}self_attn.{each}_proj.weight": (hidden, hidden) for each in "qkvo"}
        shapes |= {f"{start}self_attn.q_proj.bias": (hidden,), f"{start}norm.weight": (hidden,)}

        if experts:
            shapes[f"{start}mlp.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
        else:
            shapes[f"{start}mlp.up_proj.weight"] = (inner, hidden)

    return Layout(tuple(sorted(shapes.items())))


def real(settings: Any, layout: Layout) -> int:
    draw = torch.Generator().manual_seed(7)
    update = {name: 3e-4 * torch.randn(shape, generator=draw) for name, shape in layout.shapes}
    return len(build(settings, layout).encode(update, seed=3))


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("name", [name for name in UNFITTED if CODECS[name].exact])
def test_a_length_that_follows_from_the_layout_is_told_to_the_byte(name: str, experts: int) -> None:
    layout = layout_of(33, 2, 50, experts)
    settings = read_settings({"name": name})
    assert frame_size(settings, layout) == real(settings, layout)


def test_settings_that_change_an_exact_length_are_counted() -> None:
    layout = layout_of(33, 2, 50)
    for table in (
        {"name": "int8", "block_size": 7},
        {"name": "nf4", "block_size": 65536},
        {"name": "half_sign", "share": 0.01},
        {"name": "random_k", "rate": 7.3},
        {"name": "random_k", "rate": 1.0},
    ):
        settings = read_settings(table)
        assert frame_size(settings, layout) == real(settings, layout)


@pytest.mark.parametrize("rate", [2, 8, 64])
@pytest.mark.parametrize("name", RATED)
def test_a_large_layout_is_told_within_one_percent(
    name: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(90, 2, 120) if name == "trellis" else layout_of(150, 2, 200)
    settings = read_settings({"name": name, "rate": rate})
    monkeypatch.setattr(module, "MEASURED", layout.numel // 4)
    assert frame_size(settings, layout) == pytest.approx(real(settings, layout), rel=0.01)


@pytest.mark.parametrize("name", UNFITTED)
def test_a_layout_that_cannot_be_coded_is_refused_as_when_it_is_coded(name: str) -> None:
    layout = layout_of(33, 2, 50)
    settings = read_settings({"name": name})
    if not hasattr(settings, "rate"):
        return

    for rate in (50, 300, 1000, 3000):
        given = settings.model_copy(update={"rate": float(rate)})
        refused = []
        for ask in (CODECS[name].frame_size, build):
            try:
                ask(given, layout)
            except ConfigError as error:
                refused.append(str(error))

        assert len(refused) in (0, 2)
        assert len(set(refused)) <= 1


@pytest.mark.parametrize(
    "name", [name for name in CODECS if not must_learn(read_settings({"name": name}))]
)
def test_seventy_billion_values_take_no_memory(name: str) -> None:
    layout = layout_of(8192, 80, 90_000)
    assert layout.numel > 7e10
    assert 0 < frame_size(read_settings({"name": name}), layout) <= 12 + layout.raw_bytes


def test_a_shrunk_layout_keeps_names_order_and_shares() -> None:
    layout = layout_of(4096, 3, 11008, 8)
    small = shrunk(layout, 2**16)
    assert small.names == layout.names
    assert small.numel == pytest.approx(2**16, rel=0.1)

    for (name, large), (_, little) in zip(layout.shapes, small.shapes, strict=True):
        assert len(large) == len(little), name
