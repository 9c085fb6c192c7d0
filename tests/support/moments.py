"""Moments at which a fault test holds, cheats or starves a process of a deployment.

Each process of the deployment imports this by a `sitecustomize` on its PYTHONPATH. A file
MOMENT.armed in the folder $FLUVIAL_MOMENTS says what happens when that moment comes, once; then it
is called MOMENT.reached. Moments of a site are "NAME joining" and "NAME ROUND
training|answering|uploading|keeping", those of the server "server starting" and "server ROUND
saving". Over the live stream "NAME ROUND sending forward|backward STEP" comes before a site's turn
leaves, and "server answering forward|backward STEP" before its answer does. What happens: "hold"
until the file is gone, "sleep SECONDS", or what `_false` and `_full` know.
"""

import importlib.util
import json
import os
import random
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support import ROOT

FOLDER = "FLUVIAL_MOMENTS"
SKEW = "FLUVIAL_MOMENTS_SKEW_S"
"""Seconds that the clock of a process is ahead."""
HELD_S = 150.0
"""The longest that a process is held."""
_answering: list[Any] = ["", 0]
"""The site and the round that this process works for."""


def moment(name: str) -> str:
    """What a test wants at this moment, or ""; returns when it has happened, if it is only time."""
    armed, reached = (
        Path(os.environ[FOLDER]) / f"{name}.{state}" for state in ("armed", "reached")
    )
    try:
        wanted = armed.read_text()
        armed.rename(reached)
    except FileNotFoundError:
        return ""

    if wanted.startswith("sleep "):
        time.sleep(float(wanted.split()[1]))

    until = time.monotonic() + HELD_S
    while wanted == "hold" and reached.exists() and time.monotonic() < until:
        time.sleep(0.02)
    return wanted


def _here(what: str) -> str:
    return moment(f"{_answering[0]} {_answering[1]} {what}")


def _site_process(module: ModuleType) -> None:
    answer = module.SiteProcess.answer
    join = module.SiteProcess._join

    def answered(self: Any, header: Any, wire: bytes, *how: Any) -> Any:
        _answering[:] = [self.site.name, header.round if header.task == "train" else 0]
        found = answer(self, header, wire, *how)
        if header.task == "train":
            (Path(os.environ[FOLDER]) / f"{self.site.name} {header.round}.answer").write_bytes(
                found.data
            )

        return found

    def joined(self: Any, header: Any, message: Any) -> Any:
        moment(f"{self.site.name} joining")
        return join(self, header, message)

    module.SiteProcess.answer = answered
    module.SiteProcess._join = joined


def _journal(module: ModuleType) -> None:
    write = module.write_atomically

    def written(path: Path, data: bytes) -> None:
        """Slots lie there, the journal does not know of them."""
        wanted = (
            _here("keeping")
            if path.name == "journal.json" and b'"pending": null' not in data
            else ""
        )
        with _full(wanted == "full"):
            write(path, data)

    module.write_atomically = written  # type: ignore[attr-defined]


def _train(module: ModuleType) -> None:
    step = module.Stepper.step

    def stepped(self: Any, number: int) -> None:
        _here("training")
        step(self, number)

    module.Stepper.step = stepped


def _runtime(module: ModuleType) -> None:
    push = module.push_objects

    def pushed(objects: Any, push_object: Callable[[str, bytes], None], **settings: Any) -> None:
        def one(number: str, content: bytes) -> None:
            push_object(number, content)
            _here("uploading")  # after the first object, before the others

        push(objects, one, **settings)

    module.push_objects = pushed  # type: ignore[attr-defined]


def _executor(module: ModuleType) -> None:
    fork = module._fork
    pack = module.pack

    def forked(site: Any, message: Any) -> Any:
        header = message.content["header"]
        _answering[:] = [site.name, header["round"] if header["task"] == "train" else 0]
        return fork(site, message)

    def packed(data: bytes, header: Any) -> Any:
        wanted = _here("answering")
        return pack(_false(wanted, data) if wanted else data, header)

    module._fork, module.pack = forked, packed  # type: ignore[attr-defined]


def _false(wanted: str, data: bytes) -> bytes:
    """Another answer in the place of `data`."""
    if wanted == "garbage":
        return random.Random(1).randbytes(len(data))
    if wanted == "10 GB":
        size = 10**10
        header = json.dumps(
            {"frame": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
        ).encode()
        return len(header).to_bytes(8, "little") + header + b"\0" * 1000

    if wanted == "earlier":
        site, number = _answering
        return (Path(os.environ[FOLDER]) / f"{site} {number - 1}.answer").read_bytes()

    if wanted == "nan":  # in bf16, with a checksum that fits
        from fluvial.wire.payload import Payload, frame_payload, payload_frame

        answer = Payload.from_bytes(data)
        frame = payload_frame(answer)
        frame = frame[:8] + b"\xc0\x7f" + frame[10:-4]

        return frame_payload(
            frame + zlib.crc32(frame).to_bytes(4, "little"), **answer.values
        ).to_bytes()

    return data


def _checkpoint(module: ModuleType) -> None:
    write = module.write_atomically

    def written(path: Path, data: bytes) -> None:
        wanted = ""
        if path.parent.name == "checkpoints":
            path.parent.mkdir(exist_ok=True)
            path.with_name(f".{path.name}.partial").write_bytes(data[: len(data) // 2])
            wanted = moment(f"server {int(path.stem.removeprefix('round-'))} saving")

        with _full(wanted == "full"):
            write(path, data)

    module.write_atomically = written  # type: ignore[attr-defined]


def _seal(module: ModuleType) -> None:
    at_site = module.SiteSeal.seal
    at_server = module.ServerSeal.seal

    def kind(data: bytes) -> str:
        from fluvial.wire.payload import Payload

        values = Payload.from_bytes(data).values
        return f"{values.get('of')} {values.get('step')}"

    def sent(self: Any, data: bytes) -> bytes:
        _here(f"sending {kind(data)}")
        sealed: bytes = at_site(self, data)
        return sealed

    def answered(self: Any, data: bytes) -> bytes:
        moment(f"server answering {kind(data)}")
        sealed: bytes = at_server(self, data)
        return sealed

    module.SiteSeal.seal = sent
    module.ServerSeal.seal = answered


def _server(module: ModuleType) -> None:
    execute = module.execute

    def executed(*arguments: Any, **settings: Any) -> Iterator[Any]:
        moment("server starting")
        yield from execute(*arguments, **settings)

    module.execute = executed  # type: ignore[attr-defined]


def _fleet(module: ModuleType) -> None:
    failed = module.Fleet.failed

    def noted(self: Any, failure: Any, attempt: int) -> bool:
        entry = {
            "time": time.time(),
            "site": failure.site,
            "round": failure.round,
            "reason": failure.reason,
        }
        with (Path(os.environ[FOLDER]) / "failures.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        again: bool = failed(self, failure, attempt)
        return again

    module.Fleet.failed = noted


def _date(module: ModuleType) -> None:
    import datetime

    now = module.now
    ahead = datetime.timedelta(seconds=float(os.environ.get(SKEW, "0")))
    module.now = lambda: now() + ahead  # type: ignore[attr-defined]


@contextmanager
def _full(full: bool) -> Iterator[None]:
    """No file grows beyond 16 bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


_CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "fluvial.site_process.process": _site_process,
    "fluvial.site_process.journal": _journal,
    "fluvial.training.stepper": _train,
    "fluvial.federation.fleet": _fleet,
    "fluvial.runs.checkpoint": _checkpoint,
    "fluvial.flower.executor": _executor,
    "fluvial.flower.server": _server,
    "fluvial.flower.stream.seal": _seal,
    "flwr.supernode.runtime.run_clientapp": _runtime,
    "flwr.supercore.date": _date,
}


class _Finder(MetaPathFinder):
    """Changes a module when it is imported first, so that a process that does not need it does not
    load it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _CHANGES:
            return None

        change = _CHANGES.pop(fullname)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        load: Any = spec.loader.exec_module

        def loaded(module: ModuleType) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = loaded  # type: ignore[method-assign]
        return spec


def install() -> None:
    """From here on, in this process."""
    sys.meta_path.insert(0, _Finder())
    ahead = float(os.environ.get(SKEW, "0"))
    real = time.time

    if ahead:
        time.time = lambda: real() + ahead


class Moments:
    """The test's side."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(
            "from tests.support.moments import install\n\ninstall()\n"
        )

    @property
    def environment(self) -> dict[str, str]:
        """For the processes of a deployment."""
        before = os.environ.get("PYTHONPATH", "")

        return {
            FOLDER: str(self.folder),
            "PYTHONPATH": os.pathsep.join([str(self.folder), str(ROOT), before]),
        }

    def arm(self, name: str, what: str = "hold") -> None:
        """Let `what` happen at a moment."""
        (self.folder / f"{name}.armed").write_text(what)

    def wait(self, name: str, timeout: float = 120) -> float:
        """Return when the moment has come, with the time."""
        until = time.monotonic() + timeout
        while not (self.folder / f"{name}.reached").exists():
            assert time.monotonic() < until, f"the moment {name!r} has not come"
            time.sleep(0.02)

        return time.time()

    def failure(self, timeout: float = 150) -> dict[str, Any]:
        """The first failure of a site that the server noted since `clear`: time, site, round,
        reason."""
        until = time.monotonic() + timeout
        while True:
            with suppress(FileNotFoundError, ValueError, IndexError):
                found: dict[str, Any] = json.loads(
                    (self.folder / "failures.jsonl").read_text().splitlines()[0]
                )
                return found

            assert time.monotonic() < until, "the server noted no failure"
            time.sleep(0.02)

    def free(self) -> None:
        """Nothing more happens, and what is held continues."""
        for state in ("armed", "reached"):
            for path in self.folder.glob(f"*.{state}"):
                path.unlink()

    def clear(self) -> None:
        """As at the beginning."""
        self.free()
        (self.folder / "failures.jsonl").unlink(missing_ok=True)
