"""Refits: a learned codec follows the updates of a run.

"decoded": the server fits the codec again to the decoded updates of a round and publishes it.
"broadcast": server and sites fit alike to differences of the adapters that all received, at no
byte; a site that missed one is sent the codec.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from fluvial.codecs.base import AdaptiveCodec, Codec
from fluvial.exchange.tgap import TgapConfig
from fluvial.exchange.versions import SLOT, published
from fluvial.federation.sites import Site, round_of
from fluvial.wire.payload import Payload, join, split
from fluvial.wire.tensors import Layout, Named, subtract

SEEN = "seen"
"""Slot of a site for the adapters of past rounds."""


@dataclass
class Refits:
    """Server half: updates that the next refit is made from, and when it is due."""

    config: TgapConfig
    layout: Layout
    """Layout of what sites send."""
    rounds: int
    """Rounds of the run."""
    seen: list[tuple[int, Named]] = field(default_factory=list)
    """Adapters as sites received them, by round; for refits from broadcasts."""
    _decoded: list[tuple[str, Named]] | None = None
    """Updates of this round by site, where it ends with a refit."""

    def begin(self, codec: Codec | None, received: Named, round: int) -> Codec | None:
        """Begin a round in which sites receive the adapter `received`.

        Return a codec that is refitted from broadcasts, None where the codec stays.
        """
        every = self.config.refit_every
        ends = self.config.refit == "decoded" and isinstance(codec, AdaptiveCodec)
        self._decoded = [] if ends and round % every == 0 and round < self.rounds else None
        if self.config.refit != "broadcast":
            return None

        self.seen = [*self.seen, (round, received)][-(every + 1) :]
        updates = window(self.seen, round, every, self.layout) if self.due(round) else None
        return None if updates is None else self._fit(codec, updates)

    def due(self, round: int) -> bool:
        """Return whether a refit from broadcast adapters happens before `round`."""
        every = self.config.refit_every
        return self.config.refit == "broadcast" and round > every and (round - 1) % every == 0

    def fold(self, site: str, update: Named) -> None:
        """Take one update that counts."""
        if self._decoded is not None:
            self._decoded.append((site, update))

    def end(self, codec: Codec | None) -> Codec | None:
        """Return a codec that is refitted to this round's updates, None where none is due."""
        if self._decoded is None:
            return None
        by_site = sorted(self._decoded, key=lambda entry: entry[0])
        return self._fit(codec, [update for _, update in by_site])

    def _fit(self, codec: Codec | None, updates: Sequence[Named]) -> Codec | None:
        if not isinstance(codec, AdaptiveCodec):
            return None
        return codec.refit(updates, weight=self.config.refit_weight)


def window(
    seen: Sequence[tuple[int, Named]], round: int, every: int, layout: Layout
) -> list[Named] | None:
    """Return differences of the adapters broadcast in the `every` rounds before `round`.

    Return None unless all of them were seen.
    """
    if [number for number, _ in seen] != list(range(round - every, round + 1)):
        return None
    adapters = [{name: adapter[name] for name in layout.names} for _, adapter in seen]
    return [subtract(after, before) for before, after in itertools.pairwise(adapters)]


def follow(
    site: Site, codec: Codec, received: Named, message: Payload, config: TgapConfig
) -> Codec | None:
    """Return the codec to answer with, refitted by the site where the server refitted it.

    Return None if the site cannot come to the server's version by itself.
    """
    if config.refit != "broadcast":
        return codec

    round = round_of(site, message)
    seen = _seen(site, received, round, config.refit_every + 1)
    wanted = message.whole("codec", 0, 2**31)
    held = site.recall(SLOT).value("version", int)
    if wanted == held:
        return codec

    updates = window(seen, round, config.refit_every, codec.layout)
    if wanted != held + 1 or updates is None or not isinstance(codec, AdaptiveCodec):
        return None

    refitted: Codec = codec.refit(updates, weight=config.refit_weight)
    site.keep(SLOT, published(refitted, wanted, decoder=True))
    return refitted


def _seen(site: Site, received: Named, round: int, most: int) -> list[tuple[int, Named]]:
    """Return the newest `most` adapters that the site received, by round, and keep them."""
    before = site.recall(SEEN)
    adapters = split(before, tuple(map(str, before.values)))
    by_round = [(number, adapters[str(number)].tensors) for number in sorted(map(int, adapters))]
    seen = [*by_round, (round, received)][-most:]
    site.keep(SEEN, join({str(number): Payload(adapter) for number, adapter in seen}))
    return seen
