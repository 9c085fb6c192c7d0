"""FedCyBGD equals plain loops over whole models: full tuning, FedAvg, cyclic descent."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fluvial.data import POOLED
from fluvial.models.loading import load_base
from fluvial.seeds import generator
from fluvial.training.train import train
from fluvial.wire.tensors import moved, scale, subtract
from tests.support.fedcybgd import (
    EXACT,
    FORMS,
    LAYERS,
    LORA,
    ONCE,
    Stage,
    ascending,
    descending,
    differ,
    latin,
    whole,
)
from tests.support.weights import read_weights


@pytest.mark.parametrize("form", ["full", "cache"])
def test_one_site_with_one_block_is_ordinary_full_tuning(form: str, stage: Stage) -> None:
    """One visit is one call of `train` on the model as transformers loads it; what fp32 keeps of
    the change is sent."""
    table = stage.table(1, {"order": "full", "download": {"form": form}}, rounds=1)
    oracle = stage.oracle(table)
    model = load_base(oracle.config.model).requires_grad_(True)
    before = read_weights(model)
    train(
        model,
        oracle.texts.load(oracle.sites[0]).train,
        oracle.config.train,
        pad_token_id=0,
        generator=generator(oracle.config.seed, "train", 1, oracle.sites[0]),
    )
    change = subtract(read_weights(model), before)
    assert all(tensor.any() for tensor in change.values())
    assert not differ(stage.play(table).state, change)


@pytest.mark.parametrize("form", ["full", "cache"])
def test_one_site_with_one_block_is_fedavg_on_all_weights(form: str, stage: Stage) -> None:
    table = stage.table(1, {"order": "full", "download": {"form": form}}, rounds=3)
    fedavg = stage.play(table | {"method": {"name": "fedavg"}})
    assert not differ(stage.play(table).state, fedavg.state)
    assert not differ(fedavg.state, stage.oracle(table).cyclic(whole))


def test_a_whole_model_that_is_handed_on_is_tuned_by_one_site_after_the_other(stage: Stage) -> None:
    table = stage.table(3, {"order": "full"})
    assert not differ(stage.play(table).state, stage.oracle(table).cyclic(whole))


@pytest.mark.parametrize(
    ("block", "dtype"),
    [(ascending, "float32"), (descending, "float32"), (latin, "float32"), (ascending, "bfloat16")],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
def test_sites_in_turn_are_centralised_cyclic_descent(
    block: Callable[[int, int], int], dtype: str, stage: Stage
) -> None:
    """On the same data in the same order; more sites than blocks, so that a block is trained twice
    in a cycle.

    In half precision the masters of a visit begin at what the server holds in fp32.
    """
    table = stage.table(5, {"order": block.__name__}, model={"dtype": dtype})
    assert not differ(stage.play(table).state, stage.oracle(table).cyclic(block))


def test_the_centralised_twin_is_block_after_block_on_the_union(stage: Stage) -> None:
    table = stage.table(3, rounds=2, train={"max_steps": 5}) | {
        "method": {"name": "central_cyclic"}
    }
    del table["codec"], table["fleet"]["workers"]
    oracle = stage.oracle(table)
    state = oracle.start

    for cycle in (1, 2):
        for block in range(LAYERS):
            with oracle.pool.model(state, trainable=oracle.names(block)) as model:
                train(
                    model,
                    oracle.texts.pooled().train,
                    oracle.config.train,
                    pad_token_id=0,
                    generator=generator(oracle.config.seed, "train", block, cycle, POOLED),
                    steps=3 * 5 // LAYERS,
                )
                trained = read_weights(model)

            start = oracle.pool.weights({name: state[name] for name in oracle.names(block)})
            state = moved(state, subtract({name: trained[name] for name in start}, start))

    assert not differ(stage.play(table).state, state)


@pytest.mark.parametrize(
    ("dtype", "extra"),
    [("float32", ["embeddings", "norm"]), ("bfloat16", [])],
    ids=["fp32 and extras", "bf16"],
)
def test_all_exact_forms_are_the_full_download(dtype: str, extra: list[str], stage: Stage) -> None:
    settings: dict[str, Any] = {"model": {"dtype": dtype}, "train": ONCE}
    full, *others = (
        stage.play(stage.table(4, {"order": "latin", "extra": extra, **FORMS[form]}, **settings))
        for form in ("full", *EXACT)
    )
    assert len(full.parts) == LAYERS + len(extra)

    for form, other in zip(EXACT, others, strict=True):
        assert not differ(other.state, full.state), form
        assert [record["loss"] for record in other.rounds] == [
            record["loss"] for record in full.rounds
        ]


@pytest.mark.parametrize(
    "codec",
    [
        {"name": "int8"},
        {"name": "hadamard", "rate": 16, "error_feedback": True},
        {"name": "powersgd", "rate": 64, "error_feedback": True},
    ],
    ids=lambda codec: codec["name"],
)
def test_a_replay_of_coded_updates_is_the_full_download(
    codec: dict[str, Any], stage: Stage
) -> None:
    """Both ends decode the same frames, so nothing drifts; with damping and means, which are part
    of a commit."""
    method = {"order": "pairs", "damping": 0.7}
    full, cache = (
        stage.play(stage.table(5, {**method, **FORMS[form]}, codec=codec, train=ONCE))
        for form in ("full", "cache")
    )
    assert not differ(cache.state, full.state)
    down = [sum(record["bytes_down"] for record in played.rounds) for played in (full, cache)]
    assert down[1] < 0.5 * down[0]


@pytest.mark.parametrize(
    ("parallel", "groups"),
    [
        (1, [(client,) for client in range(8)]),
        (2, [(0, 2), (1, 3), (4, 6), (5, 7)]),  # of each sweep first blocks 0 and 2, then 1 and 3
        (4, [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ],
)
def test_visits_of_a_group_start_from_the_same_model(
    parallel: int, groups: Sequence[Sequence[int]], stage: Stage
) -> None:
    """Jacobi within a group, Gauss-Seidel between groups; eight sites and four blocks, so a cycle
    has two sweeps."""
    table = stage.table(8, {"parallel": parallel}, rounds=1)
    oracle = stage.oracle(table)
    state = oracle.start

    for group in groups:
        for update in [
            oracle.update(state, client % LAYERS, 1, oracle.sites[client]) for client in group
        ]:
            state = moved(state, update)

    assert not differ(stage.play(table).state, state)
    if parallel > 1:
        assert differ(state, oracle.cyclic(ascending)) == set().union(
            *(oracle.names(block) for block in range(LAYERS))
        )


@pytest.mark.parametrize(
    ("method", "weights", "resolved"),
    [
        ({"order": "pairs"}, None, "averaged"),
        ({"order": "pairs", "weighting": "equal"}, (1, 1), "averaged"),
        ({"merge": "overwrite"}, (0, 1), "the last one wins"),
    ],
    ids=["pairs", "equal", "overwrite"],
)
def test_sites_of_one_block_are_merged_as_asked(
    method: dict[str, Any], weights: tuple[int, int] | None, resolved: str, stage: Stage
) -> None:
    """FedBAvg: sites k and D + k train block k from the same state, and the server takes their
    mean, or the last."""
    table = stage.table(8, method, rounds=1)
    oracle = stage.oracle(table)
    state = oracle.start

    for block in range(LAYERS):
        pair = [oracle.sites[block], oracle.sites[block + LAYERS]]
        first, second = (oracle.update(state, block, 1, site) for site in pair)
        a, b = weights or [oracle.samples(site) for site in pair]
        mean = {
            name: ((a * first[name].double() + b * second[name].double()) / (a + b)).float()
            for name in first
        }
        state = moved(state, mean)

    played = stage.play(table)
    assert not differ(played.state, state)
    assert [row["resolved"] for row in played.rounds[0]["conflicts"]] == [resolved] * LAYERS


def test_a_damped_server_moves_by_a_share(stage: Stage) -> None:
    table = stage.table(4, {"damping": 0.25})
    oracle = stage.oracle(table)
    state = oracle.start

    for cycle in (1, 2):
        for client, site in enumerate(oracle.sites):
            state = moved(state, scale(oracle.update(state, client % LAYERS, cycle, site), 0.25))

    assert not differ(stage.play(table).state, state)


def test_exact_forms_of_an_adapter_agree(stage: Stage) -> None:
    codec = {"name": "int8", "error_feedback": True}
    full, cache = (
        stage.play(stage.table(5, FORMS[form], codec=codec, **LORA)) for form in ("full", "cache")
    )
    assert not differ(full.state, cache.state)


@pytest.mark.parametrize("tune", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("form", ["full", "cache"])
def test_the_gradient_through_an_exact_form_is_the_gradient(
    form: str, tune: dict[str, Any], stage: Stage
) -> None:
    table = stage.table(4, FORMS[form], codec={"name": "int8"}, rounds=1, train=ONCE, **tune)
    server = stage.play(table).server
    for block in range(LAYERS):
        assert server._cosine(block, "9/9") == pytest.approx(
            1.0, abs=1e-12
        )  # rounding of fp64 sums


def test_watching_the_gradients_changes_nothing(stage: Stage) -> None:
    table = stage.table(4, {"download": {"form": "low-bit"}}, codec={"name": "int8"})
    watched = stage.play(table)
    blind = stage.play(table | {"method": {**table["method"], "gate": {"threshold": 0}}})
    assert not differ(watched.state, blind.state)
    assert "gradient_cosine" not in blind.rounds[0]
    assert 0.7 < watched.rounds[1]["gradient_cosine"] < 1
