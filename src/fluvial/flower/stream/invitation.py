"""Invitation to a conversation: what the message that begins a task says of the live stream."""

import secrets
from dataclasses import dataclass
from typing import Any

from fluvial.errors import WireError

TOKEN_BYTES = 32
"""Bytes of a session's token."""
_PORT = "stream_port"
_SESSION = "stream_session"
_TOKEN = "stream_token"
_PATIENCE = "stream_patience_s"
_SEALED = "stream_sealed"
_NAMES = frozenset((_PORT, _SESSION, _TOKEN, _PATIENCE, _SEALED))
_MAX_PATIENCE_S = 10.0**7


@dataclass(frozen=True)
class Invitation:
    """Values beside the header of a message whose task may converse.

    The session belongs to one attempt at one site in one run. It names no host: the site connects
    to the host of its own file.
    """

    port: int
    """Port of the live stream."""
    session: str
    """Name of the session, which is no secret."""
    token: bytes
    """Secret of the session, which proves that the caller received this message."""
    patience_s: float
    """Seconds without a connection after which the site gives up."""
    sealed: bool = False
    """True where turns go through the channel of `wire.channel`, with the keys of a deployment."""

    @classmethod
    def make(cls, port: int, patience_s: float, *, sealed: bool = False) -> "Invitation":
        """Return an invitation with a new session."""
        token = secrets.token_bytes(TOKEN_BYTES)
        return cls(port, secrets.token_hex(8), token, patience_s, sealed)

    def values(self) -> dict[str, Any]:
        """Return the invitation as values of a message."""
        return {
            _PORT: self.port,
            _SESSION: self.session,
            _TOKEN: self.token,
            _PATIENCE: self.patience_s,
            _SEALED: self.sealed,
        }

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Invitation | None":
        """Return the invitation among the values of a message from outside, None where there is
        none; raise `WireError`."""
        if not _NAMES & values.keys():
            return None

        port = values.get(_PORT)
        session = values.get(_SESSION)
        token = values.get(_TOKEN)
        patience_s = values.get(_PATIENCE)
        sealed = values.get(_SEALED)

        if type(port) is not int or not 0 < port < 2**16:
            raise WireError(f"header: {_PORT}={port!r:.40}, expected 1 to 65535")
        if type(session) is not str or not is_session(session):
            raise WireError(f"header: {_SESSION}={session!r:.40}, expected 16 hexadecimal digits")
        if type(token) is not bytes or len(token) != TOKEN_BYTES:
            raise WireError(f"header: {_TOKEN}: expected {TOKEN_BYTES} bytes")
        if type(patience_s) is not float or not 0 < patience_s <= _MAX_PATIENCE_S:
            raise WireError(f"header: {_PATIENCE}={patience_s!r:.40}, expected seconds")

        if type(sealed) is not bool:
            raise WireError(f"header: {_SEALED}={sealed!r:.40}, expected True or False")

        return cls(port, session, token, patience_s, sealed)


def is_session(text: str) -> bool:
    """Return True for the form of a session's name."""
    return len(text) == 16 and set(text) <= set("0123456789abcdef")
