"""One ask of a cohort: replies are read, sites that lack something are asked again, outliers fail.

Every method that folds one reply from each site gathers them here, whatever the replies carry.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from fluvial.errors import WireError
from fluvial.federation.bounds import BoundedReplies, Counted
from fluvial.federation.context import Metrics
from fluvial.federation.fleet import Fleet
from fluvial.wire.payload import Payload

logger = logging.getLogger(__name__)

T = TypeVar("T")

STALE = Payload(values={"stale": True})
"""A site's answer when it lacks what the message builds on, and must be sent everything."""
START = "start"
"""Value of a message: the digest of the start that it builds on."""
OTHER_START = Payload(values={"stale": "start"})
"""The same answer where the site makes another start than the server's (see `start`)."""


@dataclass(frozen=True)
class Readable(Generic[T]):
    """A reply that was read and checked."""

    content: T
    length: float
    """Length of its update, which is compared with the others of the round."""
    weight: int
    """Samples of the site."""


def is_stale(reply: Payload) -> bool:
    """Return whether a reply is `STALE` or `OTHER_START` and nothing else."""
    return (
        reply.values.keys() == STALE.values.keys()
        and (reply.values["stale"] is True or has_other_start(reply))
        and not reply.tensors
    )


def has_other_start(reply: Payload) -> bool:
    """Return whether a stale reply is `OTHER_START`."""
    return reply.values["stale"] == OTHER_START.values["stale"]


def _note(_site: str) -> None:
    """Note nothing."""


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
    other_start: Callable[[str], None] = _note,
) -> Iterator[tuple[str, T]]:
    """Ask `sites`, and yield each that answered, with what `read` made of its reply.

    Those that are stale are given to `forget` and asked once more; one that still is has failed.
    `other_start` is called for those of them that make another start. The quorum is the caller's.
    """
    waiting = list(sites)

    for again in (False, True):
        stale = []
        sent = messages(waiting)
        for reply in fleet.ask(
            task,
            sent,
            round=round,
            read=partial(_read_unless_stale, read, again, sent),
            alone=False,
        ):
            if not isinstance(reply.content, _Stale):
                yield reply.site, reply.content
                continue

            stale.append(reply.site)
            fleet.meter.answered.discard((reply.site, task))  # it carried nothing
            if reply.content.other_start:
                logger.warning(
                    "round %d, %s: site %s makes another adapter from the seed, and is sent the "
                    "server's",
                    round,
                    task,
                    reply.site,
                )
                other_start(reply.site)

        if not stale:
            return

        waiting = sorted(stale)
        forget(waiting)


@dataclass(frozen=True)
class _Stale:
    """The content of a reply that is stale."""

    other_start: bool


def _read_unless_stale(
    read: Callable[[str, Payload], T],
    again: bool,
    sent: Mapping[str, Payload],
    site: str,
    reply: Payload,
) -> T | _Stale:
    """Return what `read` makes of a reply; raise `WireError` for one that is stale again, or that
    has another start than one that was not sent."""
    if not is_stale(reply):
        return read(site, reply)
    if again:
        raise WireError("the site cannot follow even after everything was sent again")
    if has_other_start(reply) and START not in sent[site].values:
        raise WireError("the site answers that it makes another start, and was sent no digest")
    return _Stale(has_other_start(reply))


def _ignore(_sites: Sequence[str]) -> None:
    """Forget nothing."""


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
    other_starts: list[str] = field(default_factory=list)
    """Sites that make another start than the server's, and were sent that."""

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
            other_start=self.other_starts.append,
        ):
            self.answered(site)
            yield from replies.add(site, reply.length, reply.weight, reply.content)

        yield from replies.close()
        self.clipped = replies.clipped

    def metrics(self) -> Metrics:
        """Return the sites whose weight was lowered, and those that were sent the start, where
        there are any; after the last reply."""
        metrics: Metrics = {"clipped": self.clipped} if self.clipped else {}
        if self.other_starts:
            metrics["sent_start"] = sorted(self.other_starts)
        return metrics
