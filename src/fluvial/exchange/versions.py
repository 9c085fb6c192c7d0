"""Versions of a learned codec: the half that a site downloads, and who holds which."""

from collections.abc import Iterable, Sequence

from fluvial.codecs import CODECS, CodecSettings, build, must_learn, read_settings
from fluvial.codecs.base import Codec, LearnedCodec
from fluvial.errors import WireError
from fluvial.federation.fleet import Fleet
from fluvial.federation.replies import nothing
from fluvial.federation.sites import Site
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout

SLOT = "codec"
"""Slot of a site for the published half of its codec."""

INSTALL = "install"
"""Task by which a site receives its codec; the answer carries nothing."""


def published(codec: Codec, version: int, *, decoder: bool) -> Payload:
    """Return what a site keeps of its codec: settings, version, and what a learned one learned."""
    half = codec.published(decoder=decoder) if isinstance(codec, LearnedCodec) else Payload()
    settings = codec.settings.model_dump(mode="json")
    return Payload(half.tensors, {"settings": settings, "version": version, "learned": half.values})


def site_codec(site: Site, layout: Layout) -> Codec:
    """Return the codec of this run at a site: built from its settings, or as it was installed.

    Raises `WireError` where nothing was installed.
    """
    if not must_learn(site.codec):
        return build(site.codec, layout)

    installed = site.recall(SLOT)
    if not installed.values:
        raise WireError(f"site {site.name!r} was asked to train before its codec was installed")

    settings = read_settings(installed.value("settings", dict))
    kind = CODECS[settings.name]
    if not issubclass(kind, LearnedCodec):
        return build(settings, layout)

    learned = Payload(installed.tensors, installed.value("learned", dict))
    return kind.from_published(settings, layout, learned)


def install_codec(site: Site, message: Payload) -> Payload:
    """Keep the codec that the server learned or chose."""
    site.keep(SLOT, message)
    return Payload()


class Versions:
    """The server's record of which site holds which version; a site that lacks one is sent it."""

    def __init__(self, settings: CodecSettings) -> None:
        self.needed = must_learn(settings)
        """True where sites cannot build the codec from the run's settings."""
        self.current = 0
        """Version that updates of this round are coded with; 0 before one is published."""
        self.held: dict[str, int] = {}

    def install(
        self,
        fleet: Fleet,
        sites: Sequence[str],
        codec: Codec,
        *,
        round: int,
        can_follow: bool = False,
    ) -> list[str]:
        """Send `codec` to those of `sites` that lack it; return those that hold it then.

        With `can_follow`, sites of the version before come to the current one by themselves. Only
        error feedback makes a site decode, so only then does it download the decoder.
        """
        if not self.needed:
            return list(sites)

        accepted = {self.current, self.current - 1} if can_follow else {self.current}
        lacking = [site for site in sites if self.held.get(site, 0) not in accepted]
        if lacking:
            half = published(codec, self.current, decoder=codec.settings.error_feedback)
            messages = dict.fromkeys(lacking, half)
            for reply in fleet.ask(INSTALL, messages, round=round, read=nothing, alone=False):
                self.held[reply.site] = self.current

        return [site for site in sites if self.held.get(site, 0) in accepted]

    def acknowledge(self, site: str) -> None:
        """Note that `site` has answered with the current version."""
        if self.needed:
            self.held[site] = self.current

    def forget(self, sites: Iterable[str]) -> None:
        """Note that these sites must be sent the codec again."""
        for site in sites:
            self.held.pop(site, None)
