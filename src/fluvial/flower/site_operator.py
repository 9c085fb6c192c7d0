"""Commands of a site's operator over Flower's SuperNode, by default with TLS and a node key.

A site's folder holds site.toml, NAME.key, NAME.pub, ca.crt, runs/ (the site's state) and
outgoing.jsonl (the log of all that it sent).
"""

import email.utils
import fcntl
import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluvial.data.site_names import plain_name
from fluvial.errors import ConfigError
from fluvial.flower import OUT_OF_STEP, certificates, channel_keys
from fluvial.flower.guard import GRACE_S, alive, guarded
from fluvial.flower.programs import environment, program, split_address, warn
from fluvial.site_process.site_file import SiteFile, read_site_file
from fluvial.storage.files import make_folder, private, sweep, writing

AHEAD_S = 5.0
"""Seconds that a site's clock may be ahead of the server's; Flower refuses signatures beyond."""
BEHIND_S = 305.0
"""Seconds that a site's clock may be behind the server's; Flower refuses signatures beyond."""


def site_init(
    folder: Path,
    *,
    name: str,
    server: str,
    ca: Path | None,
    channel_key: Path | None = None,
    insecure: bool = False,
) -> list[str]:
    """Make a site's folder and return the next steps, one line each; raise `ConfigError`.

    `channel_key` is the server's channel.pub, whose fingerprint the site's file pins.
    """
    host, port = split_address(server)
    if (folder / "site.toml").exists():
        raise ConfigError(f"{folder} holds a site already; start it, or choose another folder")
    if (ca is None) != insecure:
        raise ConfigError("give either --ca with the server's ca.crt, or --insecure")

    if ca is not None and not ca.exists():
        raise ConfigError(f"--ca: there is no file {str(ca)!r}; the server's operator has it")
    if ca is not None:
        certificates.check_authority(ca)
    if channel_key is not None and insecure:
        raise ConfigError("--channel-key is without effect with --insecure; give one of them")

    pinned = channel_keys.read_public(channel_key) if channel_key else None

    name = plain_name(name, "--name")
    with writing(folder, "choose another folder"):
        make_folder(folder)
    lines = ["## Changes take effect when the site is started again: fluvial site start FOLDER"]
    lines += [f'name = "{name}"', f'server = "{host}:{port}"', 'folder = "."']

    if ca is not None:
        shutil.copy(ca, folder / "ca.crt")
        _, public = certificates.make_node_key(folder, name)
        lines += ['ca = "ca.crt"', f'key = "{name}.key"']
        if pinned is not None:
            lines.append(f'server_fingerprint = "{pinned.fingerprint}"')

    lines += [
        '# model = "/models/llama"          # a local copy of the base model that runs name',
        "# [data]",
        '# source = "records.jsonl"         # this site\'s records, beside this file; they replace '
        "the run's",
        '# heldout_source = "test.jsonl"    # records to measure on; unset, a share is held out',
        '# encoding = "cp1252"              # text files that are not UTF-8',
        '# delimiter = ";"                  # between the columns of CSV files',
        '# columns = { prompt = "question", completion = "answer" } # our field = your column',
        '# numbers = "text"                # JSON numbers in place of a text, such as a label 0',
        '# chat_template = "plain"         # of conversations; unset, as in the run, or the '
        "tokenizer's",
        '# read_as = "prompt_completion"   # conversations of one question, without a template',
        "# [allow]                          # runs that this site takes part in; empty allows all",
        '# methods = ["fedavg", "local"]   # with the baselines that runs compare with',
        '# tensors = ["*.lora_*"]',
        '# run_paths = ["/data/shared/*"]  # paths that a run may name here; without it, none',
        "# max_bytes_up_per_round = 20_000_000",
    ]
    (folder / "site.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    read_site_file(folder / "site.toml")
    done = [f"site in {folder}; its settings are in {folder / 'site.toml'}"]

    if ca is not None:
        done.append(
            f"send {public} to the server's operator, who runs:  "
            f"fluvial site register SERVER-FOLDER {public.name}"
        )

    return [*done, f"then start it:  fluvial site start {folder}"]


def site_start(folder: Path, *, warm: bool = True, port: int | None = None) -> int:
    """Run a SuperNode and, if `warm`, its answering process; return the exit code when one ends."""
    site = read_site_file(folder / "site.toml")
    with private(), _alone(folder, site):
        sweep(site.folder, ["runs"])
        while (code := _run_site(folder, site, warm=warm, port=port)) == OUT_OF_STEP:
            pass
        return code


@contextmanager
def _alone(folder: Path, site: SiteFile) -> Iterator[None]:
    """Hold the lock of a site's folder; raise `ConfigError` if another process holds it.

    The file of the lock holds the numbers of the site's processes. Forks hold the lock too, so all
    processes of a killed site have ended when it is free.
    """
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"a process of site {site.name!r} is running already in {folder}"
                f"{_how_to_end(lock.read())}"
            ) from None

        _note_processes(folder, os.getpid())
        yield


def _note_processes(folder: Path, *processes: int) -> None:
    """Write the numbers of a site's processes into the file of its lock, first its own."""
    (folder / ".lock").write_text(" ".join(str(process) for process in processes))


def _how_to_end(noted: str) -> str:
    """Return the end of a message about a site that runs: its processes, and how to end them."""
    first, *others = [int(word) for word in noted.split() if word.isdigit()] or [0]
    if first and alive(first):
        return f": process {first}; end it with `kill {first}`"

    if not first:
        return "; end it first"

    left = " ".join(str(process) for process in others if alive(process))
    return (
        f": process {first} has ended, and what it started ends within {GRACE_S:g} s; start the "
        f"site again then{left and f', or end the rest with `kill -9 {left}`'}"
    )


def _run_site(folder: Path, site: SiteFile, *, warm: bool, port: int | None) -> int:
    _try_connection(site)
    port = port or _free_port()
    serve: Any = None

    if warm:
        try:
            from fluvial.flower.executor import serve
        except ImportError as error:
            warn(
                f"this version of Flower has other internals ({error}); the site answers by "
                "Flower's stock execution, which is slower"
            )

    command = [program("flower-supernode"), "--superlink", site.server, "--port", str(port)]
    command += ["--node-config", f'site-file="{(folder / "site.toml").resolve()}"']
    command += ["--isolation", "process" if serve else "subprocess"]

    if site.ca is None:
        warn("site.toml names no ca: no TLS and no node key")
        command += ["--insecure"]
    else:
        command += [
            "--root-certificates",
            str(site.ca),
            "--auth-supernode-private-key",
            str(site.key),
        ]

    own = os.getpid()
    node = subprocess.Popen(command, env=environment(folder))
    worker = None
    if serve:
        worker = os.fork()
        if worker == 0:
            os.environ.update(environment(folder))
            serve(f"127.0.0.1:{port}", site, parent=own)
            os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: node.terminate())

    children = (node.pid, worker) if worker else (node.pid,)
    _note_processes(folder, own, *children)
    with guarded(*children):
        return _wait(node, worker)


def _wait(node: "subprocess.Popen[bytes]", worker: int | None) -> int:
    """Wait until a process of the site ends, end the other, and return the exit code."""
    while (code := node.poll()) is None:
        if worker and (ended := os.waitpid(worker, os.WNOHANG))[0]:
            node.terminate()
            node.wait()
            if os.waitstatus_to_exitcode(ended[1]) == OUT_OF_STEP:
                return OUT_OF_STEP
            warn("the answering process of this site has ended, and the site with it")
            return 1

        time.sleep(0.2)

    if worker:
        os.kill(worker, signal.SIGTERM)
        os.waitpid(worker, 0)

    if code not in (0, -signal.SIGTERM):
        warn(
            f"the SuperNode ended with code {code}; if it says 305, this site's key is not "
            "registered, or its last process ended less than 60 s ago, or another process uses "
            "this key"
        )

    return code


def _try_connection(site: SiteFile) -> None:
    """Raise `ConfigError` for errors that Flower would retry for ever.

    These are TLS at one end only, an invalid certificate, and a wrong clock.
    """
    host, port = split_address(site.server)
    for path in (site.ca, site.key):
        if path is not None and not path.exists():
            raise ConfigError(f"site {site.name!r}: there is no file {str(path)!r}")

    context = ssl.create_default_context(cafile=site.ca)
    if site.ca is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE

    connection = http.client.HTTPSConnection(host, port, timeout=5, context=context)
    try:
        connection.connect()
        if site.ca is None:
            raise ConfigError(
                f"the server at {site.server} uses TLS; get its ca.crt and name it in site.toml, "
                "or make the site again with --ca"
            )

        connection.request("HEAD", "/")
        _compare_clocks(connection.getresponse().getheader("Date"), site.server)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"the certificate of the server at {site.server} is not valid: "
            f"{error.verify_message}; checked with {site.ca}"
        ) from None
    except ssl.SSLError as error:
        if site.ca is not None:
            raise ConfigError(
                f"the server at {site.server} does not use TLS ({error.reason}); if it was made "
                "with --insecure, make the site with --insecure too"
            ) from None
    except (OSError, http.client.HTTPException):
        return  # the server is not started yet; the SuperNode retries
    finally:
        connection.close()


def _compare_clocks(theirs: str | None, server: str) -> None:
    """Raise `ConfigError` if the clocks differ so far that Flower refuses the site's signatures."""
    if theirs is None:
        return

    ahead = _clock() - email.utils.parsedate_to_datetime(theirs).timestamp()
    if not -BEHIND_S < ahead < AHEAD_S:
        raise ConfigError(
            f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} "
            f"that of the server at {server}; Flower accepts {AHEAD_S:g} s ahead and "
            f"{BEHIND_S:g} s behind, so set both by NTP"
        )


def _clock() -> float:
    return time.time()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
