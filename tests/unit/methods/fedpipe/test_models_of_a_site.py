"""The memory and time models of a site: formulas, calibration, correction and their records."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from fluvial.methods.fedpipe.planner.comparison import Measured, compared
from fluvial.methods.fedpipe.planner.decision import Models, Planner
from fluvial.methods.fedpipe.planner.formats import FORMATS, Format, Wire
from fluvial.methods.fedpipe.planner.memory import Activations, MemoryModel, MemoryPoint
from fluvial.methods.fedpipe.planner.plan import SitePlan
from fluvial.methods.fedpipe.planner.profile import Speed
from fluvial.methods.fedpipe.planner.settings import PlannerSettings
from fluvial.methods.fedpipe.planner.sizes import Sizes
from fluvial.methods.fedpipe.planner.time import TimeModel, speed_at, under_training
from tests.support.planner import candidates, models

ATTENTION = ((4096, 4096),) * 4
MLP = ((11008, 4096), (11008, 4096), (4096, 11008))
LLAMA = Sizes(((*ATTENTION, *MLP),) * 32, 262_410_240, 4096, 32, 32_000, 2)


def llama() -> MemoryModel:
    return MemoryModel(
        LLAMA,
        Activations.of(LLAMA, checkpointing=False, scores=True),
        Activations.of(LLAMA, checkpointing=True, scores=True),
        0,
        Fraction(8192),
    )


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("bfloat16", 13.48), ("nf4", 4.17), ("nf4-double", 3.87)],
)
def test_a_base_of_7b_has_the_bytes_of_the_specification(name: str, gigabytes: float) -> None:
    """The table of (b); what is decoded at a time comes on top."""
    format = FORMATS[name]
    decoded = 2 * 11008 * 4096 if format.quantised else 0
    assert llama().base(format) - decoded == pytest.approx(gigabytes * 1e9, abs=5e6)


def test_activations_follow_the_formulas_of_c2() -> None:
    model = llama()
    tokens = 2 * 512
    layer = 34 * tokens * 4096 + 5 * 2 * 32 * 512**2
    logits = 6 * tokens * 32_000
    assert model.plain.bytes(2, 512) == 32 * layer + logits
    assert model.checkpointed.bytes(2, 512) == 2 * tokens * 4096 * 32 + layer + logits
    assert model.total(FORMATS["nf4"], 2, 512, checkpointing=True, lora=0) == (
        model.base(FORMATS["nf4"]) + model.checkpointed.bytes(2, 512)
    )


def test_errors_and_bits_of_the_formats_are_those_of_normal_weights() -> None:
    weights = np.random.default_rng(0).standard_normal((20_000, 64)).astype(np.float32)
    largest = np.abs(weights).max(axis=1, keepdims=True)
    below = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911]
    above = [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    levels = np.array([*below, 0.0, *above])
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, weights / largest)
    assert error(weights, levels[nearest] * largest) == pytest.approx(
        FORMATS["nf4"].error, rel=0.02
    )

    rows = weights.reshape(-1, 1024)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    coded = np.round(rows / largest * 127) / 127 * largest
    assert error(rows, coded) == pytest.approx(FORMATS["int8"].error, rel=0.15)

    bits = weights.view(np.uint32)
    half = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
    assert error(weights, half) == pytest.approx(FORMATS["bfloat16"].error, rel=0.02)
    bits_a_value = 8 * sum(LLAMA.coded["nf4-double"]) / sum(LLAMA.linear)
    assert bits_a_value == pytest.approx(4.127, abs=5e-4)


def error(weights: np.ndarray, coded: np.ndarray) -> float:
    return float(np.sqrt(((weights - coded) ** 2).sum() / (weights**2).sum()))


def point(batch: int, format: Format, size: int, *, checkpointing: bool = False) -> MemoryPoint:
    return MemoryPoint(batch, 64, checkpointing, format, 1000, size)


def test_a_calibrated_model_predicts_the_points_that_it_was_fitted_to() -> None:
    """Bytes of another machine: 7 MB fixed and 3,000 bytes for each token."""
    truth = replace(models().memory, plain=Activations(7_000_000, 3000))
    points = [
        point(
            batch,
            FORMATS[name],
            truth.total(FORMATS[name], batch, 64, checkpointing=False, lora=1000),
        )
        for batch, name in ((1, "bfloat16"), (4, "bfloat16"), (8, "nf4"))
    ]
    fitted = models().memory.calibrated(points)
    assert fitted.plain.token == pytest.approx(3000, abs=2)
    assert fitted.plain.fixed == pytest.approx(7_000_000, abs=100)
    assert fitted.checkpointed == models().memory.checkpointed  # nothing was measured of it


def test_one_point_calibrates_nothing_and_noise_gives_no_negative_slope() -> None:
    model = models().memory
    only = point(4, FORMATS["bfloat16"], 10**8)
    assert model.calibrated([only, only]) == model

    falling = [point(1, FORMATS["bfloat16"], 10**8), point(8, FORMATS["bfloat16"], 9 * 10**7)]
    assert model.calibrated(falling).plain.token == 0


def test_both_models_return_from_their_records() -> None:
    site = models()
    record = json.loads(json.dumps(site.to_json()))
    assert MemoryModel.from_json(record["memory"]) == site.memory
    assert TimeModel.from_json(record["time"]) == site.time


def test_speeds_are_linear_between_measured_batches_and_constant_beyond() -> None:
    curve = (Speed(2, 100.0), Speed(4, 300.0), Speed(8, 400.0))
    assert [speed_at(curve, batch) for batch in (1, 2, 3, 4, 6, 8, 99)] == [
        100.0,
        100.0,
        200.0,
        300.0,
        350.0,
        400.0,
        400.0,
    ]


def test_seconds_are_those_of_c2() -> None:
    site = models(up_bytes_s=1000.0, down_bytes_s=4000.0, latency_s=2.0)
    speeds = {"bfloat16": (Speed(1, 50.0),)}
    site = replace(site, profile=replace(site.profile, speeds=speeds))
    assert site.time.lora_measured == 3584
    base = site.time.base_parameters

    def seconds(checkpointing: bool, lora: int, of: Models = site) -> float:
        return of.time.seconds(
            of.profile,
            FORMATS["bfloat16"],
            Wire.of(4),
            batch=1,
            tokens=500,
            checkpointing=checkpointing,
            lora=lora,
            modules=2,
        ).compute_s

    assert seconds(False, 3584) == pytest.approx(10.0)
    measured = 4 * base + 6 * 3584
    assert seconds(True, 1000) == pytest.approx(10 * (6 * base + 8 * 1000) / measured)
    again = replace(site, profile=replace(site.profile, fixed_s=3.0))
    assert seconds(False, 3584, again) == pytest.approx(13.0)
    assert site.time.bytes_up(1000, 2, Wire.of(4)) == 1016
    assert site.time.bytes_down(1000, 2) == 4016


def test_a_format_that_was_not_measured_has_the_speed_of_a_measured_one() -> None:
    site = models()
    known = site.time.token_s(site.profile, FORMATS["bfloat16"], 4)
    assert site.time.token_s(site.profile, FORMATS["nf4"], 4) == known

    speeds = {**site.profile.speeds, "nf4": (Speed(1, 10.0),)}
    assert site.time.token_s(replace(site.profile, speeds=speeds), FORMATS["nf4"], 4) == 0.1


def test_under_training_is_the_share_beyond_the_deadline() -> None:
    assert under_training(60, 80) == 0.25
    assert under_training(60, 30) == 0


def test_predicted_and_measured_figures_stand_side_by_side() -> None:
    planner = Planner(candidates(0), PlannerSettings(), length=64, format="bfloat16")
    plan = planner.plan(models(0, memory_bytes=120 * 10**6))
    assert plan is not None
    figures = compared(plan, Measured(None, plan.prediction.bytes_up, 1, 2.0))
    assert figures["bytes_up"] == {
        "predicted": plan.prediction.bytes_up,
        "measured": plan.prediction.bytes_up,
        "error": 0.0,
    }
    assert figures["memory_bytes"] == {
        "predicted": plan.prediction.memory_bytes,
        "measured": None,
        "error": None,
    }
    assert SitePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
