"""Keys by which the two ends of a channel know each other, in the files and forms of OpenSSH.

An identity is an Ed25519 key, or an ECDSA key on a NIST curve. The second kind is there because
every registered site has one already: Flower accepts no other for its nodes. The kind follows from
the pinned key and is never negotiated, so nobody can choose the weaker of two. `ssh-keygen -lf`
prints the same fingerprint for a public file.
"""

import base64
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fluvial.errors import ChannelError, ConfigError

MAX_PUBLIC_BYTES = 1024
"""Largest public key that is read, in bytes."""
MAX_SIGNATURE_BYTES = 160
"""Largest signature of the accepted keys, in bytes: ECDSA on P-521 needs 139 in DER."""
_HASHES: dict[str, hashes.HashAlgorithm] = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
"""Hash of an ECDSA signature by curve, as in RFC 5656."""
_KINDS = "an Ed25519 key, or an ECDSA key on P-256, P-384 or P-521, in OpenSSH form"


@dataclass(frozen=True)
class PublicIdentity:
    """The public key of one end."""

    data: bytes
    """Type and key in OpenSSH form, without comment; equal keys have equal bytes."""

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """Read a public key in OpenSSH form, with or without comment; raises `ChannelError`."""
        if len(line) > MAX_PUBLIC_BYTES:
            raise ChannelError(f"public key of {len(line)} bytes; at most {MAX_PUBLIC_BYTES}")

        try:
            key = serialization.load_ssh_public_key(line)
        except (ValueError, UnsupportedAlgorithm):
            raise ChannelError(f"a public key cannot be read; expected {_KINDS}") from None

        _check_kind(key)
        return cls(
            key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        )

    @property
    def fingerprint(self) -> str:
        """Return SHA256: and the hash of the key in base64, as ssh-keygen does."""
        blob = base64.b64decode(self.data.split()[1])
        return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")

    def verify(self, signature: bytes, message: bytes) -> None:
        """Raise `ChannelError` unless the owner of the private key signed the message."""
        key = serialization.load_ssh_public_key(self.data)
        try:
            if isinstance(key, Ed25519PublicKey):
                key.verify(signature, message)
            else:
                assert isinstance(key, ec.EllipticCurvePublicKey), "`parse` accepts no other"
                key.verify(signature, message, ec.ECDSA(_HASHES[key.curve.name]))
        except InvalidSignature:
            raise ChannelError(f"a signature is not that of the key {self.fingerprint}") from None


class Identity:
    """The private key of one end."""

    def __init__(self, key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> None:
        """Take a key; raises `ChannelError` for a curve that is not accepted."""
        _check_kind(key.public_key())
        self._key = key
        self.public = PublicIdentity(
            key.public_key().public_bytes(
                serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
            )
        )
        """Public key that the other end pins."""

    @classmethod
    def generate(cls) -> Self:
        """Return a new Ed25519 key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a private key without passphrase; raises `ConfigError` with the path and a remedy.

        A file that others than its owner can read is refused, as by ssh.
        """
        try:
            mode = path.stat().st_mode
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read the private key {path}: {error.strerror}") from None

        if mode & 0o077:
            raise ConfigError(
                f"the private key {path} can be read by others than its owner (mode "
                f"{mode & 0o777:o}); run `chmod 600` on it"
            )

        try:
            key = serialization.load_ssh_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigError(
                f"{path} is no private key without passphrase; expected {_KINDS}"
            ) from None

        if not isinstance(key, Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{path} is a key of another kind; expected {_KINDS}")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the private key for its owner only; raises `FileExistsError` if the file exists."""
        data = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)

    def sign(self, message: bytes) -> bytes:
        """Return the signature of a message."""
        if isinstance(self._key, Ed25519PrivateKey):
            return self._key.sign(message)
        return self._key.sign(message, ec.ECDSA(_HASHES[self._key.curve.name]))

    def __repr__(self) -> str:
        return f"Identity({self.public.fingerprint})"


def _check_kind(key: object) -> None:
    """Raise `ChannelError` for a public key of a kind that is not accepted."""
    curve = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else ""
    if not isinstance(key, Ed25519PublicKey) and curve not in _HASHES:
        raise ChannelError(f"a public key is of another kind; expected {_KINDS}")
