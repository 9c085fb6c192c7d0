"""Predicted bytes of a coded update, against frames of updates of several distributions."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fluvial.codecs import build, read_settings
from fluvial.codecs.forecast import frame_size
from fluvial.methods.fedcybgd import predict
from fluvial.methods.fedcybgd.blocks import is_sparse, partition
from fluvial.methods.fedcybgd.config import FedCyBgdConfig
from fluvial.methods.interface import Given
from fluvial.methods.planning import frame_rows
from fluvial.methods.traffic import coded_frame, shared_up
from fluvial.wire.tensors import Layout

LAYOUT = Layout(
    tuple((f"{module}.lora_A.weight", (8, 64)) for module in "qkvo")
    + tuple((f"{module}.lora_B.weight", (64, 8)) for module in "qkvo")
)


@pytest.mark.parametrize("name", ["ternary", "powersgd", "trellis", "top_k", "hadamard", "int8"])
@pytest.mark.parametrize("kind", ["normal", "laplace", "zero A", "one direction"])
def test_a_frame_is_within_its_prediction(name: str, kind: str) -> None:
    settings = read_settings({"name": name} | ({} if name == "int8" else {"rate": 16}))
    random = torch.Generator().manual_seed(0)
    update = {}
    for tensor, shape in LAYOUT.shapes:
        values = torch.randn(shape, generator=random)
        if kind == "laplace":
            values = values.sign() * torch.empty(shape).exponential_(generator=random)
        if kind == "one direction":
            values = torch.outer(values[:, 0], values[0])
        update[tensor] = 1e-3 * values * (kind != "zero A" or "lora_B" in tensor)

    predicted = coded_frame(settings, LAYOUT)
    assert predicted.least <= len(build(settings, LAYOUT).encode(update, round=1)) <= predicted.most
    assert ("at most" in predicted.words) == (name in ("ternary", "powersgd"))


@pytest.mark.parametrize("name", ["top_k", "eden", "trellis", "powersgd", "dct_top_k"])
def test_a_block_of_embeddings_is_within_its_prediction(name: str) -> None:
    """Of 2,000 rows the site's tokens change 20; with a tied head all change."""
    layers = tuple((f"model.layers.{n}.mlp.up_proj.weight", (64, 32)) for n in range(2))
    tied = Layout((("model.embed_tokens.weight", (2000, 32)), *layers))
    untied = Layout((("lm_head.weight", (2000, 32)), *tied.shapes))
    settings = read_settings({"name": name, "rate": 16})
    up = {}
    for layout in (tied, untied):
        first, *_, block = partition(layout, extra=("embeddings",)).blocks
        assert not is_sparse(first, layout)
        config = FedCyBgdConfig(extra=("embeddings",))
        up[layout] = predict(config, cast(Given, SimpleNamespace(layout=layout, codec=settings)), 1)

    change = torch.zeros(2000, 32)
    change[:20] = 1e-3 * torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    frame = build(settings, block.layout).encode({"model.embed_tokens.weight": change}, round=1)
    assert up[untied].up.least <= len(frame) <= up[untied].up.most
    assert up[untied].up.words.startswith("at most ")
    small = coded_frame(settings, first.layout)
    assert (up[tied].up.least >= small.least > 0) == (name != "powersgd")


@pytest.mark.parametrize("name", ["trellis", "int8", "powersgd"])
def test_the_frame_and_what_is_sent_are_one_statement(name: str) -> None:
    """A frame that may differ is about its size; the range with headers holds it and no more."""
    settings = read_settings({"name": name} | ({} if name == "int8" else {"rate": 16}))
    given = SimpleNamespace(codec=settings, layout=LAYOUT, sites=4, rounds=3)
    config = SimpleNamespace(cohort=lambda sites: sites)
    frame = frame_size(settings, LAYOUT)
    likely = coded_frame(settings, LAYOUT)
    rows = dict(frame_rows(cast(Any, config), cast(Any, given), frame, likely=likely))
    lead = {"trellis": "about ", "int8": "", "powersgd": "up to about "}[name]
    assert rows["frame of an update"].startswith(f"{lead}{frame:,} B, 1/")
    assert rows["frame of an update"].endswith(", 1 % more or less") == (name == "trellis")
    assert rows["up, whole run"].startswith(f"{lead}{12 * frame:,} B from all sites")

    sent = shared_up(settings, LAYOUT)
    around = sent.most - likely.most
    assert 0 < around < 64
    if name == "trellis":
        assert 0.99 * frame - 1 <= likely.least <= frame <= likely.most <= 1.01 * frame + 1
