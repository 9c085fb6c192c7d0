"""Tasks that converse, run once for each sequence of messages and played back after that.

A site's half of a conversation follows from what it receives. So where one lie after another is
told in the same round, only what differs from the rounds before is trained.
"""

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluvial.federation.sites import Site, Task
from fluvial.federation.talk import Ahead, Next, Talk
from fluvial.wire.payload import Payload


@dataclass(frozen=True)
class _End:
    """The end of a conversation."""

    reply: Payload
    kept: dict[str, Payload | Path]
    """State that the site keeps with its reply."""


_Said = Payload | Ahead | Next | _End


def remembered(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """Return tasks without randomness of their own, whose conversations are played back."""
    return {name: _remembered(task) for name, task in tasks.items()}


def _remembered(task: Task) -> Task:
    known: dict[bytes, _Said] = {}
    """Content that a site sends next, by the digest of all that it has received."""

    def begin(site: Site, message: Payload) -> Talk:
        digest = hashlib.sha256(site.name.encode() + b"\0" + message.to_bytes())
        new: list[Payload | None] = [None]  # begins a generator
        talk: Generator[Any, Any, Payload] | None = None
        try:
            while True:
                if digest.digest() not in known:
                    if talk is None:
                        begun = task(site, message)
                        assert not isinstance(begun, Payload), "the task does not converse"
                        talk = begun
                    known[digest.digest()] = _after(talk, new, site)
                    new = []

                said = known[digest.digest()]
                if isinstance(said, _End):
                    site.kept.update(said.kept)
                    return said.reply

                received = yield said
                new.append(received)
                digest.update(hashlib.sha256(received.to_bytes()).digest())
        finally:
            if talk is not None:
                talk.close()

    return begin


def _after(
    talk: Generator[Any, Any, Payload], received: Sequence[Payload | None], site: Site
) -> _Said:
    """Return what `talk` says once it has `received` these; raises what it raises."""
    said: _Said | None = None
    try:
        for answer in received:
            said = talk.send(answer)
    except StopIteration as end:
        return _End(end.value, dict(site.kept))

    assert said is not None, "something is received before each thing that is said"
    return said
