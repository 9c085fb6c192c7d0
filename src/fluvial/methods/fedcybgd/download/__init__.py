"""Forms of a download: the block that a site trains, exact, and the others in one of five forms.

    form          what the others are                         the site must hold
    full          exact                                       nothing
    proxy         fewer layers, neurons, heads (the paper)    nothing
    stale-subset  the base's, but for a random share of       the base
                  those that have moved (the released code)
    low-bit       coded (int8, nf4, ...); what did not move   what it was sent before
                  since the site's last visit is not resent
    cache         exact: the base and all commits since;      the base, and what it was sent before
                  what the site has is not resent

Full, proxy and low-bit bring absolute weights, frozen ones in the model's type. With an adapter
"weights" are its factors, and the base is always there; a proxy of it makes no sense.
"""

from typing import Annotated, Literal

from pydantic import Field

from fluvial.codecs import CodecConfig
from fluvial.codecs.quantise import NF4Settings
from fluvial.methods.fedcybgd.proxy import ProxySettings
from fluvial.settings import Settings


class FullDownload(Settings):
    """All weights, exact: compression C = identity."""

    form: Literal["full"] = "full"


class ProxyDownload(ProxySettings):
    """The paper's: layer dropping and pruning, from scores on public text."""

    form: Literal["proxy"] = "proxy"


class StaleDownload(Settings):
    """The released code's `update_global`: of the blocks that have moved, a random share is
    refreshed."""

    form: Literal["stale-subset"] = "stale-subset"
    share: float = Field(0.5, gt=0, le=1)
    """Share of the moved blocks that is sent, rounded up to whole blocks; the trained block is sent
    in any case. Ours: the released code's default of -1 crashes."""


class LowBitDownload(Settings):
    """All layers, with fewer bits (ours)."""

    form: Literal["low-bit"] = "low-bit"
    codec: CodecConfig = NF4Settings()
    """Codec of the matrices; vectors, such as norms, are sent as they are."""


class CacheDownload(Settings):
    """A versioned cache of blocks, brought up to date by replaying commits (ours)."""

    form: Literal["cache"] = "cache"


DownloadConfig = Annotated[
    FullDownload | ProxyDownload | StaleDownload | LowBitDownload | CacheDownload,
    Field(discriminator="form"),
]
LOSSY = (ProxyDownload, StaleDownload, LowBitDownload)
"""Forms through which a site sees another model than the server's."""
