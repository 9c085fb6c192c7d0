"""What a method is: a config, a server half, and tasks that sites do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import nn

from fluvial.codecs import CodecSettings
from fluvial.codecs.quantise import IdentitySettings
from fluvial.federation.context import Context, Metrics
from fluvial.federation.fleet import Fleet
from fluvial.federation.line import Line
from fluvial.federation.sites import Task, part
from fluvial.settings import Settings
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named


class Server(Protocol):
    """The server half. Everything it must not forget is in `state`."""

    def setup(self, fleet: Fleet) -> Metrics:
        """Once, before round 1; what it reports goes into the result."""
        ...

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """One round, from 1: ask, fold the replies as they come, change the model at the end."""
        ...

    def model(self) -> Named | None:
        """The global adapter; None where each site keeps its own."""
        ...

    def state(self) -> Payload:
        """All that `restore` needs to go on after the last finished round."""
        ...

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        ...


@dataclass(frozen=True)
class Forecast:
    """What is known of a run before it begins."""

    frame: int
    """Bytes of one coded update."""
    width: int
    """Bytes of a value of the base."""
    sites: int
    rounds: int
    line: Line | None
    """Of a site to the server, if the configuration knows it."""


@dataclass(frozen=True)
class Promise:
    """Differential privacy that a configured method promises, as the rest of a run must respect
    it."""

    at_site: bool
    """True where the sites add the noise, so that the server need not be trusted."""
    tasks: frozenset[str]
    """Tasks that a site answers; through others something would leave that epsilon does not
    count."""
    measures: bool
    """True where exact sums of held-out text leave the sites, outside epsilon."""
    report: Callable[[int, int], dict[str, Any]]
    """The entry of result.json after so many rounds of a run of so many."""


__all__ = ["Context", "Forecast", "Method", "Metrics", "Promise", "Server", "Tune"]

Tune = Literal["lora", "full"]
"""What is tuned: a LoRA adapter, or all weights."""


@dataclass(frozen=True)
class Method:
    """An entry of `METHODS`."""

    config: type[Settings]
    server: Callable[[Any, Context], Server]
    tasks: Mapping[str, Task]
    paper: str
    """Authors, title, venue, year, link."""
    codec: CodecSettings = field(default_factory=IdentitySettings)
    """The codec when the configuration names none."""
    sends: Literal["codec", "own code", "nothing"] = "codec"
    """What carries updates: the codec of the configuration, a code that is part of the method, or
    nothing, where a site keeps what it learned. For the last two a codec in the configuration is an
    error."""
    receives: Literal["as it is", "downlink", "own code"] = "as it is"
    """Carrier of the model to the sites: one exact message, which is what a method of its own
    makes; the configuration's downlink, where both ends speak through `methods.link`; or a code of
    the method's. A `[downlink]` that nothing honours is an error."""
    weights: bool = False
    """True where both ends code factors scaled by their partners, if `codec.weighted` asks for it,
    as `methods.link` does. A `weighted` that nothing honours is an error."""
    sent: Callable[[Any, Layout], Layout] = lambda config, layout: part(
        layout, getattr(config, "factors", "A and B")
    )
    """The layout of what a site trains and sends in a round, at most."""
    forecast: Callable[[Any, Layout, Forecast], list[tuple[str, str]]] | None = None
    """Rows of `fluvial check` about the way down and the memory of a site, where these are the
    method's own."""
    notes: Callable[[Any], Sequence[str]] = lambda _config: ()
    """What `fluvial check` adds: what is decided only when the run starts."""
    tunes: tuple[Tune, ...] = ("lora",)
    """What the method can tune, its default first."""
    pooled: bool = False
    """Whether all data lies at one place (the centralised baseline)."""
    reads_public: Callable[[Any, CodecSettings], bool] = lambda _config, _codec: False
    """Whether the method, so configured and with this codec, reads public text."""
    privacy: Callable[[Any], Promise | None] = lambda _config: None
    """Differential privacy that the method, so configured, promises; None without any."""
    check: Callable[[Any, CodecSettings, Layout], None] | None = None
    """Raises `ConfigError` for settings that cannot work together, before anything is trained."""
    check_model: Callable[[Any, nn.Module], None] | None = None
    """The same for settings that do not fit the base model, which may be without weights."""
