"""A run's folder: who may write into it, what lies in it, and how it survives a crash.

    config.json                 the resolved configuration
    metrics.jsonl               one JSON object per round
    checkpoints/round-N         server state after round N, a payload; the newest two are kept
    sites/NAME/SLOT-N           what sites keep (see `store.StateStore`)
    adapter/                    the result, as PEFT writes it
    refused.json                why the gate refused the codec, if it did
    result.json                 written last; a folder that has it is finished

Every file is replaced atomically. The line of a round is written before its checkpoint, so a checkpoint always has its
lines, and a line without its checkpoint is dropped when the run goes on.
"""

import fcntl
import json
import shutil
from pathlib import Path
from typing import IO, Any

from fluvial.errors import CheckpointError, WireError
from fluvial.payload import OWN_FILES, Payload
from fluvial.store import StateStore, write_atomically

KEPT = 2


class RunFolder:
    """One run's files. Use as a context manager: only one process at a time holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = StateStore(path / "sites")
        self._lock: IO[str] | None = None
        self._made = False

    def __enter__(self) -> "RunFolder":
        """Make the folder and lock it; raises `CheckpointError` if another process holds it."""
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if self._lock:
                self._lock.close()
            raise CheckpointError(
                f"{self.path} is in use by another run; wait for it, or choose another folder with --out"
            ) from None
        except OSError as error:
            raise CheckpointError(f"cannot write into {self.path}: {error.strerror}; choose another --out") from error
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock; a folder that was made here and into which nothing was written goes again."""
        lock = self.path / ".lock"
        if self._made and list(self.path.iterdir()) == [lock]:
            lock.unlink()
            self.path.rmdir()
        if self._lock:
            self._lock.close()

    @property
    def started(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "config.json").exists()

    def write_json(self, name: str, content: Any) -> None:
        """Replace `name` by readable JSON."""
        write_atomically(self.path / name, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """The content of `name`, or None if there is no such file; raises `CheckpointError` if it is damaged."""
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CheckpointError(
                f"{self.path / name} is damaged: {error}; remove the folder and start again"
            ) from error

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add the line of a round."""
        try:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path / 'metrics.jsonl'}: {error.strerror}; free some space and use --resume"
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """All lines; a last line that a crash cut off is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def save(self, round: int, checkpoint: Payload) -> None:
        """Write the checkpoint of `round`, then drop those before the one before it."""
        write_atomically(self._checkpoint(round), checkpoint.to_bytes())
        for old in sorted(self._checkpoints())[:-KEPT]:
            self._checkpoint(old).unlink()

    def newest(self) -> tuple[int, Payload] | None:
        """The newest checkpoint and its round; raises `CheckpointError` if it is damaged."""
        rounds = self._checkpoints()
        if not rounds:
            return None
        path = self._checkpoint(max(rounds))
        try:
            return max(rounds), Payload.from_bytes(path.read_bytes(), OWN_FILES)
        except WireError as error:
            raise CheckpointError(
                f"{path} is damaged: {error}. Remove it to go on from the checkpoint before"
            ) from error

    def go_back_to(self, round: int) -> None:
        """Forget lines and site states after `round`; -1 forgets all."""
        lines = [json.dumps(record) + "\n" for record in self.metrics() if record["round"] <= round]
        write_atomically(self.path / "metrics.jsonl", "".join(lines).encode())
        self.store.rollback(round)

    def replace_folder(self, name: str, made: Path) -> None:
        """Put the folder `made` (a sibling) in the place of `name`."""
        final = self.path / name
        if final.exists():
            shutil.rmtree(final)
        made.replace(final)

    def _checkpoint(self, round: int) -> Path:
        return self.path / "checkpoints" / f"round-{round:06d}.safetensors"

    def _checkpoints(self) -> list[int]:
        folder = self.path / "checkpoints"
        return [int(path.stem.removeprefix("round-")) for path in folder.glob("round-*.safetensors")]
