"""Loading a configuration: good input is resolved, bad input is named with its place and a
remedy."""

from pathlib import Path

import pytest

from fluvial.errors import ConfigError
from fluvial.methods.fedavg import FedAvgConfig
from fluvial.runs.config import RunConfig, difference, load, parse
from tests.support import ROOT


def problem(table: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(table, "my.toml")
    return str(caught.value)


def test_quickstart_configuration_loads() -> None:
    config = load(ROOT / "configs" / "quickstart.toml")
    assert config.method.name == "cgfedllm"
    assert config.coding.name == "auto"
    assert config.downlink is not None
    assert config.compare == ("local", "central", "fedavg")
    assert config.data.source == "stdlib-keywords"


def test_defaults_are_the_papers_but_for_the_adapted_modules() -> None:
    config = parse({"method": {"name": "cgfedllm"}}, "x")
    assert config.coding.name == "resnet"
    assert (config.rounds, config.train.learning_rate) == (20, 1.5e-4)
    assert (config.lora.r, config.lora.alpha, config.lora.target_modules) == (8, 16, "all-linear")
    assert load(ROOT / "configs" / "cgfedllm-paper.toml").lora.target_modules == "attention"


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"ronds": 3}, "my.toml: ronds: unknown key; did you mean 'rounds'?"),
        (
            {"train": {"learnin_rate": 1e-3}},
            "train.learnin_rate: unknown key; did you mean 'learning_rate'?",
        ),
        ({"train": {"lr": 1e-3}}, "train.lr: unknown key; did you mean 'learning_rate'?"),
        ({"train": {"epochs": 3}}, "train.epochs: unknown key; did you mean 'num_train_epochs'?"),
        (
            {"method": {"name": "fedavgg"}},
            "method: unknown name \"fedavgg\"; did you mean 'fedavg'?",
        ),
        (
            {"method": {"name": "cgfedllm", "tgap": {"round": 4}}},
            "method.tgap.round: unknown key; did you mean 'rounds'?",
        ),
        (
            {"method": {"name": "fedcybgd", "decay": "cosine"}},
            "method.decay: no longer a setting; use train.round_scheduler_type",
        ),
        ({"codec": {"name": "ternary", "rat": 64}}, "codec.rat: unknown key; did you mean 'rate'?"),
        (
            {"codec": {"name": "int8", "rate": 64}},
            "codec.rate: codec 'int8' has no key 'rate'; remove it, or choose another codec that "
            "has it: top_k, ",
        ),
        ({"codec": "int8"}, 'codec = "int8": must be a table; write {name = "int8"}'),
        ({"codec": {"rate": 64}}, "codec: name is missing; choose one of identity, bf16"),
        (
            {"method": {"name": "fedcybgd", "download": {"form": "low-bit", "codec": "int8"}}},
            'method.download.codec = "int8": must be a table; write {name = "int8"}',
        ),
        ({"evaluate": 3}, "evaluate = 3: must be a table"),
        (
            {"fleet": {"workers": "all"}},
            'fleet.workers = "all": must be an integer from 1 to 1024 or "auto"',
        ),
        ({"data": {"columns": {"text": 3}}}, "data.columns.text = 3: must be a string"),
        ({"codec": {"name": "zip"}}, 'codec: unknown name "zip"; choose one of identity, bf16'),
        ({"rounds": 0}, "rounds = 0: must be an integer from 1 to 1000000"),
        ({"lora": {"r": "big"}}, 'lora.r = "big": must be an integer from 1 to 4096'),
        (
            {"data": {"source": "x.jsonl", "partition": {"by": "dirichlet"}}},
            "data.partition.column: missing",
        ),
        (
            {"method": {"name": "local"}, "codec": {"name": "int8"}},
            "codec: without effect, because method 'local'",
        ),
        ({"compare": ["fedavg"]}, "compare: 'fedavg' is the method itself"),
        (
            {"data": {"partition": {"by": "iid", "sites": 4}}},
            "data.partition: without effect, because source='stdlib'",
        ),
        ({"fleet": {"quorum": 0.7}}, "fleet.quorum: without effect under on_failure='stop'"),
        (
            {"method": {"name": "cgfedllm"}, "tune": "full"},
            "tune='full': method 'cgfedllm' tunes lora only",
        ),
        ({"tune": "full", "lora": {"r": 4}}, "lora: without effect, because all weights are tuned"),
        ({"tune": "full", "codec": {"name": "klt"}}, "codec: 'klt' learns among LoRA factors"),
        (
            {"method": {"name": "fedcybgd"}, "downlink": {"name": "int8"}},
            "downlink: without effect, because method",
        ),
        (
            {"method": {"name": "fedcybgd", "gate": {"threshold": 0.5}}},
            "gate: without effect, because form='cache'",
        ),
        (
            {"method": {"name": "fedcybgd", "hold": "disk", "download": {"form": "full"}}},
            "hold='disk': form='full' brings the whole model in one message",
        ),
        (
            {"method": {"name": "fedcybgd", "order": "full", "parallel": 2}},
            "parallel: without effect under order='full'",
        ),
        (
            {"method": {"name": "cgfedllm", "privacy": {"placement": "update", "clip_norm": 1.0}}},
            "method.privacy.noise_multiplier: set exactly one of noise_multiplier and epsilon",
        ),
    ],
)
def test_a_mistake_is_named_with_its_remedy(table: dict[str, object], expected: str) -> None:
    assert expected in problem(table)


def test_all_mistakes_are_named_at_once() -> None:
    text = problem({"ronds": 3, "seed": -1})
    assert "ronds" in text
    assert "seed" in text


def test_overrides_are_lines_of_toml(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[method]\nname = "cgfedllm"\n[method.tgap]\nrounds = 4\n')
    config = load(file, ["method.tgap.share = 0.5", 'codec = {name = "int8"}', "rounds = 2"])
    assert (
        config.model_dump()["method"]["tgap"] | {"rounds": 4, "share": 0.5}
        == config.model_dump()["method"]["tgap"]
    )
    assert config.coding.name == "int8"
    assert config.rounds == 2
    assert (
        load(file, ['method.name = "fedavg"']).method.name == "fedavg"
    )  # tgap belonged to the other method

    with pytest.raises(ConfigError, match="text needs quotes: --set 'codec.name=\"int8\"'"):
        load(file, ["codec.name=int8"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("rounds = = 3")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(bad)


def test_a_baseline_keeps_everything_but_method_and_codec() -> None:
    config = parse(
        {
            "seed": 7,
            "method": {"name": "cgfedllm"},
            "codec": {"name": "int8"},
            "compare": ["fedavg"],
        },
        "x",
    )
    baseline = config.baseline("fedavg")
    assert difference(config.resolved(), baseline.resolved()) != []
    assert {key.split(".")[0] for key in difference(config.resolved(), baseline.resolved())} == {
        "codec",
        "compare",
        "method",
    }


def test_the_uncompressed_baseline_moves_the_servers_adapter_alike() -> None:
    config = parse({"method": {"name": "cgfedllm", "server_momentum": 0.5}}, "x")
    method = config.baseline("fedavg").method
    assert isinstance(method, FedAvgConfig)
    assert method.server_momentum == 0.5
    assert config.baseline("local").method.name == "local"


def test_a_resolved_configuration_is_complete_and_loads_again() -> None:
    config = parse({"method": {"name": "cgfedllm"}}, "x")
    assert RunConfig.model_validate(config.resolved()).resolved() == config.resolved()
