"""Every setting that is accepted has an effect, or is refused where it has none.

`CASES` has a row for each field of every method, codec, [train] and [lora]; a field without a row
fails. A row changes one field of a run to another valid value; weights, bytes, metrics, set-up or
predicted rows must differ. Codecs that learn, and methods whose runs take seconds, are `slow`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch

from fluvial.codecs import CODECS, CodecConfig, build, read_settings
from fluvial.codecs.activations import ActivationConfig
from fluvial.codecs.base import CodecSettings, SnrDrivenSettings
from fluvial.data import POOLED
from fluvial.errors import ClientError, ConfigError
from fluvial.exchange import TgapConfig
from fluvial.federation.adapters import AggregationSettings
from fluvial.federation.sites import Site, Task
from fluvial.methods import METHODS
from fluvial.methods.fedpipe.planner.settings import PlannerSettings
from fluvial.methods.flglm.config import PartsConfig
from fluvial.models.targets import LoraSettings
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import merge, parse
from fluvial.runs.plan import plan
from fluvial.settings import Settings
from fluvial.training.config import TrainConfig
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout
from tests.contract.test_methods import SETTINGS
from tests.support.models import unmeasured, with_fitting_model
from tests.support.runs import run_table

Table = dict[str, Any]
SHARED = set(SnrDrivenSettings.model_fields)
LAYOUT = Layout((("a.lora_A.weight", (8, 96)), ("a.lora_B.weight", (96, 8))))

FRACTION = 0.4
PIPE: Table = SETTINGS["fedpipe"]
QUICK: dict[str, tuple[Table, Any]] = {
    "FedAvgConfig.fraction": ({}, FRACTION),
    "FedAvgConfig.factors": ({}, "B"),
    "FedAvgConfig.server_learning_rate": ({}, 1.5),
    "FedAvgConfig.server_momentum": ({}, 0.9),
    "FedAvgConfig.ema_decay": ({}, 0.5),
    "FedAvgConfig.aggregation": ({}, {"mode": "residual"}),
    "AggregationSettings.mode": ({}, "svd"),
    "AggregationSettings.residual_rank": (
        {"rounds": 3, "method": {"name": "fedavg", "aggregation": {"mode": "svd"}}},
        0,
    ),
    "AggregationSettings.target": (
        {"rounds": 3, "method": {"name": "fedavg", "aggregation": {"mode": "svd"}}},
        "products",
    ),
    "AggregationSettings.measure": (
        {"method": {"name": "fedavg", "aggregation": {"mode": "ab-mean"}}},
        "always",
    ),
    "CentralConfig.factors": ({"method": {"name": "central"}}, "B"),
    "FedSaConfig.fraction": (SETTINGS["fedsa"], FRACTION),
    **{
        f"FedSbConfig.{name}": ({"method": {"name": "fedsb"}}, value)
        for name, value in {"fraction": FRACTION, "samples": 2, "first_step": 0.01}.items()
    },
    **{
        f"FlascConfig.{name}": ({"method": {"name": "flasc"}}, value)
        for name, value in {
            "fraction": FRACTION,
            "density_down": 0.5,
            "density_up": 0.5,
            "values": "fp32",
            "server_optimizer": "fedavg",
            "server_learning_rate": 0.01,
            "beta_1": 0.5,
            "beta_2": 0.5,
            "epsilon": 1e-3,
        }.items()
    },
    "FlascConfig.download": ({"method": {"name": "flasc", "density_down": 1.0}}, "weights"),
    **{
        f"EcoLoraConfig.{name}": ({"method": {"name": "ecolora", "segments": 2}}, value)
        for name, value in {
            "fraction": FRACTION,
            "segments": 3,
            "most": 0.8,
            "mixing": "none",
            "beta": 0.1,
            "values": "fp32",
        }.items()
    },
    **{
        f"EcoLoraConfig.{name}": ({"rounds": 4, "method": {"name": "ecolora"}}, value)
        for name, value in {
            "gamma_a": 50.0,
            "gamma_b": 50.0,
            "least_a": 0.3,
            "least_b": 0.2,
        }.items()
    },
    **{
        f"TrainConfig.{name}": ({}, value)
        for name, value in {
            "learning_rate": 2e-2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "lr_scheduler_type": "constant",
            "round_scheduler_type": "linear",
            "warmup_ratio": 0.5,
            "warmup_steps": 2,
            "weight_decay": 1.0,
            "max_grad_norm": 0.01,
            "optim": "sgd",
            "adam_beta1": 0.5,
            "adam_beta2": 0.5,
            "adam_epsilon": 1e-2,
            "bf16": True,
        }.items()
    },
    **{
        f"FlGlmConfig.{name}": ({"method": {"name": "flglm"}}, value)
        for name, value in {
            "fraction": FRACTION,
            "front": 2,
            "back": 2,
            "mode": "sequential",
            "ends": "own",
            "hidden": {"name": "int8"},
            "gradient": {"name": "int8"},
            "noise": {"clip": 1.0, "multiplier": 0.1},
        }.items()
    },
    "FlGlmConfig.parts": ({"method": {"name": "flglm"}}, {"front": "frozen"}),
    **{
        f"PartsConfig.{name}": ({"method": {"name": "flglm", "ends": "own"}}, value)
        for name, value in {"front": "full", "middle": "frozen", "back": "full"}.items()
    },
    **{
        f"Int4RowsSettings.{name}": (
            {"method": {"name": "flglm", "hidden": {"name": "int4"}}},
            value,
        )
        for name, value in {"group_size": 16, "outlier_channels": 2}.items()
    },
    "FlGlmConfig.recurring": (
        {"method": {"name": "flglm", "hidden": {"name": "int4"}}},
        "changes",
    ),
    "TopKRowsSettings.share": (
        {"method": {"name": "flglm", "hidden": {"name": "top_k"}}},
        0.5,
    ),
    **{
        f"FedPipeConfig.{name}": (PIPE, value)
        for name, value in {
            "fraction": FRACTION,
            "planner": {"batches": [1]},
            "importance": "spectral",
            "probe_rank": 2,
            "probe_steps": 4,
            "aggregation": {"target": "products"},
            "learning_rate_by_batch": "sqrt",
            "deadline_s": 0.1,
            "replan_every": 1,
            "budgets": [{"site": "west", "tokens_s": 10.0}],
        }.items()
    },
    "FedPipeConfig.factors": (
        {
            "method": {
                "name": "fedpipe",
                "budgets": PIPE["method"]["budgets"],
                "planner": {"selection": "all", "ranks": [4]},
                "aggregation": {"mode": "ab-mean"},
            }
        },
        "B",
    ),
    "FedPipeConfig.score_decay": (
        {"rounds": 3, "method": PIPE["method"] | {"replan_every": 1}},
        0.0,
    ),
    **{
        f"PlannerSettings.{name}": (PIPE, value)
        for name, value in {
            "objective": "value",
            "ranks": [1],
            "batches": [2],
            "lengths": [8],
            "formats": ["bfloat16"],
            "checkpointing": "always",
            "eighths": [4],
        }.items()
    },
    "PlannerSettings.selection": (
        {"method": {"name": "fedpipe", "planner": {"selection": "uniform"}}},
        "all",
    ),
    "PlannerSettings.granularity": (
        merge(PIPE, {"method": {"planner": {"ranks": [1, 2]}}}),
        "type",
    ),
    "FlGlmConfig.sync_steps": ({"method": {"name": "flglm", "mode": "hierarchical"}}, 1),
    "TrainConfig.num_train_epochs": (
        {"train": {"learning_rate": 1e-2, "per_device_train_batch_size": 4}},
        0.5,
    ),
    "LoraSettings.r": ({}, 2),
    "LoraSettings.lora_alpha": ({}, 4.0),
    "LoraSettings.lora_dropout": ({}, 0.5),
    "LoraSettings.target_modules": ({}, "all-linear"),
    "LoraSettings.use_rslora": ({}, True),
    "CodecSettings.snr_db": ({"codec": {"name": "trellis", "rate": 8}}, 6.0),
    "CodecSettings.noise_ratio": ({"codec": {"name": "hadamard", "rate": 8}}, 0.1),
    "CodecSettings.error_feedback": ({"codec": {"name": "int4"}}, True),
    "CodecSettings.weighted": ({"codec": {"name": "int4"}}, True),
    "CodecSettings.feedback_decay": (
        {
            "rounds": 6,
            "method": {"name": "fedavg", "fraction": FRACTION},
            "codec": {"name": "int4", "error_feedback": True},
        },
        0.1,
    ),
}
"""By class and field: what a run needs beside the usual, and the other value."""

KLT = {"name": "klt", "rate": 8}
TGAP = {"rounds": 2, "holdout": 0.5}
LEARNS: Table = {
    "rounds": 3,
    "method": {"name": "cgfedllm", "gate": "report", "tgap": TGAP},
    "codec": KLT,
}
PUBLIC = merge(LEARNS, {"method": {"tgap": {"source": "public"}}})
REFIT = merge(LEARNS, {"method": {"tgap": {"refit": "decoded", "refit_every": 1}}})
BLOCKS: Table = {"tune": "full", "lora": None, "method": {"name": "fedcybgd"}}
LOSSY = merge(BLOCKS, {"method": {"download": {"form": "low-bit"}, "gate": {"threshold": 0.01}}})
CHECKED = merge(BLOCKS, {"method": {"accept": {"on": "public loss"}}})
SLOW: dict[str, tuple[Table, Any]] = {
    "FedAvgConfig.tgap": (
        PUBLIC | {"method": {"name": "fedavg", "tgap": TGAP | {"source": "public"}}},
        TGAP | {"source": "sites"},
    ),
    "CgFedLlmConfig.fraction": (LEARNS, FRACTION),
    "CgFedLlmConfig.server_learning_rate": (LEARNS, 1.5),
    "CgFedLlmConfig.server_momentum": (LEARNS, 0.9),
    "CgFedLlmConfig.ema_decay": (LEARNS, 0.5),
    "CgFedLlmConfig.representation": (LEARNS, "state"),
    "CgFedLlmConfig.tgap": (LEARNS, TGAP | {"share": 0.6}),
    "CgFedLlmConfig.aggregation": (
        {"method": {"name": "cgfedllm", "tgap": {"source": "none"}}, "codec": {"name": "int8"}},
        {"mode": "svd"},
    ),
    "CgFedLlmConfig.privacy": (
        merge(LEARNS, {"method": {"tgap": {"source": "public"}}}),
        {"placement": "update", "clip_norm": 0.1, "noise_multiplier": 0.1},
    ),
    "TgapConfig.source": (LEARNS, "public"),
    "TgapConfig.reading": (LEARNS, "local"),
    "TgapConfig.rounds": (LEARNS, 3),
    "TgapConfig.share": (LEARNS, 0.6),
    "TgapConfig.holdout": (merge(LEARNS, {"method": {"tgap": {"rounds": 4}}}), 0.7),
    "TgapConfig.simulated_sites": (PUBLIC, 3),
    "TgapConfig.refit": (LEARNS | {"rounds": 6}, "decoded"),
    "TgapConfig.refit_every": (REFIT, 2),
    "TgapConfig.refit_weight": (REFIT, 0.9),
    "KltSettings.rate": (LEARNS, 32),
    "KltSettings.basis_share": (LEARNS, 0.02),
    "KltSettings.mode": (LEARNS, "dithered"),
    "FedCyBgdConfig.order": (BLOCKS, "descending"),
    "FedCyBgdConfig.layers_per_block": (BLOCKS, 2),
    "FedCyBgdConfig.num_blocks": (BLOCKS, 3),
    "FedCyBgdConfig.damping": (BLOCKS, 0.5),
    "FedCyBgdConfig.download": (BLOCKS, {"form": "full"}),
    "FedCyBgdConfig.extra": (BLOCKS, ["embeddings"]),
    "FedCyBgdConfig.gate": (LOSSY, {"threshold": 0.01, "examples": 2}),
    "FedCyBgdConfig.accept": (CHECKED, {"on": "always"}),
}

ELSEWHERE = {
    "FedPipeConfig.least_upload": "tests/oracle/test_leading.py",
    "AggregationSettings.absent": "tests/oracle/test_aggregation.py",
    "TrainConfig.gradient_checkpointing": "tests/oracle/test_train.py",
    "CgFedLlmConfig.gate": "tests/unit/methods/test_cgfedllm.py",
    "CgFedLlmConfig.max_growth": "tests/unit/methods/test_cgfedllm.py",
    **{
        f"PlannerSettings.{name}": "tests/unit/methods/fedpipe/test_plans.py"
        for name in (
            "critical_batch",
            "weight_of_data",
            "weight_of_error",
            "safety",
            "hysteresis",
        )
    },
    "PlannerSettings.layer_groups": "tests/oracle/test_mixed_bits.py",
    "FlGlmConfig.in_flight": "tests/oracle/test_flglm_in_flight.py",
    "FlGlmConfig.step_deadline_s": "tests/oracle/test_flglm_rejoin.py",
    "FlGlmConfig.leakage": "tests/oracle/test_flglm_leakage.py",
    "FlGlmConfig.memory_bytes": "tests/oracle/test_flglm_memory.py",
    "FlGlmConfig.site_memory_mb": "tests/oracle/test_flglm_cut.py",
    "FlGlmConfig.server_memory_mb": "tests/oracle/test_flglm_cut.py",
    "FedCyBgdConfig.parallel": "tests/oracle/test_fedcybgd.py",
    "FedCyBgdConfig.merge": "tests/oracle/test_fedcybgd.py",
    "FedCyBgdConfig.weighting": "tests/oracle/test_fedcybgd.py",
    "FedCyBgdConfig.hold": "tests/unit/methods/fedcybgd/test_visit.py",
    "CentralCyclicConfig.order": "tests/unit/methods/fedcybgd/test_schedules.py",
    "CentralCyclicConfig.extra": "tests/unit/methods/fedcybgd/test_blocks.py",
    "CentralCyclicConfig.layers_per_block": "tests/unit/methods/fedcybgd/test_blocks.py",
    "CentralCyclicConfig.num_blocks": "tests/unit/methods/fedcybgd/test_blocks.py",
}
"""Fields whose effect is memory, a refusal, or an equality: the file of tests that measures it."""

FRAMES: dict[str, Any] = {
    "block_size": 16,
    "rate": 20.0,
    "value_bits": 4,
    "unbiased": "yes",
    "share": 0.1,
    "levels": "ternary",
    "memory": 6,
    "chunk_size": 16,
}
"""Another value of each field of a codec that learns nothing; frames must differ."""
OTHER = {"EdenSettings.unbiased": "no", "EdenSettings.levels": "fixed"}


def codecs() -> Iterator[type[CodecSettings]]:
    yield from get_args(get_args(CodecConfig)[0])


def learned(kind: type[CodecSettings]) -> bool:
    name = kind.model_fields["name"].default
    return name == "auto" or CODECS[name].learned


def fields_of(kind: type[Settings]) -> set[str]:
    return set(kind.model_fields) - {"name"}


ROWS: tuple[type[Settings], ...] = get_args(get_args(ActivationConfig)[0])
"""Settings of activation codecs."""
TABLES: list[type[Settings]] = [
    *ROWS,
    *(method.config for method in METHODS.values()),
    TgapConfig,
    AggregationSettings,
    PlannerSettings,
    PartsConfig,
    TrainConfig,
    LoraSettings,
]
UNFITTED = sorted(
    f"{kind.__name__}.{name}"
    for kind in codecs()
    if not learned(kind)
    for name in fields_of(kind) - SHARED
)
WANTED = (
    {f"{kind.__name__}.{name}" for kind in TABLES for name in fields_of(kind)}
    | {f"CodecSettings.{name}" for name in SHARED - {"name"}}
    | set(UNFITTED)
)
PLACES = dict.fromkeys((kind.__name__ for kind in ROWS), "method.hidden") | {
    "TrainConfig": "train",
    "LoraSettings": "lora",
    "TgapConfig": "method.tgap",
    "AggregationSettings": "method.aggregation",
    "PlannerSettings": "method.planner",
    "PartsConfig": "method.parts",
}


def changed(table: Table, field: str, value: Any) -> Table:
    """`table` with another value of `field`, a class and its field."""
    kind, name = field.split(".")
    default = "codec" if kind.endswith("Settings") else "method"
    place = PLACES.get(kind, default).split(".")
    change: Any = {name: value}
    for key in reversed(place):
        change = {key: change}

    base = {"method": {"name": "fedavg"}} | table
    return merge(base, change)


_outcomes: dict[str, str] = {}


def outcome(table: Table, folder: Path) -> str:
    """Everything that a setting may change, but time and memory; a run of many cases runs once."""
    key = json.dumps(table, sort_keys=True)
    if key not in _outcomes:
        _outcomes[key] = measured(table, folder)

    return _outcomes[key]


def measured(table: Table, folder: Path) -> str:
    result = run_table(table, folder)
    records = [
        {
            key: value
            for key, value in record.items()
            if key not in ("seconds", "times", "predicted")
        }
        for record in RunFolder(folder).metrics()
    ]
    kept = ("adapter_sha256", "model_sha256", "bytes", "heldout", "setup", "samples")
    rows = plan(parse(table, "test"))["rows"]
    return json.dumps([{key: result[key] for key in kept}, records, rows], sort_keys=True)


def check_effect(field: str, case: tuple[Table, Any], usual: Table, folder: Path) -> None:
    extra, value = case
    base = with_fitting_model(
        unmeasured({key: value for key, value in (usual | extra).items() if value is not None})
    )
    assert outcome(base, folder / "base") != outcome(
        changed(base, field, value), folder / "changed"
    )


LONG = (
    "EcoLoraConfig",
    "FedPipeConfig",
    "FlGlmConfig",
    "FlascConfig",
    "Int4RowsSettings",
    "PartsConfig",
    "PlannerSettings",
    "TopKRowsSettings",
)
"""Classes whose fields need runs of seconds."""
LONG_METHODS = frozenset(METHODS) - {"fedavg", "fedcybgd"}
"""Methods with which settings that all share are measured by `make test-slow`."""


def marked(value: Any, slow: bool) -> Any:
    """Return a parameter of a test, which is slow or not."""
    return pytest.param(*value, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("field", [marked([field], field.split(".")[0] in LONG) for field in QUICK])
def test_a_setting_has_an_effect(field: str, run_config: Table, tmp_path: Path) -> None:
    check_effect(field, QUICK[field], run_config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("field", SLOW)
def test_a_setting_of_a_long_run_has_an_effect(
    field: str, run_config: Table, tmp_path: Path
) -> None:
    check_effect(field, SLOW[field], run_config, tmp_path)


@pytest.mark.parametrize("field", UNFITTED)
def test_a_setting_of_a_codec_changes_its_frames(field: str) -> None:
    kind, name = field.split(".")
    (settings,) = (each for each in codecs() if each.__name__ == kind)
    codec = settings.model_fields["name"].default
    draw = torch.Generator().manual_seed(1)
    update = {name: torch.randn(shape, generator=draw) for name, shape in LAYOUT.shapes}
    usual: Table = {"name": codec} | ({"rate": 30.0} if "rate" in settings.model_fields else {})
    other = read_settings(usual | {name: OTHER.get(field, FRAMES[name])})
    assert build(read_settings(usual), LAYOUT).encode(update) != build(other, LAYOUT).encode(update)


def test_every_field_has_a_row() -> None:
    rows = {*QUICK, *SLOW, *ELSEWHERE, *UNFITTED}
    assert WANTED - rows == set()


@pytest.mark.parametrize("field", sorted(ELSEWHERE))
def test_the_other_tests_are_there(field: str) -> None:
    name = field.split(".")[1]
    assert name in (Path(__file__).parents[2] / ELSEWHERE[field]).read_text("utf-8")


REFUSED: dict[str, tuple[Table, str]] = {
    "an adapter that no part has": (
        {"method": {"name": "flglm", "parts": dict.fromkeys(("front", "middle", "back"), "full")}},
        "lora: without effect, because no part of the model has an adapter",
    ),
    "an adapter beside frozen and whole parts": (
        {
            "method": {
                "name": "flglm",
                "parts": {"front": "frozen", "middle": "full", "back": "frozen"},
            }
        },
        "lora: without effect, because no part of the model has an adapter",
    ),
    "weights of the run where every part has its own": (
        {
            "tune": "full",
            "method": {
                "name": "flglm",
                "parts": dict.fromkeys(("front", "middle", "back"), "lora"),
            },
        },
        "tune: without effect, because method.parts names every part",
    ),
    "no part that is tuned": (
        {
            "method": {
                "name": "flglm",
                "parts": dict.fromkeys(("front", "middle", "back"), "frozen"),
            }
        },
        "method.parts: nothing is left to tune",
    ),
    "epochs beside steps": (
        {"train": {"max_steps": 2, "num_train_epochs": 2.0}},
        "num_train_epochs: without effect beside max_steps",
    ),
    "Adam under SGD": (
        {"train": {"optim": "sgd", "adam_beta1": 0.5}},
        "adam_beta1: without effect under optim='sgd'",
    ),
    "decay without feedback": (
        {"codec": {"name": "int4", "feedback_decay": 0.5}},
        "codec.feedback_decay: without effect, because error_feedback is false",
    ),
    "weights of what loses nothing": (
        {"codec": {"name": "identity", "weighted": True}},
        "codec.weighted: without effect, because codec 'identity' loses nothing",
    ),
    "measures after the last round": (
        {"evaluate": {"every": 3}},
        "evaluate.every=3: without effect, because the run has 2 rounds",
    ),
    "deadline of a step that waits for nobody": (
        {"method": {"name": "flglm", "mode": "sequential", "step_deadline_s": 1.0}},
        "step_deadline_s: without effect unless mode='client-batch'",
    ),
    "memory of probes where there is one": (
        {"method": {"name": "fedpipe", "replan_every": 0, "score_decay": 0.1}},
        "score_decay: without effect at replan_every=0",
    ),
    "gain of a later plan where there is none": (
        {"method": {"name": "fedpipe", "replan_every": 0, "planner": {"hysteresis": 0.1}}},
        "planner.hysteresis: without effect at replan_every=0",
    ),
    "weights that privacy makes equal": (
        {
            "method": {
                "name": "cgfedllm",
                "privacy": {"placement": "update", "clip_norm": 1.0, "epsilon": 8.0},
            },
            "fleet": {"max_weight_share": 0.5},
        },
        "fleet.max_weight_share: without effect, because method 'cgfedllm'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_without_effect_is_refused(name: str, run_config: Table) -> None:
    change, text = REFUSED[name]
    with pytest.raises(ConfigError, match=text):
        parse(merge(run_config, change), "test")


@pytest.mark.parametrize("refit", ["decoded", "broadcast"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"rounds": 2},
            "refit_every=2: refits the codec in no round, because the run has 2 rounds",
        ),
        ({"rounds": 3}, ""),
        ({"codec": {"name": "vq", "rate": 16}}, "codec 'vq' cannot be refitted"),
    ],
)
def test_a_refit_that_never_happens_is_refused(
    change: Table, text: str, refit: str, run_config: Table
) -> None:
    for name in ("fedavg", "cgfedllm"):
        tgap = {"rounds": 2, "source": "public", "refit": refit, "refit_every": 2}
        table = run_config | {"rounds": 3, "method": {"name": name, "tgap": tgap}, "codec": KLT}
        if not text:
            plan(parse(table | change, "test"))
            continue
        with pytest.raises(ConfigError, match=text):
            plan(parse(table | change, "test"))


# -- [downlink], [fleet] and [evaluate] under every method ----------------------------------------

LINE = {"up_mbit_s": 0.01, "down_mbit_s": 0.01, "rtt_ms": 100.0}
TWO_SITES = {"partition": {"by": "column", "column": "client", "largest": 2}}


@dataclass(frozen=True)
class Shared:
    """A setting that every method accepts with an effect, or refuses."""

    change: Table
    refusing: frozenset[str] = frozenset()
    """Methods that refuse it."""
    base: Table = field(default_factory=dict)
    """Further settings of both runs."""
    failing: int = 0
    """Attempts of round 1 that fail at one site."""


POOLING = frozenset(name for name, method in METHODS.items() if method.traits.pooled)
PLAIN_METHODS: dict[str, Table] = {
    **{name: {"method": {"name": name}, "tune": "lora"} for name in METHODS},
    "cgfedllm": {
        "method": {"name": "cgfedllm", "tgap": {"source": "none"}},
        "codec": {"name": "identity"},
    },
    "local": {"method": {"name": "local"}, "evaluate": {}},
    "fedsa": SETTINGS["fedsa"],
    "ecolora": {"method": {"name": "ecolora", "segments": 1}},
    "fedpipe": SETTINGS["fedpipe"],
}
LOCAL = frozenset({"local", "fedsa"})
"""Methods that write no model."""
FLOAT_BASES = frozenset(name for name in METHODS if not METHODS[name].traits.quantised)
SHARED_SETTINGS: dict[str, Shared] = {
    "downlink.name": Shared(
        {"downlink": {"name": "int8"}},
        frozenset(METHODS) - {"fedavg", "cgfedllm", "fedpipe", "fedsa", "fedsb"},
    ),
    "downlink.feedback_decay": Shared(
        {"downlink": {"feedback_decay": 0.5}},
        frozenset(METHODS),
        base={"downlink": {"name": "int8"}},
    ),
    "fleet.max_update_growth": Shared(
        {"fleet": {"max_update_growth": 1.0001}},
        frozenset({"local", "central", "flglm"}),
        base={"fleet": {"on_failure": "skip"}},
    ),
    "fleet.max_weight_share": Shared(
        {"fleet": {"max_weight_share": 0.5}},
        frozenset({"local", "central", "central_cyclic", "fedcybgd", "flglm"}),
        base={"data": TWO_SITES},
    ),
    "fleet.line": Shared({"fleet": {"line": LINE}}, POOLING),
    "fleet.on_failure": Shared({"fleet": {"on_failure": "skip"}}, failing=1),
    "fleet.quorum": Shared(
        {"fleet": {"quorum": 1.0}}, POOLING, base={"fleet": {"on_failure": "skip"}}, failing=1
    ),
    "fleet.retries": Shared(
        {"fleet": {"retries": 1}}, base={"fleet": {"on_failure": "retry"}}, failing=2
    ),
    "model.quantization": Shared({"model": {"quantization": "nf4"}}, FLOAT_BASES),
    "model.layer_quantization": Shared(
        {"model": {"layer_quantization": {"int8": [0]}}}, FLOAT_BASES
    ),
    "model.quantization_correction": Shared(
        {"model": {"quantization_correction": 2}},
        FLOAT_BASES,
        base={"model": {"quantization": "nf4"}},
    ),
    "evaluate.every": Shared({"evaluate": {"every": 1}}),
    "evaluate.sample_prompt": Shared({"evaluate": {"sample_prompt": "the river"}}, LOCAL),
    "evaluate.sample_tokens": Shared({"evaluate": {"sample_tokens": 3}}, LOCAL),
}
"""Settings of tables that all methods share. Those about machines and time (deadline_s,
join_timeout_s, sites, threads, workers) are measured in tests/unit/federation and tests/flower."""


def fail_in_round_1(name: str, attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first attempts of one site fail in round 1 of the next run."""
    tasks = METHODS[name].tasks
    task = next(key for key in tasks if key in ("train", "visit"))
    whole = tasks[task]
    left = [attempts]

    def flaky(site: Site, message: Payload) -> Any:
        if site.name in ("north", POOLED) and message.values["round"] == 1 and left[0]:
            left[0] -= 1
            raise RuntimeError("power cut")
        return whole(site, message)

    monkeypatch.setitem(cast(dict[str, Task], tasks), task, flaky)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        marked([name, setting], name in LONG_METHODS - shared.refusing)
        for name in METHODS
        for setting, shared in SHARED_SETTINGS.items()
    ],
)
def test_a_shared_setting_has_an_effect_or_is_refused(
    name: str, setting: str, run_config: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting.startswith("model."):
        pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    case = SHARED_SETTINGS[setting]
    base = merge(with_fitting_model(unmeasured(run_config | PLAIN_METHODS[name])), case.base)
    if name == "fedpipe" and case.base.get("data") == TWO_SITES:  # a budget of no site is refused
        base["method"] = base["method"] | {"budgets": base["method"]["budgets"][1:]}
    table, _ = setting.split(".")
    changed = base | {table: base.get(table, {}) | case.change[table]}

    if name in case.refusing:
        refusal = f"{table}.*without effect" if table == "downlink" else f"{setting}.*{name!r}"
        with pytest.raises(ConfigError, match=refusal):
            parse(changed, "test")
        return

    outcomes = []
    measure = measured if case.failing else outcome
    for number, each in enumerate((base, changed)):
        with monkeypatch.context() as patch:
            if case.failing:
                fail_in_round_1(name, case.failing, patch)
            try:
                text = measure(each, tmp_path / str(number))
            except ClientError as error:
                text = str(error).replace(str(tmp_path / str(number)), "")
            outcomes.append(re.sub(r"reference [0-9a-f]{8}", "", text))

    assert outcomes[0] != outcomes[1]


def test_visits_that_are_averaged_are_bounded_in_weight(run_config: Table, tmp_path: Path) -> None:
    method = {"name": "fedcybgd", "order": "pairs", "layers_per_block": 2}
    base = merge(run_config, {"method": method, "tune": "lora", "data": TWO_SITES})
    free = run_table(base, tmp_path / "free")
    bounded = run_table(base | {"fleet": {"max_weight_share": 0.5}}, tmp_path / "bounded")
    equal = merge(base, {"method": {"weighting": "equal"}})

    clipped = [record["clipped"] for record in RunFolder(tmp_path / "bounded").metrics()]
    assert [[row["site"] for row in rows] for rows in clipped] == [["west"], ["west"]]
    assert all(row["counted"] < row["weight"] for rows in clipped for row in rows)
    assert not any("clipped" in record for record in RunFolder(tmp_path / "free").metrics())
    assert bounded["adapter_sha256"] != free["adapter_sha256"]
    # Half of the weight of two sites each is the equal mean.
    assert bounded["adapter_sha256"] == run_table(equal, tmp_path / "equal")["adapter_sha256"]

    with pytest.raises(ConfigError, match=r"fleet\.max_weight_share: without effect"):
        parse(equal | {"fleet": {"max_weight_share": 0.5}}, "test")


def test_baselines_are_without_the_settings_that_they_refuse(run_config: Table) -> None:
    fleet = {"max_weight_share": 0.5, "max_update_growth": 5.0, "line": LINE, "deadline_s": 60.0}
    evaluate = {"sample_prompt": "the river", "every": 1}
    config = parse(run_config | {"fleet": fleet, "evaluate": evaluate}, "test")
    local = config.baseline("local")
    assert (local.fleet.max_weight_share, local.fleet.deadline_s) == (0.9, 60.0)
    assert (local.evaluate.sample_prompt, local.evaluate.every) == (None, 1)
    assert local.fleet.line is not None
    central = config.baseline("central")
    assert (central.fleet.line, central.evaluate.sample_prompt) == (None, "the river")
