"""The server's layers in conversations with sites that use the model: no gradient, no optimizer."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from fluvial.errors import WireError
from fluvial.federation.fleet import Fleet
from fluvial.federation.turns import Idle, Reply, Turn
from fluvial.methods.flglm.coding import Coding
from fluvial.methods.flglm.passes import pass_rows
from fluvial.methods.flglm.setting import Setting
from fluvial.methods.flglm.turns import Continue, Look, read_use
from fluvial.models.assignment import MOST_SEQUENCES
from fluvial.models.split import Part
from fluvial.models.split_generation import ServerGeneration
from fluvial.wire.payload import Payload, frame_payload

T = TypeVar("T")


class Serving:
    """Answers the turns of sites, each of which may have a text that it continues."""

    def __init__(self, setting: Setting, part: Part) -> None:
        self._part = part
        self._longest = setting.longest
        self._coding = Coding.exact(part)
        self._texts: dict[str, ServerGeneration] = {}

    def replies(
        self,
        fleet: Fleet,
        task: str,
        sites: Sequence[str],
        message: Payload,
        *,
        round: int,
        read: Callable[[str, Payload], T],
    ) -> Iterator[Reply[T]]:
        """Yield the replies of `sites` to `message`; see `Fleet.converse`."""
        try:
            for event in fleet.converse(
                task,
                dict.fromkeys(sites, message),
                round=round,
                hear=self._hear,
                read=read,
            ):
                assert not isinstance(event, Idle), "every turn is answered at once"
                if isinstance(event, Turn):
                    event.answer(event.content)
                else:
                    self._forget(event.site)
                    yield event
        finally:
            for site in tuple(self._texts):
                self._forget(site)

    @torch.no_grad()
    def _hear(self, site: str, payload: Payload) -> Payload:
        """Return the answer to a turn."""
        turn = read_use(payload, longest=self._longest)
        if isinstance(turn, Look):
            return self._look(turn)
        return self._continue(site, turn)

    def _look(self, turn: Look) -> Payload:
        rows = self._coding.decode_hidden(turn.frame, sum(turn.lengths))
        rows = pass_rows(self._part, rows, turn.lengths)
        return frame_payload(self._coding.encode_hidden(rows))

    def _continue(self, site: str, turn: Continue) -> Payload:
        if turn.begins:
            self._forget(site)
            most = self._longest or MOST_SEQUENCES
            self._texts[site] = ServerGeneration(self._part, max_tokens=most)
        if site not in self._texts:
            raise WireError("a text begins with its prompt")

        rows = self._coding.decode_hidden(turn.frame, turn.tokens)
        hidden = self._texts[site].step(rows[None])[0]
        return frame_payload(self._coding.encode_hidden(hidden))

    def _forget(self, site: str) -> None:
        """Free the keys and values of a site's text."""
        text = self._texts.pop(site, None)
        if text is not None:
            text.close()
