"""A pool of models loads what is used, when it is used."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fluvial.errors import ConfigError
from fluvial.models import base as base_module
from fluvial.models import pool as pool_module
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.targets import LoraSettings
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import texts_of
from fluvial.runs.run import execute, in_process


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the loading functions, in order of their calls."""
    calls: list[str] = []

    def count(module: ModuleType, name: str) -> None:
        plain = vars(module)[name]

        def counted(*given: Any) -> Any:
            calls.append(name)
            return plain(*given)

        monkeypatch.setattr(module, name, counted)

    count(base_module, "load_base")
    count(base_module, "open_weights")
    count(pool_module, "load_tokenizer")

    return calls


def config(folder: Path) -> ModelConfig:
    return ModelConfig(name_or_path=str(folder), device="cpu")


@pytest.mark.parametrize("lora", [LoraSettings(r=4), None])
def test_shapes_need_no_weights(
    tiny_model: Path, loads: list[str], lora: LoraSettings | None
) -> None:
    pool = ModelPool(config(tiny_model), lora)
    assert pool.assignment(2).layout == pool.layout
    assert pool.outline.context == 128
    assert pool.outline.num_embeddings == 300
    assert pool.outline.dtypes.keys() == set(pool.layout.names)
    assert pool.base_state().keys() == set(pool.layout.names)
    assert loads == []

    pool.load()
    assert sorted(loads) == sorted(["load_tokenizer", "open_weights" if pool.full else "load_base"])
    with pool.model(pool.base_state()):
        assert len(loads) == 2


def test_a_server_that_aggregates_loads_neither_weights_nor_tokenizer(
    run_config: dict[str, Any], tmp_path: Path, loads: list[str]
) -> None:
    settings = parse(run_config | {"evaluate": {"every": 1}}, "test")
    at_sites = ModelPool(settings.model, settings.adapter)
    at_sites.load()
    texts = texts_of(settings, at_sites)
    loads.clear()

    def elsewhere(each: RunConfig, folder: Any, _: ModelPool, texts: Any) -> Any:
        return in_process(each, folder, at_sites, texts)

    events = execute(
        settings, tmp_path / "run", assemble=elsewhere, texts=lambda _config, _pool: texts
    )
    rounds = 0
    for event in events:
        if event.kind == "result":
            break
        assert loads == [], event.kind
        rounds += event.kind == "round"

    assert rounds == settings.rounds
    assert sorted(loads) == ["load_base", "load_tokenizer"], "to show and write the result"


def test_what_cannot_be_loaded_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    pool = ModelPool(config(tmp_path / "none"), LoraSettings())
    with pytest.raises(ConfigError, match="there is no folder"):
        pool.load()
    with pytest.raises(ConfigError, match="there is no folder"):
        _ = pool.layout
