"""The handshake of a channel: both ends agree on everything, or there is no session."""

import hashlib
import random
import struct
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from fluvial.errors import ChannelError, WireError
from fluvial.wire.channel import Identity, ServerHandshake, Session, Terms
from fluvial.wire.channel import handshake as module
from tests.unit.wire.channel.pair import Deployment, handshake


def works(site: Session, server: Session) -> bool:
    """Return True if each end opens what the other seals."""
    up = server.open(site.seal(b"hidden"))
    down = site.open(server.seal(b"gradient"))
    return (up, down) == (b"hidden", b"gradient")


def test_two_ends_that_pin_each_other_have_a_session() -> None:
    deployment = Deployment()
    site, server = deployment.connect()
    assert works(site, server)
    assert site.id == server.id
    assert (site.peer, server.peer) == (deployment.server.public.fingerprint, "north")


def test_a_sites_node_key_is_an_identity() -> None:
    node_key = Identity(ec.generate_private_key(ec.SECP384R1()))
    assert works(*Deployment(sites={"north": node_key}).connect())


def test_every_session_has_its_own_secrets() -> None:
    deployment = Deployment()
    first, _ = deployment.connect()
    second, _ = deployment.connect()
    assert first.id != second.id
    assert first.seal(b"the same") != second.seal(b"the same")


def test_a_server_with_another_key_is_refused() -> None:
    deployment = Deployment()
    impostor = deployment.server_end(identity=Identity.generate())
    site = deployment.site_end()
    with pytest.raises(ChannelError, match=r"the server's key is SHA256:.* is pinned"):
        site.finish(impostor.answer(site.hello()))


def test_a_server_that_shows_the_pinned_key_without_having_it_is_refused() -> None:
    deployment = Deployment()
    impostor = Identity.generate()
    impostor.public = deployment.server.public
    site = deployment.site_end()
    with pytest.raises(ChannelError, match="a signature is not that of the key"):
        site.finish(deployment.server_end(identity=impostor).answer(site.hello()))


def test_a_site_with_another_key_is_refused() -> None:
    deployment = Deployment()
    for impostor in (Identity.generate(), deployment.sites["south"]):
        site = deployment.site_end("north", identity=impostor)
        with pytest.raises(ChannelError, match="a signature is not that of the key"):
            handshake(site, deployment.server_end())


def test_a_site_that_signs_with_another_key_than_it_names_is_refused_by_the_server() -> None:
    deployment = Deployment()
    impostor = Identity.generate()
    impostor.public = deployment.sites["north"].public
    site = deployment.site_end("north", identity=impostor)
    server = deployment.server_end()
    finish, _ = site.finish(server.answer(site.hello()))
    with pytest.raises(ChannelError, match="a signature is not that of the key"):
        server.finish(finish)


def test_a_site_without_a_pinned_key_is_refused() -> None:
    deployment = Deployment()
    site = deployment.site_end("east", identity=Identity.generate())
    with pytest.raises(ChannelError, match="no key is pinned for a site 'east'"):
        deployment.server_end().answer(site.hello())


def test_another_run_is_refused() -> None:
    deployment = Deployment()
    site = deployment.site_end(run="another")
    with pytest.raises(ChannelError, match="connects for run b'another', not 'hospitals'"):
        deployment.server_end().answer(site.hello())


@pytest.mark.parametrize(
    "changes", [{"context": b"token of another task"}, {"frames_per_key": 7}], ids=str
)
def test_ends_that_differ_in_what_is_not_sent_have_no_session(changes: dict[str, Any]) -> None:
    deployment = Deployment()
    with pytest.raises(ChannelError, match="a signature is not that of the key"):
        handshake(deployment.site_end(**changes), deployment.server_end())


def test_a_signature_for_one_role_is_none_for_the_other() -> None:
    """An end whose own signature comes back to it, under one key for both, notices."""
    same = Identity.generate()
    deployment = Deployment(server=same, sites={"north": same})
    site = deployment.site_end()
    server = deployment.server_end()
    answer = server.answer(site.hello())
    signature = module._split(answer, (32, 1024, 160))[2]
    with pytest.raises(ChannelError, match="a signature is not that of the key"):
        server.finish(module._joined(signature))


def test_messages_of_another_handshake_are_refused() -> None:
    deployment = Deployment()
    old_site = deployment.site_end()
    old_server = deployment.server_end()
    old_answer = old_server.answer(old_site.hello())
    old_finish, _ = old_site.finish(old_answer)

    with pytest.raises(ChannelError, match="a signature is not that of the key"):
        deployment.site_end().finish(old_answer)

    server = deployment.server_end()
    server.answer(old_site.hello())
    with pytest.raises(ChannelError, match="a signature is not that of the key"):
        server.finish(old_finish)


def test_a_handshake_is_used_once() -> None:
    deployment = Deployment()
    site = deployment.site_end()
    server = deployment.server_end()
    with pytest.raises(ChannelError, match="has ended or not begun"):
        deployment.server_end().finish(b"")

    answer = server.answer(site.hello())
    with pytest.raises(ChannelError, match="this handshake has ended"):
        server.answer(site.hello())
    finish, _ = site.finish(answer)
    with pytest.raises(ChannelError, match="this handshake has ended"):
        site.finish(answer)
    server.finish(finish)
    with pytest.raises(ChannelError, match="has ended or not begun"):
        server.finish(finish)


def test_a_failed_handshake_cannot_be_tried_again() -> None:
    deployment = Deployment()
    site = deployment.site_end()
    server = deployment.server_end()
    finish, _ = site.finish(server.answer(site.hello()))
    with pytest.raises(ChannelError):
        server.finish(finish[:-1])
    with pytest.raises(ChannelError, match="has ended or not begun"):
        server.finish(finish)


@pytest.mark.parametrize("weak", [bytes(32), (1).to_bytes(32, "little"), b"", bytes(31)])
def test_an_ephemeral_key_that_gives_no_secret_is_refused(weak: bytes) -> None:
    """Points of small order (RFC 7748, 6.1) give the secret zero to everybody."""
    deployment = Deployment()
    identity = deployment.sites["north"]
    hello = module._joined(b"fluvial-channel", b"\x01", weak, b"hospitals", b"north")
    server = deployment.server_end()
    own, public, signature = module._split(server.answer(hello), (32, 1024, 160))
    transcript = module._Transcript.of(Terms("hospitals"), hello)
    transcript.add(own, public, identity.public.data, signature)
    with pytest.raises(ChannelError, match="an ephemeral key gives no secret"):
        server.finish(module._joined(identity.sign(transcript.message("site"))))


@given(st.data())
def test_a_change_anywhere_in_any_message_is_noticed(data: st.DataObject) -> None:
    deployment = Deployment()
    changed = data.draw(st.sampled_from(["hello", "answer", "finish"]))

    def carry(name: str, message: bytes) -> bytes:
        if name != changed:
            return message

        how = data.draw(st.sampled_from(["flip", "cut", "add"]))
        place = data.draw(st.integers(0, len(message) - 1))
        if how == "cut":
            return message[:place]
        if how == "add":
            return message + b"\0"
        bit = 1 << data.draw(st.integers(0, 7))
        return message[:place] + bytes([message[place] ^ bit]) + message[place + 1 :]

    def carry_all() -> None:
        site = deployment.site_end()
        server = deployment.server_end()
        answer = carry("answer", server.answer(carry("hello", site.hello())))
        finish, _ = site.finish(answer)
        server.finish(carry("finish", finish))

    with pytest.raises(ChannelError):
        carry_all()


@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    deployment = Deployment()
    server = deployment.server_end()
    with pytest.raises(ChannelError):
        server.answer(garbage)
    with pytest.raises(ChannelError):
        deployment.site_end().finish(garbage)


def test_announced_sizes_are_checked() -> None:
    deployment = Deployment()
    with pytest.raises(ChannelError, match="handshake message of 1000000 bytes; at most 2048"):
        deployment.server_end().answer(bytes(1_000_000))
    with pytest.raises(ChannelError, match="field of 65535 bytes"):
        deployment.server_end().answer(struct.pack("<H", 65535))
    with pytest.raises(ChannelError, match="name of 300 bytes; expected 1 to 256"):
        deployment.site_end("n" * 300)
    with pytest.raises(ChannelError, match="name of 0 bytes"):
        deployment.site_end("", identity=Identity.generate())


def test_another_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = Deployment()
    server = deployment.server_end()
    monkeypatch.setattr(module, "VERSION", 2)
    site = deployment.site_end()
    monkeypatch.undo()
    with pytest.raises(ChannelError, match="not that of a channel of version 1"):
        server.answer(site.hello())


def test_an_error_of_the_channel_is_that_sites_failure() -> None:
    """The fleet treats a `WireError` as the failure of the site whose bytes it read."""
    assert issubclass(ChannelError, WireError)


def test_keys_and_first_frame_follow_from_the_transcript() -> None:
    """The session, its keys and a frame, computed again from the messages and raw primitives."""
    deployment = Deployment()
    site_end = deployment.site_end(context=b"token")
    server_end = deployment.server_end(context=b"token")
    ephemeral = site_end._ephemeral
    assert isinstance(ephemeral, X25519PrivateKey)
    hello = site_end.hello()
    answer = server_end.answer(hello)
    finish, site = site_end.finish(answer)
    frame = site.seal(b"hidden states", header=b"step 1")

    def sized(*fields: bytes) -> bytes:
        return b"".join(len(field).to_bytes(8, "big") + field for field in fields)

    theirs = answer[2:34]
    server_key = deployment.server.public.data
    server_signature = answer[2 + 32 + 2 + len(server_key) + 2 :]
    session = hashlib.sha256(
        sized(b"fluvial-channel", b"\x01", b"token", (2**20).to_bytes(8, "big"), hello, theirs)
        + sized(server_key, deployment.sites["north"].public.data, server_signature, finish[2:])
    ).digest()
    assert session == site.id

    shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(theirs))
    secret = hkdf(shared, session, b"fluvial-channel")
    chain = hkdf_expand(secret, b"fluvial channel 1 site to server")
    key = hkdf_expand(chain, b"fluvial channel 1 key")
    label = b"\x01\x01" + session + bytes(12) + b"step 1"
    assert frame == ChaCha20Poly1305(key).encrypt(bytes(12), b"hidden states", label)

    judge = pytest.importorskip("Crypto.Cipher.ChaCha20_Poly1305", exc_type=ImportError)
    cipher = judge.new(key=key, nonce=bytes(12))
    cipher.update(label)
    assert cipher.decrypt_and_verify(frame[:-16], frame[-16:]) == b"hidden states"


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """Return the first 32 bytes of HKDF-SHA256, from HMAC alone (RFC 5869)."""
    return hkdf_expand(hmac_sha256(salt, secret), info)


def hkdf_expand(secret: bytes, info: bytes) -> bytes:
    return hmac_sha256(secret, info + b"\x01")


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """Return HMAC-SHA256 of keys up to 64 bytes (RFC 2104)."""
    block = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block) + message).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in block) + inner).digest()


def test_no_secret_follows_from_a_seed() -> None:
    """Two ends that begin from the same state of every seeded generator have other secrets."""
    deployment = Deployment()
    hellos = set()
    for _ in range(2):
        random.seed(0)
        torch.manual_seed(0)
        hellos.add(deployment.site_end().hello())

    assert len(hellos) == 2


def test_a_pin_belongs_to_one_name() -> None:
    """A site cannot connect in another's name, even with a pinned key of its own."""
    deployment = Deployment()
    pins = deployment.pins()
    site = deployment.site_end("south", identity=deployment.sites["north"])
    server = ServerHandshake(deployment.server, pins, Terms("hospitals"))
    with pytest.raises(ChannelError, match="a signature is not that of the key"):
        handshake(site, server)
