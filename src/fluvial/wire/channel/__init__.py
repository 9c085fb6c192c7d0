"""The secure channel between a site and the process that holds a model's middle, inside TLS.

TLS ends at a proxy, and its keys belong to whoever runs the port. This channel ends in the two
processes that compute: what lies between them, a peer site included, sees sizes and times and
nothing else, and changes nothing unnoticed. It protects nothing from the two ends: the process that
holds the middle reads the hidden states.

    identity.py    keys of the two ends, which each pins of the other before the run
    handshake.py   three messages: a fresh X25519 exchange, signed by both ends
    session.py     frames in both directions: ChaCha20-Poly1305, in order, with an end

All primitives are those of the library `cryptography`. It is a dependency of Flower already, and
its `encrypt` writes ciphertext and tag into the bytes object that gRPC sends, without a copy.
libsodium's secretstream (PyNaCl) would add a library and has no handshake.
"""

from fluvial.wire.channel.handshake import ServerHandshake, SiteHandshake, Terms
from fluvial.wire.channel.identity import Identity, PublicIdentity
from fluvial.wire.channel.session import Session

__all__ = ["Identity", "PublicIdentity", "ServerHandshake", "Session", "SiteHandshake", "Terms"]
