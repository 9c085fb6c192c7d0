"""A run's folder: who may write into it, what lies in it, and how it survives a crash.

    config.json                 the resolved configuration and a description of the run
    metrics.jsonl               one JSON object per round
    checkpoints/round-N         server state after round N and its SHA-256; the newest two are kept
    sites/NAME/SLOT-N-DIGEST    what sites keep (see `store.StateStore`)
    tgap                        updates that TGAP has collected, until set-up is done
    sites/NAME/errors.log       errors of a site, whole
    adapter/                    the result, as PEFT writes it
    budget.json                 choice within the budget and its trials, if there is one
    refused.json                why the gate refused the codec, if it did
    setup.json                  what the set-up has found, until the result is there
    report.html                 the page of the run for people, which nothing reads
    digests.json                SHA-256 of the files of a finished run
    result.json                 written last; a folder that has it is finished

All of it is its owner's only. Every file is replaced atomically, and what another process left
unfinished is removed when the folder is opened. The line of a round is written before its
checkpoint, so a checkpoint always has its lines, and a line without its checkpoint is dropped when
the run continues. A checkpoint knows the digests of the sites' state and of the metrics, so that a
file that is damaged, cut, missing or another one is noticed.
"""

import fcntl
import json
import shutil
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from fluvial import caller
from fluvial.errors import CheckpointError, WireError
from fluvial.federation.releases import check_stand, stand_of
from fluvial.federation.store import StateStore
from fluvial.storage.files import (
    append,
    digest_of,
    digest_of_file,
    make_folder,
    sweep,
    write_atomically,
)
from fluvial.storage.run_files import (
    BUDGET,
    CHECKPOINTS,
    CONFIG,
    DIGESTS,
    ENSEMBLE,
    EXPORTS,
    LOCK,
    METRICS,
    RESULT,
    SETUP,
    SITES,
    WRITTEN,
    anew,
    begun,
    check_written,
    read_file,
    read_metrics,
)
from fluvial.wire.payload import OWN_FILES, Payload

KEPT = 2
_FINISHED = (CONFIG, METRICS)
_OWN = (CONFIG, RESULT, CHECKPOINTS, BUDGET, *WRITTEN)
"""Files and folders of a run, beside which its folder may hold others."""


def _sidecar(path: Path, data: bytes) -> bytes:
    """A line as `sha256sum -c` reads it."""
    return f"{digest_of(data)}  {path.name}\n".encode()


def _readable(content: Any) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def copy_finished(source: Path | None, folder: Path) -> None:
    """Copy the folder of a finished run, unless `folder` is there or nothing is to be copied."""
    if source is None or folder.exists():
        return
    draft = folder.with_name(f".{folder.name}.copy")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft, ignore=shutil.ignore_patterns(LOCK))
    draft.replace(folder)


class RunFolder:
    """One run's files. Use as a context manager: only one process at a time holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = StateStore(path / SITES)
        self._lock: IO[str] | None = None
        self._made = False

    def __enter__(self) -> "RunFolder":
        """Make the folder and lock it; raises `CheckpointError` if another process holds it."""
        try:
            self._made = not self.path.exists()
            make_folder(self.path)
            self._lock = (self.path / LOCK).open("a")
            (self.path / LOCK).chmod(0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_ours():
                sweep(self.path, _OWN)
        except BlockingIOError:
            if self._lock:
                self._lock.close()
            raise CheckpointError(
                f"{self.path} is in use by another run; wait for it, or {caller.another_folder()}"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"cannot write into {self.path}: {error.strerror}; {caller.another_folder()}"
            ) from error

        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock; a folder that was made here and into which nothing was written goes
        again."""
        lock = self.path / LOCK
        if self._made and list(self.path.iterdir()) == [lock]:
            lock.unlink()
            self.path.rmdir()

        if self._lock:
            self._lock.close()

    def _is_ours(self) -> bool:
        """Return whether a run wrote the configuration here: drafts of others are theirs."""
        try:
            return "fluvial" in (read_file(self.path / CONFIG) or {})
        except CheckpointError:
            return False

    @property
    def started(self) -> bool:
        """Return True where a run was begun here."""
        return begun(self.path)

    def write_json(self, name: str, content: Any) -> None:
        """Replace `name` by readable JSON."""
        write_atomically(self.path / name, _readable(content))

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result, after the digests of all that a finished run consists of."""
        listed = {RESULT: digest_of(_readable(result))}
        exported = (path for name in EXPORTS for path in (self.path / name).rglob("*"))
        for path in sorted([*(self.path / name for name in _FINISHED), *exported]):
            if path.is_file():
                listed[str(path.relative_to(self.path))] = digest_of_file(path)

        self.write_json(DIGESTS, listed)
        self.write_json(RESULT, result)
        (self.path / SETUP).unlink(missing_ok=True)

    def verify_finished(self) -> None:
        """Raise `CheckpointError` unless the files of a finished run are those that were
        written."""
        listed = self.read_json(DIGESTS)
        if listed is None:
            raise CheckpointError(f"{self.path / DIGESTS} is missing; {anew()}")
        if not {RESULT, METRICS} <= listed.keys():
            raise CheckpointError(
                f"{self.path / DIGESTS} is damaged: it names too few files; {anew()}"
            )

        for name, digest in listed.items():
            check_written(self.path / name, digest)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the object in `name`, None without such a file; raises `CheckpointError` if it is
        damaged."""
        return read_file(self.path / name)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add the line of a round; raises `ValueError` naming an entry that has no JSON value."""
        entries = []
        for name, value in record.items():
            try:
                entries.append(f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}")
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name!r}: {error}") from None

        try:
            append(self.path / METRICS, "{" + ", ".join(entries) + "}\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path / METRICS}: {error.strerror}; "
                f"free some space and use {caller.resume()}"
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """Return all lines of rounds; a last line that a crash cut off is left out."""
        return list(
            takewhile(lambda record: type(record.get("round")) is int, read_metrics(self.path))
        )

    def save(self, round: int, checkpoint: Payload) -> None:
        """Write the checkpoint of `round`, then drop those before the one before it, and TGAP's
        snapshots.

        It is given the digests of the lines and of the sites' state that it belongs to.
        """
        kept: dict[str, Any] = {
            "lines": self._lines(round),
            "sites": self.store.digests(round),
            "ledgers": {name: stand_of(folder) for name, folder in self._ledgers().items()},
        }
        data = Payload(checkpoint.tensors, {**checkpoint.values, "folder": kept}).to_bytes()
        path = self._checkpoint(round)
        write_atomically(path.with_suffix(".sha256"), _sidecar(path, data))
        write_atomically(path, data)
        shutil.rmtree(self.ensemble, ignore_errors=True)

        for old in sorted(self._checkpoints())[:-KEPT]:
            self._checkpoint(old).unlink()
            self._checkpoint(old).with_suffix(".sha256").unlink(missing_ok=True)

    @property
    def ensemble(self) -> Path:
        """Return the folder of TGAP's snapshots."""
        return self.path / ENSEMBLE

    def newest(self) -> tuple[int, Payload] | None:
        """The newest checkpoint and its round; raises `CheckpointError` if it or what it belongs to
        is damaged."""
        rounds = self._checkpoints()
        if not rounds:
            return None

        round = max(rounds)
        path = self._checkpoint(round)
        sidecar = path.with_suffix(".sha256")

        if not sidecar.exists():
            raise CheckpointError(
                f"{path} has no {sidecar.name} beside it: it was written by another version of "
                f"Fluvial, or the file is lost; {caller.another_folder()}"
            )

        data = path.read_bytes()
        if sidecar.read_bytes() != _sidecar(path, data):
            raise CheckpointError(
                f"{path} is damaged: its bytes are not those that were written. Remove it to go on "
                "from the checkpoint before"
            )

        try:
            found = Payload.from_bytes(data, OWN_FILES)
            kept = found.value("folder", dict)
        except WireError as error:
            raise CheckpointError(
                f"{path} is damaged: {error}. Remove it to go on from the checkpoint before"
            ) from error

        if kept["lines"] != self._lines(round):
            raise CheckpointError(
                f"{self.path / METRICS} is damaged: its lines up to round {round} are not "
                f"those that were written; {anew()}"
            )

        self.store.verify(kept["sites"], round)
        for name, stand in kept["ledgers"].items():
            check_stand(self._ledger(name), stand)
        return round, found

    def go_back_to(self, round: int) -> None:
        """Forget lines and site states after `round`; -1 forgets all."""
        write_atomically(self.path / METRICS, self._metrics_until(round))
        self.store.rollback(round)

    def _metrics_until(self, round: int) -> bytes:
        """The lines of metrics up to a round."""
        lines = [json.dumps(record) + "\n" for record in self.metrics() if record["round"] <= round]
        return "".join(lines).encode()

    def _lines(self, round: int) -> str:
        return digest_of(self._metrics_until(round))

    def _ledgers(self) -> dict[str, Path]:
        """Return the folders of all secrets here: the sites', and under "" the server's own."""
        own = self._ledger("")
        return {**({"": own} if own.exists() else {}), **self.store.private_folders()}

    def _ledger(self, name: str) -> Path:
        return self.path.joinpath(*((SITES, name) if name else ()), "private")

    def replace_folder(self, name: str, made: Path) -> None:
        """Put the folder `made` (a sibling) in the place of `name`."""
        final = self.path / name
        try:
            if final.is_symlink() or final.is_file():
                final.unlink()
            elif final.exists():
                shutil.rmtree(final)

            made.replace(final)
        except OSError as error:
            raise CheckpointError(
                f"cannot replace {final}: {error.strerror}; remove it and use {caller.resume()}"
            ) from error

    def _checkpoint(self, round: int) -> Path:
        return self.path / CHECKPOINTS / f"round-{round:06d}.safetensors"

    def _checkpoints(self) -> list[int]:
        folder = self.path / CHECKPOINTS
        stems = [path.stem.removeprefix("round-") for path in folder.glob("round-*.safetensors")]
        return [int(stem) for stem in stems if stem.isascii() and stem.isdigit()]
