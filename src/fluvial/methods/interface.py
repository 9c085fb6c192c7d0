"""Interface of a method: its config, its server half, its tasks at the sites, and its plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, runtime_checkable

from pydantic import Field
from torch import nn

from fluvial.codecs import CodecSettings
from fluvial.codecs.quantise import IdentitySettings
from fluvial.data import Example
from fluvial.federation.cohort import cohort_size
from fluvial.federation.config import BOUNDS, Bound, OnFailure
from fluvial.federation.context import Context, Metrics
from fluvial.federation.fleet import Fleet
from fluvial.federation.line import Line
from fluvial.federation.sites import Task
from fluvial.methods.exporting import Export, Reporting
from fluvial.methods.measuring import Measures
from fluvial.methods.traffic import Measured, Traffic
from fluvial.models.assignment import Assignment
from fluvial.models.outline import Outline
from fluvial.models.part_tuning import Tuning
from fluvial.models.pool import ModelPool
from fluvial.models.quantisation import FLOAT, Quantisation
from fluvial.models.targets import LoraSettings
from fluvial.settings import Settings
from fluvial.training.config import TrainConfig
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, factor

Tune = Literal["lora", "full"]
"""A LoRA adapter, or all weights."""


@runtime_checkable
class Server(Protocol):
    """The server half of a method. `state` holds everything that it must not forget."""

    def setup(self, fleet: Fleet) -> Metrics:
        """Prepare the sites before round 1; return metrics for the result."""
        ...

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Run round `number`, counted from 1: ask sites, aggregate replies, change the model.

        Metrics with `stopped`, a reason, end the run once the round is recorded.
        """
        ...

    def measure(
        self, fleet: Fleet, reporting: Reporting, *, round: int, which: Literal["base", "final"]
    ) -> Measures:
        """Return measures of the base, or of the present model, on the sites' held-out text."""
        ...

    def export(self, fleet: Fleet, reporting: Reporting, final: Measures) -> Export:
        """Write the model that the run made; return what result.json says about it."""
        ...

    def state(self) -> Payload:
        """Return all that `restore` needs to go on after the last finished round."""
        ...

    def restore(self, state: Payload) -> None:
        """Become the server whose `state` this was."""
        ...


@dataclass(frozen=True)
class Promise:
    """The differential privacy that a configured method promises for a whole run."""

    at_site: bool
    """True where the sites add the noise, so that the server need not be trusted."""
    tasks: frozenset[str]
    """Tasks that a site answers; a reply to any other would not be counted by epsilon."""
    measures: bool
    """True where exact sums of held-out text leave the sites, outside epsilon."""
    report: Callable[[int, int], dict[str, Any]]
    """The entry of result.json after a number of rounds (first) of a run (second)."""


class MethodSettings(Settings):
    """Base class of the `[method]` table of every method."""

    name: str

    @property
    def cohort_share(self) -> float:
        """Return the share of the sites that take part in a round."""
        return 1.0

    def with_all_sites(self) -> Self:
        """Return the same settings with all sites in each round."""
        return self

    def cohort(self, sites: int) -> int:
        """Return the number of sites in a round, of all `sites`."""
        return cohort_size(self.cohort_share, sites)

    def together(self, sites: int) -> int:  # noqa: ARG002
        """Return the sites of a round, of all `sites`, that must work at the same time, because
        they wait for each other within a task."""
        return 1

    def turns_waited(self, train: TrainConfig) -> int:  # noqa: ARG002
        """Return the turns of another site, at most, for which the server lets a site wait in one
        of its own; the site gives up after so many deadlines."""
        return 1

    @property
    def bounds(self) -> frozenset[Bound]:
        """Return the bounds of `[fleet]` that the server half applies; the others are refused."""
        return BOUNDS

    def tuning(self, tune: "Tune", lora: LoraSettings) -> Tuning:
        """Return the weights that the method tunes in a run that tunes so."""
        return lora if tune == "lora" else None

    def promise(self) -> Promise | None:
        """Return the differential privacy that these settings promise; None without any."""
        return None


class SampledSettings(MethodSettings):
    """Base class of the tables of methods that draw a cohort in each round."""

    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sites in a round's cohort."""

    @property
    def cohort_share(self) -> float:
        """Return `fraction`."""
        return self.fraction

    def with_all_sites(self) -> Self:
        """Return the same settings with `fraction` 1."""
        return self.model_copy(update={"fraction": 1.0})


@dataclass(frozen=True)
class Given:
    """The facts about a run that are known before it begins."""

    layout: Layout
    """The layout of everything that is tuned."""
    base: nn.Module
    """The base model, which may be without weights."""
    width_bytes: int
    """Bytes of one value of the base that is not quantised."""
    codec: CodecSettings
    downlink: CodecSettings | None
    train: TrainConfig
    sites: int
    """Number of sites; 1 where all data is pooled."""
    rounds: int
    line: Line | None
    """The line between a site and the server, where the configuration describes one."""
    on_failure: OnFailure = "stop"
    """Action when a site fails."""
    deadline_s: float | None = None
    """Seconds after which a site that does not answer has failed."""
    seed: int = 0
    """The run's seed."""
    examples: Callable[[], Mapping[str, Sequence[Example]]] | None = None
    """Reader of the training sequences by site; None where the sites' data is elsewhere."""
    quantisation: Quantisation = FLOAT
    """The formats of the base's linear weights."""
    correction_rank: int = 0
    """Rank of the correction of a quantised weight."""
    max_length: int = 0
    """Tokens of a sequence at most."""
    outline: Outline | None = None
    """The base's names, shapes and types, and its tuning."""
    names: tuple[str, ...] = ()
    """Names of the sites; empty where they are not known yet."""

    @property
    def tunes_factors(self) -> bool:
        """True where an adapter is tuned, False for all weights."""
        return any(factor(name) for name in self.layout.names)


CheckRow = tuple[str, str]
"""A row of `fluvial check`: subject and value."""


@dataclass(frozen=True)
class Forecast:
    """Sizes of a run, predicted without training."""

    frame: int
    """Bytes of one coded update; 0 where no codec of the configuration carries updates."""
    down: int
    """Bytes of one coded download; 0 where the method has a code of its own."""
    traffic: Callable[[int], Traffic]
    """Predicts the bytes of a site that takes part in a round, from the round's number."""
    rows: Sequence[CheckRow] = ()
    """Rows of `fluvial check`: bytes, memory, and time over the line."""
    round_over_line_s: float | None = None
    """Seconds of a round over the line, without training; None where they are not predicted."""
    measured: Measured | None = None
    """The model in a held-out measure; None where its bytes are not predicted."""


@dataclass(frozen=True)
class Plan:
    """A method's plan for one run, made before anything is trained."""

    sent: Layout
    """The layout of the largest update that a site trains and sends in a round."""
    forecast: Callable[[], Forecast]
    """Predicts sizes. It is called only where they are shown, since it codes an update."""
    notes: Sequence[str] = ()
    """Lines of `fluvial check` about decisions that are taken only when the run starts."""
    reads_public: bool = False
    """True where the method reads public text."""
    idle: Mapping[str, str] = field(default_factory=dict)
    """Settings that cannot change this run, by their place such as "fleet.max_weight_share", and
    why; a configuration that sets one of them is refused."""
    later: Mapping[str, str] = field(default_factory=dict)
    """Settings that act only in later rounds than this run has, and why; one that is set is a
    remark, because a short trial of a longer run is no mistake."""
    visits: int = 1
    """Visits to a site in a round, which share its optimizer steps."""
    remarks: Callable[[], Sequence[str]] = tuple
    """Returns lines about settings that are no mistake and may be meant otherwise; called once the
    records that are here have been read."""
    num_trained: int | None = None
    """Number of values that are trained, where that is not the number of `sent`."""


@dataclass(frozen=True)
class Traits:
    """Properties of a method that the rest of the package asks for, whatever its settings are."""

    label: str
    """The method in a few words, as tables and pages show it."""
    tunes: tuple[Tune, ...] = ("lora",)
    """Everything that the method can tune, its default first."""
    codec: CodecSettings = field(default_factory=IdentitySettings)
    """The codec where the configuration names none."""
    sends: Literal["codec", "own code", "nothing"] = "codec"
    """Carrier of updates: the configuration's codec, a code of the method's own, or none, because
    each site keeps its update. For the last two a `[codec]` is refused."""
    receives: Literal["exact", "downlink", "own code"] = "exact"
    """Carrier of the model to the sites: one exact message, the configuration's downlink, or a code
    of the method's own. Without "downlink" a `[downlink]` is refused."""
    coded_by: str = ""
    """Names of the settings that choose a code of the method's own, for messages; empty where
    nothing chooses it."""
    weighted: bool = False
    """True where both ends can scale factors by their partners; else `codec.weighted` is
    refused."""
    quantised: bool = True
    """True where sites train adapters over a quantised base; else the settings of `[model]` about
    it are refused."""
    packs: bool = True
    """True where sites train on packed sequences; else `data.packing` is refused."""
    shares_steps: bool = True
    """True where several processes of a site can train together; else they are refused."""
    pooled: bool = False
    """True where all data lies at one place."""
    exports: bool = True
    """True where a run writes a model and a sample of its text; else the settings of that sample
    in `[evaluate]` are refused."""
    budget: bool = False
    """True where a `[budget]` can choose the adapter, the local steps and the codec."""
    baseline: bool = False
    """True for a run that others are compared with, without a page of its own in the docs."""
    uncompressed: str | None = None
    """The label of its uncompressed run, where that is a baseline of others; None where it is
    none."""


@dataclass(frozen=True)
class Method:
    """An entry of `METHODS`."""

    config: type[MethodSettings]
    server: Callable[[Any, Context], Server]
    tasks: Mapping[str, Task]
    paper: str
    """Authors, title, venue, year, link."""
    plan: Callable[[Any, Given], Plan]
    """Return the plan of a run; raises `ConfigError` for settings that cannot work together, or
    that have no effect."""
    traits: Traits
    settled: Callable[[Any, Given], MethodSettings] = lambda config, _: config
    """Return settings in which everything is chosen that the configuration leaves open; raises
    `ConfigError` where nothing fits."""
    site_model: Callable[[Named, Payload], Named] | None = None
    """Return the model of a site from what it keeps in its slot "adapter" and from the state of the
    server half; None where all sites have one model."""
    held: Callable[[Any, ModelPool, str, float | None], Assignment | None] = lambda *_: None
    """Return the assignment with which a site of this name and memory (10^6 bytes) holds the base
    when it joins a run; None for the run's own."""


__all__ = [
    "CheckRow",
    "Context",
    "Export",
    "Forecast",
    "Given",
    "Measures",
    "Method",
    "MethodSettings",
    "Metrics",
    "Plan",
    "Promise",
    "Reporting",
    "SampledSettings",
    "Server",
    "Traits",
    "Tune",
]
