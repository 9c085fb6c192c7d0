"""What a deployment does when a process is killed, a site cheats or somebody comes who must not:
`make faults`.

Every test leaves a row: the fault, what must follow, what did, and the seconds until it was seen.
`scripts/faults.py` collects them in docs/reliability.md.
"""

import datetime
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fluvial.federation.failures import Failure
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import InProcess, concurrency
from fluvial.flower import certificates
from fluvial.runs.config import parse
from fluvial.runs.opening import site_of, tasks_of
from fluvial.runs.run import execute
from tests.flower.conftest import Row
from tests.support.flower_lab import SERVER, Deployment, RunEndedError, deployment
from tests.support.moments import SKEW, Moments

pytestmark = [pytest.mark.flower, pytest.mark.faults]

SITES = ("north", "south", "west")
DEADLINE_S = 30.0
RESTART_S = 66.0
"""A SuperNode with a key is refused until its last process counts as gone; see `RestartSec` of the
unit."""
# -- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tiny_model: Path, three_sites: Path) -> dict[str, Any]:
    """Three rounds over three sites that each keep a residual, so that anything lost would show in
    the adapter."""
    columns = {"by": "column", "column": "client"}
    data = {"source": str(three_sites), "form": "text", "max_length": 32, "partition": columns}

    return {
        "seed": 1,
        "rounds": 3,
        "model": {"name_or_path": str(tiny_model)},
        "lora": {"r": 4, "target_modules": "attention"},
        "data": data,
        "codec": {"name": "bf16", "error_feedback": True},
        "train": {"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 4},
        "evaluate": {"sample_tokens": 2},
        "fleet": {"sites": list(SITES), "deadline_s": DEADLINE_S},
    }


def policy(table: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return table | {"fleet": table["fleet"] | settings}


class Undisturbed:
    """The adapter of a run in this process in which the named sites took no part in the named
    rounds."""

    def __init__(self, table: dict[str, Any], folder: Path) -> None:
        self._table = table
        self._folder = folder
        self._known: dict[str, str] = {}

    def __call__(self, absent: Mapping[int, str] | None = None) -> str:
        missing = dict(absent or {})
        key = json.dumps(missing)
        if key not in self._known:
            config = parse(policy(self._table, on_failure="skip"), "test")

            def assemble(each: Any, place: Any, pool: Any, texts: Any) -> Any:
                def open_site(name: str) -> Any:
                    return site_of(each, name, pool, texts, place.store)

                return _Absent(texts.names, open_site, tasks_of(each), each.fleet, missing)

            *_, last = execute(config, self._folder / str(len(self._known)), assemble=assemble)
            self._known[key] = str(last.values["adapter_sha256"])

        return self._known[key]


class _Absent(Fleet):
    def __init__(
        self, names: Any, open_site: Any, tasks: Any, config: Any, missing: Mapping[int, str]
    ) -> None:
        slots = concurrency(config)
        transport = InProcess(names, open_site, tasks, slots=slots, threads=config.threads)
        super().__init__(transport, config)
        self._missing = missing

    def ask(self, task: str, messages: Any, *, round: int, read: Any, alone: bool = True) -> Any:
        gone = self._missing.get(round) if task == "train" else None
        if gone is not None and gone in messages:
            self.failed(Failure(gone, round, task, "absent", 0), 1)
        present = {name: message for name, message in messages.items() if name != gone}
        yield from super().ask(task, present, round=round, read=read, alone=alone)


@pytest.fixture(scope="module")
def undisturbed(table: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(table, tmp_path_factory.mktemp("undisturbed"))


# -- one deployment for all kills and lies -------------------------------------------------------


class Lab:
    """A deployment whose processes have moments, mended before each test."""

    def __init__(self, deployed: Deployment, moments: Moments) -> None:
        self.deployed = deployed
        self.moments = moments
        self._died: dict[str, float] = {}

    def mend(self) -> None:
        """Every process runs again, and no fault is armed."""
        self.moments.clear()
        whole = True

        if "superlink" not in self.deployed.pids(SERVER):
            whole = False
            self.deployed.end(SERVER)
            self.deployed.start_server()

        for name in SITES:
            if "supernode" not in self.deployed.pids(name):
                whole = False
                self.restart(name)

        if not whole:
            self.deployed.wait_online(len(SITES))

    def restart(self, name: str) -> None:
        """Start a killed site again, when its unit would."""
        time.sleep(max(0.0, self._died.get(name, 0.0) + RESTART_S - time.time()))
        self.deployed.end(name)
        self.deployed.start_site(name)

    def kill(self, who: str, role: str) -> float:
        """kill -9; returns when."""
        self.deployed.kill(who, role, signal.SIGKILL)
        self._died[who] = time.time()
        return self._died[who]

    def gone(self, role: str, timeout: float = 120) -> float:
        """When a process of the server was no longer there."""
        until = time.monotonic() + timeout
        while role in self.deployed.pids(SERVER):
            assert time.monotonic() < until, f"{role} is still there\n{self.deployed.tail(SERVER)}"
            time.sleep(0.1)

        return time.time()

    def reason(self, run: int) -> str:
        """The last line of a run's log that names an error of ours."""
        lines = [line.strip() for line in self.deployed.logs(run).splitlines() if "Error: " in line]
        assert lines, self.deployed.logs(run)[-3000:]
        return lines[-1][lines[-1].index("Error: ") + 7 :]


@pytest.fixture(scope="module")
def _lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("faults")
    moments = Moments(folder / "moments")
    with deployment(
        folder / "lab", dict.fromkeys(SITES, ""), environment=moments.environment
    ) as deployed:
        yield Lab(deployed, moments)


@pytest.fixture
def lab(_lab: Lab) -> Lab:
    _lab.mend()
    return _lab


MOMENTS = {
    "start": "north joining",
    "training": "north 2 training",
    "upload": "north 2 uploading",
    "checkpoint": "north 2 keeping",
}
SERVER_MOMENTS = MOMENTS | {"start": "server starting", "checkpoint": "server 1 saving"}
WHEN = {
    "start": "at the start of the run",
    "training": "while a site trains",
    "upload": "while a site uploads its answer",
    "checkpoint": "while a checkpoint is written",
}


def told(failure: dict[str, Any]) -> str:
    """The reason of a failure in the words of a run's log, in one line."""
    return str(failure["reason"]).strip().splitlines()[-1][:200]


@pytest.mark.parametrize("when", MOMENTS)
def test_client_killed(
    when: str, lab: Lab, table: dict[str, Any], undisturbed: Undisturbed, tmp_path: Path, row: Row
) -> None:
    """The process that makes one answer, or the one that sends it; asked again, the site answers
    the same."""
    lab.moments.arm(MOMENTS[when])
    out = tmp_path / f"client-{when}"
    lab.deployed.submit(policy(table, on_failure="retry", retries=8), out)
    lab.moments.wait(MOMENTS[when])
    sends = when == "upload"
    killed = lab.kill("north", "executor" if sends else "task")
    lab.moments.free()

    if sends:
        lab.restart("north")  # it ends with the process that sends

    fault = f"kill -9 of a site's client process {WHEN[when]}"
    if when == "start":
        assert lab.deployed.wait(out)["adapter_sha256"] == undisturbed()
        row(
            fault,
            "greeted again; same adapter",
            "the server greeted the site again; same adapter",
            None,
        )
        return

    failure = lab.moments.failure()
    assert (failure["site"], failure["round"]) == ("north", 2)
    assert lab.deployed.wait(out)["adapter_sha256"] == undisturbed()
    observed = f"{told(failure)}; asked again: same adapter"
    assert sends or "ended with signal 9" in observed
    assert failure["time"] - killed < (DEADLINE_S + 15 if sends else 10)
    noticed = "inside the deadline" if sends else "at once"
    row(fault, f"noticed {noticed}; asked again: same adapter", observed, failure["time"] - killed)


@pytest.mark.parametrize("when", ["upload", "checkpoint", "start"])
def test_supernode_killed(
    when: str, lab: Lab, table: dict[str, Any], undisturbed: Undisturbed, tmp_path: Path, row: Row
) -> None:
    """The run stops inside the deadline; resumed with the site back, it ends the same. At the start
    it waits."""
    lab.moments.arm(MOMENTS[when])
    out = tmp_path / f"supernode-{when}"
    run = lab.deployed.submit(table, out)
    lab.moments.wait(MOMENTS[when])
    killed = lab.kill("north", "supernode")
    fault = f"kill -9 of a SuperNode {WHEN[when]}"

    if when == "start":
        lab.restart("north")
        lab.moments.free()
        assert lab.deployed.wait(out)["adapter_sha256"] == undisturbed()
        observed = "the server waited, the site was started again and joined; same adapter"
        row(fault, "the run waits for the site, or stops naming it", observed, None)

        return

    seen = lab.gone("serverapp")
    why = lab.reason(run)
    assert "north" in why
    assert seen - killed < DEADLINE_S + 15
    lab.mend()
    lab.deployed.submit(table, out, resume=True)
    assert lab.deployed.wait(out)["adapter_sha256"] == undisturbed()
    row(
        fault,
        "stops inside the deadline; resumed: same adapter",
        f"{why}; resumed: same adapter",
        seen - killed,
    )


def test_supernode_killed_and_the_quorum_goes_on(
    lab: Lab, table: dict[str, Any], undisturbed: Undisturbed, tmp_path: Path, row: Row
) -> None:
    """Two of three sites are enough, and the adapter is that of these two."""
    lab.moments.arm(MOMENTS["training"])
    out = tmp_path / "supernode-quorum"
    lab.deployed.submit(policy(table, on_failure="skip"), out)
    lab.moments.wait(MOMENTS["training"])
    killed = lab.kill("north", "supernode")
    failure = lab.moments.failure()
    assert (failure["site"], failure["round"]) == ("north", 2)
    assert lab.deployed.wait(out)["adapter_sha256"] == undisturbed({2: "north", 3: "north"})
    row(
        "kill -9 of a SuperNode while a site trains, on_failure='skip'",
        "continues with the quorum",
        f"{told(failure)}; continued with two: same adapter as a run of these",
        failure["time"] - killed,
    )


@pytest.mark.parametrize("when", SERVER_MOMENTS)
def test_server_app_killed(
    when: str, lab: Lab, table: dict[str, Any], undisturbed: Undisturbed, tmp_path: Path, row: Row
) -> None:
    """The process of the run itself; its folder continues with `submit --resume`."""
    lab.moments.arm(SERVER_MOMENTS[when])
    out = tmp_path / f"serverapp-{when}"
    run = lab.deployed.submit(table, out)
    lab.moments.wait(SERVER_MOMENTS[when])
    killed = lab.kill(SERVER, "serverapp")
    lab.moments.free()
    resume = (out / "config.json").exists()
    lab.deployed.submit(table, out, resume=resume)
    assert lab.deployed.wait(out)["adapter_sha256"] == undisturbed()
    ended = lab.deployed.finished(run, timeout=120)
    seen = datetime.datetime.fromisoformat(ended["finished-at"]).timestamp()
    how = "resumed" if resume else "nothing was written yet, submitted again"
    row(
        f"kill -9 of the server app {WHEN[when]}",
        "resumed: same adapter",
        f"run {ended['status']}; {how}: same adapter",
        seen - killed,
    )


@pytest.mark.parametrize("when", SERVER_MOMENTS)
def test_superlink_killed(
    when: str, lab: Lab, table: dict[str, Any], undisturbed: Undisturbed, tmp_path: Path, row: Row
) -> None:
    """The server's own process; its unit starts it again, the sites come back, the run continues or
    is resumed."""
    lab.moments.arm(SERVER_MOMENTS[when])
    out = tmp_path / f"superlink-{when}"
    lab.deployed.submit(table, out)
    lab.moments.wait(SERVER_MOMENTS[when])
    killed = lab.kill(SERVER, "superlink")
    lab.gone("superlink")
    lab.deployed.start_server()
    lab.moments.free()
    seen = None

    try:
        result = lab.deployed.wait(out)
        how = "the run went on by itself"
    except RunEndedError:
        seen = lab.gone("serverapp") - killed
        resume = (out / "config.json").exists()
        lab.deployed.submit(table, out, resume=resume)
        result = lab.deployed.wait(out)
        how = "the run ended; " + (
            "resumed" if resume else "nothing was written yet, submitted again"
        )

    assert result["adapter_sha256"] == undisturbed()
    fault = f"kill -9 of the SuperLink {WHEN[when]}"
    observed = f"SuperLink started again, sites came back; {how}: same adapter"
    row(fault, "continues, or resumed: same adapter", observed, seen)


LIES = {
    "silent": ("hold", "a site never answers", "no answer within"),
    "late": (f"sleep {DEADLINE_S + 4}", "a site answers after the deadline", "no answer within"),
    "garbage": ("garbage", "a site answers with garbage", "WireError"),
    "nan": ("nan", "a site answers with NaN", "WireError"),
    "earlier": (
        "earlier",
        "a site sends an earlier round's answer again",
        "an old message was sent again",
    ),
    "huge": ("10 GB", "a site announces a payload of 10 GB", "WireError"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_false_answer(
    lie: str, lab: Lab, table: dict[str, Any], undisturbed: Undisturbed, tmp_path: Path, row: Row
) -> None:
    """The site is left out of that round and takes part in the next."""
    what, fault, words = LIES[lie]
    moment = "north 2 training" if lie == "silent" else "north 2 answering"
    lab.moments.arm(moment, what)
    out = tmp_path / f"lie-{lie}"
    lab.deployed.submit(policy(table, on_failure="skip"), out)
    reached = lab.moments.wait(moment)
    failure = lab.moments.failure()
    lab.moments.free()
    assert (failure["site"], failure["round"]) == ("north", 2)
    assert words in failure["reason"]
    assert lab.deployed.wait(out)["adapter_sha256"] == undisturbed({2: "north"})
    observed = (
        f"{told(failure)}; left out of that round, back in the next: same adapter as such a run"
    )
    row(
        fault,
        "left out of the round, which continues with the quorum",
        observed,
        failure["time"] - reached,
    )


def test_disk_full_at_a_site(
    lab: Lab, table: dict[str, Any], undisturbed: Undisturbed, tmp_path: Path, row: Row
) -> None:
    """What an answer wants to keep cannot be written: the site says so, and has not changed."""
    lab.moments.arm("north 2 keeping", "full")
    out = tmp_path / "full-site"
    lab.deployed.submit(policy(table, on_failure="retry"), out)
    reached = lab.moments.wait("north 2 keeping")
    failure = lab.moments.failure()
    assert failure["reason"].startswith("CheckpointError")
    errors = lab.deployed.site("north").rglob("errors.log")
    assert any("cannot write" in file.read_text() for file in errors)
    assert lab.deployed.wait(out)["adapter_sha256"] == undisturbed()
    observed = (
        "the site answered with a CheckpointError, and its errors.log says what it cannot write; "
        "asked again when there was space, same adapter"
    )
    row(
        "disk full at a site (RLIMIT_FSIZE)",
        "the site says so; asked again: same adapter",
        observed,
        failure["time"] - reached,
    )


def test_disk_full_at_the_server(
    lab: Lab, table: dict[str, Any], undisturbed: Undisturbed, tmp_path: Path, row: Row
) -> None:
    """A checkpoint cannot be written: the run stops with the reason, and continues from the one
    before."""
    lab.moments.arm("server 2 saving", "full")
    out = tmp_path / "full-server"
    run = lab.deployed.submit(table, out)
    reached = lab.moments.wait("server 2 saving")
    seen = lab.gone("serverapp")
    why = lab.reason(run)
    assert "cannot write" in why
    lab.deployed.submit(table, out, resume=True)
    assert lab.deployed.wait(out)["adapter_sha256"] == undisturbed()
    observed = (
        'stopped with "cannot write … free some space and use --resume"; resumed: same adapter'
    )
    row(
        "disk full at the server (RLIMIT_FSIZE)",
        "stops with the reason; resumed: same adapter",
        observed,
        seen - reached,
    )


# -- who must not come in ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server with TLS and node keys, without sites."""
    folder = tmp_path_factory.mktemp("guarded")
    moments = Moments(folder / "moments")

    with deployment(folder / "lab", {}, environment=moments.environment) as deployed:
        yield deployed


def knocks(deployed: Deployment, name: str, words: str, *, ahead_s: int = 0) -> tuple[str, float]:
    """The line with `words` that a site's process writes, and after how long; the site must not
    have come in."""
    began = time.time()
    deployed.start_site(name, stock=False, processes=1, **{SKEW: str(ahead_s)})

    try:
        while True:
            lines = deployed.log(name).read_text(errors="replace").splitlines()
            found = next((line for line in lines if re.search(words, line)), None)
            if found is not None:
                break
            assert time.time() - began < 60, f"no {words!r} in\n{deployed.tail(name)}"
            time.sleep(0.1)

        seen = time.time() - began
        assert deployed.online() == 0
    finally:
        deployed.end(name)

    return re.sub(r"\x1b\[[0-9;]*m|^[A-Z]+\s*:\s*", "", found).strip()[:200], seen


def test_unregistered_key(guarded: Deployment, row: Row) -> None:
    guarded.make_site("stranger", register=False)
    line, seen = knocks(guarded, "stranger", "its key is not registered|key is not registered")
    row("a site whose key is not registered", "refused, with the reason", line, seen)


def test_another_authority(guarded: Deployment, tmp_path: Path, row: Row) -> None:
    """The site checks the server by an authority that did not sign its certificate."""
    guarded.make_site("astray")
    certificates.make_authority(tmp_path)
    (guarded.site("astray") / "ca.crt").write_bytes((tmp_path / "ca.crt").read_bytes())
    line, seen = knocks(guarded, "astray", "is not valid: ")
    row(
        "a server whose certificate another authority signed",
        "refused, with the reason",
        line,
        seen,
    )


def test_plain_text(guarded: Deployment, row: Row) -> None:
    """A site without TLS at a server that asks for it."""
    guarded.make_site("plain")
    path = guarded.site("plain") / "site.toml"
    secured = ("ca ", "key ", "server_fingerprint ")
    kept = [line for line in path.read_text().splitlines() if not line.startswith(secured)]
    path.write_text("\n".join(kept) + "\n")
    line, seen = knocks(guarded, "plain", "uses TLS")
    row("a plain-text site at a server with TLS", "refused, with the reason", line, seen)


@pytest.mark.parametrize("when", ["expired", "not yet valid"])
def test_certificate_out_of_time(when: str, guarded: Deployment, row: Row) -> None:
    """As after two years, or where the site's clock is a day behind."""
    name = when.replace(" ", "-")
    guarded.make_site(name)
    good = (guarded.server / "server.crt").read_bytes()
    guarded.end(SERVER)

    try:
        days = (-2, -1) if when == "expired" else (1, 2)
        (guarded.server / "server.crt").write_bytes(dated(guarded.server, *days))
        guarded.start_server()
        line, seen = knocks_blindly(guarded, name, when)
    finally:
        guarded.end(SERVER)
        (guarded.server / "server.crt").write_bytes(good)
        guarded.start_server()

    fault = {
        "expired": "an expired server certificate",
        "not yet valid": "clock skew: a certificate of tomorrow",
    }
    row(fault[when], "refused, with the reason", line, seen)


@pytest.mark.parametrize("seconds", [20, 3600])
def test_clock_skew(seconds: int, guarded: Deployment, row: Row) -> None:
    """A site signs the time of every request; the server takes what is at most 5 s ahead or 305 s
    behind."""
    name = f"ahead-{seconds}"
    guarded.make_site(name)
    line, seen = knocks(guarded, name, r"clock is \d+ s ahead of", ahead_s=seconds)
    row(f"clock skew: a site {seconds} s ahead", "refused, with the reason", line, seen)


def test_replayed_message(guarded: Deployment, row: Row) -> None:
    """What a site sent, recorded on the way, is sent again on a connection of its own."""
    guarded.make_site("echoed")
    recorder = Recorder(guarded.port)
    path = guarded.site("echoed") / "site.toml"
    path.write_text(path.read_text().replace(f":{guarded.port}", f":{recorder.port}"))
    guarded.start_site("echoed")

    try:
        guarded.wait_online(1)
    finally:
        guarded.end("echoed")
        recorder.close()

    sent = max(recorder.sent, key=len)
    assert len(sent) > 1000
    began = time.time()

    with socket.create_connection(("127.0.0.1", guarded.port), timeout=30) as again:
        again.sendall(sent)
        answer = b""
        with suppress(OSError):
            while part := again.recv(65536):
                answer += part

    seen = time.time() - began
    assert answer[:1] in (
        b"",
        b"\x15",
        b"\x16",
    )  # nothing, an alert, or a handshake that then fails
    assert len(answer) < 5000
    observed = (
        f"the server ended the TLS handshake; none of the {len(sent)} recorded bytes "
        "became a request"
    )
    row("a recorded connection is replayed", "refused", observed, seen)


class Recorder:
    """A way to the server that remembers what went there."""

    def __init__(self, port: int) -> None:
        self.sent: list[bytearray] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._server = port
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._server))
                record = bytearray()
                self.sent.append(record)
                threading.Thread(target=self._carry, args=(near, far, record), daemon=True).start()
                threading.Thread(
                    target=self._carry, args=(far, near, bytearray()), daemon=True
                ).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket, record: bytearray) -> None:
        with suppress(OSError), source, target:
            while part := source.recv(65536):
                record += part
                target.sendall(part)


def knocks_blindly(deployed: Deployment, name: str, words: str) -> tuple[str, float]:
    """`knocks` at a server that its own operator cannot ask either."""
    began = time.time()
    deployed.start_site(name)

    try:
        while time.time() - began < 60:
            text = deployed.log(name).read_text(errors="replace")
            if found := next((line for line in text.splitlines() if words in line), None):
                return found.strip()[:200], time.time() - began
            time.sleep(0.1)
    finally:
        deployed.end(name)

    raise AssertionError(deployed.tail(name))


def dated(folder: Path, start: int, end: int) -> bytes:
    """The server's certificate with other days of validity, counted from now, by the same
    authority."""
    old = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=start))
        .not_valid_after(now + datetime.timedelta(days=end))
    )

    for extension in old.extensions:
        made = made.add_extension(extension.value, critical=extension.critical)
    return made.sign(signer, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
