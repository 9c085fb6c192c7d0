"""One ask of a cohort: replies are read, sites that lack something are asked again, outliers fail.

Every method that folds one reply from each site gathers them here, whatever the replies carry.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from fluvial.errors import WireError
from fluvial.federation.bounds import BoundedReplies, Counted
from fluvial.federation.context import Metrics
from fluvial.federation.fleet import Fleet
from fluvial.wire.payload import Payload

T = TypeVar("T")

STALE = Payload(values={"stale": True})
"""A site's answer when it lacks what the message builds on, and must be sent everything."""


@dataclass(frozen=True)
class Readable(Generic[T]):
    """A reply that was read and checked."""

    content: T
    length: float
    """Length of its update, which is compared with the others of the round."""
    weight: int
    """Samples of the site."""


def is_stale(reply: Payload) -> bool:
    """Return whether a reply is `STALE` and nothing else."""
    return (
        reply.values.keys() == STALE.values.keys()
        and reply.values["stale"] is True
        and not reply.tensors
    )


def to_all(sites: Sequence[str], message: Payload) -> dict[str, Payload]:
    """Return the same message for each of `sites`."""
    return dict.fromkeys(sites, message)


def ask_stale_again(
    fleet: Fleet,
    task: str,
    sites: Sequence[str],
    *,
    round: int,
    messages: Callable[[Sequence[str]], Mapping[str, Payload]],
    read: Callable[[str, Payload], T],
    forget: Callable[[Sequence[str]], None],
) -> Iterator[tuple[str, T]]:
    """Ask `sites`, and yield each that answered, with what `read` made of its reply.

    Those that are stale are given to `forget` and asked once more; one that still is has failed.
    The quorum is the caller's.
    """
    waiting = list(sites)

    for again in (False, True):
        stale = []
        for reply in fleet.ask(
            task,
            messages(waiting),
            round=round,
            read=partial(_read_unless_stale, read, again),
            alone=False,
        ):
            if reply.content is None:
                stale.append(reply.site)
                fleet.meter.answered.discard((reply.site, task))  # it carried nothing
            else:
                yield reply.site, reply.content

        if not stale:
            return

        waiting = sorted(stale)
        forget(waiting)


def _read_unless_stale(
    read: Callable[[str, Payload], T], again: bool, site: str, reply: Payload
) -> T | None:
    """Return what `read` makes of a reply, None for a stale one the first time."""
    if not is_stale(reply):
        return read(site, reply)
    if again:
        raise WireError("the site cannot follow even after everything was sent again")
    return None


def _ignore(_sites: Sequence[str]) -> None:
    """Forget nothing."""


def _note(_site: str) -> None:
    """Note nothing."""


@dataclass
class Gathering(Generic[T]):
    """The replies to one task of one round, as an iterable of those that count."""

    fleet: Fleet
    task: str
    round: int
    messages: Callable[[Sequence[str]], Mapping[str, Payload]]
    """Makes the messages for some sites; it may leave out a site, which then has failed."""
    read: Callable[[str, Payload], Readable[T]]
    """Reads the reply of a site; what it raises is that site's failure."""
    answered: Callable[[str], None] = _note
    """Called for each site whose reply was read and accepted."""
    forget: Callable[[Sequence[str]], None] = _ignore
    """Called for sites that lack something, before they are asked again."""
    clipped: list[dict[str, Any]] = field(default_factory=list)
    """Sites whose weight was lowered, with both weights; complete after the last reply."""

    def of(self, cohort: Sequence[str]) -> Iterator[Counted[T]]:
        """Ask `cohort`, and yield the replies that count, as soon as it is known that they do.

        A site that is still stale when it is asked again has failed. Raises `ClientError` where
        the quorum is missed.
        """
        replies: BoundedReplies[T] = BoundedReplies(
            self.fleet, self.task, self.round, asked=len(cohort)
        )
        for site, reply in ask_stale_again(
            self.fleet,
            self.task,
            cohort,
            round=self.round,
            messages=self.messages,
            read=self.read,
            forget=self.forget,
        ):
            self.answered(site)
            yield from replies.add(site, reply.length, reply.weight, reply.content)

        yield from replies.close()
        self.clipped = replies.clipped

    def metrics(self) -> Metrics:
        """Return the sites whose weight was lowered, where there are any; after the last reply."""
        return {"clipped": self.clipped} if self.clipped else {}
