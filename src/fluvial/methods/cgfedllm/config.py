"""Settings of CG-FedLLM."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fluvial.exchange import TgapConfig
from fluvial.exchange.representation import Representation
from fluvial.federation.config import BOUNDS, Bound
from fluvial.methods.aggregating import AveragingSettings
from fluvial.methods.cgfedllm.privacy import PrivacyConfig
from fluvial.methods.interface import Promise


class CgFedLlmConfig(AveragingSettings):
    """CG-FedLLM; defaults are the paper's where it gives them."""

    name: Literal["cgfedllm"] = "cgfedllm"
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the sites in a round's cohort; 0.05 of 100 with Dolly, 1 of 3 with C-Eval and
    MMLU."""
    representation: Representation = "delta"
    """Form of what is coded: the update, or the whole adapter ("state", the letter of Algorithm 1).
    Ours: delta, because the update is 0.04 % of the state's energy and drowns in the codec's
    error."""
    tgap: TgapConfig = TgapConfig()
    """Pre-training of the codec, and the updates of the gate."""
    gate: Literal["refuse", "report"] = "refuse"
    """Action when the codec fails the gate: stop before the first round, or write it down and go
    on."""
    privacy: PrivacyConfig | None = None
    """Differential privacy of what a site releases; none where this is absent."""
    max_growth: float = Field(10.0, gt=1, le=1e9)
    """Times by which an aggregate update may be longer than the longest before it; beyond that the
    run stops (spec g.12)."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        yield from super().conflicts()
        if self.tgap.source == "none" and self.differs("gate"):
            yield "gate: without effect under tgap.source='none', which measures nothing; remove it"
        yield from self._beside_aggregation()

    def _beside_aggregation(self) -> Iterator[str]:
        """Yield a line for each setting that cannot be set with another aggregation."""
        mode = self.aggregation.mode
        if mode == "ffa":
            yield "aggregation.mode='ffa': needs a frozen A; use method.name='fedavg'"
        if mode != "ab-mean" and self.representation == "state":
            yield f"representation='state': not with aggregation.mode={mode!r}; use 'delta'"
        if self.aggregation.holds_updates and self.privacy is not None:
            yield (
                f"privacy: not with aggregation.mode={mode!r} or a measure of the error, which "
                "epsilon does not count; remove one"
            )

    @property
    def bounds(self) -> frozenset[Bound]:
        """Return both bounds; with privacy only the one that counts of records or lengths of
        updates are there for (see `rule`)."""
        if self.privacy is None:
            return BOUNDS
        return frozenset({"max_update_growth" if self.privacy.at_site else "max_weight_share"})

    def promise(self) -> Promise | None:
        """Return the promise of `privacy`, if it is set."""
        return None if self.privacy is None else self.privacy.promise()
