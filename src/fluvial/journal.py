"""The header beside a message to a site, and what the site's last answer wants to keep until it counts."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fluvial.errors import CheckpointError, WireError
from fluvial.payload import Payload
from fluvial.store import StateStore, write_atomically


@dataclass(frozen=True)
class Header:
    """What travels beside a message's payload."""

    run: str
    """Names a run of one method, and stays the same when it is resumed."""
    task: str
    round: int
    session: str
    """Names the server process."""
    seq: int
    """Counts the messages of a run."""
    ack: int
    """The site's last answer that the server accepted; 0 is none."""
    base: int
    """The round that the server's process went on from, -1 for the start."""

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Header":
        """A header from outside; raises `WireError`."""
        for name, kind in cls.__annotations__.items():
            if type(values.get(name)) is not kind or (kind is str and not 0 < len(values[name]) <= 200):
                raise WireError(f"header: {name}={values.get(name)!r:.40}, expected {kind.__name__}")
        return cls(**{name: values[name] for name in cls.__annotations__})

    def values(self) -> dict[str, Any]:
        """For the wire."""
        return asdict(self)


class Journal:
    """What one site's last answer wants to keep, until it is known whether it counts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.store, self.name = StateStore(folder), name
        self._folder = folder / f"{name}.pending"

    @property
    def begun(self) -> bool:
        """Whether an answer was given here before."""
        return (self._folder / "journal.json").exists()

    def settle(self, header: Header) -> None:
        """Keep or drop what is pending; where the server began anew, forget what it does not know of."""
        state = self._read()
        pending = state.get("pending")
        if pending and pending["seq"] == header.ack:
            for slot in pending["slots"]:
                path = self._folder / slot
                if path.exists():  # else it was moved before this process was killed
                    self.store.write(self.name, slot, path, pending["round"])
        if state.get("session") != header.session:
            self.store.rollback(header.base, site=self.name)
        self._write({"session": header.session, "pending": None})

    def post(self, header: Header, kept: dict[str, Payload | Path]) -> None:
        """Lay down what the answer to `header` wants to keep."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for slot, each in kept.items():
            if isinstance(each, Path):
                each.replace(self._folder / slot)
            else:
                write_atomically(self._folder / slot, each.to_bytes())
        pending = {"seq": header.seq, "round": header.round, "slots": sorted(kept)}
        self._write({"session": header.session, "pending": pending})

    def _read(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self._folder / "journal.json").read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise CheckpointError(
                f"{self._folder / 'journal.json'} is damaged: {error}; remove {self._folder}"
            ) from error
        return found

    def _write(self, state: dict[str, Any]) -> None:
        write_atomically(self._folder / "journal.json", json.dumps(state).encode())
