"""A run that leaves a site at work ends its process with the code that it should have."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

TOML = """
rounds = 1
[train]
max_steps = 200
per_device_train_batch_size = 8
[fleet]
deadline_s = 0.5
"""


@pytest.mark.parametrize("code", [0, 1])
def test_a_process_ends_while_a_late_site_still_trains(code: int, tmp_path: Path) -> None:
    (tmp_path / "late.toml").write_text(TOML)
    program = (
        "import fluvial\n"
        "try:\n"
        f"    fluvial.run({str(tmp_path / 'late.toml')!r}, {str(tmp_path / 'run')!r})\n"
        "except fluvial.FluvialError as late:\n"
        "    assert 'deadline_s=0.5' in str(late)\n"
        f"    raise SystemExit({code})\n"
    )

    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )

    assert ended.returncode == code, ended.stderr
    assert "terminate called" not in ended.stderr
