"""Settings of the aggregation of adapters."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fluvial.settings import Settings

Mode = Literal["ab-mean", "pad", "ffa", "stack", "svd", "residual"]
"""Rule by which the adapters of a round become one."""
SENDS_SIDE: frozenset[Mode] = frozenset({"stack", "residual"})
"""Modes in which sites receive a side path beside the adapter that they train."""
MOVES_BASIS: frozenset[Mode] = frozenset({"stack", "svd"})
"""Modes after which sites receive other factors than those they trained."""


class AggregationSettings(Settings):
    """The aggregation of LoRA adapters, whose product B A counts, not their factors."""

    mode: Mode = "svd"
    """Rule by which adapters become one ("ab-mean" in fedavg and cgfedllm without this table).
    "ab-mean": means of A and of B (FedIT). "pad": the same with zeros up to the largest rank,
    weighted by the norms of the products (HetLoRA). "ffa": mean of B, for one frozen A (FFA-LoRA).
    "stack": factors beside each other, and a fresh adapter (FLoRA). "svd": the best approximation
    of the mean product (FlexLoRA). "residual": means of A and of B, and what they miss in a frozen
    side path (FedEx-LoRA)."""
    residual_rank: int = Field(32, ge=0, le=4096)
    """Components for each module, beside the adapter's, that the server keeps. Under "svd" they
    come back in the next round (error feedback, ours), and 0 keeps none; under "stack" and
    "residual" sites receive them as a side path. What exceeds them is dropped and measured."""
    target: Literal["changes", "products"] = "changes"
    """Matrix that "svd" approximates. "changes": the adapter before, plus the mean change of the
    products, so that a site of low rank does not lower what it cannot hold (ours). "products":
    the mean of the products (FlexLoRA)."""
    absent: Literal["ignore", "count"] = "ignore"
    """Weight of sites that do not train a module. "ignore": its mean is over the sites that train
    it. "count": an absent site counts as no change, so that one site alone moves it less (ours)."""
    measure: Literal["auto", "always"] = "auto"
    """Modes whose error is measured against the exact mean of the products. "auto": all but
    "ab-mean", whose server drops each update at once. "always": "ab-mean" too, whose server then
    holds the updates of a round."""

    @property
    def sends_side(self) -> bool:
        """True where sites receive a side path."""
        return self.mode in SENDS_SIDE

    @property
    def counts_changes(self) -> bool:
        """True where the changes of the products add up, so that components of a change count."""
        return self.mode == "stack" or (self.mode == "svd" and self.target == "changes")

    @property
    def holds_updates(self) -> bool:
        """True where the server holds all updates of a round."""
        return self.mode != "ab-mean" or self.measure == "always"

    @property
    def basis(self) -> Literal["fixed", "moving"]:
        """The factors that sites receive: those of their training, or others of one product."""
        return "moving" if self.mode in MOVES_BASIS else "fixed"

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        fields = type(self).model_fields
        if self.residual_rank != fields["residual_rank"].default and self.mode not in (
            SENDS_SIDE | MOVES_BASIS
        ):
            yield f"residual_rank: without effect under mode={self.mode!r}; remove it"
        if self.residual_rank == 0 and self.mode in SENDS_SIDE:
            yield f"residual_rank=0: mode={self.mode!r} would drop what sites trained; raise it"
        if self.target == "products" and self.mode != "svd":
            yield f"target: without effect under mode={self.mode!r}; remove it"
        if self.measure == "always" and self.mode != "ab-mean":
            yield f"measure: without effect under mode={self.mode!r}, which measures; remove it"


AB_MEAN = AggregationSettings(mode="ab-mean")
"""The published FedIT, which is FedAvg of the factors."""
