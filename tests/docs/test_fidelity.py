"""The pages hold the figures that benchmarks left behind: what the scripts make of them, and a few
by hand."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

PAGE = ROOT / "docs" / "fidelity.md"


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "scripts" / "write_tables.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, the scripts and the stored results, to be changed."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("docs", "scripts", "benchmarks/results"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "README.md", root)
    return root


def test_committed_pages_are_what_the_script_makes_of_the_results() -> None:
    found = check(ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_changed_figure_is_noticed_in_the_page_and_in_the_results(copy: Path) -> None:
    page = copy / "docs" / "fidelity.md"
    stored = copy / "benchmarks" / "results" / "fedcybgd_compute.json"
    before = page.read_text()
    results = stored.read_text()
    page.write_text(before.replace("0.66 of full tuning's step", "0.52 of full tuning's step"))
    assert page.read_text() != before
    assert "docs/fidelity.md" in check(copy).stdout
    page.write_text(before)
    assert check(copy).returncode == 0
    table = json.loads(results)

    for row in table["rows"]:
        row["share"] = 0.25
    stored.write_text(json.dumps(table))
    assert check(copy).returncode == 1


def stored(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / name).read_text())[
        "rows"
    ]
    return found


def test_figures_by_hand() -> None:
    page = PAGE.read_text()
    first, last = (
        row for row in stored("fedcybgd_compute.json") if row["trains"] in ("block 0", "block 7")
    )
    assert (
        f"{first['share']:.2f} of full tuning's step at the first of 8 blocks, "
        f"{last['share']:.2f} at the last" in page
    )
    losses = {
        (row["cell"], row["contender"]): row["loss"] for row in stored("fedcybgd_losses.json")
    }
    cells = {cell for cell, _ in losses}
    wins = sum(losses[cell, "fedcybgd int8"] <= losses[cell, "fedbavg int8"] for cell in cells)
    assert f"on {wins} of {len(cells)} tasks" in page
    nf4 = next(
        row["down"] for row in stored("fedcybgd_download.json") if row["form"] == "low-bit nf4"
    )
    assert f"nf4 {1000 * round(nf4 / 1000):,}" in page
