"""A real deployment in a test: the commands of `fluvial` on free ports of loopback, ended whatever
happens."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from fluvial.flower import server_operator

FLUVIAL = (sys.executable, "-m", "fluvial.cli")


def launched(processes: int) -> list[str]:
    """Return the command `fluvial`, started by torchrun where it has several processes."""
    if processes == 1:
        return list(FLUVIAL)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return [FLUVIAL[0], "-m", *torchrun, *FLUVIAL[1:]]


SERVER = "server"
"""Stands for the server where a site's name would stand."""
_MARK = "FLUVIAL_LAB"
"""In the environment of every process of a deployment: its folder and whose it is."""


class RunEndedError(AssertionError):
    """A run that ended without a result; the message has its log."""


@dataclass
class Deployment:
    """A server and its sites, each in a folder and a process group of its own."""

    folder: Path
    port: int
    insecure: bool
    stock: bool
    sites: tuple[str, ...]
    environment: dict[str, str]
    _started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _submitted: dict[Path, int] = field(default_factory=dict)

    @property
    def server(self) -> Path:
        """The server's folder."""
        return self.folder / SERVER

    def site(self, name: str) -> Path:
        """A site's folder."""
        return self.folder / "sites" / name

    def log(self, who: str) -> Path:
        """What the server's or a site's process printed."""
        return self.folder / f"{who}.log"

    # -- commands ---------------------------------------------------------------------------------

    def command(self, *arguments: str, fails: bool = False) -> str:
        """What `fluvial ARGUMENTS` prints, both streams; it must succeed, or with `fails` fail."""
        done = subprocess.run(
            [*FLUVIAL, *arguments],
            env=self._environment("command"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
        )
        assert (done.returncode != 0) == fails, (
            f"fluvial {' '.join(arguments)}: {done.returncode}\n{done.stdout}"
        )

        return done.stdout

    def start_server(self, **environment: str) -> None:
        """Start it and wait until its port is open."""
        process = self._start(SERVER, "server", "start", str(self.server), environment=environment)
        until = time.monotonic() + 120

        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert process.poll() is None, f"the server ended:\n{self.tail(SERVER)}"
            assert time.monotonic() < until, f"the server does not listen:\n{self.tail(SERVER)}"
            time.sleep(0.2)

    def make_site(self, name: str, settings: str = "", *, register: bool = True) -> None:
        """A site's folder with lines added to its site.toml."""
        pinned = [
            *("--ca", str(self.server / "ca.crt")),
            *("--channel-key", str(self.server / "channel.pub")),
        ]
        keys = ["--insecure"] if self.insecure else pinned
        folder = str(self.site(name))
        self.command(
            "site", "init", folder, "--name", name, "--server", f"127.0.0.1:{self.port}", *keys
        )

        with (self.site(name) / "site.toml").open("a") as file:
            file.write(settings + "\n")
            if "[allow]" not in settings:  # the tests' records and models lie on one machine
                file.write('[allow]\nrun_paths = ["*"]\n')

        if register and not self.insecure:
            self.command("site", "register", str(self.server), str(self.site(name) / f"{name}.pub"))

    def start_site(
        self, name: str, *, stock: bool | None = None, processes: int = 1, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a site that was made, with torchrun if it has several processes; does not wait for
        it."""
        stock = self.stock if stock is None else stock
        arguments = ["site", "start", str(self.site(name)), *(["--stock"] if stock else [])]
        return self._start(name, *arguments, environment=environment, processes=processes)

    def status(self) -> dict[str, Any]:
        """Runs and sites as Flower's server knows them; about two seconds of processor time."""
        return server_operator.status(self.server)

    def online(self) -> int:
        """How many sites Flower's server takes for present."""
        return sum(each["status"] == "online" for each in self.status()["sites"])

    def wait_online(self, count: int, timeout: float = 180) -> None:
        """Return when `count` sites are online."""
        until = time.monotonic() + timeout
        while self.online() != count:
            for name, process in self._started.items():
                assert process.poll() is None, (
                    f"{name} ended with {process.returncode}:\n{self.tail(name)}"
                )

            assert time.monotonic() < until, f"{self.online()} of {count} sites came:\n" + "".join(
                self.tail(name) for name in self._started
            )
            time.sleep(3)

    def submit(self, table: Mapping[str, Any], out: Path, *, resume: bool = False) -> int:
        """Start a run of a configuration table; returns Flower's number of it."""
        config = self.folder / f"{out.name}.toml"
        config.write_text(toml(table))
        arguments = ["submit", str(config), "--server", str(self.server), "--out", str(out)]
        printed = self.command(*arguments, *(["--resume"] if resume else []))
        number = next(line.split()[1] for line in printed.splitlines() if line.startswith("run "))
        self._submitted[out] = int(number)

        return int(number)

    def wait(self, out: Path, timeout: float = 400) -> dict[str, Any]:
        """The result of a submitted run; raises `RunEndedError` if it ends without one."""
        until = time.monotonic() + timeout
        look = time.monotonic() + 10

        while not (out / "result.json").exists():
            now = time.monotonic()
            if now > look or now > until:
                look = now + 10
                run = self.run(self._submitted[out])
                ended = run["status"].startswith("finished") and not (out / "result.json").exists()

                if ended or now > until:
                    raise RunEndedError(f"{run}\n{self.logs(self._submitted[out])}")

            time.sleep(0.1)

        return cast(dict[str, Any], json.loads((out / "result.json").read_text())) | {
            "folder": str(out)
        }

    def finished(self, number: int, timeout: float = 60) -> dict[str, Any]:
        """A run as Flower knows it when it has ended, with or without a result."""
        until = time.monotonic() + timeout
        while not (run := self.run(number))["status"].startswith("finished"):
            assert time.monotonic() < until, f"{run}\n{self.logs(number)}"
            time.sleep(2)

        return run

    def run(self, number: int) -> dict[str, Any]:
        """A run as Flower knows it: status, bytes, times."""
        return next(run for run in self.status()["runs"] if int(run["run-id"]) == number)

    def logs(self, number: int) -> str:
        """What a run's server wrote."""
        failed = self.run(number)["status"] in ("finished:failed", "finished:stopped")
        printed = self.command("logs", str(self.server), str(number), "--no-follow", fails=failed)
        return printed.rpartition(f"ClientError: run {number}")[0] if failed else printed

    def tail(self, who: str, characters: int = 4000) -> str:
        """The end of a process's log."""
        return f"--- {who}\n{self.log(who).read_text(errors='replace')[-characters:]}\n"

    # -- processes --------------------------------------------------------------------------------

    def pids(self, who: str) -> dict[str, int]:
        """Processes of the server ("superlink", "superexec", "serverapp") or of a site, those that
        are there now.

        A site has "site" (the command), "supernode", "guard", and warm "executor" and "task" (which
        answers one message), else "superexec" and "clientapp".
        """
        found: dict[str, int] = {}
        processes = _processes(f"{self.folder}:{who}")
        lock = self.site(who) / ".lock"
        noted = lock.read_text().split() if lock.exists() else []  # those that the guard ends
        own = [pid for pid, (_, words) in processes.items() if "fluvial.cli" in words]

        for pid, (parent, words) in sorted(processes.items()):
            for role, program in _ROLES.items():
                if any(Path(word).name == program for word in words[:3]):
                    found[role] = pid

            if pid in own:
                depth = 0
                above = parent
                while above in own and depth < 2:
                    depth = depth + 1
                    above = processes[above][0]

                role = ("site", "executor", "task")[depth]
                found["guard" if role == "executor" and str(pid) not in noted else role] = pid

        if who == SERVER and (server := self._started.get(who)) and server.pid in processes:
            found["superlink"] = server.pid  # a child has its words for a moment

        return found

    def kill(self, who: str, role: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to one process of `pids`, as soon as there is one; returns its id."""
        until = time.monotonic() + 60
        while (pid := self.pids(who).get(role)) is None:
            assert time.monotonic() < until, f"{who} has no {role}: {self.pids(who)}"
            time.sleep(0.01)

        os.kill(pid, number)
        for process in self._started.values():
            if process.pid == pid and number == signal.SIGKILL:
                process.wait(10)

        return pid

    def end(self, who: str, *, gently: bool = True) -> None:
        """End all processes of the server or of a site."""
        process = self._started.pop(who, None)
        if process is not None and gently and process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)

        until = time.monotonic() + 10
        while (
            left := _processes(f"{self.folder}:{who}")
        ) and time.monotonic() < until:  # some are just starting
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

            time.sleep(0.05)

        if process is not None:
            process.wait(10)

    def end_all(self) -> None:
        """End everything, the sites first."""
        for process in self._started.values():
            process.terminate()
        for who in [*reversed(self._started), "command"]:
            self.end(who)
        assert _processes(f"{self.folder}:") == {}

    def _start(
        self,
        who: str,
        *arguments: str,
        environment: Mapping[str, str],
        processes: int = 1,
    ) -> subprocess.Popen[bytes]:
        assert who not in self._started or self._started[who].poll() is not None, (
            f"{who} runs already"
        )
        with self.log(who).open("ab") as log:
            self._started[who] = subprocess.Popen(
                [*launched(processes), *arguments],
                env=self._environment(who) | dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        return self._started[who]

    def _environment(self, who: str) -> dict[str, str]:
        return {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **self.environment,
            _MARK: f"{self.folder}:{who}",
        }


_ROLES = {
    "superlink": "flower-superlink",
    "superexec": "flower-superexec",
    "serverapp": "flwr-serverapp",
    "supernode": "flower-supernode",
    "clientapp": "flwr-clientapp",
}


def _processes(mark: str) -> dict[int, tuple[int, list[str]]]:
    """Parent and command line of the living processes whose mark begins so (or, with a name in it,
    is so)."""
    found: dict[int, tuple[int, list[str]]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            stat = (path / "stat").read_text().rpartition(")")[2].split()
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended, or is somebody else's

        own = next(
            (each for each in environment if each.startswith(f"{_MARK}=".encode())), b""
        ).decode()
        wanted = f"{_MARK}={mark}"
        if stat[0] != "Z" and (own == wanted or (mark.endswith(":") and own.startswith(wanted))):
            found[int(path.name)] = (int(stat[1]), words)

    return found


def free_port() -> int:
    """A port of loopback without a listener."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return cast(int, found.getsockname()[1])


def toml(table: Mapping[str, Any]) -> str:
    """A configuration table as a file."""

    def value(found: Any) -> str:
        if isinstance(found, Mapping):
            return "{" + ", ".join(f"{key} = {value(item)}" for key, item in found.items()) + "}"
        if isinstance(found, list | tuple):
            return "[" + ", ".join(map(value, found)) + "]"
        return json.dumps(found)

    return "".join(f"{key} = {value(item)}\n" for key, item in table.items())


@contextmanager
def deployment(
    folder: Path,
    sites: Mapping[str, str],
    *,
    insecure: bool = False,
    stock: bool = False,
    environment: Mapping[str, str] | None = None,
    start: bool = True,
) -> Iterator[Deployment]:
    """A server and sites by the names of `sites`, whose values are lines for their site.toml; all
    of them online.

    With TLS and node keys unless `insecure`; by warm clients unless `stock`. With `start` off
    nothing runs yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = Deployment(
        folder.resolve(), free_port(), insecure, stock, tuple(sites), dict(environment or {})
    )
    keys = ["--insecure"] if insecure else []
    before = signal.signal(signal.SIGTERM, _interrupt)  # as with Ctrl-C, everything is ended

    try:
        made.command(
            "server", "init", str(made.server), "--address", f"127.0.0.1:{made.port}", *keys
        )
        if start:
            made.start_server()
            for name, settings in sites.items():
                made.make_site(name, settings)
                made.start_site(name)

            made.wait_online(len(sites))

        yield made
    finally:
        made.end_all()
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
