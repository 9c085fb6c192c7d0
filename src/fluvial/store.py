"""What lies on a disk: files that are replaced whole, and the versioned slots that sites keep between rounds."""

import os
import re
import secrets
from pathlib import Path

from fluvial.errors import CheckpointError
from fluvial.payload import OWN_FILES, Payload
from fluvial.seeds import derive


class StateStore:
    """What sites keep between rounds: named slots, one version for each round that wrote it.

    A version is written only when the reply that it belongs to was accepted. The version before it stays until the
    next is written, so a run that resumes from the round before finds what the sites held then. `folder=None` keeps
    the bytes in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[Path, bytes] = {}

    def read(self, site: str, slot: str) -> Payload:
        """The newest version, or an empty payload."""
        versions = self._versions(site, slot)
        if not versions:
            return Payload()
        newest = versions[max(versions)]
        return Payload.from_bytes(self._memory[newest] if self.folder is None else newest.read_bytes(), OWN_FILES)

    def file(self, site: str, slot: str) -> Path | None:
        """Where the newest version lies, for a reader that does not want it whole in memory."""
        versions = self._versions(site, slot)
        return versions[max(versions)] if versions and self.folder is not None else None

    def draft(self, site: str, slot: str, payload: Payload) -> Path:
        """Write `payload` to a file that is no version yet; `write` makes it one.

        Every draft has a name of its own: an attempt that is past its deadline may still be writing.
        """
        assert self.folder is not None, "a store in memory has no files"
        path = self._folder(site) / f".{slot}.{secrets.token_hex(8)}.draft"
        write_atomically(path, payload.to_bytes())
        return path

    def write(self, site: str, slot: str, payload: Payload | Path, round: int) -> None:
        """Add a version, a payload or a draft of one, atomically; drop all but the newest of the versions before it."""
        versions = self._versions(site, slot)
        path = self._folder(site) / f"{slot}-{round:06d}.safetensors"
        if isinstance(payload, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
            payload.replace(path)
        elif self.folder is None:
            self._memory[path] = payload.to_bytes()
        else:
            write_atomically(path, payload.to_bytes())
        for old in sorted(number for number in versions if number < round)[:-1]:
            self._remove(versions[old])

    def rollback(self, round: int, site: str | None = None) -> None:
        """Forget everything written after `round`, by all sites or by one."""
        paths = list(self._memory) if self.folder is None else list(self.folder.glob("*/*.safetensors"))
        for path in paths:
            mine = site is None or path.parent == self._folder(site)
            if mine and int(path.stem.rsplit("-", 1)[1]) > round:
                self._remove(path)

    def private(self, site: str) -> Path:
        """Return the folder for what `site` never sends and no rollback touches."""
        assert self.folder is not None, "a store in memory has no files"
        return self._folder(site) / "private"

    def _versions(self, site: str, slot: str) -> dict[int, Path]:
        folder = self._folder(site)
        paths = self._memory if self.folder is None else folder.glob(f"{slot}-*.safetensors")
        pattern = re.compile(rf"{slot}-(\d+)")
        found = ((pattern.fullmatch(path.stem), path) for path in paths if path.parent == folder)
        return {int(match[1]): path for match, path in found if match}

    def _folder(self, site: str) -> Path:
        # A site's name comes from data or from a person; on disk it must not leave the folder nor collide.
        plain = re.sub(r"[^A-Za-z0-9_.-]", "_", site).lstrip(".") or "_"
        return (self.folder or Path()) / (plain if plain == site else f"{plain}-{derive(0, site):016x}")

    def _remove(self, path: Path) -> None:
        if self.folder is None:
            del self._memory[path]
        else:
            path.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash leaves the old file or the new one; raises `CheckpointError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
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
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path} ({len(data)} bytes): {error.strerror}. What was there before is untouched; "
            "free some space and use --resume"
        ) from error
