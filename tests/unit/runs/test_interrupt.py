"""Ctrl-C and SIGTERM, sent to real processes: the exit code, one line, and a run that continues
from there."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import run_table, toml_of

FLUVIAL = [sys.executable, "-m", "fluvial.cli"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
PATIENCE_S = 120


def stopped(
    arguments: Sequence[str],
    ready: Callable[[], bool],
    signals: Sequence[signal.Signals] = (signal.SIGINT,),
) -> tuple[int, str]:
    """The exit code and standard error of a command that got `signals` once it was `ready`."""
    process = subprocess.Popen(
        [*FLUVIAL, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + PATIENCE_S

    try:
        while not ready():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end, "the command never came so far"
            time.sleep(0.01)

        for number in signals:
            process.send_signal(number)
        _, words = process.communicate(timeout=PATIENCE_S)
        return process.returncode, words
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)


def loading(arguments: Sequence[str]) -> Callable[[], bool]:
    """True once the process of `arguments` has read torch in: main() runs, and no model is loaded
    yet."""

    def ready() -> bool:
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == os.getpid():
                continue
            try:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                if words[1 : 3 + len(arguments)] == [*FLUVIAL[1:], *arguments]:
                    return "libtorch" in (folder / "maps").read_text()
            except OSError:
                continue

        return False

    return ready


def clean(words: str) -> str:
    """Standard error without the lines about rounds; nothing in it is a traceback or a word of the
    C++ library."""
    for bad in ("Traceback", "terminate called", "Exception ignored", "Aborted", "Fatal Python"):
        assert bad not in words, words
    return words


@pytest.fixture
def long_run(run_config: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], list[str]]:
    """A table of some rounds, and the command that runs it into `tmp_path / "run"`."""
    table = run_config | {"rounds": 4, "train": run_config["train"] | {"max_steps": 15}}
    (tmp_path / "long.toml").write_text(toml_of(table))
    return table, ["run", str(tmp_path / "long.toml"), "--out", str(tmp_path / "run")]


def test_a_round_interrupted_twice_quickly_is_resumed_to_the_same_weights(
    long_run: tuple[dict[str, Any], list[str]], tmp_path: Path
) -> None:
    table, command = long_run
    first = tmp_path / "run" / "checkpoints" / "round-000001.safetensors"
    code, words = stopped(command, first.exists, [signal.SIGINT, signal.SIGINT])
    assert code == 130
    assert clean(words).splitlines()[-1].endswith("--resume")
    assert words.count("interrupted;") == 1
    assert not (tmp_path / "run" / "result.json").exists()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == list(range(1, len(lines) + 1))
    subprocess.run([*FLUVIAL, *command, "--resume"], check=True, capture_output=True)
    resumed = json.loads((tmp_path / "run" / "result.json").read_text())
    straight = run_table(table, tmp_path / "straight")
    assert resumed["adapter_sha256"] == straight["adapter_sha256"]
    assert resumed["heldout"] == straight["heldout"]


@pytest.mark.parametrize("number", CODES)
def test_stopped_while_loading(
    long_run: tuple[dict[str, Any], list[str]], tmp_path: Path, number: signal.Signals
) -> None:
    _, command = long_run
    code, words = stopped(command, loading(command), [number])
    assert code == CODES[number]
    assert "before anything was written; start again with:" in clean(words)
    assert "--resume" not in words


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("when", ["set-up", "round"])
def test_stopped_in_set_up_and_in_a_round(
    long_run: tuple[dict[str, Any], list[str]], tmp_path: Path, number: signal.Signals, when: str
) -> None:
    table, _ = long_run
    table |= {"method": {"name": "cgfedllm", "tgap": {"source": "public", "rounds": 8}}}
    table |= {"codec": {"name": "klt", "rate": 8}}
    (tmp_path / "long.toml").write_text(toml_of(table))
    run = tmp_path / "run"
    command = ["run", str(tmp_path / "long.toml"), "--out", str(run)]
    ready = (
        run / "config.json"
        if when == "set-up"
        else run / "checkpoints" / "round-000002.safetensors"
    ).exists
    code, words = stopped(command, ready, [number])
    assert code == CODES[number]
    assert clean(words).splitlines()[-1].endswith("--resume")
    assert (run / "checkpoints").exists() == (when == "round")
    straight = run_table(table, tmp_path / "straight")
    subprocess.run([*FLUVIAL, *command, "--resume"], check=True, capture_output=True)
    assert (
        json.loads((run / "result.json").read_text())["adapter_sha256"]
        == straight["adapter_sha256"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("further_s", [0.0, 8.0])
def test_evaluate_is_stopped_without_advice(
    run_config: dict[str, Any], tmp_path: Path, number: signal.Signals, further_s: float
) -> None:
    """While it loads, and some seconds later, among 20,000 records."""
    run_table(run_config, tmp_path / "run")
    records = [{"text": f"The river {line} carries the water of many."} for line in range(20_000)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ["evaluate", str(tmp_path / "run" / "adapter"), "--data", str(tmp_path / "d.jsonl")]
    loaded = loading(command)

    def ready() -> bool:
        if not loaded():
            return False
        time.sleep(further_s)
        return True

    code, words = stopped(command, ready, [number])
    assert code == CODES[number]
    assert set(clean(words).splitlines()) <= {"reading the weights ..."}


@pytest.mark.parametrize("number", CODES)
def test_a_temporary_folder_goes_with_the_process(number: signal.Signals, tmp_path: Path) -> None:
    """A converted base model is as large as the model, and no exit function runs on a signal."""
    code = (
        "import signal; from fluvial import interrupt; interrupt.install(); owner = {1}; "
        "folder = interrupt.temporary_folder(owner); (folder / 'weights').write_bytes(b'1'); "
        "print(folder, flush=True); signal.pause()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )

    with process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        process.send_signal(number)

    assert process.returncode == CODES[number]
    assert not folder.exists()
