"""The page in the folder of a run while it goes on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import CheckpointError, GateError
from fluvial.report.live import COST, with_page
from fluvial.report.show import run_tables
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.run import Event, execute
from fluvial.storage.run_files import PAGE, SETUP, read_run
from tests.unit.report.test_show import config, records, result, text_of, write

REFRESH = '<meta http-equiv="refresh"'
LINES = records(131300, 131200, start=3.3)


class Clock:
    """A clock on which each page takes some seconds to draw."""

    def __init__(self, page_s: float = 1.0) -> None:
        self.now = 0.0
        self._page_s = page_s

    def __call__(self) -> float:
        self.now += self._page_s
        return self.now


def run_of(folder: Path, clock: Clock, between_s: float) -> Iterator[Event]:
    """Yield four rounds, `between_s` apart, and the result, as a run that writes its files."""
    config(folder, "fedavg")
    for number, record in enumerate(LINES, start=1):
        write(folder, LINES[:number], None)
        clock.now += between_s
        yield Event("fedavg", "round", record)

    write(folder, LINES, result("fedavg", "identity", 3.2011, 131300, 131200))
    yield Event("fedavg", "result", {})


def pages(folder: Path, setting: str, between_s: float = 1e6) -> list[str | None]:
    """Return the page after each event and after the run, None where there was none yet."""
    clock = Clock()
    settings = RunConfig.model_validate({"page": setting})
    path = folder / PAGE
    events = with_page(run_of(folder, clock, between_s), settings, folder, clock)
    found = [path.read_text() if path.exists() else None for _ in events]
    return [*found, path.read_text() if path.exists() else None]


def test_an_open_page_follows_the_rounds_and_stays_at_the_end(tmp_path: Path) -> None:
    *shown, last = pages(tmp_path / "run", "rounds")
    for number, page in enumerate(shown[:4], start=1):
        assert page is not None
        assert f"Not finished: {number} of 4 rounds" in page
        assert REFRESH in page
    assert last is not None
    assert REFRESH not in last
    assert "ahead of the base model" in last or "against the base model" in last
    assert (tmp_path / "run" / PAGE).stat().st_mode & 0o777 == 0o600
    assert not list((tmp_path / "run").glob("*.partial"))


def test_the_page_has_the_verdict_of_the_gate_from_the_set_up_on(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    tgap = {"source": "public", "rounds": 3, "simulated_sites": 2}
    table = run_config | {
        "method": {"name": "cgfedllm", "tgap": tgap},
        "codec": {"name": "klt", "rate": 8},
        "evaluate": {"sample_tokens": 2},
    }
    settings = parse(table, "test")
    folder = tmp_path / "run"
    page = folder / PAGE
    kinds = []
    for event in with_page(execute(settings, folder), settings, folder, Clock(0.0)):
        kinds.append(event.kind)
        shown = page.read_text()
        assert "Codec gate:" in shown
        assert (folder / SETUP).exists() == (event.kind != "result")
        if event.kind == "setup":
            assert "Not finished: 0 of 2 rounds" in shown
            assert "Errors at the codec gate" in shown
            assert "gate: passed" in text_of(run_tables(read_run(folder)))

    assert kinds == ["setup", "round", "round", "result"]
    assert "Codec gate:" in page.read_text()


def test_pages_take_at_most_a_hundredth_of_the_time(tmp_path: Path) -> None:
    """A page takes a second of this clock, and rounds take less than a hundred."""
    shown = pages(tmp_path / "run", "rounds", between_s=0.7 * COST)
    rounds = [page.split(" of 4 rounds")[0][-1] for page in shown[:4] if page]
    assert rounds == ["1", "1", "3", "3"]


def test_a_run_names_its_page_at_the_end(tmp_path: Path) -> None:
    pages(tmp_path / "run", "end")
    shown = read_run(tmp_path / "run")
    assert f"Page     {tmp_path / 'run' / PAGE}" in text_of(run_tables(shown))
    (tmp_path / "run" / PAGE).unlink()
    assert "--html report.html" in text_of(run_tables(shown))


@pytest.mark.parametrize(("setting", "written"), [("end", True), ("never", False)])
def test_a_setting_leaves_pages_out(setting: str, written: bool, tmp_path: Path) -> None:
    *shown, last = pages(tmp_path / "run", setting)
    assert shown == [None] * 5
    assert (last is not None) == written


@pytest.mark.parametrize(
    ("error", "written"),
    [(GateError("refused", {}), True), (CheckpointError("holds another run"), False)],
)
def test_a_run_that_never_began_leaves_the_folder_as_it_was(
    error: Exception, written: bool, tmp_path: Path
) -> None:
    config(tmp_path / "run", "fedavg")

    def events() -> Iterator[Event]:
        yield from map(fail, range(1))

    def fail(_: int) -> Event:
        raise error

    with pytest.raises(type(error)):
        list(with_page(events(), RunConfig(), tmp_path / "run"))
    assert (tmp_path / "run" / PAGE).exists() == written


def test_a_page_that_cannot_be_drawn_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def events() -> Iterator[Event]:
        config(tmp_path / "run", "fedavg")
        broken: dict[str, Any] = {"round": 1}
        write(tmp_path / "run", [broken], None)
        yield Event("fedavg", "round", broken)

    assert len(list(with_page(events(), RunConfig(), tmp_path / "run"))) == 1
    assert "report.html is not written: KeyError" in caplog.text
