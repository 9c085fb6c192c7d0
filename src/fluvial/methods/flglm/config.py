"""Settings of FL-GLM; defaults are the paper's where it gives values."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from fluvial.codecs.activations import ActivationConfig
from fluvial.codecs.activations.floats import ExactRowsSettings
from fluvial.federation.config import BOUNDS, Bound
from fluvial.methods.flglm.leakage.noise import NoiseConfig
from fluvial.methods.flglm.leakage.settings import LeakageConfig
from fluvial.methods.interface import SampledSettings, Tune
from fluvial.models.part_tuning import PartKind, PartTuning, Place, Tuning
from fluvial.models.targets import LoraSettings
from fluvial.settings import Settings
from fluvial.training.config import TrainConfig

Mode = Literal["sequential", "client-batch", "hierarchical"]
Layers = Annotated[int, Field(ge=0, le=10**6)]
MEMORY_BYTES = 2**28
"""Bytes of hidden states of a site in each direction, unless set otherwise: 262,144 tokens of 256
values in fp32."""


class PartsConfig(Settings):
    """Weights that are tuned in each part; unset, those that the run tunes by `tune`."""

    front: PartKind | None = None
    """Tuned weights of the embedding and the first layers: a LoRA adapter ("lora"), all ("full"),
    or none ("frozen"). A frozen front needs no gradient, so that one of the four tensors of a step
    is not sent."""
    middle: PartKind | None = None
    """Tuned weights of the server's layers."""
    back: PartKind | None = None
    """Tuned weights of the last layers, the final norm and the head. A head that is the embedding
    too belongs to the front."""

    def kinds(self, tune: Tune) -> dict[Place, PartKind]:
        """Return the kind of each part in a run that tunes so."""
        return {
            "front": self.front or tune,
            "middle": self.middle or tune,
            "back": self.back or tune,
        }


class FlGlmConfig(SampledSettings):
    """FL-GLM: the first and last layers at the sites, those between them at the server."""

    name: Literal["flglm"] = "flglm"
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sites in a round's cohort."""
    front: Layers | Literal["auto"] = 1
    """Decoder layers at the site before the server's, with the embedding (p of the paper); 0 is the
    embedding alone, as in FedBERT. "auto" chooses by memory, line and leakage, from 1, and `fluvial
    check` shows why."""
    back: Layers | Literal["auto"] = 1
    """Decoder layers at the site behind the server's, with the final norm and the head (q), or
    "auto"."""
    site_memory_mb: float | None = Field(None, gt=0, le=1e9)
    """Most memory of a site in training, in 10^6 bytes, for weights, optimizer and activations at
    data.max_length; a cut that needs more is refused."""
    server_memory_mb: float | None = Field(None, gt=0, le=1e9)
    """Most memory of the server in training, in 10^6 bytes, for the whole cohort."""
    mode: Mode = "client-batch"
    """Order of the sites' steps: "sequential", one site after another; "client-batch", one step of
    all sites together, as if their batches were one; "hierarchical", a replica of the server's
    layers for each site, averaged at the end of a round or every `sync_steps`."""
    ends: Literal["shared", "own"] = "shared"
    """Layers of the sites: "shared", the same at all sites as in federated averaging, or each
    site's "own", of which nothing leaves it (the released code)."""
    parts: PartsConfig = PartsConfig()
    """Weights that are tuned in each part."""
    sync_steps: int | None = Field(None, ge=1, le=10**9)
    """Steps from one average to the next under mode="hierarchical" (tau); the default averages at
    the end of a round only."""
    step_deadline_s: float | None = Field(None, ge=0.001, le=10**7)
    """Seconds for which a step under mode="client-batch" waits for a site's turn; then the step is
    made without the site, which rejoins in the next possible one. The default waits for all."""
    in_flight: int = Field(2, ge=1, le=2**10)
    """Micro-batches of a site whose hidden states the server has, and not yet their gradient: with
    2, a site sends the next one while the server works; 1 waits for each. Weights are the same, to
    the bit; the server holds a graph for each. See `train.gradient_accumulation_steps`."""
    hidden: ActivationConfig = ExactRowsSettings()
    """Codec of the hidden states of training, both ways. Where the model is measured or generates,
    they are sent exactly."""
    recurring: Literal["states", "changes"] = "states"
    """Content of a sample's second and later passes: its hidden "states", or their "changes" since
    the pass before, coded by `hidden` after a first pass that is exact (AQ-SGD)."""
    memory_bytes: int = Field(MEMORY_BYTES, ge=0, le=2**60)
    """Bytes of hidden states that the server holds for a site in each direction, at most; the site
    holds as much with recurring="changes". Those of a frozen front are sent in the first pass of a
    sample only, unless there is noise or no room; 0 sends them in every pass."""
    gradient: ActivationConfig = ExactRowsSettings()
    """Codec of the gradients of the hidden states, both ways."""
    noise: NoiseConfig | None = None
    """Clip and noise of the hidden states that leave a site; none by default."""
    leakage: LeakageConfig = LeakageConfig()
    """Meter of the tokens that the server could read."""

    @property
    def layers(self) -> tuple[int, int]:
        """Layers of the front and of the back; see `choice.settled` for those that are open."""
        assert self.front != "auto"
        assert self.back != "auto"
        return self.front, self.back

    @property
    def is_open(self) -> bool:
        """True where the cut is to be chosen."""
        return self.front == "auto" or self.back == "auto"

    def tuning(self, tune: Tune, lora: LoraSettings) -> Tuning:
        """See `MethodSettings`."""
        kinds = self.parts.kinds(tune)
        if set(kinds.values()) == {"lora"}:
            return lora
        if set(kinds.values()) == {"full"}:
            return None
        cut = None if self.is_open else self.layers
        return PartTuning(lora, kinds["front"], kinds["middle"], kinds["back"], cut)

    @property
    def window(self) -> int:
        """Turns of a site without an answer: a gradient beside the hidden states in flight."""
        return 1 if self.in_flight == 1 else self.in_flight + 1

    def together(self, sites: int) -> int:
        """Return the whole cohort where its sites meet between two steps."""
        meet = self.mode == "client-batch" or self.sync_steps is not None
        return self.cohort(sites) if meet else 1

    def turns_waited(self, train: TrainConfig) -> int:
        """See `MethodSettings`: the turns from one meeting of the sites to the next."""
        step = 2 * train.gradient_accumulation_steps + 1
        return step * (self.sync_steps or 1)

    @property
    def sends_gradient(self) -> bool:
        """True where a training step sends gradients: not with front and middle frozen."""
        return (self.parts.front, self.parts.middle) != ("frozen", "frozen")

    @property
    def runs_front_alone(self) -> bool:
        """True where hidden states of a sample never change: the front then runs on each sample by
        itself, so that they do not depend on the batch."""
        return self.parts.front == "frozen" and self.noise is None

    @property
    def caches_front(self) -> bool:
        """True where the server holds the hidden states of a frozen front."""
        return self.runs_front_alone and self.memory_bytes > 0

    @property
    def sends_changes(self) -> bool:
        """True where both ends hold the hidden states of a sample's last pass."""
        return self.recurring == "changes"

    @property
    def remembers(self) -> bool:
        """True where an end holds hidden states by sample, so that turns name samples."""
        return self.caches_front or self.sends_changes

    @property
    def bounds(self) -> frozenset[Bound]:
        """Return the bounds for averages of updates, which the other modes do not make."""
        return BOUNDS if self.mode == "hierarchical" else frozenset()

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.sync_steps is not None and self.mode != "hierarchical":
            yield "sync_steps: without effect unless mode='hierarchical'; remove it"
        if self.step_deadline_s is not None and self.mode != "client-batch":
            yield "step_deadline_s: without effect unless mode='client-batch'; remove it"
        if self.sends_changes and self.hidden.name == "exact":
            yield "recurring: without effect under hidden.name='exact'; choose another codec"
        if self.sends_changes and self.noise is not None:
            yield (
                "recurring: under noise, which is new in every pass, changes are as large as "
                "hidden states; remove one of the two"
            )
        if self.sends_changes and not self.memory_bytes:
            yield "memory_bytes: 0 leaves no room for what recurring='changes' needs; set it higher"
        if self.memory_bytes != MEMORY_BYTES and not (self.sends_changes or self.runs_front_alone):
            yield (
                "memory_bytes: without effect unless recurring='changes', or the front is frozen "
                "and without noise; remove it"
            )
        if not self.sends_gradient and self.gradient.name != "exact":
            yield (
                "gradient: without effect, because no gradient is sent where front and middle are "
                "frozen; remove it"
            )
        if set(self.parts.kinds("lora").values()) == {"frozen"}:
            yield "parts: nothing is left to tune; freeze two parts at most"
