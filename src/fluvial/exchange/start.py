"""The start of an adapter: each site makes it from the seed, and a message has its digest alone.

Another version of torch or another processor might make other values. A site whose start has
another digest says so and is sent the server's, so that all sites begin from the same.
"""

import logging
import re
from collections.abc import Mapping, Sequence

from fluvial.errors import WireError
from fluvial.exchange.gathering import OTHER_START, START
from fluvial.federation.sites import Site, adapter_message, read_adapter_message
from fluvial.models.states import digest, initial_state
from fluvial.wire.payload import Payload, Value
from fluvial.wire.tensors import Layout, Named

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{32}")


def start_message(start: str, values: Mapping[str, Value]) -> Payload:
    """Return a message with the digest `start` in the place of the adapter."""
    return Payload(values={**values, START: start})


class Starts:
    """Server half for sites that all begin from one start: who makes another and is sent it."""

    def __init__(self, start: Named) -> None:
        self.start = start
        self.digest = digest(start)
        self.others: set[str] = set()

    def messages(self, sites: Sequence[str], **values: Value) -> dict[str, Payload]:
        """Return the messages for `sites`, with the start itself for those that lack it."""
        short = start_message(self.digest, values)
        lacking = self.others.intersection(sites)
        whole = adapter_message(self.start, **values) if lacking else short
        return {site: whole if site in lacking else short for site in sites}


def adapter_or_start(site: Site, message: Payload, layout: Layout) -> Named | Payload:
    """Return the adapter that `message` brings, or the start that it names.

    Return `OTHER_START`, the site's answer, where the site makes another one. Raises `WireError`
    for a start beside tensors.
    """
    if START in message.values:
        if message.tensors:
            raise WireError("a message with a start has no tensors")
        return checked_start(site, message, initial_state(layout, site.seed))
    return read_adapter_message(message, layout)


def checked_start(site: Site, message: Payload, start: Named) -> Named | Payload:
    """Return `start` where it is the one that `message` names, else `OTHER_START`; raises
    `WireError` for what is no digest."""
    named = message.value(START, str)
    if not _DIGEST.fullmatch(named):
        raise WireError("the start of a message is no digest of 32 hexadecimal digits")
    if digest(start) == named:
        return start

    logger.warning(
        "site %s: the adapter made here from the seed is not the server's, and is downloaded: "
        "versions of torch or processors differ",
        site.name,
    )
    return OTHER_START
