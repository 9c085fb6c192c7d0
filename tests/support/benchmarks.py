"""Benchmarks in their quick form, as a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import ROOT


def quick_report(name: str, out: Path, *options: str, of: str = "") -> dict[str, Any]:
    """Return the report of `python -m benchmarks.NAME`, or of the one named `of` in it."""
    module = [sys.executable, "-m", f"benchmarks.{name}", *([of] if of else [])]
    done = subprocess.run(
        [*module, "--quick", "--out", str(out), *options],
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
    assert content["benchmark"] == (of or name)
    assert {"cpu", "cores", "memory_bytes", "python", "torch", "load"} <= set(content["machine"])
    assert content["rows"]
    assert all({"name", "value", "bar", "holds"} <= set(claim) for claim in content["claims"])

    return content
