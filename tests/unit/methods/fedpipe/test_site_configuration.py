"""The configuration of a site: from its plan to a message and back, and what is refused of it."""

from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import WireError
from fluvial.federation.adapters import AggregationSettings
from fluvial.methods.fedpipe.planner.plan import Prediction, Setting, SitePlan
from fluvial.methods.fedpipe.site_configuration import SiteConfiguration, format_of, with_format
from fluvial.models.assignment import Assignment
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.quantisation import FLOAT, Quantisation
from fluvial.models.targets import LoraSettings
from fluvial.wire.payload import Payload


@pytest.fixture(scope="module")
def run(tiny_model: Path) -> Assignment:
    lora = LoraSettings(r=8, target_modules="all-linear")
    return ModelPool(ModelConfig(name_or_path=str(tiny_model)), lora).assignment(4)


def plan(ranks: dict[str, int], format: str = "float32") -> SitePlan:
    setting = Setting(format, 2, 32, True, 1, 5)
    return SitePlan(
        setting, tuple(sorted(ranks.items())), 0, 0.0, 0.0, Prediction(0, 0, 0, 0.0, 0.0)
    )


@pytest.mark.parametrize("format", ["float32", "bfloat16", "nf4", "nf4-double", "int8"])
def test_a_configuration_survives_its_message(format: str, run: Assignment) -> None:
    modules = [name for name, _ in run.ranks]
    ranks = {modules[0]: 2, modules[5]: 8}
    configuration = SiteConfiguration.of(plan(ranks, format), run, modules[:4])
    payload = Payload(values=configuration.to_values(run))
    again = SiteConfiguration.from_payload(Payload.from_bytes(payload.to_bytes()), run)

    assert again == configuration
    assert {name: rank for name, rank in again.assignment.ranks if rank} == ranks
    assert dict(again.assignment.side) == dict.fromkeys(modules[1:4], 8)
    assert again.assignment.batch == 2
    assert (again.steps, again.length, again.checkpointing) == (5, 32, True)
    assert format_of(again.assignment) == format


def test_a_configuration_says_how_fast_the_link_is_where_a_late_site_sends_less(
    run: Assignment,
) -> None:
    ranks = {run.ranks[0][0]: 2}
    fast = SiteConfiguration.of(plan(ranks), run, (), up_bytes_s=2e5)
    payload = Payload(values=fast.to_values(run))
    assert SiteConfiguration.from_payload(payload, run) == fast
    assert "up_bytes_s" not in SiteConfiguration.of(plan(ranks), run, ()).to_values(run)


@pytest.mark.parametrize(("mode", "untrained"), [("stack", 3), ("residual", 11), ("svd", 8)])
def test_a_mode_with_a_rest_gives_every_module_a_side_path(
    mode: Any, untrained: int, run: Assignment
) -> None:
    """A rest of rank 3 beside an adapter of rank 8, of which the site trains 2 in one module."""
    modules = [name for name, _ in run.ranks]
    rest = {} if mode == "svd" else {"residual_rank": 3}
    settings = AggregationSettings.model_validate({"mode": mode, **rest})
    side = dict(
        SiteConfiguration.of(plan({modules[0]: 2}), run, modules[:2], settings).assignment.side
    )
    trained = {"stack": {modules[0]: 3}, "residual": {modules[0]: 9}, "svd": {}}[mode]
    assert side == trained | {modules[1]: untrained}


def test_parameters_of_a_rank_are_those_of_both_factors(run: Assignment) -> None:
    """r (d_in + d_out) for each weight."""
    modules = [name for name, _ in run.ranks]
    configuration = SiteConfiguration.of(plan({modules[0]: 3}), run, ())
    (name_a, shape_a), (_, shape_b) = configuration.assignment.trained.shapes
    assert name_a.startswith(modules[0])
    assert shape_a[0] == shape_b[1] == 3
    assert configuration.assignment.trained.numel == 3 * (shape_a[1] + shape_b[0])


def test_a_quantised_base_computes_in_the_runs_type(run: Assignment) -> None:
    quantised = with_format(run, "nf4")
    assert (quantised.precision, quantised.quantisation) == (run.precision, Quantisation("nf4"))
    assert with_format(quantised, "bfloat16").quantisation == FLOAT
    assert with_format(quantised, "nf4") == quantised


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": True}, "steps"),
        ({"length": 1}, "length"),
        ({"checkpointing": 1}, "checkpointing"),
        ({"up_bytes_s": 0.0}, "up_bytes_s"),
        ({"up_bytes_s": "fast"}, "up_bytes_s"),
        ({"assignment": None}, "assignment"),
        ({"assignment": {"ranks": {"no.such": 1}}}, "no.such"),
        ({"assignment": {"ranks": 0}}, "rank 0"),
        ({"assignment": {"side": {"no.such": 1}}}, "no.such"),
    ],
)
def test_a_configuration_that_fits_no_model_is_refused(
    change: dict[str, Any], words: str, run: Assignment
) -> None:
    module = run.ranks[0][0]
    values = SiteConfiguration.of(plan({module: 2}), run, ()).to_values(run) | change
    with pytest.raises(WireError, match=words):
        SiteConfiguration.from_payload(Payload(values=values), run)
