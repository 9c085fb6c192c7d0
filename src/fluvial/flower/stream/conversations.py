"""Conversations of one fleet: which exchange has which session, and what arrives of them."""

import queue
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluvial.federation.transport import Arrival, Request
from fluvial.flower.channel_keys import server_end
from fluvial.flower.stream.invitation import Invitation
from fluvial.flower.stream.listener import StreamListener
from fluvial.flower.stream.seal import Seal, ServerSeal, terms_of
from fluvial.flower.stream.session import Session


@dataclass(frozen=True)
class _Conversation:
    invitation: Invitation
    session: Session


class Conversations:
    """Sessions of the exchanges of one fleet."""

    def __init__(
        self,
        listener: StreamListener,
        *,
        run: Callable[[], str],
        num_sites: int,
        patience_s: float,
        keys: Path | None = None,
    ) -> None:
        """Begin without a conversation; `run` returns the run's name.

        `patience_s` is how long a site goes on without a connection; `keys` is the server's folder,
        where turns are sealed.
        """
        self._run = run
        self._keys = keys
        self._listener = listener
        self._num_sites = num_sites
        self._patience_s = patience_s
        self._open: dict[int, _Conversation] = {}
        self._arrived: queue.SimpleQueue[Arrival] = queue.SimpleQueue()

    @property
    def any(self) -> bool:
        """True if an exchange may converse now."""
        return bool(self._open)

    def invite(self, request: Request) -> dict[str, Any]:
        """Return the values that invite a site to converse, none where its task may not.

        A session of an earlier message of the same exchange ends.
        """
        if not request.window:
            return {}

        self.end(request.number)
        invitation, session = self._listener.invite(
            request.number,
            self._arrived.put,
            num_sites=self._num_sites,
            patience_s=self._patience_s,
            window=request.window,
            seal=self._seal(request.site),
        )
        self._open[request.number] = _Conversation(invitation, session)
        return invitation.values()

    def _seal(self, site: str) -> Callable[[bytes], Seal] | None:
        """Return the maker of the server's end of a sealed session, from its token."""
        folder = self._keys
        if folder is None:
            return None

        def make(token: bytes) -> Seal:
            return ServerSeal(server_end(folder, terms_of(self._run(), token)), site)

        return make

    def answer(self, request: Request) -> None:
        """Send the answer to a turn."""
        self._open[request.number].session.answer(request.turn, request.data)

    def next(self, timeout_s: float) -> Arrival | None:
        """Return the next turn or failure of an exchange that is open, None after `timeout_s`."""
        try:
            arrival = self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            return None

        return arrival if arrival.number in self._open else None

    def end(self, number: int) -> None:
        """End the session of an exchange."""
        conversation = self._open.pop(number, None)
        if conversation is not None:
            self._listener.end(conversation.invitation)
