"""Sites with assignments of their own train on one base as each would alone, with PEFT itself."""

import itertools
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fluvial.codecs.quantise import IdentitySettings
from fluvial.data import IGNORE_INDEX, Example, SiteData
from fluvial.errors import ClientError, ConfigError, WireError
from fluvial.federation.config import FleetConfig
from fluvial.federation.in_process import local_fleet
from fluvial.federation.sites import (
    Site,
    adapter_message,
    evaluate,
    read_adapter_message,
    state_message,
    train_locally,
)
from fluvial.federation.store import StateStore
from fluvial.models import base as base_module
from fluvial.models import pool as pool_module
from fluvial.models.adapters import adapt
from fluvial.models.assignment import KEY, Assignment, by_layout
from fluvial.models.loading import meta_base
from fluvial.models.pool import MOST_TEMPLATES, ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.quantisation import Quantisation
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.models.tuning import read_shapes, tuned_parameters
from fluvial.seeds import generator
from fluvial.training.config import TrainConfig
from fluvial.training.train import collate, shuffled_batches
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named

pytestmark = pytest.mark.oracle

LORA = LoraSettings(r=8, lora_dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
TRAIN = TrainConfig(learning_rate=0.01, max_steps=4, per_device_train_batch_size=4)
SEED = 3
V_PROJ = "model.layers.1.self_attn.v_proj"
DOWN_PROJ = "model.layers.0.mlp.down_proj"


def examples() -> list[Example]:
    """Sequences of unequal length with labels on their second halves."""
    draw = torch.Generator().manual_seed(7)
    sequences = [torch.randint(3, 300, (8 + 2 * n,), generator=draw).tolist() for n in range(9)]
    return [
        Example(ids, [IGNORE_INDEX] * (len(ids) // 2) + ids[len(ids) // 2 :]) for ids in sequences
    ]


def pool_of(folder: Path, lora: LoraSettings | None = LORA) -> ModelPool:
    return ModelPool(ModelConfig(name_or_path=str(folder), device="cpu"), lora)


@pytest.fixture(scope="module")
def pool(tiny_model: Path) -> ModelPool:
    return pool_of(tiny_model)


def site(pool: ModelPool, name: str, assignment: Assignment | None = None) -> Site:
    data = SiteData(examples(), examples()[:3], [], 0, 0, 0)
    return Site(
        name=name,
        seed=SEED,
        pool=pool,
        load=lambda: data,
        train=TRAIN,
        codec=IdentitySettings(),
        method=None,
        downlink=None,
        store=StateStore(None),
        rounds=1,
        assigned=assignment,
    )


def start(assignment: Assignment) -> Named:
    """An adapter with both factors away from zero, so that both have gradients."""
    draw = torch.Generator().manual_seed(4)
    shapes = assignment.layout.shapes
    return {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in shapes}


def alpha(rank: int) -> float:
    """The alpha with which PEFT scales an adapter of `rank` as the run scales its own."""
    return LORA.alpha * rank / LORA.r


def alone(
    folder: Path, name: str, state: Named, *, rank: int, ranks: Mapping[str, int], batch: int
) -> Named:
    """The update of site `name`, by PEFT, transformers and torch in a plain loop."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        rank_pattern=dict(ranks),
        lora_alpha=alpha(rank),
        alpha_pattern={name: alpha(rank) for name, rank in ranks.items()},
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj", "down_proj"],
    )
    model = get_peft_model(base, lora).eval()
    factors = {
        parameter_name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for parameter_name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    with torch.no_grad():
        for factor_name, factor in factors.items():
            factor.copy_(state[factor_name])

    steps = TRAIN.max_steps
    assert steps is not None
    optimizer = torch.optim.AdamW(factors.values(), lr=0.01, weight_decay=0.0, foreach=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    draw = generator(SEED, "train", 1, name)
    batches = shuffled_batches(examples(), batch, draw)
    torch.randint(2**62, (1,), generator=draw)  # the seed of dropout, which is off here

    for _ in range(steps):
        inputs = collate(next(batches), pad_token_id=0)
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = torch.nn.functional.cross_entropy(
            logits.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum"
        )
        tokens = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        (loss / tokens).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(factors.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    return {name: factor.detach() - state[name] for name, factor in factors.items()}


def train_as(site: Site, state: Named) -> Named:
    return train_locally(site, state, 1, examples=examples())[0]


def equal(left: Named, right: Named) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_two_ranks_and_batches_on_one_base_are_two_runs_alone(
    pool: ModelPool, tiny_model: Path
) -> None:
    run = pool.assignment(TRAIN.per_device_train_batch_size)
    wanted = {
        name: Assignment.from_values({KEY: {"ranks": rank, "batch": batch}}, run)
        for name, rank, batch in (("north", 2, 1), ("south", 4, 2))
    }
    updates: dict[str, Named] = {}

    def work(name: str) -> None:
        torch.set_num_threads(1)
        assignment = wanted[name]
        updates[name] = train_as(site(pool, name, assignment), start(assignment))

    threads = [threading.Thread(target=work, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for name, assignment in wanted.items():
        rank = assignment.ranks[0][1]
        expected = alone(
            tiny_model, name, start(assignment), rank=rank, ranks={}, batch=assignment.batch
        )
        assert equal(updates[name], expected), name


def test_unequal_ranks_are_those_of_pefts_rank_pattern(pool: ModelPool, tiny_model: Path) -> None:
    assignment = pool.assignment(2).with_ranks({V_PROJ: 2, DOWN_PROJ: 16})
    update = train_as(site(pool, "north", assignment), start(assignment))
    expected = alone(
        tiny_model,
        "north",
        start(assignment),
        rank=8,
        ranks={V_PROJ: 2, DOWN_PROJ: 16},
        batch=2,
    )
    assert equal(update, expected)


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_gqa_model", "tiny_gpt2_model"])
def test_the_layout_of_ranks_is_what_peft_makes_of_them(
    kind: str, request: pytest.FixtureRequest
) -> None:
    pool = pool_of(request.getfixturevalue(kind), LoraSettings(r=8))
    run = pool.assignment(1)
    ranks = {name: 1 + number for number, (name, _) in enumerate(run.ranks)}

    for assignment in (run.with_ranks(3), run.with_ranks(ranks), run.with_ranks({min(ranks): 5})):
        assert isinstance(pool.tuning, LoraSettings)
        model = adapt(meta_base(pool.config), pool.tuning, dict(assignment.ranks))
        assert read_shapes(model) == assignment.layout
        with pool.model(initial_state(assignment.layout, 0), assignment=assignment) as borrowed:
            assert read_shapes(borrowed) == assignment.layout


def test_a_side_path_is_frozen_and_counts(pool: ModelPool) -> None:
    """A module of rank 0 with a side path computes as with the same adapter, and is not trained."""
    run = pool.assignment(2)
    usual = start(run)
    sided = run.with_ranks({V_PROJ: 0, DOWN_PROJ: 3}).with_side({V_PROJ: 8, DOWN_PROJ: 5}, run)
    state = {name: tensor for name, tensor in usual.items() if name in sided.trained.names}
    for which in ("A", "B"):
        whole, low = (usual[f"{module}.lora_{which}.weight"] for module in (V_PROJ, DOWN_PROJ))
        first, last = (low[:3], low[3:]) if which == "A" else (low[:, :3], low[:, 3:])
        state[f"{V_PROJ}.lora_{which}.side.weight"] = whole
        state[f"{DOWN_PROJ}.lora_{which}.weight"] = first
        state[f"{DOWN_PROJ}.lora_{which}.side.weight"] = last

    assert Layout.of(state) == sided.layout
    ids = torch.tensor([examples()[0].input_ids])
    with (
        pool.model(usual) as one,
        pool.model(state, trainable="A and B", assignment=sided) as other,
        torch.no_grad(),
    ):
        assert read_shapes(other) == sided.layout
        # The products are summed in another order.
        assert torch.allclose(one(input_ids=ids).logits, other(input_ids=ids).logits, atol=1e-5)
        trained = {name for name, p in tuned_parameters(other).items() if p.requires_grad}

    assert trained == set(sided.trained.names)
    update = train_as(site(pool, "north", sided), state)
    assert update.keys() == trained
    assert not any(torch.equal(change, torch.zeros_like(change)) for change in update.values())

    values = sided.to_values(run)
    message = Payload.from_bytes(Payload(values=cast(Any, values)).to_bytes())
    assert Assignment.from_values(message.values, run) == sided


def test_all_modules_have_the_scale_of_the_run(pool: ModelPool) -> None:
    from peft.tuners.lora import LoraLayer

    run = pool.assignment(2)
    unequal = run.with_ranks({V_PROJ: 2, DOWN_PROJ: 16}).with_side({V_PROJ: 5}, run)
    for lora in (LORA, LORA.model_copy(update={"use_rslora": True})):
        own = ModelPool(pool.config, lora)
        with own.model(start(unequal), assignment=unequal) as model:
            scales = {
                scale
                for module in model.modules()
                if isinstance(module, LoraLayer)
                for scale in module.scaling.values()
            }
        expected = LORA.alpha / (LORA.r**0.5 if lora.use_rslora else LORA.r)
        assert all(scale == pytest.approx(expected, rel=1e-12) for scale in scales)


def test_the_base_is_held_once_for_all_layouts(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load_base = vars(base_module)["load_base"]

    def counted(config: ModelConfig) -> Any:
        loads.append(config.dtype)
        return load_base(config)

    monkeypatch.setattr(base_module, "load_base", counted)
    pool = pool_of(tiny_model)
    narrow, wide = (pool.assignment(1).with_ranks(rank) for rank in (2, 4))

    with (
        pool.model(start(narrow), assignment=narrow) as first,
        pool.model(start(wide), assignment=wide) as second,
    ):
        frozen = [
            {
                parameter.data_ptr()
                for name, parameter in model.named_parameters()
                if "lora" not in name
            }
            for model in (first, second)
        ]
        adapters = [
            {parameter.data_ptr() for parameter in tuned_parameters(model).values()}
            for model in (first, second)
        ]

    assert loads == ["float32"]
    assert frozen[0] == frozen[1]
    assert not adapters[0] & adapters[1]


def test_each_precision_has_a_base_of_its_own(pool: ModelPool) -> None:
    run = pool.assignment(1)
    half = Assignment.from_values({KEY: {"precision": "bfloat16"}}, run)
    assert half.layout == run.layout

    with pool.model(start(run)) as whole, pool.model(start(half), assignment=half) as narrow:
        for name, parameter in narrow.named_parameters():
            expected = torch.float32 if ".lora_" in name else torch.bfloat16
            assert parameter.dtype == expected, name
        rounded = dict(narrow.named_parameters())
        for name, parameter in whole.named_parameters():
            if ".lora_" not in name:
                assert torch.equal(parameter.to(torch.bfloat16), rounded[name]), name


def test_all_weights_in_another_precision(tiny_model: Path) -> None:
    pool = pool_of(tiny_model, None)
    nothing = initial_state(pool.layout, 0)
    run = pool.assignment(4)
    half = Assignment.from_values({KEY: {"precision": "bfloat16", "batch": 1}}, run)
    update = train_as(site(pool, "north", half), nothing)

    config = ModelConfig(name_or_path=str(tiny_model), device="cpu", dtype="bfloat16")
    own = site(ModelPool(config, None), "north")
    own.train = TRAIN.model_copy(update={"per_device_train_batch_size": 1})
    assert equal(update, train_as(own, nothing))

    with pytest.raises(WireError, match="all weights are tuned"):
        Assignment.from_values({KEY: {"ranks": 2}}, run)


def test_models_of_many_layouts_do_not_pile_up(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    plain = vars(pool_module)["adapt"]

    def counted(base: Any, lora: Any, ranks: Mapping[str, int] | None, side: Any) -> Any:
        made.append(max(ranks.values()) if ranks else LORA.r)
        return plain(base, lora, ranks, side)

    monkeypatch.setattr(pool_module, "adapt", counted)
    pool = pool_of(tiny_model)
    ranks = range(1, MOST_TEMPLATES + 2)
    assignments = [pool.assignment(1).with_ranks(rank) for rank in ranks]

    for assignment in (*assignments, assignments[-1], assignments[0]):
        with pool.model(start(assignment), assignment=assignment) as model:
            assert read_shapes(model) == assignment.layout

    assert made == [*ranks, 1]


def test_bases_go_with_the_last_template_that_needs_them(tiny_gqa_model: Path) -> None:
    """A server that asks for other formats in each message fills no site's memory."""
    pool = ModelPool(ModelConfig(name_or_path=str(tiny_gqa_model), dtype="float32"), LORA)
    run = pool.assignment(1)
    kinds: tuple[Any, ...] = (None, "int8", "nf4", "nf4-double")
    count = 0

    for usual, layer in itertools.product(kinds, kinds):
        assignment = replace(run, quantisation=Quantisation(usual, ((0, layer),)))
        with pool.model(start(run), assignment=assignment):
            count += 1
            assert len(vars(pool)["_bases"]) <= MOST_TEMPLATES + 1

    assert count > MOST_TEMPLATES + 1
    with pool.model(start(run)):
        pass


def test_an_assignment_travels_where_it_differs(pool: ModelPool) -> None:
    run = pool.assignment(4)
    ranks = dict(run.ranks) | {V_PROJ: 2}

    for values, assignment in (
        ({}, run),
        ({KEY: {"ranks": 2, "batch": 1}}, _with_batch(run.with_ranks(2), 1)),
        ({KEY: {"ranks": {V_PROJ: 2}}}, run.with_ranks(ranks)),
        ({KEY: {"precision": "float16"}}, _with_precision(run, "float16")),
    ):
        assert assignment.to_values(run) == values
        message = Payload.from_bytes(Payload(values=cast(Any, values)).to_bytes())
        again = Assignment.from_values(message.values, run)
        assert again == assignment
        assert hash(again) == hash(assignment)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        (3, "assignment: expected"),
        ({}, "assignment: expected"),
        ({"width": 2}, "assignment: unknown name 'width'"),
        ({"ranks": "2"}, "assignment.ranks: expected"),
        ({"ranks": {}}, "assignment.ranks: expected"),
        ({"ranks": True}, "assignment.ranks: expected"),
        ({"ranks": {V_PROJ: 2.0}}, f"assignment.ranks: rank of '{V_PROJ}'"),
        ({"ranks": {"model.layers.9.self_attn.v_proj": 2}}, "assignment.ranks: module 'model"),
        ({"ranks": 0}, "assignment.ranks: every module has rank 0"),
        ({"ranks": -1}, "assignment.ranks: rank of 'model"),
        ({"ranks": {V_PROJ: -1}}, f"assignment.ranks: rank of '{V_PROJ}': -1 is not from 0 to 32"),
        ({"ranks": {V_PROJ: 33}}, f"assignment.ranks: rank of '{V_PROJ}': 33 is not from 0 to 32"),
        ({"ranks": 33}, "33 is not from 0 to 32"),
        ({"side": 2}, "assignment.side: expected ranks by module"),
        ({"side": {V_PROJ: "2"}}, f"assignment.side: rank of '{V_PROJ}'"),
        ({"side": {V_PROJ: 33}}, f"assignment.side: rank of '{V_PROJ}': 33 is not from 0 to 32"),
        ({"side": {"lm_head": 2}}, "assignment.side: module 'lm_head' has no adapter"),
        ({"batch": 0}, "assignment.batch: 0"),
        ({"batch": 2.0}, "assignment.batch: 2.0"),
        ({"batch": 10**7}, "assignment.batch: 10000000"),
        ({"precision": "int8"}, "assignment.precision: 'int8'"),
        ({"precision": ["float32"]}, "assignment.precision: "),
    ],
)
def test_a_malformed_assignment_is_refused_by_its_place(
    pool: ModelPool, given: Any, place: str
) -> None:
    message = Payload.from_bytes(Payload(values={KEY: given}).to_bytes())
    with pytest.raises(WireError, match=place.replace(".", r"\.")):
        site(pool, "north").accept_assignment(message)


def test_a_server_sets_ranks_that_exist(pool: ModelPool) -> None:
    with pytest.raises(ConfigError, match="module 'lm_head' has no adapter"):
        pool.assignment(1).with_ranks({"lm_head": 2})


def test_a_site_measures_the_layout_that_it_is_given(pool: ModelPool) -> None:
    narrow = pool.assignment(TRAIN.per_device_train_batch_size).with_ranks(2)
    state = start(narrow)
    values = narrow.to_values(pool.assignment(TRAIN.per_device_train_batch_size))
    message = state_message(state, narrow.layout, which="sent", generate=0, **values)
    measured = site(pool, "north")
    measured.accept_assignment(message)
    assert measured.layout == narrow.layout
    sent = evaluate(measured, message).value("loss_sum", float)

    own = site(
        pool_of(
            Path(pool.config.name_or_path), LORA.model_copy(update={"r": 2, "lora_alpha": alpha(2)})
        ),
        "north",
    )
    plain = state_message(state, own.layout, which="sent", generate=0)
    assert sent == evaluate(own, plain).value("loss_sum", float)


def test_a_fleet_of_two_layouts_is_two_fleets(pool: ModelPool) -> None:
    """The sites of each layout send what they would send in a run of their own rank."""
    run = pool.assignment(TRAIN.per_device_train_batch_size)
    narrow = run.with_ranks(2)
    wanted = {"east": run, "north": narrow, "south": run, "west": narrow}
    messages = {
        name: adapter_message(start(assignment), **assignment.to_values(run))
        for name, assignment in wanted.items()
    }
    fleet = local_fleet(
        tuple(wanted), lambda name: site(pool, name), {"work": _work}, FleetConfig(workers=2)
    )

    def read(name: str, payload: Payload) -> Named:
        return read_adapter_message(payload, wanted[name].layout)

    replies = {r.site: r.content for r in fleet.ask("work", messages, round=1, read=read)}
    assert [name for names in by_layout(wanted).values() for name in names] == [
        *("east", "south"),
        *("north", "west"),
    ]
    small = pool_of(
        Path(pool.config.name_or_path), LORA.model_copy(update={"r": 2, "lora_alpha": alpha(2)})
    )
    for name, assignment in wanted.items():
        own = small if assignment == narrow else pool
        assert equal(replies[name], train_as(site(own, name), start(assignment))), name


def _work(site: Site, message: Payload) -> Payload:
    received = read_adapter_message(message, site.layout)
    return adapter_message(train_as(site, received))


def test_a_malformed_assignment_is_the_sites_failure(pool: ModelPool) -> None:
    fleet = local_fleet(("north",), lambda name: site(pool, name), {"work": _work})
    message = Payload(values={KEY: {"ranks": 99}})
    with pytest.raises(ClientError, match="assignment"):
        list(fleet.ask("work", {"north": message}, round=1, read=lambda _, payload: payload))


def test_sites_are_grouped_by_layout(pool: ModelPool) -> None:
    run = pool.assignment(4)
    groups = by_layout(
        {
            "east": run,
            "north": run.with_ranks(2),
            "south": _with_batch(run, 1),
            "west": _with_precision(run.with_ranks(2), "float16"),
        }
    )
    assert list(groups.values()) == [["east", "south"], ["north", "west"]]
    assert list(groups) == [run.layout, run.with_ranks(2).layout]


def _with_batch(assignment: Assignment, batch: int) -> Assignment:
    return Assignment(assignment.layout, assignment.ranks, batch, assignment.precision)


def _with_precision(assignment: Assignment, precision: Any) -> Assignment:
    return Assignment(assignment.layout, assignment.ranks, assignment.batch, precision)
