"""Every field of every table of settings: a value is honoured or refused, in TOML's words, with its
place."""

import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from fluvial.errors import ConfigError
from fluvial.flower.server_operator import ServerFile
from fluvial.runs.config import RunConfig, load, parse
from fluvial.settings import Settings
from fluvial.site_process.site_file import SiteFile
from fluvial.storage import toml

WRONG: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "0": 0,
    "-1": -1,
    "-0.5": -0.5,
    "2.0": 2.0,
    "5e-324": 5e-324,
    "1e300": 1e300,
    "2**70": 2**70,
    "-(2**2000)": -(2**2000),
    "text": "2",
    "empty": "",
    "NUL": "a\0b",
    "true": True,
    "array": ("a", "a"),
    "table": {"a": 1},
}
PYTHON = re.compile(
    r"\b(tuple|dict|dictionary|NoneType|None|list|float|int|str|bool|valid)\b|True|False"
)
"""Words of Python, which are none of TOML's."""


def below(annotation: Any) -> set[type[Settings]]:
    """Every table of an annotation, and all tables in these."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return {annotation}.union(
            *(below(field.annotation) for field in annotation.model_fields.values())
        )

    return set().union(*map(below, get_args(annotation)))


CLASSES = set[type[Settings]]().union(*map(below, (RunConfig, SiteFile, ServerFile)))
FIELDS = {f"{kind.__name__}.{name}": (kind, name) for kind in CLASSES for name in kind.model_fields}


def required(kind: type[Settings]) -> dict[str, Any]:
    """A value for each field without a default."""
    usual = {
        "up_mbit_s": 1.0,
        "down_mbit_s": 1.0,
        "rtt_ms": 1.0,
        "placement": "update",
        "clip_norm": 1.0,
        "clip": 1.0,
        "multiplier": 1.0,
    }
    return {
        name: usual.get(name, "x")
        for name, field in kind.model_fields.items()
        if field.is_required()
    } | (
        {"epsilon": 1.0}
        if "epsilon" in kind.model_fields and "clip_norm" in kind.model_fields
        else {}
    )


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_a_value_is_honoured_or_refused_by_name(field: str) -> None:
    kind, name = FIELDS[field]
    for found in WRONG.values():
        text = _refusal(kind, name, found)
        if text is None:
            settings = toml.read(kind, required(kind) | {name: found}, "my.toml")
            held = getattr(settings, name)
            held = str(held) if isinstance(held, Path) else held
            assert held == found or isinstance(held, Settings)
            assert type(held) is type(found) or (type(found), type(held)) == (int, float)
            assert not isinstance(held, float) or abs(held) < 1e12  # finite, and within bounds
        else:
            faults = text.splitlines()
            assert all(line.startswith("my.toml: ") for line in faults)
            assert any(name in line for line in faults)
            assert not PYTHON.search(text.replace(toml.show(found), "")), text


def _refusal(kind: type[Settings], name: str, found: Any) -> str | None:
    try:
        toml.read(kind, required(kind) | {name: found}, "my.toml")
    except ConfigError as error:
        return str(error)

    return None


def test_all_faults_of_a_file_are_reported_at_once() -> None:
    table = {
        "ronds": 3,
        "rounds": "2",
        "seed": 2**80,
        "compare": "local",
        "model": {"name_or_path": ""},
        "lora": {"target_modules": ["q_proj", "q_proj"], "lora_alpha": 1e300},
        "data": {"max_length": 10**9, "partition": {"by": "iid", "sites": 0}},
        "train": {"learning_rate": 1e6, "bf16": 1},
        "codec": {"name": "trellis", "rate": 0.5},
        "downlink": {"name": "klt", "error_feedback": True, "weighted": True},
        "fleet": {"workers": 0, "quorum": 0.7, "retries": 3},
    }
    with pytest.raises(ConfigError) as caught:
        parse(table, "my.toml")
    lines = [line.removeprefix("my.toml: ") for line in str(caught.value).splitlines()]
    begins = [
        "ronds: unknown key; did you mean 'rounds'?",
        'rounds = "2": must be an integer from 1 to 1000000; write 2 without quotes',
        "seed = an integer of 81 bits: must be an integer from 0 to 2147483647",
        'compare = "local": must be an array of strings among "local", "central", "fedavg"; '
        'write ["local"]',
        'model.name_or_path = "": the string is empty',
        'lora.target_modules = ["q_proj", "q_proj"]: \'q_proj\' is listed twice',
        "lora.lora_alpha = 1e+300: must be a number from",
        "data.max_length = 1000000000: must be an integer from",
        "data.partition.sites = 0: must be an integer from 1",
        "train.learning_rate = 1000000.0: must be a number from",
        "train.bf16 = 1: must be true or false",
        "codec.rate = 0.5: must be a number from 1 to",
        "downlink.name='klt' must be learned",
        "downlink.error_feedback: the downlink always",
        "downlink.weighted: only the uplink",
        'fleet.workers = 0: must be an integer from 1 to 1024 or "auto"',
        "fleet.quorum: without effect under on_failure='stop'",
        "fleet.retries: without effect",
    ]
    for begin in begins:
        assert any(line.startswith(begin) for line in lines), begin
    assert len(lines) == len(begins)


def test_a_fault_that_another_one_causes_is_not_told() -> None:
    table = {
        "method": {
            "name": "cgfedllm",
            "privacy": {"placement": "update", "clip_norm": 1.0, "epsilon": "2"},
        }
    }
    with pytest.raises(ConfigError) as caught:
        parse(table, "my.toml")
    assert "epsilon" in str(caught.value)
    assert "exactly one" not in str(caught.value)  # epsilon stands there, if wrongly


@pytest.mark.parametrize(
    "line", ['train.learning_rate="1e-3"', "train.bf16=1", "fleet.workers=2.0", "seed=-1"]
)
def test_an_override_is_held_to_the_same_rules(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text("rounds = 2\n")
    with pytest.raises(ConfigError, match="must be"):
        load(file, [line])


def test_a_configuration_survives_json() -> None:
    """A run's configuration reaches a site as JSON, where arrays are lists and whole floats are
    floats."""
    table = {
        "compare": ["local"],
        "method": {"name": "cgfedllm"},
        "codec": {"name": "resnet", "betas": [0, 0.5]},
    }
    config = parse(table, "test")
    assert parse(json.loads(json.dumps(config.resolved())), "run") == parse(
        config.resolved(), "test"
    )
    assert parse(json.loads(json.dumps(config.resolved())), "run").resolved() == config.resolved()
