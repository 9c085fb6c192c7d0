"""State of sites between rounds: named slots, in files that are known by their digest."""

import re
import secrets
from pathlib import Path

from fluvial.errors import CheckpointError
from fluvial.seeds import derive
from fluvial.storage.files import digest_of, digest_of_file, make_folder, write_atomically
from fluvial.storage.run_files import anew
from fluvial.wire.payload import OWN_FILES, Payload

Digests = dict[str, dict[str, str]]
"""Digests of what a store holds, by site and "slot-round"."""
_DIGITS = 32
"""Hexadecimal digits of a digest in a file's name."""


class StateStore:
    """Named slots, one version for each round that wrote it, as SLOT-ROUND-DIGEST.safetensors.

    A version is written only when the reply that it belongs to was accepted. The version before it
    stays until the next is written, so a run that resumes from the round before finds what the
    sites held then. A version whose bytes are not those of its digest is refused. `folder=None`
    keeps the bytes in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[Path, bytes] = {}

    def read(self, site: str, slot: str) -> Payload:
        """Return the newest version, or an empty payload; raises `CheckpointError` if it is
        damaged."""
        versions = self._versions(site, slot)
        if not versions:
            return Payload()

        newest = versions[max(versions)]
        data = self._memory[newest] if self.folder is None else newest.read_bytes()
        _check(newest, digest_of(data))

        return Payload.from_bytes(data, OWN_FILES)

    def file(self, site: str, slot: str) -> Path | None:
        """Return where the newest version lies, for a reader that does not want it whole in memory.

        Raises `CheckpointError` if it is damaged.
        """
        versions = self._versions(site, slot)
        if not versions or self.folder is None:
            return None

        newest = versions[max(versions)]
        _check(newest, digest_of_file(newest))
        return newest

    def errors(self, site: str) -> Path | None:
        """Return where the site logs its errors; None for a store in memory."""
        return None if self.folder is None else self._folder(site) / "errors.log"

    def draft(self, site: str, slot: str, payload: Payload) -> Path:
        """Write `payload` to a file that is no version yet; `write` makes it one.

        Every draft has a name of its own: an attempt that is past its deadline may still be
        writing.
        """
        assert self.folder is not None, "a store in memory has no files"
        path = self._folder(site) / f".{slot}.{secrets.token_hex(8)}.draft"
        write_atomically(path, payload.to_bytes())

        return path

    def write(
        self, site: str, slot: str, payload: Payload | Path, round: int, digest: str | None = None
    ) -> None:
        """Add a version, a payload or a draft of one, atomically; drop all but the newest of the
        versions before it.

        `digest` is the draft's where it is known already.
        """
        versions = self._versions(site, slot)
        data = b"" if isinstance(payload, Path) else payload.to_bytes()

        if digest is None:
            digest = digest_of_file(payload) if isinstance(payload, Path) else digest_of(data)

        path = self._folder(site) / f"{slot}-{round:06d}-{digest[:_DIGITS]}.safetensors"
        if (
            round in versions and versions[round] != path
        ):  # first: two of one round would not say which counts
            self._remove(versions[round])

        if isinstance(payload, Path):
            make_folder(path.parent)
            payload.replace(path)
        elif self.folder is None:
            self._memory[path] = data
        else:
            write_atomically(path, data)

        for old in sorted(number for number in versions if number < round)[:-1]:
            self._remove(versions[old])

    def rollback(self, round: int, site: str | None = None) -> None:
        """Forget everything written after `round`, by all sites or by one."""
        for path in self._paths():
            found = _parsed(path)
            mine = site is None or path.parent == self._folder(site)
            if found is not None and mine and found[1] > round:
                self._remove(path)

    def private(self, site: str) -> Path:
        """Return the folder for what `site` never sends and no rollback touches."""
        assert self.folder is not None, "a store in memory has no files"
        return self._folder(site) / "private"

    def private_folders(self) -> dict[str, Path]:
        """Return the private folders that there are, by the name of the site's folder."""
        found = [] if self.folder is None else sorted(self.folder.glob("*/private"))
        return {path.parent.name: path for path in found}

    def holds(self, site: str, slot: str, round: int, digest: str) -> bool:
        """Return whether the store has the version of `round` with this digest in the slot."""
        path = self._versions(site, slot).get(round)
        return path is not None and path.stem.endswith(f"-{digest[:_DIGITS]}")

    def names(self, site: str) -> list[str]:
        """Return the names of all versions that a site holds, sorted."""
        return sorted(
            path.name
            for path in self._paths()
            if path.parent == self._folder(site) and _parsed(path)
        )

    def digests(self, round: int) -> Digests:
        """Return the digests of the newest versions up to `round`, of all sites and slots."""
        newest: dict[tuple[str, str], tuple[int, str]] = {}
        for path in self._paths():
            found = _parsed(path)
            if found is not None and found[1] <= round:
                slot, number, digest = found
                key = path.parent.name, slot
                newest[key] = max(newest.get(key, (-1, "")), (number, digest))

        listed: Digests = {}
        for (site, slot), (number, digest) in sorted(newest.items()):
            listed.setdefault(site, {})[f"{slot}-{number:06d}"] = digest
        return listed

    def verify(self, expected: Digests, round: int) -> None:
        """Raise `CheckpointError` unless the newest versions up to `round` are those expected, byte
        for byte."""
        assert self.folder is not None, "what lies in memory is not verified"
        found = self.digests(round)

        for site in sorted(expected.keys() | found.keys()):
            wanted = expected.get(site, {})
            there = found.get(site, {})
            for name in sorted(wanted.keys() | there.keys()):
                where = (
                    self.folder / site / f"{name}-{wanted.get(name, there.get(name))}.safetensors"
                )
                if name not in there:
                    raise CheckpointError(f"{where} is missing; {anew()}")
                if there[name] != wanted.get(name):
                    raise CheckpointError(
                        f"{where}: another file is in its place, of another round or site; {anew()}"
                    )

                _check(where, digest_of_file(where))

    def _paths(self) -> list[Path]:
        return (
            list(self._memory) if self.folder is None else list(self.folder.glob("*/*.safetensors"))
        )

    def _versions(self, site: str, slot: str) -> dict[int, Path]:
        folder = self._folder(site)
        paths = self._memory if self.folder is None else folder.glob(f"{slot}-*.safetensors")
        found = ((_parsed(path), path) for path in sorted(paths) if path.parent == folder)

        return {
            parsed[1]: path for parsed, path in found if parsed is not None and parsed[0] == slot
        }

    def _folder(self, site: str) -> Path:
        return (self.folder or Path()) / folder_of(site)

    def _remove(self, path: Path) -> None:
        if self.folder is None:
            del self._memory[path]
        else:
            path.unlink(missing_ok=True)


def folder_of(site: str) -> str:
    """Return the name of a site's folder; no two sites have one."""
    # A site's name comes from data or from a person; on disk it must not leave the folder nor
    # collide.
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", site).lstrip(".")[:_LONGEST] or "_"
    return plain if plain == site else f"{plain}-{derive(0, site):016x}"


_LONGEST = 100
"""Characters of a site's name in the name of its folder."""
_NAME = re.compile(rf"(.+)-(\d{{6,}})-([0-9a-f]{{{_DIGITS}}})")


def _parsed(path: Path) -> tuple[str, int, str] | None:
    """Slot, round and digest in a version's name; None for another file."""
    match = _NAME.fullmatch(path.stem)
    return None if match is None else (match[1], int(match[2]), match[3])


def _check(path: Path, digest: str) -> None:
    if not path.stem.endswith(f"-{digest[:_DIGITS]}"):
        raise CheckpointError(
            f"{path} is damaged: its bytes are not those that were written; {anew()}"
        )
