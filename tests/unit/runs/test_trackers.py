"""Trackers and traces of a run: their own readers find the lines of metrics.jsonl in them."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from fluvial.errors import ConfigError
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from fluvial.runs.run import execute
from fluvial.runs.shareable import shareable
from fluvial.runs.trackers import result_scalars, scalars
from fluvial.storage.run_files import read_metrics
from tests.support.runs import run_table, run_with_stops

History = dict[str, dict[int, float]]
"""Values by tag and step."""


@pytest.fixture
def table(run_config: dict[str, Any]) -> dict[str, Any]:
    return run_config | {"rounds": 3, "evaluate": {"every": 1, "sample_tokens": 2}}


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Take back what trackers set for their libraries."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def expected(folder: Path, result: dict[str, Any]) -> History:
    """What a tracker must hold: every round under its own step, and the result under the last."""
    values: History = {}
    rounds = read_metrics(folder)
    for record in rounds:
        for tag, value in scalars(record).items():
            values.setdefault(tag, {})[record["round"]] = value

    for tag, value in result_scalars(result).items():
        values.setdefault(tag, {})[rounds[-1]["round"]] = value
    return values


def tensorboard_values(folder: Path) -> History:
    """The values that TensorBoard's own reader finds, each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder)).Reload()
    values: History = {}
    for tag in reader.Tags()["scalars"]:
        events = reader.Scalars(tag)
        values[tag] = {event.step: event.value for event in events}
        assert len(values[tag]) == len(events), tag
    return values


def assert_holds(found: History, wanted: History) -> None:
    assert found.keys() == wanted.keys()
    for tag, steps in wanted.items():
        assert found[tag] == pytest.approx(steps, rel=1e-6), tag  # TensorBoard keeps 32 bits


def test_tensorboard_holds_every_round_once_after_a_kill(
    table: dict[str, Any], three_sites: Path, tmp_path: Path
) -> None:
    """The process dies after round 2 was sent, and before it was noted down that it was."""
    table |= {"report_to": ["tensorboard"]}
    next_events = execute(parse(table, "test"), tmp_path / "run")
    for event in next_events:
        if event.values.get("round") == 2:
            break
    next_events.close()  # type: ignore[attr-defined]
    stands = json.loads((tmp_path / "run" / "trackers.json").read_text())
    assert stands["tensorboard"]["round"] == 2
    stands["tensorboard"]["round"] = 1
    (tmp_path / "run" / "trackers.json").write_text(json.dumps(stands))

    result = run_with_stops(table | {"profile": [3]}, tmp_path / "run", [99], resume=True)
    folder = tmp_path / "run" / "tensorboard" / "fedavg"
    assert_holds(tensorboard_values(folder), expected(tmp_path / "run", result))
    (settings,) = folder.glob("*/hparams.yml")
    assert "lora.r: 4" in settings.read_text()
    for path in folder.rglob("*"):
        assert path.is_dir() or str(three_sites.parent).encode() not in path.read_bytes()

    traces = list((tmp_path / "run" / "profile").iterdir())
    assert [path.name for path in traces] == ["round-000003.pt.trace.json.gz"]
    with gzip.open(traces[0]) as file:
        events = json.load(file)["traceEvents"]
    products = {event["tid"] for event in events if event.get("name") == "aten::mm"}
    assert len(products) >= 1
    assert os.getpid() not in products  # sites train in threads of their own

    again = run_with_stops(table, tmp_path / "run", [99], resume=True)  # it only shows its result
    assert_holds(tensorboard_values(folder), expected(tmp_path / "run", again))


def test_a_baseline_is_a_run_of_its_own(table: dict[str, Any], tmp_path: Path) -> None:
    table |= {"rounds": 1, "report_to": ["tensorboard"], "compare": ["local"]}
    run_table(table, tmp_path / "run")
    local = tmp_path / "run" / "compare" / "local"
    result = json.loads((local / "result.json").read_text())
    found = tensorboard_values(tmp_path / "run" / "tensorboard" / "local")
    assert_holds(found, expected(local, result))


@pytest.mark.slow
def test_mlflow_continues_its_run(table: dict[str, Any], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    table |= {"report_to": ["mlflow"]}
    result = run_with_stops(table, tmp_path / "run", [2, 99])
    client = MlflowClient((tmp_path / "run" / "mlruns").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'fluvial'")
    (found,) = client.search_runs([experiment.experiment_id])
    number = found.info.run_id
    assert found.data.params["lora.r"] == "4"
    assert str(tmp_path) not in str(found.data)
    values = {
        tag: {point.step: point.value for point in client.get_metric_history(number, tag)}
        for tag in found.data.metrics
    }
    assert_holds(values, expected(tmp_path / "run", result))


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: 7 bytes, then the log of LevelDB in blocks of 32 KiB, whose
    pieces have a checksum, a length and a kind (whole, first, middle, last)."""
    place, parts = 7, b""
    while place < len(data):
        left = 2**15 - place % 2**15
        length, kind = (
            int.from_bytes(data[place + 4 : place + 6], "little"),
            data[place + 6 : place + 7],
        )
        if left < 7 or kind == b"\0":
            place += left
            continue
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (b"\1", b"\4"):
            yield parts
            parts = b""


@pytest.mark.slow
def test_wandb_stays_offline_and_continues_its_run(table: dict[str, Any], tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    table |= {"report_to": ["wandb"]}
    result = run_with_stops(table, tmp_path / "run", [2, 99])
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1  # one id, so that a sync makes one run

    values: History = {}
    for path in files:
        for data in wandb_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            items = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            for tag, value in items.items():
                if not tag.startswith("_"):
                    values.setdefault(tag, {})[items["_step"]] = value

    assert_holds(values, expected(tmp_path / "run", result))


def test_a_tracker_that_fails_does_not_end_the_run(
    table: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(tracking.TensorBoardTracker, "log", fail)
    run_table(table | {"rounds": 1, "report_to": ["tensorboard"]}, tmp_path / "run")
    assert "tensorboard failed in round 1" in caplog.text
    assert "the disk is full" in caplog.text


def test_what_cannot_report_is_refused_before_anything_is_loaded(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    for name, package in (("wandb", r"'fluvial\[trackers\]'"), ("comet_ml", "comet-ml")):
        config = parse(table | {"report_to": [name]}, "test")
        with pytest.raises(ConfigError, match=rf"'{name}' needs a package.*install {package}"):
            next(execute(config, tmp_path / "run"))
        with pytest.raises(ConfigError, match="needs a package"):
            plan(config)
    assert not (tmp_path / "run").exists()

    for wrong, text in (
        ({"report_to": ["tensorboard", "tensorboard"]}, "is listed twice"),
        ({"report_to": ["tensorbord"]}, "tensorboard"),
        ({"profile": [4]}, "there is no round 4; the run has rounds 1 to 3"),
    ):
        with pytest.raises(ConfigError, match=text):
            parse(table | wrong, "test")


def test_settings_without_a_trace_of_the_machine() -> None:
    shown = shareable(
        {
            "seed": 0,
            "rounds": 3,
            "model": {"name_or_path": "/models/llama", "dtype": "auto", "device": "cuda:1"},
            "data": {"source": "/data/north.jsonl", "max_length": 64, "sites": ["north"]},
            "method": {
                "name": "fedpipe",
                "budgets": [{"site": "north", "memory_mb": 8.0}],
                "table": "~/prior.bin",
                "nested": {"path": "/x/y", "kept": 1},
            },
            "evaluate": {"sample_prompt": "The patient", "every": 0},
        }
    )
    assert shown == {
        "seed": 0,
        "rounds": 3,
        "model": {"dtype": "auto"},
        "method": {"name": "fedpipe", "nested": {"kept": 1}},
        "data": {"max_length": 64},
        "evaluate": {"every": 0},
    }
    assert shareable({"model": {"name_or_path": "org/model"}}) == {
        "model": {"name_or_path": "org/model"}
    }
