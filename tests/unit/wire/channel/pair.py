"""Two ends of a channel in one process, for tests."""

from dataclasses import dataclass, field
from typing import Any

from fluvial.wire.channel import (
    Identity,
    PublicIdentity,
    ServerHandshake,
    Session,
    SiteHandshake,
    Terms,
)

RUN = "hospitals"


@dataclass
class Deployment:
    """A server with pinned sites, each with a key of its own."""

    server: Identity = field(default_factory=Identity.generate)
    sites: dict[str, Identity] = field(
        default_factory=lambda: {"north": Identity.generate(), "south": Identity.generate()}
    )

    def pins(self) -> dict[str, PublicIdentity]:
        return {name: identity.public for name, identity in self.sites.items()}

    def site_end(self, site: str = "north", **changes: Any) -> SiteHandshake:
        """Begin a handshake at a site; `changes` are those of `Terms`, of the key, and the pin."""
        identity = changes.pop("identity", self.sites.get(site))
        pin = changes.pop("pin", self.server.public.fingerprint)
        return SiteHandshake(identity, pin, site, Terms(**{"run": RUN, **changes}))

    def server_end(self, **changes: Any) -> ServerHandshake:
        identity = changes.pop("identity", self.server)
        return ServerHandshake(identity, self.pins(), Terms(**{"run": RUN, **changes}))

    def connect(self, site: str = "north", **changes: Any) -> tuple[Session, Session]:
        """Return the sessions of the site and of the server."""
        return handshake(self.site_end(site, **changes), self.server_end(**changes))


def handshake(site: SiteHandshake, server: ServerHandshake) -> tuple[Session, Session]:
    """Carry the three messages, and return the sessions of the site and of the server."""
    finish, here = site.finish(server.answer(site.hello()))
    return here, server.finish(finish)
