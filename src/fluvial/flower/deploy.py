"""What an operator does: thin over Flower's own programs, with TLS and node keys unless the insecure mode is asked for.

server folder   server.toml, ca.crt, ca.key, server.crt, server.key, superlink.db, names.json, flower/ (its home), runs/
site folder     site.toml, NAME.key, NAME.pub, ca.crt, runs/ (what the site keeps), outgoing.jsonl
"""

import email.utils
import fcntl
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fluvial.config import RunConfig
from fluvial.errors import ClientError, ConfigError
from fluvial.flower import OUT_OF_STEP, QUIET, certificates
from fluvial.settings import Settings
from fluvial.sites import write_atomically
from fluvial.station import SiteFile, read_site_file

_SETTINGS = QUIET | {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5"}
"""Nor an installation while a run runs."""
_MEMORY = {"MALLOC_ARENA_MAX": "2"}
"""Of glibc, where the environment does not say otherwise: every thread's own arena keeps what a large message took."""
AHEAD_S, BEHIND_S = 5.0, 305.0
"""Flower refuses the signature of a site whose clock is further from the server's."""
WARN_DAYS = 30
"""Before a certificate ends, the server says so when it starts."""
_CONNECTION = "fluvial"
_APP = """[project]
name = "fluvial-run"
version = "1.0.0"
description = "A run of Fluvial; the code is the installed package"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fluvial"

[tool.flwr.app.components]
serverapp = "fluvial.flower.server:app"
clientapp = "fluvial.flower.site:app"

[tool.flwr.app.config]
config = ""
folder = ""
names = ""
resume = false
"""


class ServerFile(Settings):
    """server.toml."""

    host: str = "0.0.0.0"
    """Of the network interface that the server listens on; this one means all."""
    port: int = 8000
    address: str
    """Under which the sites reach it."""
    insecure: bool = False
    """No TLS and no keys, so anybody may be a site: for trials on one machine."""
    certificate: Path = Path("server.crt")
    """Of the server; a relative path lies beside server.toml, in all three."""
    key: Path = Path("server.key")
    """Of the certificate."""
    ca: Path = Path("ca.crt")
    """The authority that signed it, which the sites get."""


# -- the server's operator --------------------------------------------------------------------------------------------


def server_init(
    folder: Path,
    *,
    address: str,
    insecure: bool = False,
    certificate: Path | None = None,
    key: Path | None = None,
    ca: Path | None = None,
) -> list[str]:
    """Make a server's folder; returns what to do next. Raises `ConfigError` if one is there already."""
    host, port = _address(address)
    if (folder / "server.toml").exists():
        raise ConfigError(f"{folder} holds a server already; start it, or choose another folder")
    own = {"certificate": certificate, "key": key, "ca": ca}
    for option, path in own.items():
        if path is not None and not path.exists():
            raise ConfigError(f"--{option}: there is no file {str(path)!r}")
    lines = [f'address = "{host}:{port}"', f"port = {port}"]
    local = host in ("127.0.0.1", "localhost")
    if certificate and key and ca:
        certificates.check(certificate, key, ca, host=host)
        lines += [f'{option} = "{Path(str(path)).resolve()}"' for option, path in own.items()]
        if not certificates.names(certificate, "127.0.0.1"):
            lines.append(f'host = "{host}"  # Flower\'s own processes come here too; the certificate has no 127.0.0.1')
            local = False
    elif any(own.values()):
        raise ConfigError("--certificate, --key and --ca belong together; give all three, or none")
    if local:
        lines.append('host = "127.0.0.1"  # reachable from this machine only; "0.0.0.0" is everywhere')
    folder.mkdir(parents=True, exist_ok=True)
    if insecure:
        lines.append("insecure = true       # no TLS, no node keys: for experiments on one machine only")
    elif not certificate:
        certificates.make_authority(folder)
        certificates.make_server_certificate(folder, _hosts(host))
    (folder / "server.toml").write_text("\n".join(lines) + "\n")
    _connection(folder, read_server_file(folder))
    return [
        f"server in {folder}; start it:  fluvial server start {folder}",
        *([] if insecure else [f"give every site {ca or folder / 'ca.crt'}"]),
    ]


def read_server_file(folder: Path) -> ServerFile:
    """server.toml of a folder; raises `ConfigError`."""
    path = folder / "server.toml"
    try:
        found = ServerFile.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no server; `fluvial server init` makes one") from None
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from error
    here = folder.resolve()
    return found.model_copy(update={name: here / getattr(found, name) for name in ("certificate", "key", "ca")})


def renew(folder: Path) -> str:
    """Make the server's certificate anew, signed by the same authority, so that sites need nothing new."""
    server = read_server_file(folder)
    if server.insecure or not (folder / "ca.key").exists():
        raise ConfigError(f"{folder} has no authority of its own; renew the certificate where it was made")
    certificates.make_server_certificate(folder, _hosts(_address(server.address)[0]))
    days = certificates.days_left(server.certificate)
    return f"{server.certificate} is valid for {days:.0f} days; start the server again"


def server_start(folder: Path) -> None:
    """Become Flower's SuperLink; does not return."""
    server = read_server_file(folder)
    command = [_program("flower-superlink"), "--host", server.host, "--port", str(server.port)]
    command += ["--database", str(folder.resolve() / "superlink.db"), "--disable-runtime-dependency-installation"]
    if server.insecure:
        _warn("server.toml says insecure = true: no TLS and no node keys")
        command += ["--insecure"]
    else:
        _watch_certificate(server)
        command += ["--ssl-certfile", str(server.certificate), "--ssl-keyfile", str(server.key)]
        command += ["--ssl-ca-certfile", str(server.ca), "--enable-supernode-auth"]
    os.execve(command[0], command, _environment(folder))


def register(folder: Path, public_key: Path) -> str:
    """Let the site with this key join; returns what was done."""
    if not public_key.exists():
        raise ConfigError(f"there is no public key {str(public_key)!r}; the site's operator has it as NAME.pub")
    found = _asked(folder, "supernode", "register", str(public_key.resolve()), _CONNECTION)
    number = str(found.get("node-id", ""))
    if not number.isdigit():
        raise ConfigError(f"{public_key} was not registered: {found}")
    words = public_key.read_text().split()  # type, key, and as a comment the site's name
    name = words[2] if len(words) > 2 else public_key.stem
    _name(folder, "sites", number, name)
    return f"site {name} may join (node {number})"


def submit(config: RunConfig, folder: Path, *, out: Path, resume: bool = False) -> int:
    """Start a run on the server of `folder`; returns Flower's number of it. Raises `ConfigError`."""
    read_server_file(folder)
    if (out / "config.json").exists() and not resume:
        raise ConfigError(f"{out} already holds a run; go on with it by --resume, or choose another folder with --out")
    app = folder / "app"
    app.mkdir(exist_ok=True)
    (app / "pyproject.toml").write_text(_APP)
    given = {
        "config": json.dumps(config.model_dump(mode="json", exclude_unset=True)),
        "folder": str(out.resolve()),
        "names": str(folder.resolve() / "names.json"),
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in given.items()]
    lines.append(f"resume = {'true' if resume else 'false'}")
    (folder / "submitted.toml").write_text("\n".join(lines) + "\n")
    settings = str(folder.resolve() / "submitted.toml")
    found = _asked(folder, "run", str(app.resolve()), _CONNECTION, "--run-config", settings)
    if "run-id" not in found:
        raise ConfigError(f"the server did not take the run: {found}")
    _name(folder, "runs", str(found["run-id"]), out.name)
    return int(found["run-id"])


def status(folder: Path) -> dict[str, Any]:
    """Runs and sites as Flower's server knows them, with the names that they were submitted and registered under."""
    nodes = _asked(folder, "supernode", "list", _CONNECTION).get("nodes", [])
    runs = _asked(folder, "list", _CONNECTION).get("runs", [])
    names = _names(folder)
    return {
        "runs": [{"name": names["runs"].get(str(run["run-id"]), ""), **run} for run in runs],
        "sites": [{"name": names["sites"].get(str(node["node-id"]), ""), **node} for node in nodes],
    }


def newest(folder: Path) -> int:
    """The run that was submitted last; raises `ConfigError` if there is none."""
    read_server_file(folder)
    runs = _names(folder)["runs"]
    if not runs:
        raise ConfigError(f"no run was submitted to {folder} yet; `fluvial submit` starts one")
    return int(list(runs)[-1])


def logs(folder: Path, run: int, *, follow: bool) -> None:
    """Print what a run's server wrote; raises `ClientError` where it ended otherwise than with a result."""
    command = [_program("flwr"), "log", str(run), _CONNECTION, "--stream" if follow else "--show"]
    subprocess.run(command, env=_environment(folder), check=False)
    found = next((each for each in status(folder)["runs"] if int(each["run-id"]) == run), None)
    if found is None:
        raise ConfigError(f"the server of {folder} has no run {run}; `fluvial status {folder}` lists them")
    if found["status"] in ("finished:failed", "finished:stopped"):
        how = found["status"].partition(":")[2]
        raise ClientError(f"run {run} ({found['name']}) has {how}; `fluvial submit --resume` goes on with it")


def stop(folder: Path, run: int) -> str:
    """End a run; what it had reached can be resumed."""
    return _flwr(folder, "stop", str(run), _CONNECTION)


# -- a site's operator ------------------------------------------------------------------------------------------------


def site_init(folder: Path, *, name: str, server: str, ca: Path | None, insecure: bool = False) -> list[str]:
    """Make a site's folder; returns what to do next."""
    host, port = _address(server)
    if (folder / "site.toml").exists():
        raise ConfigError(f"{folder} holds a site already; start it, or choose another folder")
    if (ca is None) != insecure:
        raise ConfigError("give --ca with the server's ca.crt, or ask for --insecure by name; not both")
    if ca is not None and not ca.exists():
        raise ConfigError(f"--ca: there is no file {str(ca)!r}; the server's operator has it")
    SiteFile(name=name)  # a name that cannot be used is refused before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f'name = "{name}"', f'server = "{host}:{port}"', 'folder = "."']
    if ca is not None:
        shutil.copy(ca, folder / "ca.crt")
        _, public = certificates.make_node_key(folder, name)
        lines += ['ca = "ca.crt"', f'key = "{name}.key"']
    lines += [
        '# model = "/models/llama"          # a local copy of the base model that runs name',
        "# [data]",
        '# source = "records.jsonl"         # this site\'s records, beside this file; without it, what the run names',
        "# [allow]                          # what this site takes part in; empty allows everything",
        '# methods = ["fedavg", "cgfedllm"]',
        '# tensors = ["*.lora_*"]',
        "# max_bytes_up_per_round = 20_000_000",
    ]
    (folder / "site.toml").write_text("\n".join(lines) + "\n")
    read_site_file(folder / "site.toml")
    done = [f"site in {folder}; its settings are in {folder / 'site.toml'}"]
    if ca is not None:
        done.append(
            f"send {public} to the server's operator, who runs:  fluvial site register SERVER-FOLDER {public.name}"
        )
    return [*done, f"then start it:  fluvial site start {folder}"]


def site_start(folder: Path, *, warm: bool = True, port: int | None = None) -> int:
    """Run a SuperNode and, `warm`, the process that answers for it, until one of them ends; returns the exit code."""
    site = read_site_file(folder / "site.toml")
    with _alone(folder, site):
        while (code := _run_site(folder, site, warm=warm, port=port)) == OUT_OF_STEP:
            pass
        return code


@contextmanager
def _alone(folder: Path, site: SiteFile) -> Iterator[None]:
    """No second process may answer for a site; forks hold the lock too, so one that was killed is over before."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"a process of site {site.name!r} is running already in {folder}; end it first") from None
        yield


def _run_site(folder: Path, site: SiteFile, *, warm: bool, port: int | None) -> int:
    _try_connection(site)
    port = port or _free_port()
    serve: Any = None
    if warm:
        try:
            from fluvial.flower.executor import serve
        except ImportError as error:
            _warn(f"this Flower has another inside ({error}); sites answer by its stock execution, which is slower")
    command = [_program("flower-supernode"), "--superlink", site.server, "--port", str(port)]
    command += ["--node-config", f'site-file="{(folder / "site.toml").resolve()}"']
    command += ["--isolation", "process" if serve else "subprocess"]
    if site.ca is None:
        _warn("site.toml names no ca: no TLS and no node key")
        command += ["--insecure"]
    else:
        command += ["--root-certificates", str(site.ca), "--auth-supernode-private-key", str(site.key)]
    node = subprocess.Popen(command, env=_environment(folder))
    worker = None
    if serve:
        worker = os.fork()
        if worker == 0:
            os.environ.update(_environment(folder))
            serve(f"127.0.0.1:{port}", site, parent=node.pid)
            os._exit(0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: node.terminate())
    while (code := node.poll()) is None:
        if worker and (ended := os.waitpid(worker, os.WNOHANG))[0]:
            node.terminate()
            node.wait()
            if os.waitstatus_to_exitcode(ended[1]) == OUT_OF_STEP:
                return OUT_OF_STEP
            _warn("the process that answers for this site has ended, and the site with it")
            return 1
        time.sleep(0.2)
    if worker:
        os.kill(worker, signal.SIGTERM)
        os.waitpid(worker, 0)
    if code not in (0, -signal.SIGTERM):
        _warn(
            f"the SuperNode ended with code {code}; if it says 305, this site's key is not registered, or its last "
            "process went less than 60 s ago, or another one with this key is there"
        )
    return code


# -- Flower's programs ------------------------------------------------------------------------------------------------


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"address {text!r}: write HOST:PORT, such as fluvial.example.org:8000")
    return host, int(port)


def _hosts(host: str) -> list[str]:
    """What a server's certificate names: its address, and where Flower's own processes reach it."""
    return list(dict.fromkeys([host, "localhost", "127.0.0.1"]))


def _watch_certificate(server: ServerFile) -> None:
    """Warn of a certificate that ends soon."""
    for path, remedy in ((server.certificate, "renew it"), (server.ca, "make a new server folder")):
        left = certificates.days_left(path)
        if left < WARN_DAYS:
            _warn(f"{path} {'has ended' if left < 0 else f'ends in {left:.0f} days'}; {remedy}")


def _try_connection(site: SiteFile) -> None:
    """Raise `ConfigError` where Flower would try for ever: TLS on one side only, a bad certificate or clock."""
    host, port = _address(site.server)
    for path in (site.ca, site.key):
        if path is not None and not path.exists():
            raise ConfigError(f"site {site.name!r}: there is no file {str(path)!r}")
    context = ssl.create_default_context(cafile=site.ca)
    if site.ca is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection(host, port, timeout=5, context=context)
    try:
        connection.connect()
        if site.ca is None:
            raise ConfigError(
                f"the server at {site.server} speaks TLS; get its ca.crt and name it in site.toml, or make the "
                "site again with --ca"
            )
        connection.request("HEAD", "/")
        _compare_clocks(connection.getresponse().getheader("Date"), site.server)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"the certificate of the server at {site.server} does not hold: {error.verify_message}; checked with "
            f"{site.ca}"
        ) from None
    except ssl.SSLError as error:
        if site.ca is not None:
            raise ConfigError(
                f"the server at {site.server} does not speak TLS ({error.reason}); if it was made with --insecure, "
                "make the site so too"
            ) from None
    except (OSError, http.client.HTTPException):
        return  # the server is not there yet; the site goes on trying
    finally:
        connection.close()


def _compare_clocks(theirs: str | None, server: str) -> None:
    """Raise `ConfigError` where Flower would take no signature of ours, because it covers the time."""
    if theirs is None:
        return
    ahead = _clock() - email.utils.parsedate_to_datetime(theirs).timestamp()
    if not -BEHIND_S < ahead < AHEAD_S:
        raise ConfigError(
            f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of the server at "
            f"{server}; Flower takes {AHEAD_S:g} s ahead and {BEHIND_S:g} s behind, so set both by NTP"
        )


def _clock() -> float:
    return time.time()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise ConfigError(f"{name} is not installed; run pip install 'fluvial[flower]'")
    return found


def _environment(folder: Path) -> dict[str, str]:
    """Flower's home inside the folder, its own programs on the path, nothing that calls out."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**_MEMORY, **os.environ, **_SETTINGS, "PATH": path, "FLWR_HOME": str(folder.resolve() / "flower")}


def _connection(folder: Path, server: ServerFile) -> None:
    """Tell Flower's own command where the server is."""
    lines = ["[superlink]", f'default = "{_CONNECTION}"', "", f"[superlink.{_CONNECTION}]"]
    lines += [f'address = "{server.address}"']
    lines += ["insecure = true"] if server.insecure else [f'root-certificates = "{server.ca}"', "insecure = false"]
    home = folder / "flower"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text("\n".join(lines) + "\n")


def _flwr(folder: Path, *arguments: str) -> str:
    """The output of Flower's command; raises `ConfigError` with what it says when it fails."""
    _connection(folder, read_server_file(folder))
    done = subprocess.run(
        [_program("flwr"), *arguments], env=_environment(folder), capture_output=True, text=True, timeout=120
    )
    if done.returncode != 0:
        raise ConfigError(f"flwr {arguments[0]} failed: {(done.stderr or done.stdout).strip()[-800:]}")
    return done.stdout


def _asked(folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON that Flower's command prints; raises `ConfigError` with its reason where it did not succeed."""
    text = _flwr(folder, *arguments, "--format", "json")
    start = text.find("{")
    found: dict[str, Any] = json.loads(text[start:]) if start >= 0 else {}
    if not found.get("success"):
        said = " ".join(str(found.get("error-message") or text).split())
        if "unavailable" in said or "nable to connect" in said or "refused" in said:
            said = f"{said}; is the server running? fluvial server start {folder}"
        raise ConfigError(f"flwr {arguments[0]}: {said[-800:]}")
    return found


def _names(folder: Path) -> dict[str, dict[str, str]]:
    """What people call the runs and sites that Flower knows by number."""
    path = folder / "names.json"
    return {"runs": {}, "sites": {}, **(json.loads(path.read_text()) if path.exists() else {})}


def _name(folder: Path, what: str, number: str, name: str) -> None:
    names = _names(folder)
    names[what][number] = name
    write_atomically(folder / "names.json", json.dumps(names, indent=2).encode())


def _warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")


__all__: Sequence[str] = (
    "logs",
    "newest",
    "register",
    "renew",
    "server_init",
    "server_start",
    "site_init",
    "site_start",
    "status",
    "stop",
    "submit",
)
