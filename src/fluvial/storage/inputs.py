"""Digests of the files that a run reads, by which a run that goes on notices that they changed."""

import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fluvial.storage import paths
from fluvial.storage.files import digest_of_file, expanded

SAVED = ("dataset_dict.json", "dataset_info.json")
"""Files of a saved data set of Hugging Face, whose parts lie in folders below it."""
READ = {
    *(".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".arrow"),
    *(".safetensors", ".bin", ".model", ".jinja", ".py", ".yaml", ".yml"),
}
"""Suffixes of what is read of a folder: records, weights, tokenizers, templates and tasks."""


def digests(settings: dict[str, Any]) -> dict[str, str]:
    """Return a digest of each file or folder that `settings` name, by the setting.

    What names no path of this machine, such as the id of a hub, has none.
    """
    named = {".".join(place): paths.value_at(settings, place) for place in paths.places(settings)}
    found = {}
    for setting, text in named.items():
        if text in paths.BUNDLED:  # which differ with the version of Python
            found[setting] = f"Python {platform.python_version()}"
        elif isinstance(text, str) and _is_read(path := expanded(text)):
            found[setting] = _digest(path)

    return found


def _is_read(path: Path) -> bool:
    return paths.exists(path) and (path.is_file() or path.is_dir())


def changed(before: object, now: Mapping[str, str]) -> list[str]:
    """Return the settings whose files are others than `before`, what an earlier call of `digests`
    returned; all where that is damaged."""
    if not isinstance(before, Mapping):
        return list(now)
    return [setting for setting, digest in before.items() if now.get(setting) != digest]


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits; a file with another time or size is
    read again."""
    state = path.stat()
    return _read(path, state.st_mtime_ns, state.st_size)


def _digest(path: Path) -> str:
    """Return 32 hexadecimal digits over a file, or over the names and contents in a folder."""
    digest = hashlib.sha256()
    for file in _files(path) if path.is_dir() else [path]:
        name = file.relative_to(path).as_posix()
        try:
            content = content_digest(file)
        except OSError:
            content = "unreadable"  # which is an error where the file is read
        digest.update(f"{name}\0{content}\0".encode())

    return digest.hexdigest()[:32]


def _files(folder: Path) -> list[Path]:
    saved = any((folder / name).exists() for name in SAVED)
    within = folder.rglob("*") if saved else folder.iterdir()
    return sorted(file for file in within if file.suffix.lower() in READ and file.is_file())


@cache
def _read(path: Path, changed: int, size: int) -> str:  # noqa: ARG001
    return digest_of_file(path)
