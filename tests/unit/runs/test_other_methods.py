"""Memory of a site under the other methods: large models leave a block or two layers to a site."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

from fluvial.methods.fedpipe.planner.decision import Models
from fluvial.methods.fedpipe.planner.formats import FORMATS
from fluvial.methods.fedpipe.planner.memory import Activations, MemoryModel
from fluvial.methods.fedpipe.planner.sizes import sizes_of
from fluvial.models.loading import meta_base
from fluvial.models.outline import Outline
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import given
from fluvial.runs.other_methods import alternatives
from tests.support.models import shared_four_layers
from tests.support.planner import models


def alternatives_of(config: RunConfig, reserve: int) -> dict[str, int]:
    base = meta_base(config.model)
    facts = given(config, Outline(config.model, config.adapter).assignment.layout, base, 3)
    sizes = sizes_of(base, 4)
    memory = MemoryModel(
        sizes,
        Activations.of(sizes, checkpointing=False, scores=False),
        Activations.of(sizes, checkpointing=True, scores=False),
        reserve,
        Fraction(64),
    )
    site: Models = replace(models(), memory=memory)
    found = alternatives(facts, site, FORMATS["float32"])
    assert all(each.bytes > reserve for each in found)
    return {each.method: each.bytes - reserve for each in found}


def test_a_deep_model_leaves_little_to_a_site(run_config: dict[str, Any]) -> None:
    """Of 24 layers, FedCyBGD holds one with its optimizer, FL-GLM two and the embedding."""
    folder = shared_four_layers(num_hidden_layers=24, hidden_size=64, intermediate_size=256)
    config = parse(run_config | {"model": {"name_or_path": str(folder)}}, "test")
    needed = alternatives_of(config, 10**6)
    assert list(needed) == ["fedcybgd", "flglm"]

    base = meta_base(config.model)
    whole = 4 * sum(parameter.numel() for parameter in base.parameters())
    layer = sum(
        parameter.numel()
        for name, parameter in base.named_parameters()
        if name.startswith("model.layers.0.")
    )
    passes = Activations.of(sizes_of(base, 4), checkpointing=True, scores=False).bytes(1, 32)
    assert needed["fedcybgd"] == max(20 * layer + passes, 24 * layer)
    assert 4 * 2 * layer < needed["flglm"] < whole / 2


def test_a_model_that_cannot_be_cut_has_fewer_ways_out(run_config: dict[str, Any]) -> None:
    """The tiny model has two layers, of which none is left for the server."""
    assert list(alternatives_of(parse(run_config, "test"), 10**6)) == ["fedcybgd"]
