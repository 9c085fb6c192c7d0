"""The processes of a site end with the one that started them."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from fluvial.errors import ConfigError
from fluvial.flower import site_operator
from fluvial.flower.guard import alive
from fluvial.flower.site_operator import site_init, site_start

SITE = """
import signal, sys, time, types
from pathlib import Path

def serve(runtime_api, site, parent):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(60)

sys.modules["fluvial.flower.executor"] = types.SimpleNamespace(serve=serve)
from fluvial.flower import site_operator

site_operator.program = lambda _: sys.argv[2]
sys.exit(site_operator.site_start(Path(sys.argv[1])))
"""
"""A site whose SuperNode is a program that waits, and whose answering process waits too."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    site_init(tmp_path / "north", name="north", server="127.0.0.1:9", ca=None, insecure=True)
    return tmp_path / "north"


@pytest.fixture
def site(folder: Path, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    node = tmp_path / "node"
    node.write_text("#!/bin/sh\nexec sleep 60\n")
    node.chmod(0o700)
    command = [sys.executable, "-c", SITE, str(folder), str(node)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        until(lambda: len(numbers(folder)) == 3)
        yield process
        process.kill()
        others = numbers(folder)[1:]
        until(lambda: not any(alive(number) for number in others))


def numbers(folder: Path) -> list[int]:
    """The processes of a site, as the file of its lock has them."""
    lock = folder / ".lock"
    return [int(word) for word in lock.read_text().split()] if lock.exists() else []


def until(holds: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_all_processes_of_a_killed_site_end(site: "subprocess.Popen[bytes]", folder: Path) -> None:
    own, *others = numbers(folder)
    assert own == site.pid
    with pytest.raises(ConfigError, match=f"running already .* process {own}; .*`kill {own}`$"):
        site_start(folder)

    os.kill(own, signal.SIGKILL)
    site.wait()
    until(lambda: not any(alive(number) for number in others))
    until(lambda: not locked(folder))


def locked(folder: Path) -> bool:
    """Whether a process of the site holds the lock."""
    with (folder / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say it")
def test_a_process_that_has_ended_is_not_alive_before_its_parent_looks() -> None:
    """The first process of a container may take its time to look at what it has inherited."""
    with subprocess.Popen(["sleep", "60"]) as process:
        assert alive(process.pid)
        process.kill()
        until(lambda: not alive(process.pid))
        os.kill(process.pid, 0)  # its number is still in use


def test_a_guard_ends_with_the_body() -> None:
    program = (
        "import os\nfrom fluvial.flower.guard import guarded\n"
        "with guarded(os.getpid()): print(os.waitpid(-1, os.WNOHANG))\n"
        "os.waitpid(-1, os.WNOHANG)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "(0, 0)\n", "there is a child process"
    assert "ChildProcessError" in done.stderr, "there is none afterwards"


def test_what_a_killed_site_has_left_is_named() -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    text = site_operator._how_to_end(f"{ended.pid} {ended.pid} {os.getpid()}")
    assert text.endswith(f"start the site again then, or end the rest with `kill -9 {os.getpid()}`")
    assert site_operator._how_to_end(f"{ended.pid}").endswith("start the site again then")
    assert site_operator._how_to_end("") == "; end it first"
