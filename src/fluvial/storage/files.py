"""Files of a run or a site: replaced whole, readable by their owner only, whatever the umask, and
known by a digest."""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fluvial import caller
from fluvial.errors import CheckpointError, ConfigError

DRAFTS = (".*.partial", ".*.draft")
"""Names of files and folders that are not finished yet."""


def exists(path: Path) -> bool:
    """Return whether there is something at a path that a person names; false too where the system
    cannot say, as for a name that is longer than it allows."""
    try:
        return path.exists()
    except OSError:
        return False


def expanded(name: str | Path) -> Path:
    """Return a path that a person names with the home in place of `~`; a home that the system does
    not know stays as it is written, and is found missing where it is read."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 (that of pathlib raises RuntimeError)


def is_endless(path: Path) -> bool:
    """Return true for a pipe, a device or a socket, which a read may wait on for ever; false for a
    file, a folder, and where there is nothing that can be looked at."""
    with suppress(OSError, ValueError):
        mode = path.stat().st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))

    return False


def refuse_endless(path: Path) -> None:
    """Raise `ConfigError` for a pipe, a device or a socket in the place of a file of a person."""
    if is_endless(path):
        raise ConfigError(
            f"{path}: is no regular file but a pipe, a device or a socket; copy its content into a "
            "file, and name that"
        )


def make_folder(path: Path) -> None:
    """Make a folder and those above it that lack, for their owner only; those that are there stay
    as they are."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        path.chmod(0o700)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash leaves the old file or the new one; raises
    `CheckpointError`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        make_folder(path.parent)
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise CheckpointError(
            f"cannot write {path} ({len(data)} bytes): {error.strerror}. What was there before is "
            f"untouched; free some space and use {caller.resume()}"
        ) from error


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Raise `ConfigError` with `remedy` where `path`, which a person names, cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot write {path}: {reason}; {remedy}") from error
    except SafetensorError as error:
        raise ConfigError(f"cannot write {path}: {error}; {remedy}") from error


def write_whole(path: Path, data: bytes, remedy: str) -> None:
    """Replace `path`, which a person names, by `data`; raises `ConfigError` with `remedy`, and
    leaves what was there.

    A link and what is no file, such as /dev/stdout, are written through.
    """
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: is a folder; {remedy}")

    partial = path.with_name(f".{path.name}.partial")
    with writing(path, remedy):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(data)
            return

        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink()


def append(path: Path, text: str) -> None:
    """Add `text` to a file, on a line of its own even where a kill or a full disk cut the last one
    off."""
    make_folder(path.parent)
    start = "" if _ends_with_line(path) else "\n"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    with os.fdopen(handle, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(start + text)


def _ends_with_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file that a person names, None where there is no file.

    Raises `ConfigError` for a file that is damaged or holds something else.
    """
    refuse_endless(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # no file has it
            return None
        raise ConfigError(f"{path}: cannot be read as JSON: {error}; copy it again") from error

    if not isinstance(record, dict):
        raise ConfigError(
            f"{path}: must be a JSON object, found {type(record).__name__}; copy it again"
        )

    return record


def digest_of(data: bytes) -> str:
    """Return the SHA-256 of bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sealed(name: str, content: Any) -> bytes:
    """Return JSON with `content` under `name`, and its digest beside it."""
    return json.dumps({name: content, "sha256": _digest_of_json(content)}).encode()


def unsealed(name: str, text: bytes) -> Any:
    """Return the content that `sealed` was given; raises `ValueError` where it is another one."""
    try:
        record = json.loads(text)
        content = record[name]
        digest = record["sha256"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"it lacks {name!r} or its digest") from error

    if digest != _digest_of_json(content):
        raise ValueError("its content is not what was written")

    return content


def _digest_of_json(content: Any) -> str:
    return digest_of(json.dumps(content, sort_keys=True).encode())


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path, names: Iterable[str]) -> list[Path]:
    """Remove what a killed process left unfinished of the files and folders `names` in `folder`;
    return it. The caller holds the folder's lock, and other files there may be of others."""
    record = []
    for name in names:
        beside = [folder / pattern.replace("*", name) for pattern in DRAFTS]
        record += [path for path in beside if os.path.lexists(path)]
        record += [path for pattern in DRAFTS for path in (folder / name).rglob(pattern)]

    for path in record:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    return record


@contextmanager
def private() -> Iterator[None]:
    """Make everything that this process writes meanwhile its owner's only, also what libraries
    write."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
