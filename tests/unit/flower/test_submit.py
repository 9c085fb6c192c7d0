"""What `fluvial submit` remarks on."""

from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from fluvial.cli.submit import NO_DEADLINE, submit
from fluvial.flower import server_operator


@pytest.mark.parametrize("deadline_s", [None, 600.0])
def test_a_run_without_a_deadline_is_remarked_on(
    deadline_s: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(server_operator, "check_submission", lambda *_, **__: None)
    monkeypatch.setattr(server_operator, "submit", lambda *_, **__: 17)
    config = tmp_path / "run.toml"
    config.write_text("" if deadline_s is None else f"[fleet]\ndeadline_s = {deadline_s}\n")
    submit(config, tmp_path)
    printed = capsys.readouterr()
    assert "run 17 in" in printed.out
    assert (NO_DEADLINE in printed.err) == (deadline_s is None)
