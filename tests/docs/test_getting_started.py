"""Every command of docs/getting-started.md runs, and its configuration is the one that init
writes."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.models import cpu_types
from tests.docs.test_docs import blocks, commands
from tests.support import ROOT

OF_THE_MODEL = (
    ("data", "max_length"),
    ("train", "learning_rate"),
    ("codec", "rate"),
    ("evaluate", "max_new_tokens"),
)
"""Values that follow from the tokens and the size of the small model."""
PAGE = ROOT / "docs" / "getting-started.md"


@pytest.fixture(autouse=True)
def _visits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the records of the page, and work beside them."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"<<'EOF'\n(.*?)^EOF$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    subprocess.run([sys.executable, "-c", code], check=True)


def run(words: list[str]) -> str:
    """Return the output of a command of the page."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (words, result.output, result.exception)
    return result.output


def settings(text: str) -> dict[str, Any]:
    """Return the settings of a TOML text but for values that the small model decides."""
    table = tomllib.loads(text)
    for name, key in OF_THE_MODEL:
        table[name][key] = "any"
    return table


def test_init_writes_the_configuration_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page shows what is written without a GPU, on a CPU that is slow in bfloat16."""
    monkeypatch.setattr(cpu_types, "times_slower", lambda _: 5.4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (init,) = (words for words in commands(PAGE) if words[0] == "init")
    run(init)
    (shown,) = blocks(PAGE, "toml")
    written = Path("clinics.toml").read_text()
    assert settings(shown) == settings(written)
    assert list(tomllib.loads(shown)) == list(tomllib.loads(written))


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_their_order() -> None:
    for words in commands(PAGE):
        run(words)

    assert Path("report.html").stat().st_size > 10_000
    assert Path("runs/clinics/adapter/adapter_model.safetensors").is_file()
    assert Path("clinic.toml").read_text() == (ROOT / "configs" / "clinic.toml").read_text()
