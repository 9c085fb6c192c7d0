"""What the benchmark `engine` computes: uncovered time, the grid, the engine's own times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.engine import rounds
from benchmarks.engine.cells import Cell, bytes_of_a_rank, table_of
from benchmarks.engine.clock import CLOCK, covered_s, folder_of_clock, read_clock
from benchmarks.engine.fleets import ROOT
from benchmarks.engine.link import fitted
from fluvial.federation.line import Line, round_s
from fluvial.models.outline import Outline
from fluvial.runs.config import parse

FREE = Line(up_mbit_s=1e9, down_mbit_s=1e9, rtt_ms=0)


def test_covered_time_counts_overlaps_once_and_cuts_at_the_ends() -> None:
    assert covered_s([], 0, 10) == 0
    assert covered_s([(1, 3), (2, 4), (8, 12), (-5, -1)], 0, 10) == 5
    assert covered_s([(2, 3), (1, 9)], 0, 10) == 8


def test_the_clock_sees_a_process_train(tmp_path: Path) -> None:
    """In a process that has it on its path, and only where it was asked for."""
    path = os.pathsep.join([str(folder_of_clock(tmp_path / "clock")), str(ROOT / "src"), str(ROOT)])
    code = (
        "import fluvial.training.train\ntry: fluvial.training.train.train()\nexcept TypeError: pass"
    )

    for clock in (None, str(tmp_path / "trained")):
        environment = {**os.environ, "PYTHONPATH": path} | ({CLOCK: clock} if clock else {})
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
        assert len(read_clock(tmp_path / "trained")) == (1 if clock else 0)


def test_the_payload_is_the_adapter(tmp_path: Path) -> None:
    cell = Cell("local", 1.0, 3, 2)
    config = parse(table_of(cell, tmp_path), "test")
    layout = Outline(config.model, config.adapter).assignment.layout
    assert layout.raw_bytes == cell.payload == 61 * bytes_of_a_rank(cell.shape)
    assert abs(cell.payload / 1e6 - cell.payload_mb) < 0.01

    for megabytes in (0.1, 10.0, 100.0):
        wide = Cell("local", megabytes, 2, 2)
        assert wide.rank <= wide.shape[1]
        assert abs(wide.payload / 1e6 / megabytes - 1) < 0.02


def test_the_grid_begins_with_what_is_cheap() -> None:
    groups = rounds.grid(("local", "warm", "stock"), (0.1, 10.0), (2, 4), 3)
    assert [(cells[0].fleet, cells[0].sites, len(cells)) for cells in groups] == [
        ("local", 2, 2),
        ("local", 4, 1),
        ("warm", 2, 2),
        ("warm", 4, 1),
        ("stock", 2, 2),
        ("stock", 4, 1),
    ]


def test_the_engine_is_what_was_measured_without_a_line() -> None:
    rows = [
        {"round_s": 4.6, "train_s": 0.1, "bytes_down": 1e5, "bytes_up": 1e5},
        {"round_s": 6.6, "train_s": 0.3, "bytes_down": 1e7, "bytes_up": 1e7},
    ]
    found = fitted(rows)
    for row in rows:
        predicted = round_s(
            int(row["bytes_down"]),
            int(row["bytes_up"]),
            sites=2,
            line=FREE,
            engine=found,
            train_s=row["train_s"],
        )
        assert predicted == pytest.approx(row["round_s"], abs=0.01)
