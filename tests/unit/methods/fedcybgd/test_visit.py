"""A visit of FedCyBGD trains its block and touches nothing else; blocks may be of an adapter."""

from itertools import pairwise
from pathlib import Path

import pytest

from fluvial.errors import ConfigError
from fluvial.runs.config import parse
from fluvial.runs.run import execute
from tests.support.fedcybgd import FORMS, LAYERS, LORA, Seen, Stage, differ, graphs_from, latin


def test_blocks_of_factors_are_trained_in_turn_and_the_model_improves(stage: Stage) -> None:
    table = stage.table(4, {"order": "latin"}, rounds=4, **LORA, train={"learning_rate": 5e-2})
    played = stage.play(table)
    assert not differ(played.state, stage.oracle(table).cyclic(latin))
    assert len(played.parts) == LAYERS
    assert stage.loss(table, played.state) < stage.loss(table, stage.oracle(table).start) - 0.1


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_visit_changes_only_its_blocks_factors(
    checkpointing: bool, stage: Stage, watch: "list[Seen]"
) -> None:
    stage.play(stage.table(4, rounds=1, train={"gradient_checkpointing": checkpointing}, **LORA))
    for client, seen in enumerate(watch):
        factors = {
            name
            for name in seen.names
            if f".layers.{client % LAYERS}." in name and ".lora_" in name
        }
        assert len(factors) == 8
        assert seen.trained == factors
        assert {name for name in factors if ".lora_B." in name} <= seen.changed <= factors
        assert seen.graphs == graphs_from(client % LAYERS)


@pytest.mark.parametrize("form", ["proxy", "cache, disk"])
def test_the_base_of_an_adapter_is_there_and_in_memory(
    form: str, stage: Stage, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match="form='proxy'.*tune = 'full'|hold='disk': without effect"
    ):
        next(iter(execute(parse(stage.table(4, FORMS[form], **LORA), "test"), tmp_path)))


@pytest.mark.parametrize(
    ("form", "checkpointing"),
    [*((form, False) for form in FORMS), ("full", True), ("cache, disk", True), ("proxy", True)],
    ids=lambda each: {False: "", True: "checkpointing"}.get(each, each),
)
def test_a_visit_trains_its_block_and_touches_nothing_else(
    form: str, checkpointing: bool, stage: Stage, watch: list[Seen]
) -> None:
    """No other tensor changes or has a gradient or optimizer state, and below the block there is no
    graph at all."""
    table = stage.table(
        rounds=1,
        method=FORMS[form],
        train={"max_steps": 2, "gradient_checkpointing": checkpointing},
    )
    parts = stage.play(table).parts
    assert len(watch) == LAYERS

    for block, seen in enumerate(watch):
        names = set(parts.blocks[block].layout.names)
        assert seen.trained == seen.changed == names
        assert seen.graded == [names] * 2
        assert seen.graphs == graphs_from(block)
        (optimizer,) = seen.optimizers
        held = optimizer.state.values()
        assert len(held) == len(names)
        assert sum(state["exp_avg"].numel() for state in held) == parts.blocks[block].numel
        assert sum(state["exp_avg_sq"].numel() for state in held) == parts.blocks[block].numel


def test_a_block_that_ends_within_a_layer_touches_nothing_else(
    stage: Stage, watch: list[Seen]
) -> None:
    table = stage.table(
        3, {"num_blocks": 3, "extra": ["embeddings"]}, rounds=1, train={"max_steps": 2}
    )
    parts = stage.play(table).parts
    assert len(parts) == len(watch) == 3
    assert any(first.layers[-1:] == second.layers[:1] for first, second in pairwise(parts.blocks))

    for block, seen in zip(parts.blocks, watch, strict=True):
        names = set(block.layout.names)
        assert seen.trained == seen.changed == names
        assert seen.graded == [names] * 2


def test_a_block_of_two_layers_and_extra_blocks_touch_nothing_else(
    stage: Stage, watch: list[Seen]
) -> None:
    """The tied embeddings are trained alone, at both ends of the model; the final norm needs no
    graph in any layer."""
    table = stage.table(
        4,
        {"layers_per_block": 2, "extra": ["embeddings", "norm"]},
        rounds=1,
        train={"max_steps": 2},
    )
    parts = stage.play(table).parts
    assert [block.name for block in parts.blocks] == [
        "layers 0 to 1",
        "layers 2 to 3",
        "embeddings",
        "norm",
    ]

    for block, seen in enumerate(watch):
        names = set(parts.blocks[block].layout.names)
        assert seen.trained == seen.changed == names
        assert seen.graded == [names] * 2

    assert watch[1].graphs == graphs_from(2)
    assert set.union(*watch[2].graphs.values()) == {True}
    assert set.union(*watch[3].graphs.values()) == {False}
