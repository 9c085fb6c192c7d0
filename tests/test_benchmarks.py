"""The benchmarks run, write their files, and say for each claim whether it holds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import Claim, Report

ROOT = Path(__file__).parents[1]


def _quick(name: str, out: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(out.read_text())
    assert set(content) == {"benchmark", "machine", "settings", "skipped", "rows", "claims"}
    assert content["benchmark"] == name
    assert {"cpu", "cores", "memory_bytes", "python", "torch", "load"} <= set(content["machine"])
    assert content["rows"]
    assert all({"name", "value", "bar", "holds"} <= set(claim) for claim in content["claims"])
    return content


@pytest.mark.slow
def test_overhead(tmp_path: Path) -> None:
    """Start-up, three numbers of sites, and Flower or a word that it is not there."""
    content = _quick("overhead", tmp_path / "overhead.json")
    ours = [row for row in content["rows"] if row["what"] == "fluvial"]
    assert [row["sites"] for row in ours] == [1, 10, 100]
    assert all(row["bytes_up"] > 131_072 for row in ours)
    assert any(row["what"].startswith("Flower") for row in content["rows"])
    held = {claim["name"]: claim["holds"] for claim in content["claims"]}
    assert held["MB that each further site costs, up to 100 sites"]


@pytest.mark.slow
def test_cgfedllm(tmp_path: Path) -> None:
    """Gate and loss on the embedded text; identity is exact whatever the size."""
    content = _quick("cgfedllm", tmp_path / "cgfedllm.json")
    assert {row["part"] for row in content["rows"]} == {"gate", "loss"}
    held = {claim["name"][0]: claim["holds"] for claim in content["claims"]}
    assert set(held) == set("abcdef")
    assert held["f"]


def test_a_claim_that_does_not_hold_stays(tmp_path: Path) -> None:
    """Exit without an error, with the figure in the file; not measured is not held."""
    report = Report("none", {})
    report.claims = [
        Claim("too slow", 6.0, 5.0, "below"),
        Claim("just fits", 5.0, 5.0, "at most"),
        Claim("endless", float("inf"), 1.0, "at least"),
        Claim("not measured", None, 1.0, "at least"),
    ]
    report.finish(tmp_path / "none.json", (0.0, 0.0, 0.0))
    found = json.loads((tmp_path / "none.json").read_text())["claims"]
    assert [claim["holds"] for claim in found] == [False, True, True, False]
    assert [claim["value"] for claim in found] == [6.0, 5.0, "inf", None]
