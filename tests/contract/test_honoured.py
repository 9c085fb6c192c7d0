"""Every method honours a setting, with an effect on bytes or weights, or refuses it; `check`
predicts what is sent."""

from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import ConfigError
from fluvial.methods import METHODS
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from tests.contract.test_methods import SETTINGS
from tests.support.models import with_fitting_model
from tests.support.runs import run_table

CHANGES: dict[str, dict[str, Any]] = {
    "weighted": {"codec": {"name": "int4", "weighted": True}},
    "error_feedback": {"codec": {"name": "int4", "error_feedback": True}},
    "downlink": {"downlink": {"name": "int8"}},
}
PLAIN: dict[str, dict[str, Any]] = {
    "weighted": {"codec": {"name": "int4"}},
    "error_feedback": {"codec": {"name": "int4"}},
    "downlink": {},
}
HONOURED = {
    "fedavg": {"weighted", "error_feedback", "downlink"},
    "cgfedllm": {"weighted", "error_feedback", "downlink"},
    "fedcybgd": {"error_feedback"},
    "fedsa": {"error_feedback", "downlink"},
    "fedsb": {"error_feedback", "downlink"},
    "flasc": set(),
    "ecolora": set(),
    "flglm": set(),
    "fedpipe": {"weighted", "error_feedback", "downlink"},
    "local": set(),
    "central": set(),
    "central_cyclic": set(),
}
"""What each method honours; the others must be refused."""


ENVELOPE = 120
"""Bytes of a message around its frames, at most: the names and values of a payload."""


def accepted(table: dict[str, Any]) -> bool:
    try:
        plan(parse(table, "test"))
    except ConfigError:
        return False

    return True


@pytest.mark.parametrize("setting", CHANGES)
@pytest.mark.parametrize("name", METHODS)
def test_a_setting_has_an_effect_or_is_refused(
    name: str, setting: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    usual = {
        key: value
        for key, value in SETTINGS.get(name, {}).items()
        if key != "codec" or setting == "downlink"
    }
    base = with_fitting_model(run_config | {"method": {"name": name}, "tune": "lora"} | usual)
    if name == "fedcybgd":  # a site codes the same block in both rounds
        base["method"] = {"name": name, "order": "ascending"}
    if name == "cgfedllm":
        base["method"] = {"name": name, "gate": "report", "tgap": {"rounds": 2}}

    assert accepted(base | CHANGES[setting]) == (setting in HONOURED[name])
    if setting not in HONOURED[name]:
        return

    plain = run_table(base | PLAIN[setting], tmp_path / "plain")
    changed = run_table(base | CHANGES[setting], tmp_path / "changed")
    same_weights = plain["adapter_sha256"] == changed["adapter_sha256"]
    assert not (same_weights and plain["bytes"] == changed["bytes"])


@pytest.mark.parametrize("change", [{}, *CHANGES.values()], ids=["plain", *CHANGES])
def test_check_predicts_the_bytes_of_a_run(
    change: dict[str, Any], run_config: dict[str, Any], tmp_path: Path
) -> None:
    table = run_config | change
    predicted = plan(parse(table, "test"))
    rows = {
        row["what"]: int(row["value"].split()[0].replace(",", ""))
        for row in predicted["rows"]
        if " B " in row["value"]
    }
    sent = run_table(table, tmp_path / "run")["bytes"]["by_kind"]

    messages = table["rounds"] * len(predicted["sites"])

    for way in ("up", "down"):
        frames = rows[f"{way}, whole run"]
        envelopes = sent[f"{way} train"] - frames
        assert 0 < envelopes <= ENVELOPE * messages
