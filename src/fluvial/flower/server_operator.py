"""Commands of the server's operator over Flower's own programs, by default with TLS and node keys.

A server's folder holds server.toml, ca.crt, ca.key, server.crt, server.key, channel.key,
channel.pub, superlink.db, names.json, submitted/, flower/ (home of Flower's programs) and runs/.
"""

import json
import os
import secrets
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from fluvial.data.site_names import plain_name
from fluvial.errors import ClientError, ConfigError
from fluvial.flower import certificates, channel_keys, names
from fluvial.flower.programs import environment, program, split_address, warn
from fluvial.flower.stream.place import Place
from fluvial.settings import FilePath, Settings
from fluvial.storage import toml
from fluvial.storage.files import make_folder, read_object, write_atomically, writing
from fluvial.storage.run_files import CONFIG, JsonObject
from fluvial.wire.channel import PublicIdentity

if TYPE_CHECKING:
    from fluvial.runs.config import RunConfig

WARN_DAYS = 30
"""Days before the end of a certificate from which the server warns when it starts."""
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
submitted = ""
"""
_SUBMITTED = "submitted"
"""Folder of what was submitted, in the server's; Flower sends each site the settings of its app, so
these have no more than the name of a file there."""


class ServerFile(Settings):
    """The settings in server.toml."""

    host: str = "0.0.0.0"
    """Address of the network interface that the server listens on; 0.0.0.0 means all."""
    port: int = Field(8000, ge=1, le=65535)
    """Port that the server listens on."""
    stream_port: int | None = Field(None, ge=0, le=65535)
    """Port of the live stream, which a run opens beside `port` if its method converses; unset, the
    number after `port`, and 0 is any free port."""
    address: str
    """Address HOST:PORT at which sites reach the server."""
    insecure: bool = False
    """Operation without TLS and keys, for trials on one machine; any process can be a site."""
    certificate: FilePath = Path("server.crt")
    """Certificate of the server. A relative path, as in `key` and `ca`, starts at server.toml."""
    key: FilePath = Path("server.key")
    """Private key of the certificate."""
    ca: FilePath = Path("ca.crt")
    """Certificate of the authority that signed the server's certificate; sites receive a copy."""


def server_init(
    folder: Path,
    *,
    address: str,
    insecure: bool = False,
    certificate: Path | None = None,
    key: Path | None = None,
    ca: Path | None = None,
) -> list[str]:
    """Make a server's folder and return the next steps, one line each.

    Raises `ConfigError` if the folder holds a server, or if the given files do not fit together.
    """
    host, port = split_address(address)
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
            lines.append(
                f'host = "{host}"  # Flower\'s own processes come here too; '
                "the certificate has no 127.0.0.1"
            )
            local = False
    elif any(own.values()):
        raise ConfigError("--certificate, --key and --ca belong together; give all three, or none")

    if local:
        lines.append(
            'host = "127.0.0.1"  # reachable from this machine only; "0.0.0.0" is everywhere'
        )

    with writing(folder, "choose another folder"):
        make_folder(folder)
    if insecure:
        lines.append(
            "insecure = true       # no TLS, no node keys: for experiments on one machine only"
        )
    else:
        channel_keys.make_server_key(folder)
        if not certificate:
            certificates.make_authority(folder)
            certificates.make_server_certificate(folder, _hosts(host))

    (folder / "server.toml").write_text("\n".join(lines) + "\n")
    _connection(folder, read_server_file(folder))
    return [
        f"server in {folder}; start it:  fluvial server start {folder}",
        *(
            []
            if insecure
            else [f"give every site {ca or folder / 'ca.crt'} and {folder / channel_keys.PUBLIC}"]
        ),
    ]


def read_server_file(folder: Path) -> ServerFile:
    """Read and check server.toml in `folder`; raise `ConfigError`."""
    path = folder / "server.toml"
    table = toml.load(path, f"{folder} holds no server; `fluvial server init` makes one")
    server = toml.read(ServerFile, table, str(path))
    here = folder.resolve()

    return server.model_copy(
        update={
            "certificate": here / server.certificate,
            "key": here / server.key,
            "ca": here / server.ca,
        }
    )


def stream_place(folder: Path) -> Place:
    """Return where the runs of the server in `folder` open the live stream, with its
    certificate."""
    server = read_server_file(folder)
    port = server.port + 1 if server.stream_port is None else server.stream_port
    if server.insecure:
        return Place(server.host, port)
    return Place(server.host, port, server.certificate, server.key)


def renew(folder: Path) -> str:
    """Renew the server's certificate with the same authority, so that sites need no change.

    Returns one line about the new certificate.
    """
    server = read_server_file(folder)
    if server.insecure or not (folder / "ca.key").exists():
        raise ConfigError(
            f"{folder} has no authority of its own; renew the certificate where it was made"
        )

    certificates.make_server_certificate(folder, _hosts(split_address(server.address)[0]))
    days = certificates.days_left(server.certificate)
    return f"{server.certificate} is valid for {days:.0f} days; start the server again"


def server_start(folder: Path) -> None:
    """Replace this process by Flower's SuperLink; does not return."""
    server = read_server_file(folder)
    command = [program("flower-superlink"), "--host", server.host, "--port", str(server.port)]
    command += [
        "--database",
        str(folder.resolve() / "superlink.db"),
        "--disable-runtime-dependency-installation",
    ]

    if server.insecure:
        warn("server.toml says insecure = true: no TLS and no node keys")
        command += ["--insecure"]
    else:
        _watch_certificate(server)
        channel_keys.make_server_key(folder)  # folders of an older version have none
        command += ["--ssl-certfile", str(server.certificate), "--ssl-keyfile", str(server.key)]
        command += ["--ssl-ca-certfile", str(server.ca), "--enable-supernode-auth"]

    os.umask(0o077)
    os.execve(command[0], command, environment(folder))


def register(folder: Path, public_key: Path) -> str:
    """Register a site's public key, so that it can join, and return one line about it."""
    if not public_key.exists():
        raise ConfigError(
            f"there is no public key {str(public_key)!r}; the site's operator has it as NAME.pub"
        )

    # The words of a public key: its type, the key, and the site's name.
    words = public_key.read_bytes()[:10_000].decode(errors="replace").split()
    name = words[2] if len(words) > 2 else public_key.stem
    name = plain_name(name, str(public_key))
    answer = _flwr_json(folder, "supernode", "register", str(public_key.resolve()), _CONNECTION)
    number = str(answer.get("node-id", ""))

    if not number.isdigit():
        raise ConfigError(f"{public_key} was not registered: {answer}")

    public = PublicIdentity.parse(b" ".join(word.encode() for word in words[:2]))
    names.add(folder / names.FILE, "keys", number, public.data.decode())
    names.add(folder / names.FILE, "sites", number, name)
    spelled = "" if name.isascii() else f", {name!a},"  # letters of other scripts look alike
    return f"site {name}{spelled} may join (node {number})"


def check_submission(folder: Path, *, out: Path, resume: bool) -> None:
    """Raise `ConfigError` if `folder` is no server's, or if `out` holds a run and `resume` is
    False."""
    read_server_file(folder)
    if (out / CONFIG).exists() and not resume:
        raise ConfigError(
            f"{out} already holds a run; continue it with --resume, or choose another folder with "
            "--out"
        )


def submit(config: "RunConfig", folder: Path, *, out: Path, resume: bool = False) -> int:
    """Start a run on the server of `folder` and return Flower's number of the run.

    Raises `ConfigError` if `out` holds a run and `resume` is False, or if the server refuses it.
    """
    check_submission(folder, out=out, resume=resume)
    app = folder / "app"
    app.mkdir(exist_ok=True)
    (app / "pyproject.toml").write_text(_APP)
    token = secrets.token_hex(16)
    given = {
        "config": config.model_dump(mode="json", exclude_unset=True),
        "folder": str(out.resolve()),
        "resume": resume,
    }
    make_folder(folder / _SUBMITTED)
    write_atomically(folder / _SUBMITTED / f"{token}.json", json.dumps(given).encode())
    settings = (folder / _SUBMITTED).resolve() / "settings.toml"
    settings.write_text(f'submitted = "{token}"\n')
    answer = _flwr_json(
        folder, "run", str(app.resolve()), _CONNECTION, "--run-config", str(settings)
    )

    if "run-id" not in answer:
        raise ConfigError(f"the server did not accept the run: {answer}")

    names.add(folder / names.FILE, "runs", str(answer["run-id"]), out.name)
    return int(answer["run-id"])


def read_submission(token: str) -> tuple[Path, JsonObject]:
    """Return the server's folder, and the configuration, folder and resume of what was submitted.

    The caller is a program of Flower's that the server has started, see `environment`.
    """
    folder = Path(os.environ["FLWR_HOME"]).parent
    given = read_object(folder / _SUBMITTED / f"{token}.json") if token.isalnum() else None
    if given is None:
        raise ConfigError(f"nothing was submitted to {folder} as {token!r:.40}; submit the run")
    return folder, given


def status(folder: Path) -> JsonObject:
    """Return the runs and sites that Flower's server lists, with their names."""
    nodes = _flwr_json(folder, "supernode", "list", _CONNECTION).get("nodes", [])
    runs = _flwr_json(folder, "list", _CONNECTION).get("runs", [])
    named = names.read(folder / names.FILE)

    return {
        "runs": [{"name": named["runs"].get(str(run["run-id"]), ""), **run} for run in runs],
        "sites": [{"name": named["sites"].get(str(node["node-id"]), ""), **node} for node in nodes],
    }


def newest(folder: Path) -> int:
    """Return the number of the run submitted last; raise `ConfigError` if there is none."""
    read_server_file(folder)
    runs = names.read(folder / names.FILE)["runs"]

    if not runs:
        raise ConfigError(f"no run was submitted to {folder} yet; `fluvial submit` starts one")
    return int(list(runs)[-1])


def logs(folder: Path, run: int, *, follow: bool) -> None:
    """Print the server's log of a run.

    Raises `ClientError` if the run has failed or was stopped, and `ConfigError` if the server has
    no such run.
    """
    _connection(folder, read_server_file(folder))
    command = [program("flwr"), "log", str(run), _CONNECTION, "--stream" if follow else "--show"]
    subprocess.run(command, env=environment(folder), check=False)
    listed = next((row for row in status(folder)["runs"] if int(row["run-id"]) == run), None)

    if listed is None:
        raise ConfigError(
            f"the server of {folder} has no run {run}; `fluvial status {folder}` lists them"
        )

    if listed["status"] in ("finished:failed", "finished:stopped"):
        end = listed["status"].partition(":")[2]
        raise ClientError(
            f"run {run} ({listed['name']}) has {end}; `fluvial submit --resume` continues it"
        )


def stop(folder: Path, run: int) -> str:
    """Stop a run, which can be resumed from its last checkpoint, and return Flower's message."""
    return _flwr(folder, "stop", str(run), _CONNECTION)


def _hosts(host: str) -> list[str]:
    """Return the names in a server's certificate: its address, and those for Flower's processes."""
    return list(dict.fromkeys([host, "localhost", "127.0.0.1"]))


def _watch_certificate(server: ServerFile) -> None:
    """Warn about a certificate that ends soon or has ended."""
    for path, remedy in ((server.certificate, "renew it"), (server.ca, "make a new server folder")):
        left = certificates.days_left(path)
        if left < WARN_DAYS:
            warn(f"{path} {'has ended' if left < 0 else f'ends in {left:.0f} days'}; {remedy}")


def _connection(folder: Path, server: ServerFile) -> None:
    """Write the address of the server where Flower's command reads it."""
    lines = ["[superlink]", f'default = "{_CONNECTION}"', "", f"[superlink.{_CONNECTION}]"]
    lines += [f'address = "{server.address}"']
    lines += (
        ["insecure = true"]
        if server.insecure
        else [f'root-certificates = "{server.ca}"', "insecure = false"]
    )
    home = folder / "flower"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text("\n".join(lines) + "\n")


def _flwr(folder: Path, *arguments: str) -> str:
    """Return the output of Flower's command; raise `ConfigError` with its message if it fails."""
    _connection(folder, read_server_file(folder))
    done = subprocess.run(
        [program("flwr"), *arguments],
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=120,
    )

    if done.returncode != 0:
        raise ConfigError(
            f"flwr {arguments[0]} failed: {(done.stderr or done.stdout).strip()[-800:]}"
        )

    return done.stdout


def _flwr_json(folder: Path, *arguments: str) -> JsonObject:
    """Return the JSON that Flower's command prints; raise `ConfigError` with the reason else."""
    text = _flwr(folder, *arguments, "--format", "json")
    start = text.find("{")
    answer: JsonObject = json.loads(text[start:]) if start >= 0 else {}

    if not answer.get("success"):
        reason = " ".join(str(answer.get("error-message") or text).split())
        if "unavailable" in reason or "nable to connect" in reason or "refused" in reason:
            reason = f"{reason}; is the server running? fluvial server start {folder}"
        raise ConfigError(f"flwr {arguments[0]}: {reason[-800:]}")

    return answer
