"""One run on one engine for `benchmarks.engine`, watched from outside: rounds, training, memory,
bytes.

The model and its steps are the same on all engines: the package's small Llama, one step on one
sequence of 32 tokens at each site and round. The rank of its adapter grows with the payload, which
an identity codec sends as it is; where the model is too small for that rank, a wider one has random
weights. Sites differ in their text, so in every answer.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine.cells import NAMES, Cell, names_of, table_of
from benchmarks.engine.clock import CLOCK, covered_s, folder_of_clock, read_clock
from benchmarks.report import Row
from tests.support import flower_lab

ROOT = Path(__file__).parents[2]
MARK = "ENGINE_MARK"
"""In the environment of every process of a cell."""
SAMPLE_S = 0.5
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
SERVERS = ("flower-superlink", "flwr-serverapp")
"""Programs that are the server of a deployment."""


@dataclass
class Watch:
    """Observations of a run: the end of each round, and the memory of all processes."""

    environment: dict[str, str]
    records: list[dict[str, Any]] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    peak_pss: int = 0
    server_peaks: dict[int, int] = field(default_factory=dict)

    def rounds(self, out: Path, rounds: int, *, alive: Callable[[], bool], timeout: float) -> None:
        """Return when the run in `out` has ended `rounds` rounds; raises `RuntimeError` if it will
        not."""
        until = time.monotonic() + timeout
        metrics = out / "metrics.jsonl"

        while len(self.records) < rounds:
            running = alive()
            lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
            for line in lines[len(self.records) :]:
                if line.endswith("\n"):
                    self.records.append(json.loads(line))
                    self.ended.append(time.time())

            if len(self.records) < rounds:
                if not running or time.monotonic() > until:
                    raise RuntimeError(
                        f"{len(self.records)} of {rounds} rounds, then "
                        f"{'silence' if running else 'end'}"
                    )

                time.sleep(0.02)

    @contextmanager
    def memory(self, serves: Callable[[list[str]], bool]) -> Iterator[None]:
        """Note the peaks inside; `serves` says of a command line whether it is the server's."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(SAMPLE_S):
                found = marked(self.environment[MARK])
                self.peak_pss = max(
                    self.peak_pss, sum(_kilobytes(pid, "smaps_rollup", "Pss:") for pid in found)
                )
                for pid, words in found.items():
                    if serves(words):
                        if pid not in self.server_peaks:
                            _forget_peak(pid)
                        self.server_peaks[pid] = max(self.server_peaks.get(pid, 0), peak_of(pid))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def row(self, cell: Cell, began: float) -> Row:
        """Figures of the rounds after the first; a round is apart from training while no site
        trains."""
        spans = [span for span in read_clock(Path(self.environment[CLOCK])) if span[0] >= began]
        whole = [record["seconds"] for record in self.records]
        apart = [
            seconds - covered_s(spans, end - seconds, end)
            for seconds, end in zip(whole, self.ended, strict=True)
        ]
        assert len(spans) >= cell.sites * cell.rounds, (
            f"{cell}: the clock saw {len(spans)} trainings"
        )
        last = self.records[-1]

        return {
            **head(cell),
            "apart_s": statistics.median(apart[1:]),
            "apart_worst_s": max(apart[1:]),
            "round_s": statistics.median(whole[1:]),
            "train_s": statistics.median(until - since for since, until in spans),
            "start_s": self.ended[0] - began,
            "peak_mb": self.peak_pss / 1e6,
            "server_mb": sum(self.server_peaks.values()) / 1e6 or None,
            "payload": cell.payload,
            "bytes_up": last["bytes_up"] / cell.sites,
            "bytes_down": last["bytes_down"] / cell.sites,
        }


def head(cell: Cell) -> Row:
    """Return the columns that name a row."""
    return {
        "part": "rounds",
        "what": NAMES[cell.fleet],
        "payload_mb": cell.payload_mb,
        "sites": cell.sites,
    }


def environment_of(folder: Path) -> dict[str, str]:
    """Return the environment of every process of a cell or of a deployment."""
    folder.mkdir(parents=True, exist_ok=True)
    path = [
        str(folder_of_clock(folder / "clock")),
        str(ROOT / "src"),
        str(ROOT),
        os.environ.get("PYTHONPATH", ""),
    ]

    return {
        **QUIET,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        CLOCK: str(folder.resolve() / "trained"),
        MARK: str(folder.resolve()),
    }


def one_machine(cell: Cell, folder: Path) -> Row:
    """`fluvial run`, in one process or over Flower's simulation."""
    seen = Watch(environment_of(folder))
    out = folder / "run"
    config = folder / "run.toml"
    config.write_text(flower_lab.toml(table_of(cell, folder)))
    command = [*flower_lab.FLUVIAL, "run", str(config), "--out", str(out), "--format", "json"]
    command += ["--fleet", "flower" if cell.fleet == "ray" else "process"]
    began = time.time()

    with running(command, seen.environment, folder / "log") as process, seen.memory(_drives(cell)):
        seen.rounds(out, cell.rounds, alive=lambda: process.poll() is None, timeout=600)
    return seen.row(cell, began)


def _drives(cell: Cell) -> Callable[[list[str]], bool]:
    return lambda words: cell.fleet == "ray" and "fluvial.cli" in words


def deployed(cells: Sequence[Cell], folder: Path) -> Iterator[Row]:
    """Yield runs one after the other on one server and its sites, processes with TLS and node keys.

    `start_s` is from the submission on, `join_s` from the start of the sites until the server sees
    all. A run is waited for to its end, so that Flower's meter has seen what was counted: the
    rounds and two measurements after them.
    """
    environment = environment_of(folder)
    first = cells[0]
    stock = first.fleet == "stock"
    names = names_of(first.sites)
    assert all((cell.fleet, cell.sites) == (first.fleet, first.sites) for cell in cells)

    with flower_lab.deployment(
        folder / "lab", dict.fromkeys(names, ""), stock=stock, environment=environment, start=False
    ) as made:
        made.start_server()
        for name in names:
            made.make_site(name)
        joining = time.time()
        for name in names:
            made.start_site(name)
        made.wait_online(len(names), timeout=300)
        joined = time.time() - joining
        for cell in cells:
            seen = Watch(environment)
            out = folder / f"rank-{cell.rank}"
            began = time.time()
            number = made.submit(table_of(cell, folder), out)

            with seen.memory(lambda words: any(Path(word).name in SERVERS for word in words[:3])):
                seen.rounds(out, cell.rounds, alive=lambda: True, timeout=900)
            row = {**seen.row(cell, began), "join_s": joined}
            result = made.wait(out)
            meter = made.finished(number)["network-traffic"]
            row["counted"] = sum(result["bytes"]["by_kind"].values())
            row["metered"] = meter["inbound-bytes"] + meter["outbound-bytes"]
            # Every round brings the adapter down and an update up; at the end it comes down once
            # more to be measured.
            row["metered_ratio"] = row["metered"] / (
                cell.payload * cell.sites * (2 * cell.rounds + 1)
            )
            yield row


def nvflare(cell: Cell, folder: Path, python: str) -> Row:
    """Its simulator with clients that only answer: there is nothing to subtract."""
    seen = Watch(environment_of(folder))
    environment = {
        key: value for key, value in seen.environment.items() if key not in (CLOCK, "PYTHONPATH")
    }
    script = str(ROOT / "benchmarks" / "engine" / "nvflare_rounds.py")
    command = [
        python,
        script,
        "server",
        str(cell.sites),
        str(cell.rounds),
        str(cell.payload),
        str(folder.resolve()),
    ]
    environment["ENGINE_BEGAN"] = repr(time.time())

    with (
        running(command, environment, folder / "log") as process,
        seen.memory(lambda words: "nvflare.private.fed.app.simulator.simulator" in words),
    ):
        if process.wait(600):
            raise RuntimeError(f"NVFlare: {(folder / 'log').read_text(errors='replace')[-400:]}")

    found = json.loads((folder / "log").read_text(errors="replace").strip().splitlines()[-1])
    return {
        **head(cell),
        "apart_s": statistics.median(found["round_s"][1:]),
        "apart_worst_s": max(found["round_s"][1:]),
        "round_s": statistics.median(found["round_s"][1:]),
        "start_s": found["start_s"],
        "peak_mb": seen.peak_pss / 1e6,
        "server_mb": max(seen.server_peaks.values(), default=0) / 1e6
        or None,  # its starter has the same name
        "payload": cell.payload,
    }


@contextmanager
def running(
    command: list[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program; at the end, kill it and all that it started, by a mark in their
    environment."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

        while left := marked(environment[MARK]):
            for pid in left:
                try:
                    os.kill(pid, 9)
                except ProcessLookupError:
                    continue

            time.sleep(0.1)

        process.wait(10)


def marked(mark: str) -> dict[int, list[str]]:
    """Command lines of the living processes of a cell."""
    wanted = f"{MARK}={mark}".encode()
    found = {}

    for path in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (path / "environ").read_bytes().split(b"\0"):
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if state != "Z":
                    found[int(path.name)] = words
        except OSError:
            continue  # it has ended, or is somebody else's

    return found


def _forget_peak(pid: int) -> None:
    """Let the peak of a process begin anew: a SuperLink has had other runs."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return  # gone, or not ours: its peak counts from its start


def peak_of(pid: int) -> int:
    """Return the most resident memory of a process so far, in bytes; 0 where it is gone."""
    return _kilobytes(pid, "status", "VmHWM:")


def _kilobytes(pid: int, file: str, key: str) -> int:
    """Return a line of /proc in kB, as bytes; 0 where the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0

    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def measure(
    cells: Sequence[Cell], folder: Path, *, nvflare_python: str = sys.executable
) -> Generator[Row, None, None]:
    """Yield the rows of cells of one engine; those of a deployment share it. Raises what went
    wrong."""
    fleet = cells[0].fleet
    if fleet in ("warm", "stock"):
        yield from deployed(cells, folder)
        return

    for cell in cells:
        own = folder / f"rank-{cell.rank}"
        yield nvflare(cell, own, nvflare_python) if fleet == "nvflare" else one_machine(cell, own)
