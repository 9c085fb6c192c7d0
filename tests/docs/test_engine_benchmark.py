"""What the benchmark `engine` computes: uncovered time, the grid, the engine's own times, and the
parts of a round at the size of a real model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from benchmarks.engine import rounds, size, size_rounds
from benchmarks.engine.cells import Cell, bytes_of_a_rank, table_of
from benchmarks.engine.clock import CLOCK, covered_s, folder_of_clock, read_clock
from benchmarks.engine.fleets import ROOT
from benchmarks.engine.link import fitted
from benchmarks.engine.size_contenders import CONTENDERS, NAMES, QWEN
from benchmarks.engine.size_contenders import table_of as size_table
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


def _record(seconds: float, coding: float, decoding: float) -> dict[str, Any]:
    site = {"download": 4.0, "training": 2.0, "coding": coding, "other": 0.5, "transfer": 5.0}
    server = {"coding": 0.25, "decoding": decoding}
    return {
        "seconds": seconds,
        "times": {"server": server, "sites": {"a": site, "b": site | {"coding": coding + 2}}},
        "bytes_up": 2 * 5_000_000,
        "bytes_down": 2 * 10_000_000,
    }


def test_parts_of_a_round_by_hand() -> None:
    """The first two rounds do not count; 5 MB take 2 s at 20 Mbit/s."""
    records = [_record(90.0, 50.0, 9.0)] * size.UNCOUNTED
    records += [_record(12.0, 0.5, 0.5), _record(14.0, 1.5, 0.5)]
    row = size.row_of(records)
    assert row["round_s"] == 13.0
    assert (row["download_s"], row["train_s"], row["encode_s"]) == (4.0, 2.0, 2.0)
    assert (row["upload_s"], row["engine_s"], row["server_codec_s"]) == (2.0, 3.0, 0.75)
    assert row["codec_share"] == 2.75 / 13
    assert row["codec_share_untrained"] == 2.75 / 11
    assert (row["bytes_up"], row["bytes_down"]) == (5e6, 1e7)


def test_time_to_the_target_is_rounds_times_their_seconds() -> None:
    """The first round has no download."""
    shares = {"codec_share": 0.05, "codec_share_untrained": 0.2, "download_s": 0.5}
    found = [
        {"contender": "trellis 1/64 + EF", "round_s": 3.0, **shares},
        {"contender": "nf4, both ways", "round_s": 2.0, **shares},
        {"contender": "uncompressed, r 2", "round_s": 1.0, **shares},
    ]
    rows = size.with_target(found, {"trellis 1/64 + EF": 10.0, "nf4, both ways": 8.0})
    assert [row["to_target_s"] for row in rows] == [29.5, 15.5, None]
    assert [(claim.value, claim.holds) for claim in size.claims(rows)] == [
        (0.05, True),
        (0.2, False),
        (29.5 / 15.5, False),
    ]


def test_rounds_come_from_contenders_that_always_reached_the_target() -> None:
    found = size_rounds.stored()
    rows = json.loads(size_rounds.STORED.read_text())["rows"]
    assert found["uncompressed"] == 8
    never = {row["contender"] for row in rows if row["reached"] < row["seeds"]}
    assert never
    assert not never & found.keys()

    seeds = [("a", 4), ("b", 6), ("a", 5), ("b", None)]
    small = [{"contender": name, "reached": reached} for name, reached in seeds]
    assert size_rounds.mean_rounds(small) == {"a": 4.5}


def test_the_real_size_is_that_of_qwen(tmp_path: Path) -> None:
    """An adapter of rank 16 on every linear layer has 8,798,208 values."""
    assert {contender.name for contender in CONTENDERS} >= set(NAMES)
    config = Qwen2Config(
        hidden_size=QWEN.hidden,
        intermediate_size=QWEN.intermediate,
        num_hidden_layers=QWEN.layers,
        num_attention_heads=QWEN.heads,
        num_key_value_heads=QWEN.kv_heads,
        vocab_size=QWEN.vocabulary,
        tie_word_embeddings=True,
    )
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(tmp_path)
    for contender in CONTENDERS:
        table = size_table(contender, tmp_path, tmp_path, rounds=2, steps=1)
        parsed = parse(table, contender.name)
        values = Outline(parsed.model, parsed.adapter).assignment.layout.numel
        assert values == (8_798_208 if not contender.lora else 8_798_208 // 8)


@pytest.mark.flower
def test_the_quick_form_over_loopback(tmp_path: Path) -> None:
    out = tmp_path / "size.json"
    command = [sys.executable, "-m", "benchmarks.engine", "--part", "size", "--quick"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, timeout=400, check=False)
    assert done.returncode == 0
    found = json.loads(out.read_text())
    assert found["skipped"] == []
    assert len(found["rows"]) == 2
    for row in found["rows"]:
        parts = ("download_s", "train_s", "encode_s", "other_s", "server_codec_s")
        assert all(row[part] > 0 for part in parts), row
        assert sum(row[part] for part in parts) < row["round_s"]
