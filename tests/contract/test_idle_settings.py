"""Every setting that cannot change a run is refused before it, with its place and the reason.

A row has a run in which the setting changes nothing, and a change of that run after which it is
accepted. What changes results where it is accepted is in `test_settings_have_effect`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import Example, SiteData
from fluvial.errors import ConfigError
from fluvial.methods.interface import Forecast, Plan
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import merge, parse
from fluvial.runs.idle import refuse_idle
from fluvial.runs.plan import plan
from fluvial.runs.run import execute
from fluvial.wire.tensors import Layout
from tests.support.models import with_fitting_model
from tests.support.runs import run_table

Table = dict[str, Any]


@dataclass(frozen=True)
class Idle:
    """A run with one setting that changes nothing, and what makes it change something."""

    setting: Table
    place: str
    why: str
    """Words of the refusal."""
    base: Table = field(default_factory=dict)
    """Further settings of the run."""
    otherwise: Table = field(default_factory=dict)
    """Settings beside which the same one is accepted."""


SHARE = {"fleet": {"max_weight_share": 0.6}}
GROWTH = {"fleet": {"max_update_growth": 3.0}}
COHORT_OF_ONE = {"method": {"name": "fedavg", "fraction": 0.34}}
ALL_SITES = {"method": {"fraction": 1.0}}
FEEDBACK = {"codec": {"name": "int8", "error_feedback": True}}
DECAY = {"codec": {"feedback_decay": 0.5}}
ECOLORA = {"method": {"name": "ecolora"}}
KLT = {"name": "klt", "rate": 8}
CYCLES = {"tune": "lora", "rounds": 2, "method": {"name": "fedcybgd", "order": "latin"}}
HIERARCHICAL = {"method": {"name": "flglm", "mode": "hierarchical"}}
PLAIN = {"name": "cgfedllm", "tgap": {"source": "none"}}
POOLED = {"method": {"name": "central"}}
PAIRS = {
    "data": {
        "form": "auto",
        "source": "PAIRS",
        "public_source": "PAIRS",
        "max_length": 32,
        "partition": {"by": "column", "column": "client"},
    }
}
"""Another form takes the place of the whole table."""
NO_RECORD = "which takes no records of the sites"

IDLE: dict[str, Idle] = {
    "share of a cohort of one": Idle(
        SHARE, "fleet.max_weight_share", "a round has 1 update,", COHORT_OF_ONE, ALL_SITES
    ),
    "share of segments": Idle(
        SHARE,
        "fleet.max_weight_share",
        "each of its 3 segments comes from one site of a cohort of 3",
        {"method": {"name": "ecolora", "segments": 3}},
        {"method": {"segments": 2}},
    ),
    "share of flasc's cohort of one": Idle(
        SHARE,
        "fleet.max_weight_share",
        "a round has 1 update,",
        {"method": {"name": "flasc", "fraction": 0.34}},
        ALL_SITES,
    ),
    "share of blocks": Idle(
        SHARE,
        "fleet.max_weight_share",
        "no two of 2 sites share one of 2 blocks",
        {
            "tune": "lora",
            "method": {"name": "fedcybgd", "order": "pairs"},
            "data": {"partition": {"largest": 2}},
        },
        {"method": {"layers_per_block": 2}},
    ),
    "merge of blocks that no two sites share": Idle(
        {"method": {"merge": "overwrite"}},
        "method.merge",
        "no two of 2 sites share one of 2 blocks",
        {
            "tune": "lora",
            "method": {"name": "fedcybgd"},
            "data": {"partition": {"largest": 2}},
        },
        {"method": {"layers_per_block": 2}},
    ),
    "growth of a cohort of two": Idle(
        GROWTH,
        "fleet.max_update_growth",
        "a round has 2 updates, and 3 or more are compared",
        {
            "method": {"name": "cgfedllm", "fraction": 0.67, "tgap": {"source": "none"}},
            "codec": {"name": "int8"},
        },
        ALL_SITES,
    ),
    "growth of a cohort of two before TGAP at sites": Idle(
        GROWTH,
        "fleet.max_update_growth",
        "a round has 2 updates",
        {"method": {"name": "fedavg", "fraction": 0.67}, "codec": KLT},
        {"method": {"tgap": {"source": "sites"}}},
    ),
    "growth of few visits": Idle(
        GROWTH,
        "fleet.max_update_growth",
        "the run has 3 visits, and an update is compared with 3 or more",
        CYCLES | {"rounds": 1},
        {"rounds": 2},
    ),
    "share of one site": Idle(
        {"method": {"fraction": 0.5}},
        "method.fraction",
        "there is one site",
        {"data": {"partition": {"largest": 1}}},
        {"data": {"partition": {"largest": 2}}},
    ),
    "feedback around identity": Idle(
        {"codec": {"error_feedback": True}},
        "codec.error_feedback",
        "codec 'identity' loses nothing",
        {"codec": {"name": "identity"}},
        {"codec": {"name": "int8"}},
    ),
    "feedback of one round": Idle(
        {"codec": {"error_feedback": True}},
        "codec.error_feedback",
        "no site codes the same tensors twice in 1 round",
        {"codec": {"name": "int8"}, "rounds": 1},
        {"rounds": 2},
    ),
    "feedback of a block": Idle(
        {"codec": {"error_feedback": True}},
        "codec.error_feedback",
        "no site codes the same tensors twice in 2 rounds",
        CYCLES | {"codec": {"name": "int8"}},
        {"rounds": 3},
    ),
    "decay without absence": Idle(
        DECAY,
        "codec.feedback_decay",
        "every site answers in every round",
        FEEDBACK,
        {"fleet": {"on_failure": "skip"}},
    ),
    "decay where none is drawn": Idle(
        DECAY,
        "codec.feedback_decay",
        "every site answers in every round",
        FEEDBACK,
        {"method": {"fraction": 0.67}},
    ),
    "schedule of one step": Idle(
        {"train": {"lr_scheduler_type": "cosine"}},
        "train.lr_scheduler_type",
        "no site takes more than one optimizer step",
        {"train": {"max_steps": 1}},
        {"train": {"max_steps": 2}},
    ),
    "warm-up of one step": Idle(
        {"train": {"warmup_ratio": 0.1}},
        "train.warmup_ratio",
        "no site takes more than one optimizer step",
        {"train": {"max_steps": 1}},
        {"compare": ["central"]},
    ),
    "schedule of one large batch": Idle(
        {"train": {"lr_scheduler_type": "cosine"}},
        "train.lr_scheduler_type",
        "no site takes more than one optimizer step",
        {"train": {"max_steps": None, "per_device_train_batch_size": 1000}},
        {"train": {"per_device_train_batch_size": 2}},
    ),
    "rate of equal shares": Idle(
        {"method": {"gamma_a": 3.0}},
        "method.gamma_a",
        "most and least_a are the same share",
        {"rounds": 3, "method": {"name": "ecolora", "most": 1.0, "least_a": 1.0, "least_b": 1.0}},
        {"method": {"least_a": 0.5}},
    ),
    "least share that never falls": Idle(
        {"method": {"least_b": 0.3}},
        "method.least_b",
        "under gamma_b=0",
        {"rounds": 3, "method": {"name": "ecolora", "gamma_b": 0.0}},
        {"method": {"gamma_b": 1.0}},
    ),
    "deadline of a step of one site": Idle(
        {"method": {"step_deadline_s": 3.0}},
        "method.step_deadline_s",
        "a step has one site only",
        {"method": {"name": "flglm", "fraction": 0.34}},
        ALL_SITES,
    ),
    "deadline of a step beyond that of a site": Idle(
        {"method": {"step_deadline_s": 3.0}},
        "method.step_deadline_s",
        "a site has failed before, by fleet.deadline_s=2",
        {"method": {"name": "flglm"}, "fleet": {"deadline_s": 2.0}},
        {"fleet": {"deadline_s": 4.0}},
    ),
    "micro-batches in flight of a step that is one": Idle(
        {"method": {"in_flight": 1}},
        "method.in_flight",
        "a step has one micro-batch",
        {"method": {"name": "flglm"}},
        {"train": {"gradient_accumulation_steps": 2}},
    ),
    "more micro-batches in flight than a step has": Idle(
        {"method": {"in_flight": 3}},
        "method.in_flight",
        "a step has at most 2 micro-batches",
        {"method": {"name": "flglm"}, "train": {"gradient_accumulation_steps": 2}},
        {"train": {"gradient_accumulation_steps": 3}},
    ),
    "averages after more steps than there are": Idle(
        {"method": {"sync_steps": 3}},
        "method.sync_steps",
        "no site makes more than 2 steps in a round",
        HIERARCHICAL | {"train": {"max_steps": 2}},
        {"train": {"max_steps": 3}},
    ),
    "averages after more steps than sites have sequences": Idle(
        {"method": {"sync_steps": 2}},
        "method.sync_steps",
        "no site makes more than 1 step in a round",
        HIERARCHICAL | {"train": {"max_steps": None, "per_device_train_batch_size": 1000}},
        {"train": {"per_device_train_batch_size": 2}},
    ),
    "D1 of public text": Idle(
        {"method": {"tgap": {"share": 0.5}}},
        "method.tgap.share",
        NO_RECORD,
        {"method": {"name": "fedavg", "tgap": {"source": "public"}}, "codec": KLT},
        {"method": {"tgap": {"source": "sites"}}},
    ),
    "simulated sites where sites train": Idle(
        {"method": {"tgap": {"simulated_sites": 3}}},
        "method.tgap.simulated_sites",
        "source='sites', which simulates none",
        {"method": {"name": "cgfedllm", "tgap": {"source": "sites"}}, "codec": KLT},
        {"method": {"tgap": {"source": "public"}}},
    ),
    "rounds of no pre-training": Idle(
        {"method": {"tgap": {"rounds": 4}}},
        "method.tgap.rounds",
        "source='none', which has no pre-training",
        {"method": PLAIN, "codec": {"name": "int8"}},
        {"method": {"tgap": {"source": "public"}}},
    ),
    "gate without measures": Idle(
        {"method": {"gate": "report"}},
        "method.gate",
        "tgap.source='none', which measures nothing",
        {"method": PLAIN, "codec": {"name": "int8"}},
        {"method": {"tgap": {"source": "public"}}},
    ),
    "gate of an unbiased codec": Idle(
        {"method": {"gate": "report"}},
        "method.gate",
        "codec 'eden' has no bias",
        {"method": {"name": "cgfedllm"}, "codec": {"name": "eden"}},
        {"codec": {"name": "int4"}},
    ),
    **{
        f"{name} of pooled data": Idle(
            {"fleet": {name: value}},
            f"fleet.{name}",
            "method 'central' has all data at one place",
            POOLED,
            {"method": {"name": "fedavg"}},
        )
        for name, value in {"workers": 1, "sites": ["north"], "join_timeout_s": 5.0}.items()
    },
    "split of a folder": Idle({"data": {"split": "test"}}, "data.split", "has no splits"),
    "revision of a folder": Idle(
        {"model": {"revision": "main"}}, "model.revision", "is a local folder"
    ),
    "revision of the embedded model": Idle(
        {"model": {"revision": "main"}},
        "model.revision",
        "the embedded model has none",
        {"model": {"name_or_path": "embedded"}},
    ),
    "loss of plain text": Idle(
        {"data": {"loss_on": "all"}},
        "data.loss_on",
        "all records are plain text",
        {},
        PAIRS,
    ),
    "treatment of plain text": Idle(
        {"data": {"overlong": "drop"}},
        "data.overlong",
        "all records are plain text",
        {},
        PAIRS,
    ),
    "template of pairs": Idle(
        {"data": {"chat_template": "plain"}},
        "data.chat_template",
        "no record is a conversation",
        PAIRS,
        {"data": {"public_source": "CHATS"}},
    ),
    "answers of plain text": Idle(
        {"evaluate": {"max_new_tokens": 2}},
        "evaluate.max_new_tokens",
        "no held-out record has a question",
        {},
        PAIRS,
    ),
}

LATER: dict[str, Idle] = {
    "rate of a short run": Idle(
        {"method": {"gamma_b": 3.0}},
        "method.gamma_b",
        "the shares fall from round 3 on, and the run has 2",
        ECOLORA,
        {"rounds": 3},
    ),
    "least share of a short run": Idle(
        {"method": {"least_a": 0.3}},
        "method.least_a",
        "the shares fall from round 3 on",
        ECOLORA,
        {"method": {"most": 0.5}},
    ),
    "mixing of one round": Idle(
        {"method": {"mixing": "none"}},
        "method.mixing",
        "from round 2 on",
        ECOLORA | {"rounds": 1},
        {"rounds": 2},
    ),
    "growth of one round": Idle(
        {"method": {"max_growth": 5.0}},
        "method.max_growth",
        "the run has 1 round",
        {"rounds": 1, "method": PLAIN, "codec": {"name": "int8"}},
        {"rounds": 2},
    ),
}
"""Runs that are too short for a setting, which is a remark: they may be trials of longer ones."""


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    """Files of pairs and of conversations for three sites, by the words that stand for them."""
    pairs: list[Table] = [{"prompt": f"{n} and {n}?", "completion": f"{2 * n}"} for n in range(30)]
    chats: list[Table] = [
        {
            "messages": [
                {"role": "user", "content": pair["prompt"]},
                {"role": "assistant", "content": pair["completion"]},
            ]
        }
        for pair in pairs
    ]
    files = {}
    for name, records in (("PAIRS", pairs), ("CHATS", chats)):
        path = tmp_path / f"{name.lower()}.jsonl"
        named = [
            record | {"client": ("north", "south", "west")[number % 3]}
            for number, record in enumerate(records)
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in named))
        files[name] = str(path)

    return files


def merged(tables: list[Table], sources: dict[str, str]) -> Table:
    """Return tables over one another; a table or key that is None is left out."""
    table: Table = {}
    for other in tables:
        table = merge(table, other)

    return {
        key: {
            name: sources.get(value, value) if isinstance(value, str) else value
            for name, value in inner.items()
            if value is not None
        }
        if isinstance(inner, dict)
        else inner
        for key, inner in table.items()
        if inner
    }


@pytest.mark.parametrize("name", IDLE)
def test_a_setting_that_cannot_change_a_run_is_refused(
    name: str, run_config: Table, sources: dict[str, str]
) -> None:
    row = IDLE[name]
    usual = run_config | {"method": {"name": "fedavg"}}
    with pytest.raises(ConfigError) as refusal:
        plan(parse(with_fitting_model(merged([usual, row.base, row.setting], sources)), "test"))

    line = next(line for line in str(refusal.value).splitlines() if row.place in line)
    place, _, rest = line.removeprefix("test: ").partition(": ")
    assert place.partition("=")[0] == row.place
    assert "without effect" in rest
    assert row.why in rest
    assert "remove it" in rest
    plan(parse(with_fitting_model(merged([usual, row.base], sources)), "test"))


@pytest.mark.parametrize("name", [name for name in IDLE if IDLE[name].otherwise])
def test_the_same_setting_is_accepted_where_it_can(
    name: str, run_config: Table, sources: dict[str, str]
) -> None:
    row = IDLE[name]
    usual = run_config | {"method": {"name": "fedavg"}}
    table = merged([usual, row.base, row.otherwise, row.setting], sources)
    plan(parse(with_fitting_model(table), "test"))


@pytest.mark.parametrize("name", LATER)
def test_a_setting_of_later_rounds_is_a_remark(name: str, run_config: Table) -> None:
    row = LATER[name]
    usual = run_config | {"method": {"name": "fedavg"}}

    def remarks(*tables: Table) -> list[str]:
        notes = plan(parse(merged([usual, *tables], {}), "test"))["notes"]
        return [note for note in notes if note.startswith(f"{row.place}: without effect")]

    (remark,) = remarks(row.base, row.setting)
    assert row.why in remark
    assert not remarks(row.base)
    assert not remarks(row.base, row.otherwise, row.setting)


def test_a_warm_up_that_is_longer_than_a_round_is_a_remark(run_config: Table) -> None:
    def remarks(warmup: int) -> list[str]:
        train = {"train": {"max_steps": 4, "warmup_steps": warmup}}
        notes = plan(parse(merged([run_config, {"method": {"name": "fedavg"}}, train], {}), "test"))
        return [note for note in notes["notes"] if note.startswith("train.warmup_steps")]

    (remark,) = remarks(1000)
    assert "train.warmup_steps = 1,000: no site takes more than 4 optimizer steps" in remark
    assert "0.4% of train.learning_rate" in remark
    assert not remarks(4)


def test_one_step_has_a_constant_rate(run_config: Table) -> None:
    train = {"train": {"max_steps": 1, "lr_scheduler_type": "constant"}}
    plan(parse(merged([run_config, {"method": {"name": "fedavg"}}, train], {}), "test"))


def test_a_run_refuses_it_before_it_writes_anything(run_config: Table, tmp_path: Path) -> None:
    config = parse(run_config | {"evaluate": {"max_new_tokens": 2}}, "test")
    with pytest.raises(ConfigError, match=r"evaluate\.max_new_tokens: without effect"):
        list(execute(config, tmp_path / "run"))

    assert not (tmp_path / "run" / "config.json").exists()


def test_all_idle_settings_are_named_at_once(run_config: Table) -> None:
    table = (
        run_config
        | SHARE
        | ECOLORA
        | {
            "data": run_config["data"] | {"overlong": "drop"},
            "evaluate": {"max_new_tokens": 2},
        }
    )
    with pytest.raises(ConfigError) as refusal:
        plan(parse(table, "test"))

    places = [line.partition(": ")[0] for line in str(refusal.value).splitlines()]
    assert sorted(places) == ["data.overlong", "evaluate.max_new_tokens", "fleet.max_weight_share"]


def test_a_baseline_is_not_held_to_settings_of_the_method(
    run_config: Table, tmp_path: Path
) -> None:
    """Two sites: FedCyBGD compares visits of all rounds, and FedAvg's rounds have too few."""
    table = merge(
        run_config,
        {"tune": "lora", "method": {"name": "fedcybgd"}, "compare": ["fedavg"]}
        | GROWTH
        | {"data": {"partition": {"largest": 2}}},
    )
    result = run_table(table, tmp_path / "run")
    assert result["adapter_sha256"]
    assert len(RunFolder(tmp_path / "run" / "compare" / "fedavg").metrics()) == 2


def test_public_text_that_nothing_reads_is_a_remark(
    run_config: Table, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remark = "data.public_source: not used, because method 'fedavg' reads no public text"
    notes = plan(parse(run_config, "test"))["notes"]
    assert [note for note in notes if remark in note]
    run_table(run_config | {"rounds": 1}, tmp_path / "run")
    assert remark in caplog.text

    learned = run_config | {"codec": KLT}
    assert "public_source" not in str(plan(parse(learned, "test"))["notes"])
    without = {key: value for key, value in run_config["data"].items() if key != "public_source"}
    assert "public_source" not in str(plan(parse(run_config | {"data": without}, "test"))["notes"])


class NamesOnly:
    """Data of a deployment, of which the server knows the names."""

    names = ("north", "south", "west")
    sample_from = None

    def public(self) -> dict[str, list[Example]]:
        """Return no text."""
        return {}

    def sample(self) -> SiteData:
        """Return no sample."""
        raise AssertionError("nothing is shown")


def no_forecast() -> Forecast:
    """Predict nothing."""
    raise AssertionError("nothing is predicted")


def test_what_depends_on_records_is_not_refused_where_there_are_none(run_config: Table) -> None:
    table = run_config | {
        "evaluate": {"max_new_tokens": 2},
        "train": {"lr_scheduler_type": "cosine"},
    }
    planned = Plan(Layout((("weight", (2, 2)),)), forecast=no_forecast)
    refuse_idle(parse(table, "test"), planned, NamesOnly())

    one_step = table | {"train": {"lr_scheduler_type": "cosine", "max_steps": 1}}
    with pytest.raises(ConfigError, match=r"train\.lr_scheduler_type: without effect"):
        refuse_idle(parse(one_step, "test"), planned, NamesOnly())
