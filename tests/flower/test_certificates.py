"""Certificates of a deployment: the company's own, those made here, and what an operator reads
about them."""

import email.utils
import fcntl
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")

from fluvial.errors import ClientError, ConfigError
from fluvial.flower import certificates, names, programs, server_operator, site_operator
from fluvial.runs.config import RunConfig

HOST = "fluvial.example.org"


def made(folder: Path, *hosts: str) -> dict[str, Any]:
    """An authority and a certificate for `hosts`, as a company would have them."""
    folder.mkdir()
    certificates.make_authority(folder)
    certificates.make_server_certificate(folder, list(hosts))

    return {
        "certificate": folder / "server.crt",
        "key": folder / "server.key",
        "ca": folder / "ca.crt",
    }


def test_a_companys_own_certificate_is_taken_as_it_is(tmp_path: Path) -> None:
    own = made(tmp_path / "own", HOST, "127.0.0.1")
    server_operator.server_init(tmp_path / "server", address=f"{HOST}:9000", **own)
    found = server_operator.read_server_file(tmp_path / "server")
    assert {"certificate": found.certificate, "key": found.key, "ca": found.ca} == own
    assert found.host == "0.0.0.0"
    assert not (tmp_path / "server" / "ca.key").exists()


def test_flowers_own_processes_go_where_the_certificate_holds(tmp_path: Path) -> None:
    own = made(tmp_path / "own", HOST)
    server_operator.server_init(tmp_path / "server", address=f"{HOST}:9000", **own)
    assert server_operator.read_server_file(tmp_path / "server").host == HOST


@pytest.mark.parametrize("host", [HOST, "10.1.2.3", "a.b.example.org"])
def test_a_certificate_names_hosts_and_addresses(host: str, tmp_path: Path) -> None:
    own = made(tmp_path / "own", host, "*.sites.example.org")
    assert certificates.names(own["certificate"], host)
    assert certificates.names(own["certificate"], "north.sites.example.org")
    assert not certificates.names(own["certificate"], "far.north.sites.example.org")
    assert not certificates.names(own["certificate"], "10.9.9.9")


def test_a_certificate_for_another_address_is_refused(tmp_path: Path) -> None:
    own = made(tmp_path / "own", "other.example.org", "127.0.0.1")
    with pytest.raises(
        ConfigError, match=r"server\.crt does not name 'fluvial\.example\.org' among"
    ):
        server_operator.server_init(tmp_path / "server", address=f"{HOST}:9000", **own)

    assert not (tmp_path / "server").exists()


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    own = made(tmp_path / "own", HOST)
    other = made(tmp_path / "other", HOST)
    for part, why in (("key", "is not the key of"), ("ca", "is not signed by")):
        with pytest.raises(ConfigError, match=why):
            certificates.check(**(own | {part: other[part]}), host=HOST)

    with pytest.raises(ConfigError, match="expected PEM files"):
        certificates.check(**(own | {"key": own["certificate"]}), host=HOST)
    with pytest.raises(ConfigError, match="belong together"):
        server_operator.server_init(
            tmp_path / "server", address=f"{HOST}:9000", certificate=own["certificate"]
        )


def test_an_intermediate_authority_may_follow_in_the_file(tmp_path: Path) -> None:
    own = made(tmp_path / "own", HOST)
    other = made(tmp_path / "other", HOST)
    chain = tmp_path / "chain.crt"
    chain.write_bytes(own["certificate"].read_bytes() + own["ca"].read_bytes())
    certificates.check(chain, own["key"], other["ca"], host=HOST)


def test_a_certificate_that_ended_is_refused_and_an_operator_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(certificates, "YEARS", -1 / (365 * 24 * 60))  # a minute ago
    own = made(tmp_path / "own", HOST)
    with pytest.raises(ConfigError, match="is valid from"):
        certificates.check(**own, host=HOST)
    server = server_operator.ServerFile(
        address=f"{HOST}:9000", certificate=own["certificate"], key=own["key"], ca=own["ca"]
    )
    server_operator._watch_certificate(server)
    assert capsys.readouterr().err.count("has ended") == 2


def test_a_renewed_certificate_holds_for_the_sites_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    server_operator.server_init(folder, address=f"{HOST}:9000")
    before = (folder / "server.crt").read_bytes()
    authority = (folder / "ca.crt").read_bytes()
    assert "is valid for" in server_operator.renew(folder)
    assert (folder / "server.crt").read_bytes() != before
    assert (folder / "ca.crt").read_bytes() == authority
    certificates.check(folder / "server.crt", folder / "server.key", folder / "ca.crt", host=HOST)
    assert (folder / "server.key").stat().st_mode & 0o777 == 0o600
    server_operator.server_init(tmp_path / "open", address="127.0.0.1:9000", insecure=True)

    with pytest.raises(ConfigError, match="no authority of its own"):
        server_operator.renew(tmp_path / "open")


def test_flowers_programs_open_no_other_connection_and_keep_few_arenas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    found = programs.environment(tmp_path)
    assert found["FLWR_TELEMETRY_ENABLED"] == "0"
    assert found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert found["MALLOC_ARENA_MAX"] == "2"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")  # whoever knows better
    assert programs.environment(tmp_path)["MALLOC_ARENA_MAX"] == "8"


def test_flowers_programs_print_each_line_at_once_to_a_pipe(tmp_path: Path) -> None:
    printing = "import time; print('a line of the log'); time.sleep(20)"
    with subprocess.Popen(
        [sys.executable, "-c", printing],
        env=programs.environment(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a line of the log\n"
        assert process.poll() is None, "the program has not ended yet"
        process.kill()


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (
            '{"success": false, "error-message": "Connection to the SuperLink is unavailable"}',
            "is the server running",
        ),
        (
            '{"success": false, "error-message": "public key\\n already in use"}',
            "public key already in use",
        ),
        ("words", "words"),
    ],
)
def test_what_flowers_command_did_not_do_is_an_error(
    printed: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_operator.server_init(tmp_path / "server", address="127.0.0.1:9000")
    (tmp_path / "north.pub").write_text("ecdsa KEY north")
    monkeypatch.setattr(server_operator, "_flwr", lambda *_: printed)

    with pytest.raises(ConfigError, match=said):
        server_operator.register(tmp_path / "server", tmp_path / "north.pub")
    with pytest.raises(ConfigError, match=said):
        server_operator.status(tmp_path / "server")
    assert not (tmp_path / "server" / "names.json").exists()


def test_a_run_is_not_submitted_where_it_cannot_begin(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no server"):
        server_operator.submit(RunConfig(), tmp_path / "none", out=tmp_path / "run")
    server_operator.server_init(tmp_path / "server", address="127.0.0.1:9000")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")

    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume"):
        server_operator.submit(RunConfig(), tmp_path / "server", out=tmp_path / "run")


def test_the_newest_run_is_meant_where_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no server"):
        server_operator.newest(tmp_path)
    server_operator.server_init(tmp_path, address="127.0.0.1:9000")
    with pytest.raises(ConfigError, match="no run was submitted"):
        server_operator.newest(tmp_path)
    for number in ("91", "17"):
        names.add(tmp_path / names.FILE, "runs", number, "run")
    assert server_operator.newest(tmp_path) == 17


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (
            "finished:failed",
            ClientError,
            r"run 17 \(hospitals\) has failed; `fluvial submit --resume` continues it",
        ),
        ("finished:stopped", ClientError, "has stopped"),
        ("", ConfigError, "has no run 17"),
        ("finished:completed", None, ""),
    ],
)
def test_the_log_of_a_run_without_a_result_ends_with_an_error(
    status: str,
    error: type[Exception] | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[list[str]] = []
    monkeypatch.setattr(
        "fluvial.flower.server_operator.subprocess.run", lambda command, **_: shown.append(command)
    )
    runs = [{"run-id": 17, "name": "hospitals", "status": status}] if status else []
    monkeypatch.setattr(server_operator, "status", lambda _: {"runs": runs, "sites": []})

    (tmp_path / "server.toml").write_text('address = "127.0.0.1:8000"\nport = 8000\n')
    with pytest.raises(error, match=said) if error else nullcontext():
        server_operator.logs(tmp_path, 17, follow=False)
    assert shown[0][1:3] == ["log", "17"]


def test_clocks_that_differ_are_told_before_flower_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(site_operator, "_clock", lambda: 1_000_000.0)

    def date(ahead: float) -> str:
        return email.utils.formatdate(1_000_000.0 - ahead, usegmt=True)

    for ahead in (0, 4, -300):
        site_operator._compare_clocks(date(ahead), "there:1")
    site_operator._compare_clocks(None, "there:1")
    with pytest.raises(ConfigError, match="clock is 60 s ahead of that of the server at there:1"):
        site_operator._compare_clocks(date(60), "there:1")
    with pytest.raises(ConfigError, match="clock is 400 s behind"):
        site_operator._compare_clocks(date(-400), "there:1")


def test_a_site_runs_once(tmp_path: Path) -> None:
    site_operator.site_init(
        tmp_path / "north", name="north", server="127.0.0.1:9", ca=None, insecure=True
    )
    with (tmp_path / "north" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="a process of site 'north' is running already"):
            site_operator.site_start(tmp_path / "north")


def test_a_new_sites_file_says_when_edits_hold_and_that_baselines_are_methods(
    tmp_path: Path,
) -> None:
    site_operator.site_init(tmp_path, name="north", server="127.0.0.1:9", ca=None, insecure=True)
    text = (tmp_path / "site.toml").read_text()
    assert "Changes take effect when the site is started again" in text.splitlines()[0]
    methods = next(line for line in text.splitlines() if line.startswith("# methods = "))
    assert '"local"' in methods
    assert "baselines" in methods
