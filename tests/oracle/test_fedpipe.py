"""FedPipe equals what is already trusted where nothing sets it apart, and applies its plans."""

import json
import struct
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from fluvial.errors import ClientError, ConfigError
from fluvial.federation import sites as federation_sites
from fluvial.federation.adapters import WholeAdapter, redistribute
from fluvial.federation.sites import Site, Task
from fluvial.methods import METHODS
from fluvial.methods.fedpipe import measure, tasks
from fluvial.methods.fedpipe.planner.plan import Prediction, Setting, SitePlan
from fluvial.methods.fedpipe.site_configuration import SiteConfiguration
from fluvial.models.pool import ModelPool
from fluvial.models.tuning import tuned_parameters
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import merge, parse
from fluvial.runs.plan import plan as check
from fluvial.runs.run import execute
from fluvial.training import processes
from fluvial.training.train import TrainReport, collate, train
from fluvial.wire.payload import Payload, frame_payload, payload_frame
from fluvial.wire.tensors import Named
from tests.contract.test_methods import SETTINGS
from tests.support.runs import adapter_of, run_table

Table = dict[str, Any]

EQUAL: Table = {
    "name": "fedpipe",
    "planner": {"selection": "all", "ranks": [4], "batches": [4], "eighths": [8]},
    "aggregation": {"mode": "ab-mean"},
}
"""Every site trains all weights at the run's rank, with the run's batch and steps."""
SPEEDS = SETTINGS["fedpipe"]["method"]["budgets"]
UNEQUAL: Table = {
    "lora": {"r": 8, "target_modules": "all-linear"},
    "method": {
        "name": "fedpipe",
        "probe_steps": 3,
        "probe_rank": 4,
        "planner": {"ranks": [1, 2, 4, 8], "objective": "value", "lengths": [32]},
        "budgets": [
            {"site": "north", "memory_mb": 0.27, "tokens_s": 4000.0},
            {"site": "south", "memory_mb": 0.30, "tokens_s": 2000.0},
            {"site": "west", "tokens_s": 1000.0},
        ],
    },
}
"""Three sites, two of which have too little memory for all weights at the run's rank."""


@pytest.fixture
def unequal(run_config: Table) -> Table:
    return run_config | UNEQUAL


def records(folder: Path) -> list[dict[str, Any]]:
    return list(RunFolder(folder).metrics())


@pytest.mark.parametrize("codec", [{"name": "identity"}, {"name": "int8", "error_feedback": True}])
def test_equal_plans_and_means_of_factors_are_fedavg(
    codec: Table, run_config: Table, tmp_path: Path
) -> None:
    table = run_config | {"codec": codec}
    expected = run_table(table | {"method": {"name": "fedavg"}}, tmp_path / "fedavg")
    result = run_table(table | {"method": EQUAL}, tmp_path / "fedpipe")

    assert result["adapter_sha256"] == expected["adapter_sha256"]
    assert result["heldout"]["final"] == expected["heldout"]["final"]


def test_products_of_one_site_are_local_training(one_site: Table, tmp_path: Path) -> None:
    """After one round the product B A is that of the site's own adapter; the factors of `svd` are
    balanced, and so are other ones."""
    table = one_site | {"rounds": 1}
    expected = adapter_of(run_table(table | {"method": {"name": "fedavg"}}, tmp_path / "alone"))
    method = EQUAL | {"aggregation": {"mode": "svd"}}
    trained = adapter_of(run_table(table | {"method": method}, tmp_path / "fedpipe"))

    for name in expected:
        if ".lora_A." in name:
            name_b = name.replace(".lora_A.", ".lora_B.")
            product = expected[name_b] @ expected[name]
            assert torch.allclose(trained[name_b] @ trained[name], product, atol=1e-6)
            assert not torch.allclose(trained[name_b], expected[name_b], atol=1e-6)


def test_sites_train_what_their_plans_say(
    unequal: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and ranks of what has a gradient; batch and steps; nothing else has a gradient."""
    seen: dict[str, list[tuple[dict[str, int], int, int]]] = {}

    def watched(model: nn.Module, examples: Any, config: Any, **options: Any) -> TrainReport:
        ranks: dict[str, int] = {}

        def watch(parameters: Mapping[str, nn.Parameter]) -> bool:
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                if ".lora_A." in name:
                    ranks[name.removesuffix(".lora_A.weight")] = parameter.shape[0]
            return True

        usual = options.pop("watch")
        report = train(model, examples, config, watch=lambda p: usual(p) and watch(p), **options)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        seen.setdefault(str(len(examples)), []).append(
            (ranks, config.per_device_train_batch_size, report.steps)
        )
        return report

    monkeypatch.setattr(processes, "train", watched)
    result = run_table(unequal | {"rounds": 1}, tmp_path / "run")
    plans = result["setup"]["plans"]
    trained = [entry for entries in seen.values() for entry in entries[1:]]  # the first is a probe

    assert sorted(json.dumps(entry, sort_keys=True) for entry in trained) == sorted(
        json.dumps((plan["ranks"], plan["batch"], plan["steps"]), sort_keys=True)
        for plan in plans.values()
    )
    assert len({json.dumps(plan["ranks"]) for plan in plans.values()}) == 3
    assert any(len(plan["ranks"]) < 14 for plan in plans.values())


def plan_of(ranks: Mapping[str, int]) -> SitePlan:
    setting = Setting("float32", 4, 32, False, 1, 3)
    return SitePlan(
        setting, tuple(sorted(ranks.items())), 0, 0.0, 0.0, Prediction(0, 0, 0, 0.0, 0.0)
    )


def test_sites_that_train_other_weights_see_the_same_model(unequal: Table) -> None:
    """The logits of a site that trains one weight, and has the others as a side path, are those of
    a site that trains all."""
    config = parse(unequal, "test")
    pool = ModelPool(config.model, config.adapter)
    run = pool.assignment(4)
    draw = torch.Generator().manual_seed(1)
    whole = WholeAdapter(
        {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in run.layout.shapes}
    )
    modules = [name for name, _ in run.ranks]
    inputs = torch.arange(20)[None]
    logits = []

    for ranks in (dict(run.ranks), {modules[0]: 8}, {modules[-1]: 8, modules[3]: 8}):
        assignment = SiteConfiguration.of(plan_of(ranks), run, modules).assignment
        adapter = redistribute(whole, assignment)
        with pool.model(adapter, assignment=assignment) as model, torch.no_grad():
            logits.append(model(input_ids=inputs).logits)

    with pool.model({}, assignment=run) as model, torch.no_grad():
        changed = model(input_ids=inputs).logits
    assert not torch.allclose(changed, torch.zeros_like(changed))
    for other in logits[1:]:
        assert torch.allclose(other, logits[0], atol=1e-5)


def test_plain_peft_loads_the_adapter_to_the_same_logits(unequal: Table, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    result = run_table(unequal, tmp_path / "run")
    config = parse(unequal, "test")
    pool = ModelPool(config.model, config.adapter)
    inputs = torch.arange(20)[None]
    peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()

    with pool.model(adapter_of(result)) as model, torch.no_grad():
        own = model(input_ids=inputs).logits
        assert torch.allclose(peft(input_ids=inputs).logits, own, atol=1e-6)
        merged = peft.merge_and_unload()
        assert torch.allclose(merged(input_ids=inputs).logits, own, atol=1e-5)


def test_a_measured_plan_is_decided_once(
    unequal: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run measures nothing, and goes on with the plan of its checkpoint."""
    timed = [
        {key: value for key, value in budget.items() if key != "tokens_s"}
        for budget in UNEQUAL["method"]["budgets"]
    ]
    budgets = [budget for budget in timed if len(budget) > 1]
    config = parse(merge(unequal, {"method": {"budgets": budgets}}), "test")
    setup = next(execute(config, tmp_path / "run"))  # then everything is thrown away
    assert setup.kind == "setup"

    def measured(*_: object) -> None:
        raise AssertionError("a resumed run has its plan")

    monkeypatch.setattr(tasks, "measured", measured)
    *_, last = execute(config, tmp_path / "run", resume=True)
    assert last.values["setup"] == setup.values
    assert [record["sites"] for record in records(tmp_path / "run")] == [3, 3]


def test_a_site_leaves_and_returns_with_another_budget(
    unequal: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in the first profile, is measured when it is back, and gets another plan when its
    memory has changed."""
    calls = []

    def profile(site: Site, message: Payload) -> Payload:
        reply = tasks.profile(site, message)
        if site.name != "west":
            return reply

        calls.append(site.name)
        if len(calls) == 1:
            raise RuntimeError("power cut")
        given = cast(dict[str, Any], reply.values["profile"])
        small = given if len(calls) == 2 else given | {"memory_bytes": 320_000}
        return Payload(values={"profile": small})

    monkeypatch.setitem(cast(dict[str, Task], METHODS["fedpipe"].tasks), "profile", profile)
    change = {"rounds": 3, "fleet": {"on_failure": "skip"}, "method": {"replan_every": 2}}
    result = run_table(merge(unequal, change), tmp_path / "run")
    first, second, third = records(tmp_path / "run")

    assert sorted(result["setup"]["plans"]) == ["north", "south"]
    assert [record["sites"] for record in (first, second, third)] == [3, 3, 3]
    before = first["plans"]["west"]
    after = third["plans"]["west"]
    assert "plans" not in second
    assert after["prediction"]["memory_bytes"] <= 320_000 < before["prediction"]["memory_bytes"]
    # The profiles of the others are as they were, and so are their settings.
    assert third["plans"]["north"]["batch"] == first["plans"]["north"]["batch"]


def test_one_slow_round_does_not_keep_a_site_out(
    unequal: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that would be refused for its last round is measured anew, without that round."""
    said = {"north": "000000.000", "south": "999999.999"}

    def train(site: Site, message: Payload) -> Payload:
        reply = tasks.train(site, message)
        late = {"s": said[site.name]} if site.name in said and site.recall("late").values else {}
        site.keep("late", Payload(values={"once": True}))
        return Payload(reply.tensors, {**reply.values, **late})

    monkeypatch.setitem(cast(dict[str, Task], METHODS["fedpipe"].tasks), "train", train)
    planner = {"selection": "all", "ranks": [8], "batches": [4]}
    method = {"name": "fedpipe", "planner": planner, "replan_every": 1, "deadline_s": 60.0}
    change = {"rounds": 4, "fleet": {"on_failure": "skip"}, "method": method}
    run_table(unequal | change, tmp_path / "run")

    seen = records(tmp_path / "run")
    assert [record["sites"] for record in seen] == [3, 3, 3, 3]
    assert all(record["plans"]["north"]["prediction"]["compute_s"] > 0 for record in seen[1:])


@pytest.mark.parametrize("stalls", [1, 2])
def test_a_site_is_measured_again_before_the_deadline_refuses_it(
    stalls: int, unequal: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its measure is too slow once, or always."""
    asked = []

    def profile(site: Site, message: Payload) -> Payload:
        reply = tasks.profile(site, message)
        asked.append(site.name)
        if site.name != "south" or asked.count("south") > stalls:
            return reply
        slow = {"speeds": {"float32": [[1, 0.01]]}}
        return Payload(values={"profile": cast(dict[str, Any], reply.values["profile"]) | slow})

    monkeypatch.setitem(cast(dict[str, Task], METHODS["fedpipe"].tasks), "profile", profile)
    planner = {"selection": "all", "ranks": [8], "batches": [1, 4]}
    method = {"name": "fedpipe", "planner": planner, "deadline_s": 60.0}
    table = unequal | {"fleet": {"on_failure": "skip"}, "method": method}
    setup = next(execute(parse(table, "test"), tmp_path / "run"))
    assert sorted(asked) == ["north", "south", "south", "west"]
    assert ("south" in setup.values["plans"]) == (stalls == 1)


def test_a_plan_is_compared_once_with_what_was_measured(
    unequal: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that is planned later has no influence on the slowness of the others, whose plans are
    as they were; a prediction holds the slowness at the time of its plan."""
    calls = []

    def profile(site: Site, message: Payload) -> Payload:
        if site.name == "west":
            calls.append(site.name)
            if len(calls) < 3:
                raise RuntimeError("power cut")
        return tasks.profile(site, message)

    monkeypatch.setitem(cast(dict[str, Task], METHODS["fedpipe"].tasks), "profile", profile)
    change = {"rounds": 3, "fleet": {"on_failure": "skip"}}
    run_table(merge(unequal, change), tmp_path / "run")
    compared = [sorted(record.get("predicted", {})) for record in records(tmp_path / "run")]
    assert compared == [["north", "south"], ["west"], []]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"method": {"budgets": [{"site": "nort", "memory_mb": 9.0}]}},
            "method.budgets: there is no site 'nort'; the sites are 'north', 'south', 'west'",
        ),
        ({"method": {"planner": {"ranks": [4, 64]}}}, "no site can have rank 64.*raise lora.r"),
        ({"method": {"planner": {"lengths": [32, 999]}}}, "999 tokens.*data.max_length"),
        ({"model": {"dtype": "float16"}}, "model.dtype: .*'float32' or 'bfloat16'"),
        ({"train": {"gradient_checkpointing": True}}, "train.gradient_checkpointing: without"),
        ({"train": {"gradient_accumulation_steps": 2}}, "train.gradient_accumulation_steps: wit"),
    ],
)
def test_settings_that_no_plan_can_use_are_refused_before_anything_is_measured(
    change: Table, words: str, unequal: Table
) -> None:
    with pytest.raises(ConfigError, match=words):
        check(parse(merge(unequal, change), "test"))


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"memory_bytes": -1}, "memory_bytes"),
        ({"memory_bytes": 10**30}, "memory_bytes"),
        ({"speeds": {"float32": [[1, -5.0]]}}, "tokens_s"),
        ({"speeds": {"float32": [[1, 1e300]]}}, "tokens_s"),
        ({"samples": 0}, "samples"),
        ({"samples": 10**9}, "tokens"),
        ({"up_bytes_s": 0.0}, "up_bytes_s"),
        ({"peaks": [[1, 32, False, 10**30]]}, "peaks"),
        ({"more": 1}, "more"),
    ],
)
def test_a_site_that_lies_about_itself_fails_alone(
    lie: Table,
    words: str,
    unequal: Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def profile(site: Site, message: Payload) -> Payload:
        reply = tasks.profile(site, message)
        if site.name != "west":
            return reply
        return Payload(values={"profile": cast(dict[str, Any], reply.values["profile"]) | lie})

    monkeypatch.setitem(cast(dict[str, Task], METHODS["fedpipe"].tasks), "profile", profile)
    with pytest.raises(ClientError, match=f"'west' failed.*{words}"):
        next(execute(parse(unequal, "test"), tmp_path / "stop"))

    skipping = parse(unequal | {"fleet": {"on_failure": "skip"}}, "test")
    setup = next(execute(skipping, tmp_path / "skip"))
    assert sorted(setup.values["plans"]) == ["north", "south"]


def test_a_site_that_sends_values_that_are_not_finite_fails_alone(
    unequal: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frame is whole by its checksum, and its last value is NaN."""

    def hostile(site: Site, message: Payload) -> Payload:
        reply = tasks.train(site, message)
        if site.name != "west":
            return reply
        frame = payload_frame(reply)[:-8] + struct.pack("<f", float("nan"))
        return frame_payload(frame + struct.pack("<I", zlib.crc32(frame)), **reply.values)

    monkeypatch.setitem(cast(dict[str, Task], METHODS["fedpipe"].tasks), "train", hostile)
    table = unequal | {"rounds": 1, "codec": {"name": "identity"}}
    with pytest.raises(ClientError, match=r"'west' failed: WireError.*NaN or Inf"):
        list(execute(parse(table, "test"), tmp_path / "stop"))

    run_table(table | {"fleet": {"on_failure": "skip"}}, tmp_path / "skip")
    assert [record["sites"] for record in records(tmp_path / "skip")] == [2]


def test_a_site_without_any_plan_is_refused_with_the_limit_that_binds(
    unequal: Table, tmp_path: Path
) -> None:
    budgets = [{"site": "west", "memory_mb": 0.01, "tokens_s": 1.0}]
    table = merge(unequal, {"method": {"budgets": budgets}})
    # Nothing trains before it, no baseline either.
    with pytest.raises(ConfigError, match="base in format float32 needs .*0.01 of site 'west'"):
        run_table(table | {"compare": ["local"]}, tmp_path / "run")
    assert not (tmp_path / "run" / "compare").exists()

    # A limit that base and no pass fit in is known once the site has measured itself.
    tight = merge(unequal, {"method": {"budgets": [{"site": "west", "memory_mb": 0.15}]}})
    with pytest.raises(ClientError, match="'west' failed: .*raise method.budgets.memory_mb"):
        run_table(tight, tmp_path / "tight")

    # It counts as a site that did not answer.
    with pytest.raises(ClientError, match="2 of 3 sites answered, fleet.quorum=0.9 needs"):
        run_table(table | {"fleet": {"on_failure": "skip", "quorum": 0.9}}, tmp_path / "all")

    result = run_table(table | {"fleet": {"on_failure": "skip"}}, tmp_path / "skip")
    assert sorted(result["setup"]["plans"]) == ["north", "south"]
    assert [record["sites"] for record in records(tmp_path / "skip")] == [2, 2]


def test_a_site_that_sends_back_what_it_received_is_named(
    unequal: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = federation_sites.train_locally

    def idle(site: Site, received: Named, *arguments: Any, **options: Any) -> Any:
        update, report = usual(site, received, *arguments, **options)
        if site.name == "south" and options.get("purpose") != "probe":
            update = {name: torch.zeros_like(tensor) for name, tensor in update.items()}
        return update, report

    monkeypatch.setattr(tasks, "train_locally", idle)
    run_table(unequal, tmp_path / "run")
    assert [record["unchanged"] for record in records(tmp_path / "run")] == [["south"]] * 2


def test_steps_that_were_not_made_are_counted(
    unequal: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.Pace, "watch", lambda *_: False)
    result = run_table(unequal | {"rounds": 1}, tmp_path / "run")
    steps = [plan["steps"] for plan in result["setup"]["plans"].values()]
    (record,) = records(tmp_path / "run")
    assert record["worst_under_training"] == 1 - 1 / max(steps)
    assert record["under_training"] == pytest.approx(sum(1 - 1 / each for each in steps) / 3)


def test_a_step_begins_only_if_it_ends_before_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = tasks.Pace(10.0, 1.0)
    verdicts = []
    for seconds in (1.0, 4.0, 1.5):
        now[0] += seconds
        verdicts.append(pace.watch({}))
    assert verdicts == [True, True, False]  # 6.5 s, and the longest step took 4
    assert pace.seconds == 6.5


def test_a_slowed_site_sleeps_for_the_rest_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    slept: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", slept.append)
    pace = tasks.Pace(None, 0.25)
    now[0] = 2.0
    assert pace.watch({})
    assert slept == [6.0]


def test_every_byte_is_counted(unequal: Table, tmp_path: Path) -> None:
    kinds = run_table(unequal, tmp_path / "run")["bytes"]["by_kind"]
    assert {f"{way} {task}" for way in ("up", "down") for task in METHODS["fedpipe"].tasks} <= set(
        kinds
    )
    # A score in fp32 and the energies of the probe's rank for each of 14 weights, at 3 sites.
    assert kinds["up probe"] >= 3 * 14 * 4 * (1 + 4)


def test_unequal_ranks_have_no_mean_of_factors(unequal: Table, tmp_path: Path) -> None:
    table = merge(unequal, {"method": {"aggregation": {"mode": "ab-mean"}}})
    with pytest.raises(ConfigError, match="unequal ranks"):
        run_table(table, tmp_path / "run")


@pytest.mark.parametrize("batch", [3, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_predicted_memory_is_that_of_batches_that_were_not_measured(
    batch: int, checkpointing: bool, unequal: Table, tmp_path: Path
) -> None:
    """The models of a profile of batches 1 and 2 say what autograd saves at other ones, within
    10 %."""
    from fluvial.data import SiteTexts
    from fluvial.methods.fedpipe.deciding import Deciding
    from fluvial.methods.fedpipe.planner.formats import FORMATS
    from fluvial.methods.fedpipe.planner.profile import Profile
    from fluvial.models.states import initial_state
    from fluvial.runs.run import Run

    config = parse(unequal, "test")
    pool = ModelPool(config.model, config.adapter)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    with RunFolder(tmp_path / "run") as folder:
        run = Run(config, folder, pool, texts)
        next(run.events())
        deciding: Deciding = run.server.deciding  # type: ignore[attr-defined]
        profile: Profile = run.server.profiles["west"]  # type: ignore[attr-defined]

    longest = max(texts.load("west").train, key=lambda example: len(example.input_ids))
    inputs = collate([longest] * batch, 0)
    with pool.model(initial_state(pool.layout, 1), trainable="A and B") as model:
        measured = measure.peak_bytes(model, inputs)[checkpointing]
        assert tuned_parameters(model)

    predicted = deciding.models(profile).memory.total(
        FORMATS["float32"],
        batch,
        inputs["input_ids"].shape[1],
        checkpointing=checkpointing,
        lora=pool.layout.numel,
    )
    assert predicted == pytest.approx(measured, rel=0.1)
