"""The wheel has what a run needs, and works outside of a clone."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

LARGEST = 8_000_000
"""Bytes of the wheel at most: the small model is most of it."""
NEEDED = {
    "fluvial/py.typed",
    "fluvial/assets/tiny/model.safetensors",
    "fluvial/assets/tiny/tokenizer.json",
    "fluvial/report/page.html",
    *(f"fluvial/recipes/{path.name}" for path in (ROOT / "configs").glob("*.toml")),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the clone; pip fetches the tool that builds it from the package index."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-q", "-w", str(folder)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    if "No matching distribution found for hatchling" in built.stderr:
        pytest.skip("the package index cannot be reached")
    assert built.returncode == 0, built.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_has_what_a_run_needs_and_nothing_large(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert set(names) >= NEEDED
    assert {Path(name).parts[0].partition("-")[0] for name in names} == {"fluvial"}
    assert not [name for name in names if "__pycache__" in name]
    assert wheel.stat().st_size < LARGEST


def test_the_wheel_works_outside_of_the_clone(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site-packages"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(target)}

    def fluvial(*arguments: str) -> str:
        """Return the output of a command of the installed package."""
        command = [sys.executable, "-m", "fluvial.cli", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import fluvial; print(fluvial.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert Path(run.stdout.strip()).is_relative_to(target)
    assert wheel.name.split("-")[1] in fluvial("--version")
    assert "quickstart" in fluvial("recipes")
    assert fluvial("recipes", "flglm") == (ROOT / "configs" / "flglm.toml").read_text()

    records = [{"site": "ab"[number % 2], "text": f"{number} apples"} for number in range(40)]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    fluvial("init", "my.toml", "--yes", "--model", "embedded", "--data", "records.jsonl")
    assert "1,115,264" in fluvial("check", "my.toml")
    fluvial("run", "my.toml", "--set", "rounds=1", "--set", "train.max_steps=2")
    assert (tmp_path / "runs" / "my" / "adapter" / "adapter_model.safetensors").is_file()
    fluvial("show", "runs/my", "--html", "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000
