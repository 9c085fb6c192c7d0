"""What docs/comparing.md says about comparisons is what they do."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.runs.comparison.contenders import read_comparison
from fluvial.runs.comparison.result import (
    Compared,
    ComparedContender,
    ComparedRun,
    Difference,
    Score,
)
from fluvial.storage.run_files import COMPARED
from tests.docs.test_docs import blocks
from tests.support import ROOT
from tests.support.comparison import compare_here
from tests.support.runs import write_toml

PAGE = ROOT / "docs" / "comparing.md"


def test_the_sweep_on_the_page_runs(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Its contenders are those that the page names, and `fluvial show` prints their tables."""
    table = run_config | {"rounds": 1, "evaluate": {}}
    write_toml(tmp_path / "base.toml", table)
    (code,) = blocks(PAGE, "toml")
    path = tmp_path / "sweep.toml"
    path.write_text(code)

    comparison = read_comparison([path])
    names = [each.name for each in comparison.contenders]
    assert names == ["identity+r=4", "trellis,rate=64+r=4", "trellis,rate=64+r=8", "local"]
    assert all(f"`{name}`" in PAGE.read_text() for name in names[2:3])
    assert comparison.seeds == (0, 1, 2)
    assert comparison.baseline == "identity+r=4"

    once = read_comparison([path], seeds=(1,))
    compared = compare_here(once, tmp_path / "out")
    assert compared.complete
    assert list(compared.differing) == ["codec.name", "codec.rate", "lora.r", "method.name"]
    (tmp_path / "out" / COMPARED).write_text(compared.model_dump_json())
    page = tmp_path / "page.html"
    words = ["show", str(tmp_path / "out"), "--html", str(page)]
    shown = CliRunner().invoke(app, words, catch_exceptions=False)
    assert shown.exit_code == 0
    assert all(name in shown.output.replace("\n", "") for name in ("local", "amortised", "Costs"))
    assert compared.verdict in page.read_text()


@pytest.mark.parametrize("kind", [Compared, ComparedContender, ComparedRun, Score, Difference])
def test_every_key_of_the_file_is_on_the_page(kind: type[BaseModel]) -> None:
    text = PAGE.read_text()
    section = text[text.index("## compare.json") :]
    names = set(re.findall(r"\w+", section))
    assert set(kind.model_fields) <= names
