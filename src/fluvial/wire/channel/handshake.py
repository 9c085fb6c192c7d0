"""The handshake of a channel: three messages in which both ends prove their pinned keys.

    site    -> server   hello    version, ephemeral key, run, site
    server  -> site     answer   ephemeral key, public key, signature over all of this
    site    -> server   finish   signature over all of this

Both signatures cover a transcript: version, context, terms, hello, both ephemeral keys and both
public keys, behind a label that names the signer's role. A signature for one role, run, site or
protocol is thus none for another, and no end can be led to think that it speaks with somebody else
(the signed Diffie-Hellman exchange of ISO 9798-3, with both names under both signatures). The
secrets of the two directions are HKDF-SHA256 of the X25519 secret, salted with the hash of all
three messages. The ephemeral keys are new for each handshake and dropped with it: who learns an
identity's private key later cannot read earlier sessions.

Messages are plain bytes; reading and sending them is the caller's work. Each is short and its size
is checked before anything else. A hello costs the server one exchange and one signature.
"""

import hashlib
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fluvial.errors import ChannelError
from fluvial.wire.channel.identity import (
    MAX_PUBLIC_BYTES,
    MAX_SIGNATURE_BYTES,
    Identity,
    PublicIdentity,
)
from fluvial.wire.channel.session import (
    FRAMES_PER_KEY,
    KEY_BYTES,
    LIFETIME_S,
    MAX_FRAME_BYTES,
    TO_SERVER,
    TO_SITE,
    VERSION,
    Session,
    expand,
)

MAX_NAME_BYTES = 256
"""Largest name of a run or site, in bytes."""
MAX_MESSAGE_BYTES = 2048
"""Largest message of a handshake, in bytes."""
_MAGIC = b"fluvial-channel"
_SIZE = struct.Struct("<H")


@dataclass(frozen=True)
class Terms:
    """Terms on which both ends must agree before a handshake; they are signed, not sent."""

    run: str
    """Run for which the channel is, such as its folder's name."""
    context: bytes = b""
    """Further bytes that both ends know and this connection alone has, such as a token."""
    frames_per_key: int = FRAMES_PER_KEY
    """Frames of one direction until its key changes."""
    lifetime_s: float = LIFETIME_S
    """Seconds until the session expires at this end; only this one may differ between the ends."""
    max_frame_bytes: int = MAX_FRAME_BYTES
    """Largest frame that this end seals or opens, in bytes; not signed either."""
    clock: Callable[[], float] = time.monotonic
    """Clock for `lifetime_s`, in seconds."""


class SiteHandshake:
    """The handshake at the site, which begins it: `hello`, then `finish`."""

    def __init__(self, identity: Identity, server: str, site: str, terms: Terms) -> None:
        """Begin; `server` is the pinned fingerprint of the server's public key."""
        self._identity = identity
        self._server = server
        self._site = site
        self._terms = terms
        self._started_s = terms.clock()
        self._ephemeral: X25519PrivateKey | None = X25519PrivateKey.generate()
        self._hello = _joined(
            _MAGIC,
            bytes([VERSION]),
            _public(self._ephemeral),
            _named(terms.run),
            _named(site),
        )

    def hello(self) -> bytes:
        """Return the first message."""
        return self._hello

    def finish(self, answer: bytes) -> tuple[bytes, Session]:
        """Return the last message and the session; raises `ChannelError`.

        The session may be used at once. The server's end exists when it has read the message.
        """
        ephemeral, self._ephemeral = self._ephemeral, None
        if ephemeral is None:
            raise ChannelError("this handshake has ended; begin another")

        theirs, public, signature = _split(
            answer, (KEY_BYTES, MAX_PUBLIC_BYTES, MAX_SIGNATURE_BYTES)
        )
        server = PublicIdentity.parse(public)
        if server.fingerprint != self._server:
            raise ChannelError(
                f"the server's key is {server.fingerprint}, and {self._server} is pinned"
            )

        transcript = _Transcript.of(self._terms, self._hello)
        transcript.add(theirs, server.data, self._identity.public.data)
        server.verify(signature, transcript.message("server"))
        transcript.add(signature)
        own = self._identity.sign(transcript.message("site"))
        transcript.add(own)
        session = _session(
            ephemeral, theirs, transcript, self._terms, self._started_s, server.fingerprint, True
        )

        return _joined(own), session


class ServerHandshake:
    """The handshake at the server: `answer`, then `finish`."""

    def __init__(
        self, identity: Identity, sites: Mapping[str, PublicIdentity], terms: Terms
    ) -> None:
        """Begin; `sites` are the pinned public keys by the names of the sites that may connect."""
        self._identity = identity
        self._sites = sites
        self._terms = terms
        self._started_s = terms.clock()
        self._pending: _Pending | None = None
        self._used = False

    def answer(self, hello: bytes) -> bytes:
        """Return the answer to a site's first message; raises `ChannelError`."""
        if self._used:
            raise ChannelError("this handshake has ended; begin another")

        self._used = True
        magic, version, theirs, run, name = _split(
            hello, (len(_MAGIC), 1, KEY_BYTES, MAX_NAME_BYTES, MAX_NAME_BYTES)
        )
        if magic != _MAGIC or version != bytes([VERSION]):
            raise ChannelError(
                f"the first message is not that of a channel of version {VERSION}; install the "
                "same version at both ends"
            )
        if run != _named(self._terms.run):
            raise ChannelError(f"a site connects for run {run!r:.80}, not {self._terms.run!r:.80}")

        site = name.decode(errors="replace")
        pinned = self._sites.get(site)
        if pinned is None:
            raise ChannelError(f"no key is pinned for a site {site!r:.80}")

        ephemeral = X25519PrivateKey.generate()
        own = _public(ephemeral)
        transcript = _Transcript.of(self._terms, hello)
        transcript.add(own, self._identity.public.data, pinned.data)
        signature = self._identity.sign(transcript.message("server"))
        transcript.add(signature)
        self._pending = _Pending(site, pinned, theirs, ephemeral, transcript)

        return _joined(own, self._identity.public.data, signature)

    def finish(self, finish: bytes) -> Session:
        """Return the session after a site's last message; raises `ChannelError`."""
        pending, self._pending = self._pending, None
        if pending is None:
            raise ChannelError("this handshake has ended or not begun; begin another")

        (signature,) = _split(finish, (MAX_SIGNATURE_BYTES,))
        pending.public.verify(signature, pending.transcript.message("site"))
        pending.transcript.add(signature)

        return _session(
            pending.ephemeral,
            pending.theirs,
            pending.transcript,
            self._terms,
            self._started_s,
            pending.site,
            False,
        )


@dataclass(frozen=True)
class _Pending:
    """A server's handshake between its answer and the site's last message."""

    site: str
    public: PublicIdentity
    theirs: bytes
    """Ephemeral public key of the site, 32 bytes."""
    ephemeral: X25519PrivateKey
    transcript: "_Transcript"


class _Transcript:
    """All that both ends have said and known so far, as a running hash of sized fields."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    @classmethod
    def of(cls, terms: Terms, hello: bytes) -> Self:
        """Begin with what both ends knew before, and the hello, which names run and site."""
        transcript = cls()
        transcript.add(
            _MAGIC, bytes([VERSION]), terms.context, terms.frames_per_key.to_bytes(8, "big"), hello
        )
        return transcript

    def add(self, *fields: bytes) -> None:
        """Add fields, each behind its size, so that no two sequences have one hash."""
        for field in fields:
            self._hash.update(len(field).to_bytes(8, "big"))
            self._hash.update(field)

    def digest(self) -> bytes:
        """Return the hash of the fields so far, 32 bytes."""
        return self._hash.digest()

    def message(self, role: str) -> bytes:
        """Return the bytes that the end of this role signs; the spaces are those of TLS 1.3."""
        return b" " * 64 + _MAGIC + b" %d " % VERSION + role.encode() + b"\0" + self.digest()


def _session(
    ephemeral: X25519PrivateKey,
    theirs: bytes,
    transcript: _Transcript,
    terms: Terms,
    started_s: float,
    peer: str,
    at_site: bool,
) -> Session:
    """Return this end's session from the exchange of ephemeral keys and the whole transcript."""
    try:
        shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:
        raise ChannelError("an ephemeral key gives no secret") from None

    session = transcript.digest()
    secret = HKDF(hashes.SHA256(), KEY_BYTES, salt=session, info=_MAGIC).derive(shared)
    to_server = expand(secret, b"site to server")
    to_site = expand(secret, b"server to site")

    return Session(
        session,
        sends=TO_SERVER if at_site else TO_SITE,
        send_secret=to_server if at_site else to_site,
        receive_secret=to_site if at_site else to_server,
        started_s=started_s,
        peer=peer,
        lifetime_s=terms.lifetime_s,
        frames_per_key=terms.frames_per_key,
        max_frame_bytes=terms.max_frame_bytes,
        clock=terms.clock,
    )


def _public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def _named(name: str) -> bytes:
    """Return a name as it is sent; raises `ChannelError` if it is empty or too long."""
    data = name.encode()
    if not 0 < len(data) <= MAX_NAME_BYTES:
        raise ChannelError(f"name of {len(data)} bytes; expected 1 to {MAX_NAME_BYTES}")
    return data


def _joined(*fields: bytes) -> bytes:
    """Return one message of fields, each behind its size in two bytes."""
    return b"".join(_SIZE.pack(len(field)) + field for field in fields)


def _split(message: bytes, limits: tuple[int, ...]) -> list[bytes]:
    """Return the fields of a message; raises `ChannelError` unless they are as many as `limits`,
    each at most that long, and nothing follows."""
    if len(message) > MAX_MESSAGE_BYTES:
        raise ChannelError(
            f"handshake message of {len(message)} bytes; at most {MAX_MESSAGE_BYTES}"
        )

    fields = []
    place = 0
    for limit in limits:
        if place + _SIZE.size > len(message):
            raise ChannelError("a handshake message is cut off")

        (size,) = _SIZE.unpack_from(message, place)
        place += _SIZE.size
        if size > min(limit, len(message) - place):
            raise ChannelError(f"field of {size} bytes in a handshake message; it does not fit")

        fields.append(bytes(message[place : place + size]))
        place += size

    if place != len(message):
        raise ChannelError("a handshake message has bytes behind its end")
    return fields
