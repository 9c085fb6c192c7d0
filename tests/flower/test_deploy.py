"""docs/deploy.md is walked, command by command; what it lists is complete; what lies in deploy/ is
checked by rules."""

import ast
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml  # type: ignore[import-untyped]

from fluvial import __version__
from fluvial.cli import app
from fluvial.data.config import SiteDataSettings
from fluvial.federation.config import FleetConfig
from fluvial.report.status_tables import status_tables
from fluvial.settings import Settings
from fluvial.site_process.site_file import Allowed, SiteFile
from fluvial.storage.run_files import PAGE as REPORT
from tests.support import ROOT

PAGE = ROOT / "docs" / "deploy.md"
DEPLOY = ROOT / "deploy"


def blocks(*languages: str) -> list[str]:
    """The fenced blocks of the page in these languages, in its order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


def section(title: str) -> str:
    """The text under a heading of the page."""
    _, _, rest = PAGE.read_text().partition(f"## {title}\n")
    assert rest, title
    return rest.split("\n## ")[0]


def first_column(text: str) -> set[str]:
    """The names in backquotes in the first column of a table."""
    rows = re.findall(r"^\| (`[^|]+) \|", text, flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


# -- the steps of docs/deploy.md -----------------------------------------------------------------


@dataclass
class Newcomer:
    """Someone who does what the page says, in an empty folder, and makes the edits that it asks
    for."""

    folder: Path
    port: int
    terminals: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "bin").mkdir()
        command = self.folder / "bin" / "fluvial"
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fluvial.cli "$@"\n')
        command.chmod(0o755)
        path = [str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
        sources = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": os.pathsep.join(filter(None, sources)),
            "OMP_NUM_THREADS": "1",
        }

    def type(self, block: str) -> str:
        """Run a block; a server or a site gets a terminal of its own. Returns what was printed."""
        block = block.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        lines = block.splitlines()
        stay = [line for line in lines if re.match(r"fluvial (server|site) start ", line)]

        if stay:
            assert stay == lines, "a block starts what stays, or does something else"
            for line in stay:
                self.open_terminal(line)
            return ""

        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{self.tails()}"
        self.done.append(block)

        return done.stdout

    def open_terminal(self, line: str) -> None:
        log = (self.folder / f"{Path(line.split()[-1]).name}.log").open("wb")
        self.terminals[line] = subprocess.Popen(
            shlex.split(line),
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()

        if "server start" in line:
            self.wait(lambda: self.listens(), "the server listens")

    def listens(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def online(self) -> int:
        """How many sites `fluvial status` shows as online."""
        done = subprocess.run(
            ["fluvial", "status", "server", "--format", "json"],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            check=True,
        )
        return sum(site["status"] == "online" for site in json.loads(done.stdout)["sites"])

    def wait(self, reached: Any, what: str, *, seconds: float = 300, every: float = 0.5) -> None:
        until = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < until, f"{what}: not within {seconds:g} s\n{self.tails()}"
            time.sleep(every)

    def tails(self) -> str:
        return "\n".join(
            f"-- {log.name}\n{log.read_text()[-1500:]}" for log in sorted(self.folder.glob("*.log"))
        )

    def press_ctrl_c(self, line: str) -> int:
        """As a terminal does: to the whole group; returns the exit code."""
        process = self.terminals.pop(line)
        os.killpg(process.pid, signal.SIGINT)
        return process.wait(timeout=60)

    def leave(self) -> None:
        """End every process group that was started."""
        for process in self.terminals.values():
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=15)


@pytest.fixture
def newcomer(tmp_path: Path) -> Iterator[Newcomer]:
    pytest.importorskip("flwr", reason="needs the extra 'flower'")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    made = Newcomer(tmp_path, port)
    try:
        yield made
    finally:
        made.leave()


@pytest.mark.flower
# Ten minutes at a load of ten on two cores, of which 3.6 minutes are processor time.
@pytest.mark.slow
def test_the_page_leads_from_the_laptop_to_three_sites(newcomer: Newcomer) -> None:
    here = newcomer.folder
    for settings in blocks("toml"):
        (here / settings.splitlines()[0].removeprefix("# ")).write_text(settings)
    _company_certificate(here)
    printed = {}
    for block in blocks("shell"):
        if "status" in block:
            newcomer.wait(lambda: newcomer.online() == 3, "three sites online", every=3)
        if "stop" in block:
            newcomer.wait((here / "server/runs/again/metrics.jsonl").exists, "a first round")
        if "cmp" in block and "again" in block:
            newcomer.wait((here / "server/runs/again/result.json").exists, "the resumed run's end")
        printed[block] = newcomer.type(block)

    assert len(newcomer.done) == len(blocks("shell")) - len({"server", "sites"})

    (table,) = (text for block, text in printed.items() if block.startswith("fluvial status"))
    assert re.search(r"^\s*north\s+online", table, flags=re.MULTILINE), table
    (log,) = (text for block, text in printed.items() if block.startswith("fluvial logs"))
    assert "round 3" in log
    assert "HTTP Request" not in log
    hospitals = here / "server" / "runs" / "hospitals"
    verdict = json.loads((hospitals / "result.json").read_text())["verdict"]["line"]
    assert verdict.split(". ")[0].removesuffix(".") in (hospitals / REPORT).read_text()

    (example,) = blocks("json")

    for site in ("north", "south", "west"):
        entries = [
            json.loads(line)
            for line in (here / f"sites/{site}/outgoing.jsonl").read_text().splitlines()
        ]
        answers = [entry for entry in entries if entry["task"] != "join"]
        assert {tuple(entry) for entry in answers} == {tuple(json.loads(example))}
        assert len(answers) < len(entries) <= len(answers) + 3, (
            "one greeting for each process of the server"
        )
        code = here / f"sites/{site}/flower/apps"
        assert not code.exists(), "a warm site unpacks nothing that came with a run"

    assert _control_without_any_credential(newcomer.port) == 200, (
        "the page says that nothing is asked for"
    )
    for line in ("fluvial site start sites/north", "fluvial server start server"):
        newcomer.press_ctrl_c(line)
    assert "go on with --resume" not in newcomer.tails()


def _company_certificate(folder: Path) -> None:
    """The files that the page calls the company's own."""
    from fluvial.flower import certificates

    made = folder / "company"
    made.mkdir()
    certificates.make_authority(made)
    certificates.make_server_certificate(made, ["fluvial.example.org", "127.0.0.1"])

    for name, given in (
        ("server.crt", "fluvial.crt"),
        ("server.key", "fluvial.key"),
        ("ca.crt", "company-ca.crt"),
    ):
        shutil.copy(made / name, folder / given)

    shutil.rmtree(made)


def _control_without_any_credential(port: int) -> int:
    """What Flower answers an operator's request from anybody, without a certificate, key or
    password."""
    trusting = ssl.create_default_context()
    trusting.check_hostname = False
    trusting.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=trusting)

    try:
        connection.request(
            "POST", "/v1/control/list-runs", b"", {"Content-Type": "application/protobuf"}
        )
        return connection.getresponse().status
    finally:
        connection.close()


# -- what the page lists -------------------------------------------------------------------------


def test_every_key_of_a_site_file_is_explained() -> None:
    tables: dict[str, type[Settings]] = {"data": SiteDataSettings, "allow": Allowed}
    keys = set(SiteFile.model_fields) - set(tables)
    keys |= {f"{name}.{key}" for name, table in tables.items() for key in table.model_fields}
    assert first_column(section("The site file")) == keys


def test_every_key_of_the_fleet_is_explained() -> None:
    assert first_column(section("The fleet")) == set(FleetConfig.model_fields)


def test_every_key_of_a_server_file_is_named() -> None:
    path = ROOT / "src" / "fluvial" / "flower" / "server_operator.py"
    source = ast.parse(path.read_text())  # importing it needs cryptography
    (server,) = (
        node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "ServerFile"
    )
    annotated = [each.target for each in server.body if isinstance(each, ast.AnnAssign)]
    keys = [target.id for target in annotated if isinstance(target, ast.Name)]
    words = next(
        text
        for text in section("On real machines").split("\n\n")
        if text.startswith("`server.toml` has")
    )
    assert set(re.findall(r"`(\w+)`", words)) == set(keys)


def test_commands_on_the_page_exist_with_their_options() -> None:
    lines = [
        line
        for block in blocks("shell")
        for line in block.splitlines()
        if line.startswith("fluvial ")
    ]
    assert len(lines) > 20
    for line in lines:
        _command_exists(shlex.split(line)[1:])


def _command_exists(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words[0]]
        words = words[1:]

    options = {name for each in command.params for name in each.opts}
    assert {word for word in words if word.startswith("-")} <= options, words


def test_the_status_of_a_server_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    run = {
        "name": "hospitals",
        "run-id": "13269005032555589026",
        "status": "finished:failed",
        "elapsed": 76.6,
    }
    run |= {"status-details": "No heartbeat", "pending-at": "2026-11-21 10:13:28Z"}
    run |= {"network-traffic": {"inbound-bytes": 73391, "outbound-bytes": 1210777}}
    times = {
        "created-at": "2026-11-21 10:12:16Z",
        "online-at": "2026-11-21 10:12:31Z",
        "offline-at": "N/A",
    }
    sites = [
        {"name": name, "node-id": "2584", "status": "online", **times} for name in ("north", "")
    ]
    Console(width=80).print(status_tables({"runs": [run], "sites": sites}))
    printed = capsys.readouterr().out

    for line in (
        "hospitals  13269005032555589026  failed  76.6 s  73.4 kB  1.21 MB",
        "13269005032555589026: No heartbeat",
        "north      online  2026-11-21 10:12:31Z",
        "node 2584  online  2026-11-21 10:12:31Z",
    ):
        assert line in printed, printed

    Console(width=80).print(status_tables({"runs": [], "sites": []}))
    assert capsys.readouterr().out.split("\n")[:2] == ["No runs.", "No sites."]


# -- deploy/ -------------------------------------------------------------------------------------


def _instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile with their arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace(
        "\\\n", " "
    )
    return [
        (line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()
    ]


def test_the_image_is_built_from_a_pinned_base_by_known_instructions() -> None:
    found = _instructions()
    known = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in found} <= known, "ADD, for one, unpacks and downloads"
    (base,) = (words for name, words in found if name == "FROM")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base), (
        "a base without a full version changes under our feet"
    )
    assert "latest" not in (DEPLOY / "Dockerfile").read_text()
    assert all(json.loads(words) for name, words in found if name in ("ENTRYPOINT", "CMD")), (
        "exec form"
    )


def test_the_image_runs_as_any_user() -> None:
    names = [name for name, _ in _instructions()]
    users = [words for name, words in _instructions() if name == "USER"]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", users[-1])
    assert names.index("USER") > max(
        number for number, name in enumerate(names) if name in ("RUN", "COPY")
    )


def test_what_the_image_copies_exists_and_is_not_ignored() -> None:
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    sources = {
        word for name, words in _instructions() if name == "COPY" for word in words.split()[:-1]
    }
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_services_of_the_compose_file_are_locked_down() -> None:
    composed = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(composed) == {"name", "x-service", "services"}
    known = {
        "image",
        "restart",
        "init",
        "read_only",
        "tmpfs",
        "cap_drop",
        "security_opt",
        "stop_grace_period",
    }
    known |= {"profiles", "command", "ports", "environment", "volumes"}
    assert set(composed["services"]) == {"server", "site"}

    for name, service in composed["services"].items():
        assert set(service) <= known, name
        assert service["image"] == f"fluvial:{__version__}"
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] in ("always", "unless-stopped")
        assert all(isinstance(value, str) for value in service["environment"].values()), (
            "1 would be a number"
        )
        assert all(
            re.fullmatch(r"\./\w+:/srv/fluvial/\w+(:ro)?", volume) for volume in service["volumes"]
        )
        assert service["command"][2] in {volume.split("/")[-1] for volume in service["volumes"]}
        _command_exists(service["command"])

    assert "ports" not in composed["services"]["site"], "no process connects to a site"
    built = re.search(r"docker build .* -t fluvial:(\S+)", (DEPLOY / "Dockerfile").read_text())
    assert built is not None
    assert built[1] == __version__


@pytest.mark.parametrize("who", ["server", "site"])
def test_units_start_again_and_are_well_formed(who: str, tmp_path: Path) -> None:
    unit = (DEPLOY / f"fluvial-{who}.service").read_text()
    assert re.findall(r"^\[(\w+)\]$", unit, flags=re.MULTILINE) == ["Unit", "Service", "Install"]
    settings = dict(re.findall(r"^(\w+)=(.*)$", unit, flags=re.MULTILINE))
    assert settings["Restart"] == "always"
    assert int(settings["RestartSec"]) > 60 or who == "server", (
        "Flower refuses a site's return for 60 s"
    )
    assert settings["StartLimitIntervalSec"] == "0", "else systemd gives up after some restarts"
    assert settings["User"] not in ("", "root")
    _command_exists(shlex.split(settings["ExecStart"])[1:])

    if program := shutil.which("systemd-analyze"):
        present = tmp_path / f"fluvial-{who}.service"
        present.write_text(unit.replace("/opt/fluvial/bin/fluvial", str(shutil.which("true"))))
        done = subprocess.run([program, "verify", str(present)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
