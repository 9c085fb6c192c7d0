"""The secret of a site under differential privacy, and the ledger of what it has released.

Epsilon counts one disturbed vector for each round. A site cannot rely on the server for that: a
retry, a resumed run or a hostile server may ask again. So the same request with the same answer
draws the same noise, which tells nothing new, and anything else is another release; the site counts
these itself, on its own disk, before anything leaves, and refuses one too many. Neither secret nor
ledger is ever sent, nor rolled back with a checkpoint.
"""

import fcntl
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fluvial.errors import CheckpointError, PrivacyError
from fluvial.federation.noise import SECRET_BYTES, derive_key
from fluvial.storage.files import make_folder, sealed, unsealed, write_atomically

_FILE = "releases.json"


@dataclass(frozen=True)
class Mechanism:
    """The Gaussian mechanism that a run promises, the same from the first release to the last."""

    placement: str
    clip_norm: float
    noise_multiplier: float
    """Standard deviation of the noise in units of `clip_norm`."""
    releases: int
    """Releases that epsilon counts."""


def secret_of(folder: Path) -> bytes:
    """Return the secret kept in `folder` (32 bytes), drawn from the operating system once."""
    with _locked(folder):
        return _secret(_read(folder))


def claim(folder: Path, mechanism: Mechanism, *parts: bytes) -> bytes:
    """Return the key of the noise for the release that `parts` describe, and count it if it is new.

    The ledger is on the disk when this returns. Raises `PrivacyError` for a release that epsilon
    does not count, or under another mechanism than the first release.
    """
    with _locked(folder):
        book = _read(folder)
        secret = _secret(book)
        began = book["mechanism"]

        if began is not None and began != asdict(mechanism):
            raise PrivacyError(
                f"this run's releases began under {began}, and now {asdict(mechanism)} is asked "
                "for; epsilon cannot count both: begin a new run"
            )

        release = derive_key(secret, "release", *parts)
        if release.hex() not in book["releases"]:
            if len(book["releases"]) >= mechanism.releases:
                raise PrivacyError(
                    f"this would be release {len(book['releases']) + 1} of this site, and epsilon "
                    f"counts {mechanism.releases}: some round was answered more than once"
                )

            book |= {"mechanism": asdict(mechanism), "releases": [*book["releases"], release.hex()]}
            _write(folder, book)

        return derive_key(secret, "noise", release)


def count_releases(folder: Path) -> int:
    """Return how many distinct releases the ledger in `folder` counts."""
    with _locked(folder):
        return len(_read(folder)["releases"])


def stand_of(folder: Path) -> list[str | int]:
    """Return a mark of the secret in `folder` and the number of its releases; empty without a
    ledger.

    The mark tells nothing about the secret. Kept elsewhere, it shows later that a ledger was lost.
    """
    if not (folder / _FILE).exists():
        return []

    with _locked(folder):
        book = _read(folder)
        return [derive_key(_secret(book), "mark").hex()[:32], len(book["releases"])]


def check_stand(folder: Path, before: Sequence[str | int]) -> None:
    """Raise `CheckpointError` unless the ledger in `folder` continues the ledger that
    stood at `before`."""
    if not before:
        return

    found = stand_of(folder)
    if not found or found[0] != before[0] or int(found[1]) < int(before[1]):
        raise CheckpointError(
            f"{folder / _FILE} is missing, another one or older than what was released; restore it "
            "from a copy, or begin a new run"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the ledger of `folder` alone, against other threads and processes."""
    make_folder(folder)
    folder.chmod(0o700)  # one that was there may be open to others

    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(folder: Path) -> dict[str, Any]:
    """Return secret, mechanism and releases; a new secret is on the disk before it is used."""
    path = folder / _FILE
    book: dict[str, Any]

    try:
        text = path.read_bytes()
    except FileNotFoundError:
        secret = secrets.token_bytes(SECRET_BYTES).hex()
        book = {"secret": secret, "mechanism": None, "releases": []}
        _write(folder, book)
        return book

    try:
        book = unsealed("ledger", text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}. Without it this site cannot know what it has released; "
            "begin a new run"
        ) from None

    return dict(book)


def _write(folder: Path, book: dict[str, Any]) -> None:
    write_atomically(folder / _FILE, sealed("ledger", book))


def _secret(book: dict[str, Any]) -> bytes:
    return bytes.fromhex(book["secret"])
