"""What the log of a deployed run says of baselines, and of the error that ends the run."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from flwr.superlink.grid import http_grid

from fluvial.errors import ClientError
from fluvial.flower import server
from fluvial.flower.stream.place import Place


@pytest.fixture
def flower_log() -> Iterator[io.StringIO]:
    """What Flower's logger prints after the log of a run was begun."""
    logger = logging.getLogger("flwr")
    filters, handlers, propagate = [*logger.filters], [*logger.handlers], logger.propagate
    level = logging.getLogger("httpx").level
    printed = io.StringIO()
    logger.handlers = [logging.StreamHandler(printed)]
    server.begin_log()
    yield printed
    logger.filters, logger.handlers, logger.propagate = filters, handlers, propagate
    logging.getLogger("httpx").setLevel(level)


def end_run(error: Exception) -> None:
    """Log as Flower does at the end of a run by an error."""
    logger = logging.getLogger("flwr")
    try:
        raise error
    except Exception as raised:
        logger.error("%s raised an exception", "ServerApp", exc_info=raised)
    logger.error("Exit Code: 201\nAn unhandled exception occurred in the ServerApp.")


def test_an_error_of_ours_ends_a_run_with_one_line(flower_log: io.StringIO) -> None:
    end_run(ClientError("sites west have not joined within 120 s"))
    assert flower_log.getvalue() == "ClientError: sites west have not joined within 120 s\n"
    assert not logging.getLogger("flwr").propagate, "the log of the run has Flower's lines once"


def test_an_unexpected_error_has_its_traceback(flower_log: io.StringIO) -> None:
    end_run(KeyError("west"))
    assert "Traceback" in flower_log.getvalue()
    assert "Exit Code: 201" in flower_log.getvalue()


def test_the_log_names_a_baseline_before_sites_are_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    flower_log: io.StringIO,
) -> None:
    def execute(config: Any, *_: Any, assemble: Any, **__: Any) -> Iterator[Any]:
        texts = SimpleNamespace(names=["north"])
        for each in (config.baseline("local"), config):
            assemble(each, None, None, texts)
        return iter(())

    monkeypatch.setattr(http_grid, "pull_objects", None)  # what `main` sets ends with this
    monkeypatch.setattr(server, "execute", execute)
    monkeypatch.setattr(server, "flower_fleet", lambda *_, **__: None)
    monkeypatch.setattr(server, "_end_with_parent", lambda: None)
    monkeypatch.setattr(server, "stream_place", lambda _: Place("127.0.0.1", 0))
    caplog.set_level(logging.INFO)
    given = {
        "config": {"method": {"name": "fedavg"}, "compare": ["local"]},
        "folder": str(tmp_path / "run"),
        "resume": False,
    }
    monkeypatch.setattr(server, "read_submission", lambda _: (tmp_path, given))
    submitted = SimpleNamespace(run_config={"submitted": "token"})
    server.main(cast(Any, None), cast(Any, submitted))
    asked = [line for line in caplog.messages if "asked" in line]
    assert asked == ["sites are asked to take part in 'local', a baseline of compare"]
