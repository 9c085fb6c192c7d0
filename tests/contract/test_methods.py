"""The contract of every entry of `METHODS`: a new method is covered the moment it is listed."""

import inspect
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from fluvial.data import SiteTexts
from fluvial.errors import ConfigError
from fluvial.methods import METHODS, MethodConfig
from fluvial.methods.shared import SharedModelServer
from fluvial.models.pool import ModelPool
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import parse
from fluvial.runs.export import export_run
from fluvial.runs.run import Run, execute
from fluvial.training.config import TrainConfig
from fluvial.training.stepper import Stepper
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import digest
from tests.support import ROOT
from tests.support.models import with_fitting_model
from tests.support.runs import run_table
from tests.support.vllm_rules import broken_rules

# What a method needs beside its name to run on the tiny model.
SETTINGS: dict[str, dict[str, Any]] = {
    "cgfedllm": {
        "method": {"name": "cgfedllm", "tgap": {"rounds": 2}},
        "codec": {"name": "klt", "rate": 8, "error_feedback": True},
    },
    # They write no model, so they refuse settings of a sample.
    "local": {"method": {"name": "local"}, "evaluate": {}},
    "fedsa": {"method": {"name": "fedsa"}, "evaluate": {}},
    # A plan follows from speeds, which are given here, so that every run has the same.
    "fedpipe": {
        "method": {
            "name": "fedpipe",
            "probe_steps": 3,
            "learning_rate_by_batch": "constant",
            "budgets": [
                {"site": site, "tokens_s": speed}
                for site, speed in {"north": 4000.0, "south": 2000.0, "west": 1000.0}.items()
            ],
        },
    },
    # With all weights tuned, it refuses its default mode, which would bring the embedding to the
    # server.
    "flglm full": {"method": {"name": "flglm", "mode": "hierarchical"}},
}


@pytest.fixture(
    params=[f"{name} {tune}" for name in sorted(METHODS) for tune in METHODS[name].traits.tunes]
)
def table(request: pytest.FixtureRequest, run_config: dict[str, Any]) -> dict[str, Any]:
    """A configuration for each method and all that it can tune."""
    name, tune = request.param.split()
    settings = SETTINGS.get(request.param, SETTINGS.get(name, {}))
    table = with_fitting_model(run_config | {"method": {"name": name}, "tune": tune} | settings)

    return (
        table if tune == "lora" else {key: value for key, value in table.items() if key != "lora"}
    )


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The peak learning rate of every optimizer that the test makes."""
    seen = []
    begin = Stepper.__init__

    def watched(self: Stepper, trained: Any, config: TrainConfig, **rest: Any) -> None:
        seen.append(config.learning_rate)
        begin(self, trained, config, **rest)

    monkeypatch.setattr(Stepper, "__init__", watched)
    return seen


def test_a_run_ends_with_a_result(
    table: dict[str, Any], rates: list[float], tmp_path: Path
) -> None:
    """Its learning rate decays over the rounds; pre-training and probes have the whole."""
    decaying = table["train"] | {"round_scheduler_type": "linear"}
    result = run_table(table | {"train": decaying}, tmp_path / "run")
    whole = table["train"]["learning_rate"]
    assert rates == sorted(rates, reverse=True)
    assert set(rates) == {whole, whole / 2}
    assert result["method"] == table["method"]["name"]
    for kind in ("adapter", "model"):
        assert (result[f"{kind}_sha256"] is None) == (not (tmp_path / "run" / kind).exists())
    assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]
    assert result["bytes"]["up"] > 0
    assert result["bytes"]["down"] > 0
    assert_exported(table, tmp_path)


def assert_exported(table: dict[str, Any], folder: Path) -> None:
    """Assert that the run's result can be exported, and that vLLM can serve the adapter."""
    kinds = [kind for kind in ("adapter", "model") if (folder / "run" / kind).exists()]
    if not kinds:
        with pytest.raises(ConfigError, match="leaves every site its own"):
            export_run(folder / "run", folder / "out")
        return

    made = export_run(folder / "run", folder / "out", base="org/base")
    assert made.form == {"adapter": "peft", "model": "model"}[kinds[0]]
    for path in (folder / "out").iterdir():
        if path.suffix in (".json", ".md"):
            assert str(folder) not in path.read_text()

    if made.form == "peft":
        assert made.max_lora_rank is not None
        base = AutoModelForCausalLM.from_pretrained(table["model"]["name_or_path"])
        assert broken_rules(folder / "out", base, made.max_lora_rank) == []


def test_state_is_all_a_server_needs(table: dict[str, Any], tmp_path: Path) -> None:
    config = parse(table, "test")
    pool = ModelPool(config.model, config.lora)
    with RunFolder(tmp_path / "a") as folder:
        run = Run(config, folder, pool, SiteTexts(config.data, pool.tokenizer, seed=config.seed))
        for event in run.events():
            if event.kind == "round":
                break

        state = run.server.state().to_bytes()
        again = config.entry.server(config.method, run.context)
        again.restore(Payload.from_bytes(state))
        assert again.state().to_bytes() == state

        if isinstance(run.server, SharedModelServer):
            assert isinstance(again, SharedModelServer)
            assert digest(again.model()) == digest(run.server.model())


def test_resume_after_every_event_is_a_straight_run(table: dict[str, Any], tmp_path: Path) -> None:
    straight = run_table(table, tmp_path / "straight")
    config = parse(table, "test")
    resume = False

    for _ in range(config.rounds + 2):
        event = next(
            execute(config, tmp_path / "stopped", resume=resume)
        )  # then everything is thrown away
        resume = True

    assert event.kind == "result"
    for kind in ("adapter_sha256", "model_sha256"):
        assert event.values[kind] == straight[kind]
    assert event.values["heldout"] == straight["heldout"]
    assert event.values["bytes"] == straight["bytes"]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_entry_is_complete(name: str) -> None:
    method = METHODS[name]
    config = method.config.model_validate({})
    assert config.model_dump()["name"] == name
    assert method.config in get_args(get_args(MethodConfig)[0])
    assert method.paper
    assert method.config.__doc__

    with pytest.raises(ValidationError):
        method.config.model_validate({"name": name, "no_such_setting": 1})
    with pytest.raises(ValidationError):
        config.name = "other"  # type: ignore[misc]
    for task in method.tasks.values():
        assert list(inspect.signature(task).parameters) == ["site", "message"]
        assert task.__doc__

    page = ROOT / "docs" / "methods" / f"{name}.md"
    assert page.exists() or method.traits.baseline
