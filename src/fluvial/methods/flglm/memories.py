"""The server's hidden states by sample, of every site, as of the last round that counted.

Server and site agree on the memory with which a conversation begins by the number of the round
that it is of: the server names the round of its own, and the site answers with this number if it
has the same, else with 0, and both begin with an empty one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fluvial.errors import WireError
from fluvial.methods.flglm.coding import Coding
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.hidden import (
    HiddenStates,
    empty_memory,
    memory_tensors,
    restored_memory,
)
from fluvial.methods.flglm.turns import Forward
from fluvial.wire.payload import Payload, join_tensors, tensors_of
from fluvial.wire.tensors import Named


@dataclass(frozen=True)
class _Saved:
    """The memory of one site."""

    round: int
    tensors: Named


class Memories:
    """The server's end of the memories of all sites; none where nothing is held by sample."""

    def __init__(self, config: FlGlmConfig) -> None:
        self._config = config
        self._saved: dict[str, _Saved] = {}

    def messages(self, sites: Sequence[str], message: Payload) -> dict[str, Payload]:
        """Return the first message to each site: `message`, with the round of its memory."""
        if not self._config.remembers:
            return dict.fromkeys(sites, message)
        return {
            site: Payload(message.tensors, {**message.values, "held": self._round(site)})
            for site in sites
        }

    def begin(self, site: str, turn: Forward, coding: Coding) -> HiddenStates:
        """Return the hidden states of a conversation whose first turn this is; raises
        `WireError`."""
        memory = empty_memory(self._config, coding, server=True)
        if turn.held:
            if turn.held != self._round(site):
                raise WireError(
                    f"message value 'held': {turn.held}, expected 0 or {self._round(site)}"
                )
            memory = restored_memory(memory, self._saved[site].tensors)

        return HiddenStates(self._config, coding, memory)

    def save(self, site: str, round: int, hidden: HiddenStates) -> None:
        """Hold what a conversation of `round` has left, once its reply counts."""
        if self._config.remembers:
            self._saved[site] = _Saved(round, memory_tensors(hidden.memory))

    def state(self) -> Payload:
        """Return all memories, for a checkpoint."""
        sites = sorted(self._saved)
        tensors = join_tensors(
            {str(place): self._saved[site].tensors for place, site in enumerate(sites)}
        )
        return Payload(tensors, {"held": [[site, self._saved[site].round] for site in sites]})

    def restore(self, state: Payload) -> None:
        """Become the memories whose `state` this was."""
        self._saved = {}
        for place, (site, round) in enumerate(state.value("held", list)):
            self._saved[site] = _Saved(round, tensors_of(str(place), state.tensors))

    def _round(self, site: str) -> int:
        """Return the round of a site's memory; 0 for none."""
        saved = self._saved.get(site)
        return 0 if saved is None else saved.round
