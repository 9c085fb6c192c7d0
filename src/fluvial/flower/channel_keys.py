"""Keys of the secure channel in the folders of a deployment, and the handshake of each end.

A site proves itself with its node key, which its operator sends at registration anyway: there is no
second key to make, send, renew or revoke. Flower signs nothing but times with this key, by SHA-256,
and the channel signs messages that begin with 64 spaces and its own name, so that no signature can
pass for one of the other. The server has a key of its own, because its TLS key belongs to whatever
ends TLS: the SuperLink, or a company's proxy.

    server's folder    channel.key, channel.pub, and names.json with the sites' registered keys
    site's folder      NAME.key, and in site.toml the fingerprint of channel.pub
"""

from pathlib import Path

from fluvial.errors import ChannelError, ConfigError
from fluvial.flower import names
from fluvial.site_process.site_file import SiteFile
from fluvial.wire.channel import Identity, PublicIdentity, ServerHandshake, SiteHandshake, Terms

KEY = "channel.key"
"""Private key of the server, in its folder."""
PUBLIC = "channel.pub"
"""Public key of the server, which sites receive with ca.crt."""


def make_server_key(folder: Path) -> None:
    """Make the key of a server's folder, unless it has one."""
    if not (folder / KEY).exists():
        Identity.generate().save(folder / KEY)

    public = Identity.load(folder / KEY).public
    (folder / PUBLIC).write_bytes(public.data + b" fluvial-server\n")


def read_public(path: Path) -> PublicIdentity:
    """Read a server's public key; raises `ConfigError`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read the server's public key {path}: {error.strerror}; the server's operator "
            f"has it as {PUBLIC}"
        ) from None

    try:
        return PublicIdentity.parse(data)
    except ChannelError as error:
        raise ConfigError(f"{path}: {error}") from None


def server_end(folder: Path, terms: Terms) -> ServerHandshake:
    """Return the server's end of a handshake, from its folder; raises `ConfigError`.

    Sites that were registered may connect, each in its own name. Of two registrations with one name
    the later counts.
    """
    return ServerHandshake(Identity.load(folder / KEY), pins(folder), terms)


def pins(folder: Path) -> dict[str, PublicIdentity]:
    """Return the registered keys by names of sites, in the order of registration."""
    named = names.read(folder / names.FILE)
    return {
        name: PublicIdentity.parse(named["keys"][number].encode())
        for number, name in named["sites"].items()
        if number in named["keys"]
    }


def site_end(site: SiteFile, terms: Terms) -> SiteHandshake:
    """Return a site's end of a handshake, from its file; raises `ConfigError`."""
    if site.key is None:
        raise ConfigError(
            f"site {site.name!r} has no key, so it cannot open a secure channel; make the site "
            "with --ca and --channel-key"
        )
    if site.server_fingerprint is None:
        raise ConfigError(
            f"site {site.name!r} does not know the server's key; ask the server's operator for "
            f'{PUBLIC} and write server_fingerprint = "SHA256:..." into site.toml, as '
            f"`ssh-keygen -lf {PUBLIC}` prints it"
        )

    return SiteHandshake(Identity.load(site.key), site.server_fingerprint, site.name, terms)
