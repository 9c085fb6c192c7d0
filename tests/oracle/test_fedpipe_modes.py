"""FedPipe under every mode of aggregation and a coded downlink: what equals what, at any ranks."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fluvial.codecs import build, read_settings
from fluvial.errors import ConfigError
from fluvial.exchange.feedback import RESIDUAL, ResizedFeedback, resized
from fluvial.exchange.uplink import coder_of
from fluvial.federation.adapters import AggregationSettings, WholeAdapter, redistribute
from fluvial.federation.sites import Site, Task
from fluvial.methods import METHODS
from fluvial.methods.fedpipe import tasks
from fluvial.methods.fedpipe.site_configuration import SiteConfiguration
from fluvial.models.pool import ModelPool
from fluvial.runs.config import merge, parse
from fluvial.runs.plan import plan as check
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout
from tests.oracle.test_fedpipe import EQUAL, UNEQUAL, Table, plan_of, records
from tests.support.runs import adapter_of, run_table

pytestmark = pytest.mark.oracle

MODES: dict[str, Table] = {
    "ffa": {"aggregation": {"mode": "ffa"}, "factors": "B"},
    "pad": {"aggregation": {"mode": "pad"}},
    "residual": {"aggregation": {"mode": "residual", "residual_rank": 6}},
    "stack": {"aggregation": {"mode": "stack", "residual_rank": 6}},
    "svd": {"aggregation": {"mode": "svd"}},
}
INT8: Table = {"name": "int8"}


def beside(mode: str) -> int:
    """Bytes of the side paths that a mode leaves memory for: rank 6 in the 14 weights."""
    return 4 * 6 * 2 * (4 * 64 + 3 * 96) * (mode in ("residual", "stack"))


def budgets(mode: str) -> list[Table]:
    """The limits of `UNEQUAL`, with memory for what lies beside the adapter."""
    more = beside(mode) / 1e6
    return [
        each | ({"memory_mb": each["memory_mb"] + more} if "memory_mb" in each else {})
        for each in UNEQUAL["method"]["budgets"]
    ]


@pytest.fixture
def unequal(run_config: Table) -> Table:
    return run_config | UNEQUAL


@pytest.mark.parametrize("mode", MODES)
def test_equal_plans_are_fedavg_under_every_mode(
    mode: str, run_config: Table, tmp_path: Path
) -> None:
    """To the bit, with a coded downlink and weighted codes on both."""
    table = run_config | {
        "codec": {"name": "int4", "weighted": mode != "ffa", "error_feedback": True},
        "downlink": INT8,
    }
    expected = run_table(table | {"method": {"name": "fedavg"} | MODES[mode]}, tmp_path / "fedavg")
    result = run_table(table | {"method": EQUAL | MODES[mode]}, tmp_path / "fedpipe")

    assert result["adapter_sha256"] == expected["adapter_sha256"]
    assert result["heldout"]["final"] == expected["heldout"]["final"]


def test_equal_ranks_below_the_runs_leave_its_other_components(
    run_config: Table, tmp_path: Path
) -> None:
    """Means of factors at rank 2 of 4: what no site trains stays as the seed has it."""
    method = merge(EQUAL, {"planner": {"ranks": [2]}})
    adapter = adapter_of(run_table(run_config | {"method": method}, tmp_path / "run"))
    for name, tensor in adapter.items():
        if ".lora_B." in name:
            assert tensor[:, :2].any()
            assert not tensor[:, 2:].any()


@pytest.mark.parametrize("mode", MODES)
def test_unequal_plans_learn_under_every_mode(mode: str, unequal: Table, tmp_path: Path) -> None:
    change = MODES[mode] | {"budgets": budgets(mode)}
    result = run_table(merge(unequal, {"method": change}), tmp_path / "run")
    assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]
    assert len({str(plan["ranks"]) for plan in result["setup"]["plans"].values()}) == 3
    for record in records(tmp_path / "run"):
        assert 0 <= record["aggregation_error"] < 1


@pytest.mark.parametrize("mode", ["residual", "stack"])
def test_sites_of_any_ranks_compute_with_what_lies_beside_the_adapter(
    mode: str, unequal: Table
) -> None:
    """A rest of rank 6 in every module: the logits of each site are those of the whole."""
    config = parse(unequal, "test")
    pool = ModelPool(config.model, config.adapter)
    run = pool.assignment(4)
    draw = torch.Generator().manual_seed(1)
    adapter = {name: torch.randn(shape, generator=draw) for name, shape in run.layout.shapes}
    if mode == "stack":  # the adapter that sites train is fresh
        adapter = {k: v if ".lora_A." in k else torch.zeros_like(v) for k, v in adapter.items()}
    six = run.with_ranks(6).layout
    rest = {name: torch.randn(shape, generator=draw) for name, shape in six.shapes}
    whole = WholeAdapter(
        {name: 0.1 * tensor for name, tensor in adapter.items()},
        {name: 0.1 * tensor for name, tensor in rest.items()},
    )
    settings = AggregationSettings(mode=cast(Any, mode), residual_rank=6)
    modules = [name for name, _ in run.ranks]
    inputs = torch.arange(20)[None]
    logits = []

    wide = run.with_ranks({name: min(14, run.width(name)) for name in modules})
    merged = redistribute(whole.merged(dict(wide.ranks)), wide)
    with pool.model(merged, assignment=wide) as model, torch.no_grad():
        expected = model(input_ids=inputs).logits

    for ranks in (dict(run.ranks), dict.fromkeys(modules, 2), {modules[0]: 1, modules[3]: 8}):
        assignment = SiteConfiguration.of(plan_of(ranks), run, modules, settings).assignment
        site = redistribute(whole, assignment)
        with pool.model(site, assignment=assignment) as model, torch.no_grad():
            logits.append(model(input_ids=inputs).logits)

    for each in logits:
        assert torch.allclose(each, expected, atol=1e-4)


def test_a_downlink_that_loses_nothing_changes_nothing(unequal: Table, tmp_path: Path) -> None:
    """Also where a site's plan, and with it the layout of its adapter, changes in each round."""
    table = merge(unequal, {"rounds": 3, "method": {"replan_every": 1}})
    exact = run_table(table, tmp_path / "exact")
    coded = run_table(table | {"downlink": {"name": "identity"}}, tmp_path / "coded")
    short = run_table(table | {"downlink": INT8}, tmp_path / "short")

    loss = exact["heldout"]["final"]["loss"]
    # A state and the difference to it are added in fp32, which rounds.
    assert coded["heldout"]["final"]["loss"] == pytest.approx(loss, rel=1e-5)
    kind = "down train"
    assert short["bytes"]["by_kind"][kind] < exact["bytes"]["by_kind"][kind]


@pytest.mark.parametrize("mode", ["pad", "residual", "stack", "svd"])
def test_error_feedback_survives_a_change_of_rank_at_both_ends(
    mode: str, unequal: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site has another memory in each round, so its residual and the server's reference change
    their layouts."""
    calls = []

    def profile(site: Site, message: Payload) -> Payload:
        reply = tasks.profile(site, message)
        given = cast(dict[str, Any], reply.values["profile"])
        if site.name != "west":
            return reply

        calls.append(site.name)
        more = (290_000 + beside(mode), 10**9)[(len(calls) - 1) % 2]
        return Payload(values={"profile": given | {"memory_bytes": more}})

    monkeypatch.setitem(cast(dict[str, Task], METHODS["fedpipe"].tasks), "profile", profile)
    change = {
        "rounds": 4,
        "codec": {"name": "int4", "error_feedback": True},
        "downlink": INT8,
        "method": MODES[mode] | {"replan_every": 1, "budgets": budgets(mode)},
    }
    run_table(merge(unequal, change), tmp_path / "run")
    seen = records(tmp_path / "run")
    ranks = [record["plans"]["west"]["ranks"] for record in seen if "plans" in record]
    assert len({str(each) for each in ranks}) > 1
    for record in seen:
        assert record["sites"] == 3
        assert 0 < record["codec_error"] < 1


def test_a_component_keeps_its_residual_when_the_rank_changes() -> None:
    """What is lost at rank 4 comes back at rank 2 in the first two components, and nowhere else."""

    def layout(rank: int) -> Layout:
        return Layout((("m.lora_A.weight", (rank, 6)), ("m.lora_B.weight", (5, rank))))

    codec = read_settings({"name": "int4", "error_feedback": True})
    draw = torch.Generator().manual_seed(2)
    wide = {name: torch.randn(shape, generator=draw) for name, shape in layout(4).shapes}
    _, after = coder_of(build(codec, layout(4)), {}, basis="resized").encode(wide, round=1)
    residual = after[RESIDUAL].tensors

    narrow = coder_of(build(codec, layout(2)), {}, basis="resized")
    assert isinstance(narrow, ResizedFeedback)
    zero = {name: torch.zeros(shape) for name, shape in layout(2).shapes}
    frame, left = narrow.encode(zero, after, round=2)
    sent = narrow.decode(frame)
    for name in zero:
        owed = residual[name][:2] if ".lora_A." in name else residual[name][:, :2]
        assert torch.allclose(sent[name] + left[RESIDUAL].tensors[name], owed)

    again = resized(residual, layout(6))
    assert torch.equal(again["m.lora_A.weight"][:4], residual["m.lora_A.weight"])
    assert not again["m.lora_B.weight"][:, 4:].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codec": {"name": "klt", "rate": 8}}, "each layout would need a fit.*'trellis'"),
        ({"method": {"aggregation": {"mode": "ffa"}}}, "set factors='B'"),
        ({"method": {"factors": "B"}}, "changes A, which factors='B' freezes"),
    ],
)
def test_what_unequal_layouts_cannot_have_is_refused_with_the_reason(
    change: Table, words: str, unequal: Table
) -> None:
    with pytest.raises(ConfigError, match=words):
        check(parse(merge(unequal, change), "test"))
