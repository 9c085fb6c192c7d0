"""Every setting that is accepted has an effect, or is refused where it has none.

`CASES` has a row for each field of every method, codec, [train] and [lora]; a field without a row
fails. A row changes one field of a run to another valid value; weights, bytes, metrics, set-up or
predicted rows must differ. Codecs that learn, and methods whose runs are long, are `slow`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from fluvial.codecs import CODECS, CodecConfig, build, read_settings
from fluvial.codecs.base import CodecSettings
from fluvial.errors import ConfigError
from fluvial.exchange import TgapConfig
from fluvial.methods import METHODS
from fluvial.models.targets import LoraSettings
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import merge, parse
from fluvial.runs.plan import plan
from fluvial.settings import Settings
from fluvial.training.train import TrainConfig
from fluvial.wire.tensors import Layout
from tests.support.runs import run_table

Table = dict[str, Any]
SHARED = set(CodecSettings.model_fields)
LAYOUT = Layout((("a.lora_A.weight", (8, 96)), ("a.lora_B.weight", (96, 8))))

FRACTION = 0.4
QUICK: dict[str, tuple[Table, Any]] = {
    "FedAvgConfig.fraction": ({}, FRACTION),
    "FedAvgConfig.factors": ({}, "B"),
    "FedAvgConfig.server_learning_rate": ({}, 1.5),
    "CentralConfig.factors": ({"method": {"name": "central"}}, "B"),
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
            "least_a": 0.3,
            "least_b": 0.2,
            "mixing": "none",
            "beta": 0.1,
            "values": "fp32",
        }.items()
    },
    **{
        f"EcoLoraConfig.{name}": ({"rounds": 4, "method": {"name": "ecolora"}}, 50.0)
        for name in ("gamma_a", "gamma_b")
    },
    **{
        f"TrainConfig.{name}": ({}, value)
        for name, value in {
            "learning_rate": 2e-2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.5,
            "weight_decay": 1.0,
            "max_grad_norm": 0.01,
            "optim": "sgd",
            "adam_beta1": 0.5,
            "adam_beta2": 0.5,
            "adam_epsilon": 1e-2,
            "bf16": True,
        }.items()
    },
    "TrainConfig.num_train_epochs": (
        {"train": {"learning_rate": 1e-2, "per_device_train_batch_size": 4}},
        0.5,
    ),
    "LoraSettings.r": ({}, 2),
    "LoraSettings.lora_alpha": ({}, 4.0),
    "LoraSettings.lora_dropout": ({}, 0.5),
    "LoraSettings.target_modules": ({}, "all-linear"),
    "LoraSettings.use_rslora": ({}, True),
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
    "CgFedLlmConfig.representation": (LEARNS, "state"),
    "CgFedLlmConfig.tgap": (LEARNS, TGAP | {"share": 0.6}),
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
    "KltSettings.noise_ratio": (LEARNS, 0.01),
    "FedCyBgdConfig.order": (BLOCKS, "descending"),
    "FedCyBgdConfig.layers_per_block": (BLOCKS, 2),
    "FedCyBgdConfig.damping": (BLOCKS, 0.5),
    "FedCyBgdConfig.decay": (BLOCKS, "cosine"),
    "FedCyBgdConfig.download": (BLOCKS, {"form": "full"}),
    "FedCyBgdConfig.extra": (BLOCKS, ["embeddings"]),
    "FedCyBgdConfig.gate": (LOSSY, {"threshold": 0.01, "examples": 2}),
    "FedCyBgdConfig.accept": (CHECKED, {"on": "always"}),
}

ELSEWHERE = {
    "TrainConfig.gradient_checkpointing": "tests/oracle/test_train.py",
    "CgFedLlmConfig.gate": "tests/unit/methods/test_cgfedllm.py",
    "CgFedLlmConfig.max_growth": "tests/unit/methods/test_cgfedllm.py",
    "FedCyBgdConfig.parallel": "tests/oracle/test_fedcybgd.py",
    "FedCyBgdConfig.merge": "tests/oracle/test_fedcybgd.py",
    "FedCyBgdConfig.weighting": "tests/oracle/test_fedcybgd.py",
    "FedCyBgdConfig.hold": "tests/unit/methods/fedcybgd/test_visit.py",
    "CentralCyclicConfig.order": "tests/unit/methods/fedcybgd/test_schedules.py",
    "CentralCyclicConfig.extra": "tests/unit/methods/fedcybgd/test_blocks.py",
    "CentralCyclicConfig.layers_per_block": "tests/unit/methods/fedcybgd/test_blocks.py",
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


TABLES: list[type[Settings]] = [
    *(method.config for method in METHODS.values()),
    TgapConfig,
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
PLACES = {"TrainConfig": "train", "LoraSettings": "lora", "TgapConfig": "method.tgap"}


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


def outcome(table: Table, folder: Path) -> str:
    """Everything that a setting may change, but time and memory."""
    result = run_table(table, folder)
    records = [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in RunFolder(folder).metrics()
    ]
    kept = ("adapter_sha256", "model_sha256", "bytes", "heldout", "setup")
    rows = plan(parse(table, "test"))["rows"]
    return json.dumps([{key: result[key] for key in kept}, records, rows], sort_keys=True)


def check_effect(field: str, case: tuple[Table, Any], usual: Table, folder: Path) -> None:
    extra, value = case
    base = {key: value for key, value in (usual | extra).items() if value is not None}
    assert outcome(base, folder / "base") != outcome(
        changed(base, field, value), folder / "changed"
    )


@pytest.mark.parametrize("field", QUICK)
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
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_without_effect_is_refused(name: str, run_config: Table) -> None:
    change, text = REFUSED[name]
    with pytest.raises(ConfigError, match=text):
        parse(merge(run_config, change), "test")
