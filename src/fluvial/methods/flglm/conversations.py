"""Conversations of one round in which every site has a replica of the server's layers."""

from collections.abc import Iterator, Sequence

from fluvial.federation.bounds import lower_heaviest, too_long
from fluvial.federation.fleet import Fleet
from fluvial.federation.turns import Idle, Turn
from fluvial.methods.flglm.memories import Memories
from fluvial.methods.flglm.replica import Replica, SiteUpdate, Waiting
from fluvial.methods.flglm.setting import Setting
from fluvial.methods.flglm.turns import answer
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Named, WeightedMean, norm


class Conversations:
    """The training of some sites at a time, in one round."""

    def __init__(
        self,
        setting: Setting,
        fleet: Fleet,
        round: int,
        middle: Named,
        message: Payload,
        memories: Memories,
    ) -> None:
        """Begin every replica with `middle`, the state of the server's layers, and every site with
        `message`."""
        self._setting = setting
        self._fleet = fleet
        self._round = round
        self._middle = middle
        self._message = message
        self._memories = memories
        self._replicas: dict[str, Replica] = {}
        self._waiting: dict[str, tuple[Turn[Payload | Waiting], Waiting]] = {}

    def updates(self, sites: Sequence[str]) -> Iterator[SiteUpdate]:
        """Yield the sites' updates as they come; the quorum is the caller's."""
        self._replicas = {
            site: Replica(self._setting, site, self._round, self._middle, self._memories)
            for site in sites
        }
        try:
            for event in self._fleet.converse(
                "train",
                self._memories.messages(sites, self._message),
                round=self._round,
                hear=self._hear,
                read=self._read,
                alone=False,
                window=self._setting.config.window,
            ):
                if isinstance(event, Idle):
                    self._average()
                elif not isinstance(event, Turn):
                    self._replicas[event.site].close()
                    self._memories.save(event.site, self._round, event.content.hidden)
                    yield event.content
                elif isinstance(event.content, Waiting):
                    self._waiting[event.site] = (event, event.content)
                else:
                    event.answer(event.content)
        finally:
            for replica in self._replicas.values():
                replica.close()

    def _hear(self, site: str, payload: Payload) -> Payload | Waiting:
        return self._replicas[site].hear(payload)

    def _read(self, site: str, payload: Payload) -> SiteUpdate:
        return self._replicas[site].read(payload)

    def _average(self) -> None:
        """Let all sites that wait go on from the mean of their updates."""
        self._refuse_too_long()
        weights = {site: waiting.turn.weight for site, (_, waiting) in self._waiting.items()}
        lower_heaviest(weights, self._fleet.config.max_weight_share, self._round)
        mean = WeightedMean()
        for site, (_, waiting) in self._waiting.items():
            mean.add(waiting.update, weights[site])

        update = mean.mean()
        ends = {name: update[name] for name in self._setting.shared.names}
        frame = self._setting.shared_codec.encode(ends) if ends else None

        for site, (turn, waiting) in sorted(self._waiting.items()):
            self._replicas[site].replace_update(update)
            turn.answer(answer(waiting.turn, frame))

        self._waiting = {}

    def _refuse_too_long(self) -> None:
        """Bound an average within a round as `BoundedReplies` bounds that at its end."""
        lengths = {site: norm(waiting.update) for site, (_, waiting) in self._waiting.items()}
        growth = self._fleet.config.max_update_growth
        for site, length in sorted(lengths.items()):
            reason = too_long(length, list(lengths.values()), growth)
            if reason is not None:
                turn, _ = self._waiting.pop(site)
                self._replicas[site].close()
                turn.fail(reason)
