"""`fluvial check` predicts the bytes of every method: a run sends them, with all that is around."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import SiteTexts
from fluvial.methods import METHODS
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.places import Places
from fluvial.methods.flglm.traffic import conversations
from fluvial.methods.interface import Plan
from fluvial.methods.traffic import Bytes, Traffic
from fluvial.models.loading import meta_base
from fluvial.models.outline import Outline
from fluvial.models.tokenizers import load_tokenizer
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import given
from fluvial.runs.plan import plan
from tests.contract.test_methods import SETTINGS
from tests.support.models import with_fitting_model
from tests.support.runs import run_table

SITES = 3
DIGITS = 60
"""Bytes by which an exact message may vary: digits of loss and sample count."""

FEDAVG: dict[str, dict[str, Any]] = {
    "identity": {},
    "int8": {"codec": {"name": "int8"}},
    "int4 with feedback": {"codec": {"name": "int4", "error_feedback": True}},
    "top_k": {"codec": {"name": "top_k"}},
    "trellis": {"codec": {"name": "trellis"}},
    "B alone": {"method": {"name": "fedavg", "factors": "B"}},
    "svd": {"method": {"name": "fedavg", "aggregation": {"mode": "svd"}}},
    "stack": {"method": {"name": "fedavg", "aggregation": {"mode": "stack"}}},
    "residual, int8 downlink": {
        "method": {"name": "fedavg", "aggregation": {"mode": "residual", "residual_rank": 3}},
        "downlink": {"name": "int8"},
    },
    "int8 downlink": {"downlink": {"name": "int8"}},
    "trellis downlink": {"downlink": {"name": "trellis"}},
}
OTHERS: dict[str, dict[str, Any]] = {
    "fedsa": SETTINGS["fedsa"],
    "fedsa, int4 and int8 downlink": SETTINGS["fedsa"]
    | {"codec": {"name": "int4"}, "downlink": {"name": "int8"}},
    "fedsb": {"method": {"name": "fedsb"}},
    "flasc": {"method": {"name": "flasc"}},
    "flasc of weights": {
        "method": {"name": "flasc", "download": "weights", "density_down": 1.0, "values": "fp32"}
    },
    "ecolora": {"method": {"name": "ecolora"}},
    "ecolora, 2 segments": {"method": {"name": "ecolora", "segments": 2, "values": "bf16"}},
    "fedcybgd": {"method": {"name": "fedcybgd"}, "tune": "lora"},
    "fedcybgd, exact": {
        "method": {"name": "fedcybgd"},
        "tune": "lora",
        "codec": {"name": "identity"},
    },
    "local": SETTINGS["local"],
    "central": {"method": {"name": "central"}},
    "central_cyclic": {"method": {"name": "central_cyclic"}, "tune": "lora"},
    "cgfedllm": SETTINGS["cgfedllm"],
    "fedpipe": SETTINGS["fedpipe"],
    "fedpipe, int4 with feedback": SETTINGS["fedpipe"]
    | {"codec": {"name": "int4", "error_feedback": True}},
    **{
        f"fedpipe, {mode}": {
            "method": SETTINGS["fedpipe"]["method"]
            | {"aggregation": {"mode": mode}, "factors": "B" if mode == "ffa" else "A and B"}
        }
        for mode in ("ffa", "residual", "stack")
    },
    "fedpipe, int8 downlink": SETTINGS["fedpipe"] | {"downlink": {"name": "int8"}},
    "flglm": {"method": {"name": "flglm"}},
    "flglm, own ends": {"method": {"name": "flglm", "ends": "own", "hidden": {"name": "int8"}}},
    "flglm, one by one": {
        "method": {"name": "flglm", "mode": "sequential", "parts": {"front": "frozen"}}
    },
    "flglm, replicas": {"method": {"name": "flglm", "mode": "hierarchical", "sync_steps": 2}},
    "flglm, cached front": {
        "method": {"name": "flglm", "parts": {"front": "frozen"}, "hidden": {"name": "int8"}}
    },
    "flglm, cached front without room for all": {
        "method": {
            "name": "flglm",
            "mode": "hierarchical",
            "parts": {"front": "frozen"},
            "memory_bytes": 20_000,
            "fraction": 0.67,
        }
    },
    "flglm, changes": {
        "method": {"name": "flglm", "hidden": {"name": "int4"}, "recurring": "changes"}
    },
    "flglm, cached front and changes": {
        "method": {
            "name": "flglm",
            "parts": {"front": "frozen"},
            "recurring": "changes",
            "hidden": {"name": "int4"},
            "mode": "sequential",
            "memory_bytes": 40_000,
        }
    },
    "flglm, tuned back": {
        "method": {"name": "flglm", "parts": {"front": "frozen", "middle": "frozen"}}
    },
    "flglm, embedding and head": {"method": {"name": "flglm", "front": 0, "back": 0}},
    "flglm, all weights of the back": {
        "method": {
            "name": "flglm",
            "mode": "hierarchical",
            "sync_steps": 2,
            "parts": {"front": "frozen", "back": "full"},
        }
    },
    "flglm, own weights at the ends": {
        "method": {"name": "flglm", "ends": "own", "parts": {"front": "full", "back": "full"}},
    },
    "flglm, all weights of the middle": {
        "method": {"name": "flglm", "mode": "sequential", "parts": {"middle": "full"}},
    },
    "flglm, all weights": {"tune": "full", "method": {"name": "flglm", "mode": "hierarchical"}},
}
CASES = FEDAVG | OTHERS


def table_of(run_config: dict[str, Any], name: str) -> dict[str, Any]:
    table = with_fitting_model(run_config | CASES[name])
    if table.get("tune") == "full":
        return {key: value for key, value in table.items() if key != "lora"}
    return table


def planned(config: RunConfig) -> Plan:
    base = meta_base(config.model)
    layout = Outline(config.model, config.adapter).assignment.layout
    return config.entry.plan(config.method, given(config, layout, base, SITES, texts_of(config)))


def texts_of(config: RunConfig) -> SiteTexts:
    return SiteTexts(config.data, load_tokenizer(config.model), seed=config.seed)


def rounds_of(result: dict[str, Any]) -> list[dict[str, dict[str, int]]]:
    """Bytes by site of each round."""
    return [record["bytes"] for record in RunFolder(Path(result["folder"])).metrics()]


def check_message(predicted: Bytes, sent: int) -> None:
    assert predicted.unknown or predicted.least <= sent <= predicted.most


@pytest.mark.parametrize("name", CASES)
def test_a_run_sends_what_was_predicted(
    name: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    table = table_of(run_config, name)
    config = parse(table, "test")
    forecast = planned(config).forecast()
    predict = forecast.traffic
    result = run_table(table, tmp_path / "run")
    rounds = rounds_of(result)
    assert len(rounds) == config.rounds
    own = config.method.name in ("fedpipe", "fedcybgd", "central_cyclic", "flglm")
    side = name in ("stack", "residual, int8 downlink")  # what is measured has no side path
    assert (forecast.measured is None) == (own or side)
    if forecast.measured is not None:
        evaluate = config.evaluate
        models = 1 + (config.rounds // evaluate.every if evaluate.every else 0)
        predicted = forecast.measured.bytes(models, evaluate.max_new_tokens)
        assert not predicted.unknown
        check_message(predicted, result["bytes"]["evaluate"] // result["sites"])
        assert predicted.most - predicted.least <= 2 * DIGITS * (models + 1)

    for number, sites in enumerate(rounds, 1):
        traffic = predict(number)
        assert sites
        for sent in sites.values():
            for way, predicted in (("up", traffic.up), ("down", traffic.down)):
                task = next(key for key in config.entry.tasks if key in ("train", "visit"))
                check_message(predicted, sent[f"{way} {task}"])

    if config.method.name == "flglm":
        check_conversations(config, rounds)


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_as_narrow_as_they_can_be(name: str, run_config: dict[str, Any]) -> None:
    """To the byte where it can be known; but for digits of an exact answer; 1 % where coded."""
    config = parse(table_of(run_config, name), "test")
    traffic: Traffic = planned(config).forecast().traffic(2)

    if name in ("identity", "B alone", "int8", "int4 with feedback", "top_k", "trellis", "central"):
        assert traffic.down.least == traffic.down.most
    if name in ("identity", "B alone", "int8", "central", "local"):
        assert traffic.up.most - traffic.up.least <= DIGITS
    if name in FEDAVG or name == "cgfedllm":
        for predicted in (traffic.up, traffic.down):
            middle = (predicted.least + predicted.most) / 2
            assert predicted.most - middle <= 0.01 * middle + DIGITS


def test_every_method_is_among_the_cases(run_config: dict[str, Any]) -> None:
    covered = {parse(table_of(run_config, name), "test").method.name for name in CASES}
    assert covered == set(METHODS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, " B"),
        ({"codec": {"name": "auto"}}, "not predicted: codec 'auto' is chosen by measurement"),
    ],
)
def test_check_shows_predictions_or_why_there_are_none(
    change: dict[str, Any], words: str, run_config: dict[str, Any]
) -> None:
    rows = {row["what"]: row["value"] for row in plan(parse(run_config | change, "test"))["rows"]}
    assert words in rows["up, one site in a round, with headers"]
    assert rows["down, one site in a round, with headers"].endswith(" B in round 1")
    held = "held-out measures, one site, whole run"
    assert rows[held].endswith(" B, both ways")
    blocks = parse(table_of(run_config, "fedcybgd"), "test")
    rows = {row["what"]: row["value"] for row in plan(blocks)["rows"]}
    assert rows[held] == "not predicted: method 'fedcybgd' sends them in its own way"


def check_conversations(config: RunConfig, rounds: Sequence[dict[str, dict[str, int]]]) -> None:
    """The lengths of all micro-batches follow from the seed; digits of numbers vary."""
    base = meta_base(config.model)
    layout = Outline(config.model, config.adapter).assignment.layout
    facts = given(config, layout, base, SITES, texts_of(config))
    assert isinstance(config.method, FlGlmConfig)
    places = Places.of(config.method, base, layout)

    for number, sites in enumerate(rounds, 1):
        predicted = conversations(config.method, facts, places, number)
        for site, sent in sites.items():
            each = predicted[site]
            check_message(each.up, sent["up train"])
            check_message(each.down, sent["down train"])
            for way in (each.up, each.down):
                assert way.most - way.least <= DIGITS * (each.turns + 1)
