"""A hub that does not answer is found out at once."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from fluvial.data import DataConfig, SiteTexts
from fluvial.errors import ConfigError
from fluvial.models import network
from fluvial.models.network import reachable_hub
from fluvial.models.pretrained import ModelConfig, read_config
from fluvial.models.tokenizers import load_tokenizer


@pytest.fixture
def closed_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub at a port of loopback at which nothing listens."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("closed_hub")
def test_a_hub_id_without_network_is_answered_at_once(tokenizer: Any) -> None:
    calls: dict[str, Callable[[], object]] = {
        "data.source: 'nobody/none' is no file or folder here, and": lambda: SiteTexts(
            DataConfig(source="nobody/none"), tokenizer, seed=0
        ),
        "model.name_or_path='nobody/none' is no folder here": lambda: read_config(
            ModelConfig(name_or_path="nobody/none")
        ),
        "model.name_or_path='nobody/none' is no folder here and": lambda: load_tokenizer(
            ModelConfig(name_or_path="nobody/none")
        ),
    }
    import datasets  # noqa: F401 - so that its import is not in the time

    for message, call in calls.items():
        started = time.monotonic()
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "hub cannot be reached" in str(caught.value)
        assert time.monotonic() - started < 10  # its own retries take 50 s and more

    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.usefixtures("closed_hub")
def test_the_switch_holds_within_the_context_only() -> None:
    with reachable_hub() as reached:
        assert (reached, constants.HF_HUB_OFFLINE) == (False, True)
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.usefixtures("closed_hub")
def test_a_hub_is_asked_once_for_the_calls_of_one_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall that drops packets costs the whole time limit at each attempt."""
    asked = list[str]()

    class Session:
        def head(self, endpoint: str, **_: float) -> None:
            asked.append(endpoint)
            raise ConnectionError

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:10")
    for period in (1, 1, 1, 2):
        monkeypatch.setattr(network, "_period", lambda period=period: period)
        with reachable_hub() as reached:
            assert not reached

    assert len(asked) == 2


def test_a_model_folder_without_tokenizer_is_named(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(
        ConfigError,
        match="the folder has no tokenizer .*; copy the files from where the model came",
    ):
        load_tokenizer(ModelConfig(name_or_path=str(folder)))
