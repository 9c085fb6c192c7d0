"""Keys of the secure channel: made, handed over and pinned by the operators' own commands."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fluvial.errors import ChannelError, ConfigError
from fluvial.flower import certificates, channel_keys, names, server_operator, site_operator
from fluvial.site_process.site_file import SiteFile, read_site_file
from fluvial.wire.channel import Identity, Session, Terms

ADDRESS = "127.0.0.1:9000"
TERMS = Terms("hospitals")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a server's folder, whose Flower numbers the keys that it registers."""
    numbers = iter(range(100, 200))
    monkeypatch.setattr(
        server_operator, "_flwr", lambda *_: f'{{"success": true, "node-id": {next(numbers)}}}'
    )
    server_operator.server_init(tmp_path / "server", address=ADDRESS)
    return tmp_path / "server"


def site_of(server: Path, name: str, folder: Path | None = None) -> SiteFile:
    """Make and register a site as its operator and the server's do."""
    folder = folder or server.parent / name
    site_operator.site_init(
        folder,
        name=name,
        server=ADDRESS,
        ca=server / "ca.crt",
        channel_key=server / "channel.pub",
    )
    server_operator.register(server, folder / f"{name}.pub")
    return read_site_file(folder / "site.toml")


def connect(server: Path, site: SiteFile) -> tuple[Session, Session]:
    there = channel_keys.server_end(server, TERMS)
    here = channel_keys.site_end(site, TERMS)
    finish, session = here.finish(there.answer(here.hello()))
    return session, there.finish(finish)


def test_a_registered_site_and_its_server_have_a_channel(server: Path) -> None:
    for name in ("north", "south"):
        site, middle = connect(server, site_of(server, name))
        assert middle.open(site.seal(b"hidden")) == b"hidden"
        assert middle.peer == name

    assert (server / "channel.key").stat().st_mode & 0o777 == 0o600
    printed = Identity.load(server / "channel.key").public.fingerprint
    assert site.peer == printed


def test_a_site_that_is_not_registered_has_none(server: Path, tmp_path: Path) -> None:
    site_of(server, "north")
    site_operator.site_init(
        tmp_path / "east",
        name="east",
        server=ADDRESS,
        ca=server / "ca.crt",
        channel_key=server / "channel.pub",
    )
    with pytest.raises(ChannelError, match="no key is pinned for a site 'east'"):
        connect(server, read_site_file(tmp_path / "east" / "site.toml"))


def test_a_site_cannot_open_a_channel_in_anothers_name(server: Path) -> None:
    site_of(server, "north")
    south = site_of(server, "south")
    with pytest.raises(ChannelError, match="a signature is not that of the key"):
        connect(server, south.model_copy(update={"name": "north"}))


def test_a_new_key_of_a_site_takes_the_place_of_the_old(server: Path, tmp_path: Path) -> None:
    old = site_of(server, "north")
    new = site_of(server, "north", tmp_path / "again")
    connect(server, new)
    with pytest.raises(ChannelError, match="a signature is not that of the key"):
        connect(server, old)


def test_whoever_ends_tls_cannot_answer_for_the_server(server: Path, tmp_path: Path) -> None:
    """Certificate, TLS key and authority of the server are not enough."""
    site = site_of(server, "north")
    proxy = tmp_path / "proxy"
    proxy.mkdir()
    for file in ("ca.crt", "ca.key", "server.crt", "server.key", names.FILE):
        (proxy / file).write_bytes((server / file).read_bytes())

    channel_keys.make_server_key(proxy)
    with pytest.raises(ChannelError, match=r"the server's key is SHA256:.* is pinned"):
        connect(proxy, site)


def test_the_servers_key_stays_when_it_starts_or_renews(server: Path) -> None:
    before = (server / "channel.key").read_bytes()
    site = site_of(server, "north")
    server_operator.renew(server)
    channel_keys.make_server_key(server)
    assert (server / "channel.key").read_bytes() == before
    connect(server, site)


def test_a_site_without_pin_or_key_says_what_is_missing(server: Path, tmp_path: Path) -> None:
    site_operator.site_init(tmp_path / "a", name="a", server=ADDRESS, ca=server / "ca.crt")
    with pytest.raises(ConfigError, match=r"ask the server's operator for channel\.pub"):
        channel_keys.site_end(read_site_file(tmp_path / "a" / "site.toml"), TERMS)

    site_operator.site_init(tmp_path / "b", name="b", server=ADDRESS, ca=None, insecure=True)
    with pytest.raises(ConfigError, match="has no key, so it cannot open a secure channel"):
        channel_keys.site_end(read_site_file(tmp_path / "b" / "site.toml"), TERMS)


def test_a_pin_that_cannot_be_one_is_refused(server: Path, tmp_path: Path) -> None:
    site = tmp_path / "north"
    for path, why in (
        (tmp_path / "none.pub", "cannot read the server's public key"),
        (server / "ca.crt", r"ca\.crt: a public key cannot be read"),
    ):
        with pytest.raises(ConfigError, match=why):
            site_operator.site_init(
                site, name="north", server=ADDRESS, ca=server / "ca.crt", channel_key=path
            )
    with pytest.raises(ConfigError, match="--channel-key is without effect with --insecure"):
        site_operator.site_init(
            site,
            name="north",
            server=ADDRESS,
            ca=None,
            channel_key=server / "channel.pub",
            insecure=True,
        )
    assert not site.exists()

    site.mkdir()
    text = f'name = "north"\nkey = "north.key"\nserver_fingerprint = "{"SHA256:" + 43 * "A"}"\n'
    (site / "site.toml").write_text(text)
    read_site_file(site / "site.toml")
    for damaged, why in (
        (text.replace("AA", "A", 1), "server_fingerprint"),
        (text.replace('key = "north.key"\n', ""), "without effect, because key is not set"),
    ):
        (site / "site.toml").write_text(damaged)
        with pytest.raises(ConfigError, match=why):
            read_site_file(site / "site.toml")


def test_flowers_signature_of_a_time_is_none_of_the_channel(tmp_path: Path) -> None:
    """A node key signs for Flower too; a channel takes no signature that Flower lets it make."""
    private, _ = certificates.make_node_key(tmp_path, "north")
    identity = Identity.load(private)
    key = serialization.load_ssh_private_key(private.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)

    from flwr.supercore.primitives.asymmetric import sign_message

    message = b"2026-11-29T04:00:00+00:00"
    with pytest.raises(ChannelError, match="a signature is not that of the key"):
        identity.public.verify(sign_message(key, message), message)


def test_an_insecure_server_has_no_key(tmp_path: Path) -> None:
    server_operator.server_init(tmp_path / "open", address=ADDRESS, insecure=True)
    assert not (tmp_path / "open" / "channel.key").exists()
