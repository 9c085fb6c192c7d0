"""Keys of a channel's ends: files, fingerprints, signatures and what is refused."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from fluvial.errors import ChannelError, ConfigError
from fluvial.wire.channel import Identity, PublicIdentity

Make = Callable[[], Identity]
CURVES = (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1())
IDENTITIES = [
    pytest.param(Identity.generate, id="ed25519"),
    *(
        pytest.param(lambda c=curve: Identity(ec.generate_private_key(c)), id=curve.name)
        for curve in CURVES
    ),
]


@pytest.mark.parametrize("make", IDENTITIES)
def test_a_saved_key_is_the_same_and_its_owners_only(make: Make, tmp_path: Path) -> None:
    identity = make()
    old = os.umask(0)
    try:
        identity.save(tmp_path / "end.key")
    finally:
        os.umask(old)

    assert (tmp_path / "end.key").stat().st_mode & 0o777 == 0o600
    loaded = Identity.load(tmp_path / "end.key")
    assert loaded.public == identity.public
    loaded.public.verify(identity.sign(b"message"), b"message")
    with pytest.raises(FileExistsError):
        identity.save(tmp_path / "end.key")


@pytest.mark.parametrize("make", IDENTITIES)
def test_a_signature_holds_for_one_key_and_one_message(make: Make) -> None:
    identity = make()
    signature = identity.sign(b"message")
    identity.public.verify(signature, b"message")

    for public, signed, message in (
        (identity.public, signature, b"another"),
        (make().public, signature, b"message"),
        (Identity.generate().public, signature, b"message"),
        (identity.public, b"", b"message"),
        (identity.public, signature[:-1], b"message"),
    ):
        with pytest.raises(ChannelError, match="a signature is not that of the key SHA256:"):
            public.verify(signed, message)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "end.key"
    Identity.generate().save(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"mode 640\); run `chmod 600` on it"):
        Identity.load(path)


def test_a_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "end.key"
    with pytest.raises(ConfigError, match="cannot read the private key"):
        Identity.load(path)

    key = ec.generate_private_key(ec.SECP384R1())
    pem = serialization.Encoding.PEM
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    openssh = serialization.PrivateFormat.OpenSSH
    pkcs8 = serialization.PrivateFormat.PKCS8
    open_ = serialization.NoEncryption()
    for data, why in (
        (b"words", "is no private key without passphrase"),
        (key.private_bytes(pem, pkcs8, open_), "is no private key without passphrase"),
        (other.private_bytes(pem, openssh, open_), "of another kind"),
    ):
        path.write_bytes(data)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match=why):
            Identity.load(path)


def test_a_public_key_is_read_with_and_without_comment() -> None:
    public = Identity.generate().public
    assert PublicIdentity.parse(public.data) == public
    assert PublicIdentity.parse(public.data + b" north\n") == public


def test_a_public_key_of_another_kind_or_size_is_refused() -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    with pytest.raises(ChannelError, match="of another kind; expected an Ed25519 key"):
        PublicIdentity.parse(line)
    with pytest.raises(ChannelError, match="public key of 5000 bytes; at most 1024"):
        PublicIdentity.parse(bytes(5000))


@given(st.binary(max_size=300), st.integers(0, 200))
def test_damaged_public_keys_are_refused_or_are_other_keys(noise: bytes, place: int) -> None:
    line = bytearray(Identity.generate().public.data)
    line[place : place + len(noise)] = noise
    for data in (bytes(line), noise):
        try:
            PublicIdentity.parse(data)
        except ChannelError:
            continue


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen here")
@pytest.mark.parametrize("make", IDENTITIES)
def test_the_fingerprint_is_that_of_ssh_keygen(make: Make, tmp_path: Path) -> None:
    public = make().public
    (tmp_path / "end.pub").write_bytes(public.data + b" end\n")
    done = subprocess.run(
        ["ssh-keygen", "-lf", tmp_path / "end.pub"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[1] == public.fingerprint


def test_a_private_key_does_not_show() -> None:
    identity = Identity.generate()
    assert repr(identity) == f"Identity({identity.public.fingerprint})"
