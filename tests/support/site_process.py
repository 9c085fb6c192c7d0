"""Headers, site files and journals for the tests of a site's process."""

from pathlib import Path
from typing import Any

from fluvial.site_process.journal import Header, Journal
from fluvial.site_process.site_file import SiteFile
from fluvial.wire.payload import Payload

SITE = "south"


def header(**changes: Any) -> Header:
    values: dict[str, Any] = {
        "run": "a run",
        "task": "train",
        "round": 1,
        "session": "first",
        "seq": 1,
        "ack": 0,
        "base": -1,
    }
    return Header(**(values | changes))


def site_file(tmp_path: Path, **settings: Any) -> SiteFile:
    settings["allow"] = {"run_paths": ["*"], **settings.get("allow", {})}
    return SiteFile.model_validate(
        {"name": SITE, "folder": tmp_path / "site", "device": "cpu", **settings}
    )


def kept(round: int) -> dict[str, Payload | Path]:
    return {slot: Payload(values={"round": round}) for slot in ("one", "two")}


def held(journal: Journal) -> tuple[Any, ...]:
    return tuple(journal.store.read("site", slot).values.get("round") for slot in ("one", "two"))


def play(folder: Path, *steps: tuple[Header, int]) -> Journal:
    """Messages that were answered, each by a journal of its own: the state is on the disk or
    nowhere."""
    for message, round in steps:
        journal = Journal(folder, "site")
        journal.settle(message)
        journal.post(message, kept(round))

    return Journal(folder, "site")


class Killed(BaseException):
    """The process is gone."""
