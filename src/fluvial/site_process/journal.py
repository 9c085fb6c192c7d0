"""Journal of one site: the state of its last answer, pending until the server accepts the answer.

Also the header of each message.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fluvial.errors import CheckpointError, WireError
from fluvial.federation.releases import check_stand, stand_of
from fluvial.federation.store import StateStore
from fluvial.storage.files import (
    digest_of,
    digest_of_file,
    make_folder,
    sealed,
    unsealed,
    write_atomically,
)
from fluvial.wire.payload import Payload


@dataclass(frozen=True)
class Header:
    """Values that are sent beside the payload of a message."""

    run: str
    """Name of the run of one method, the same when it is resumed."""
    task: str
    """Name of the task."""
    round: int
    """Number of the round, from 1; 0 before."""
    session: str
    """Name of the server's process."""
    seq: int
    """Number of the message, counted over the run."""
    ack: int
    """Number of the site's last answer that the server accepted; 0 for none."""
    base: int
    """Round of the checkpoint that the server's process began with, -1 for the start."""

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Header":
        """Return a header from outside; raise `WireError` for a missing or wrong value."""
        for name, kind in cls.__annotations__.items():
            if type(values.get(name)) is not kind or (
                kind is str and not 0 < len(values[name]) <= 200
            ):
                raise WireError(
                    f"header: {name}={values.get(name)!r:.40}, expected {kind.__name__}"
                )

        return cls(**{name: values[name] for name in cls.__annotations__})

    def values(self) -> dict[str, Any]:
        """Return the header as values of a message."""
        return asdict(self)


class Journal:
    """State of one site's last answer, pending until the server has accepted the answer.

    The journal lists the files that the site holds and the digests of the pending ones, so that a
    file that is lost, damaged or of another time is detected.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.store = StateStore(folder)
        self.name = name
        self._folder = folder / f"{name}.pending"

    @property
    def begun(self) -> bool:
        """True if the site has answered a message of the run before."""
        return self._path.exists()

    @property
    def _path(self) -> Path:
        return self._folder / "journal.json"

    def settle(self, header: Header) -> None:
        """Accept or drop the pending files; for a new server process, go back to its checkpoint.

        Raises `CheckpointError` if a file of the site is missing, damaged or of another time.
        """
        state = self._read()
        check_stand(self.store.private(self.name), state.get("ledger", []))
        pending = state.get("pending")
        counted: dict[str, Any] = pending if pending and pending["seq"] == header.ack else {}
        self._check_held(state.get("held", []), counted.get("slots", {}))

        if state.get("session") == header.session and not counted:
            self._check_not_older(state, header)

        for slot, digest in counted.get("slots", {}).items():
            self._settle(slot, counted["round"], digest)
        if state.get("session") != header.session:
            self.store.rollback(header.base, site=self.name)

        self._write(header.session, None, counted.get("seq", state.get("settled", 0)))

    def post(self, header: Header, kept: dict[str, Payload | Path]) -> None:
        """Write the state by slot that counts once the answer to `header` is accepted."""
        make_folder(self._folder)
        slots = {}

        for slot, state in kept.items():
            path = self._folder / slot
            if isinstance(state, Path):
                slots[slot] = digest_of_file(state)
                state.replace(path)
            else:
                data = state.to_bytes()
                slots[slot] = digest_of(data)
                write_atomically(path, data)

        settled = self._read().get("settled", 0)
        self._write(
            header.session, {"seq": header.seq, "round": header.round, "slots": slots}, settled
        )

    def _settle(self, slot: str, round: int, digest: str) -> None:
        """Make a pending file the newest version of its slot."""
        path = self._folder / slot
        if not path.exists():
            # A process that was killed may have moved the file already.
            if not self.store.holds(self.name, slot, round, digest):
                raise CheckpointError(f"{path} is missing; {self._remedy}")

            return

        if digest_of_file(path) != digest:
            raise CheckpointError(
                f"{path} is damaged: its bytes are not those that were written; {self._remedy}"
            )

        self.store.write(self.name, slot, path, round, digest)

    def _check_held(self, held: list[str], replaced: dict[str, str]) -> None:
        """Raise `CheckpointError` if a file that the site holds is missing.

        The versions of the slots in `replaced` may have changed before a kill.
        """
        there = set(self.store.names(self.name))
        for name in held:
            if name not in there and not any(name.startswith(f"{slot}-") for slot in replaced):
                raise CheckpointError(
                    f"{self.store.folder}/{self.name}/{name} is missing; {self._remedy}"
                )

    def _check_not_older(self, state: dict[str, Any], header: Header) -> None:
        """Raise `CheckpointError` if the server accepted a later answer than this folder holds."""
        if header.ack > state.get("settled", 0) and self.store.names(self.name):
            raise CheckpointError(
                f"{self._path} is older than what the server accepted of this site (answer "
                f"{header.ack}); {self._remedy}"
            )

    @property
    def _remedy(self) -> str:
        return f"restore {self._folder.parent} from a copy of the same time, or begin a new run"

    def _read(self) -> dict[str, Any]:
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return {}

        try:
            state: dict[str, Any] = unsealed("state", text)
        except ValueError as error:
            raise CheckpointError(
                f"{self._path} is damaged: {error}; remove {self._folder}"
            ) from error

        return state

    def _write(self, session: str, pending: dict[str, Any] | None, settled: int) -> None:
        held = self.store.names(self.name)
        state = {
            "session": session,
            "pending": pending,
            "settled": settled,
            "held": held,
            "ledger": stand_of(self.store.private(self.name)),
        }
        write_atomically(self._path, sealed("state", state))
