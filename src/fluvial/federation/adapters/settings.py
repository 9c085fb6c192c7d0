"""Settings of the aggregation of adapters."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fluvial.settings import Settings

Mode = Literal["ab-mean", "pad", "ffa", "stack", "svd", "residual"]
"""Rule by which the adapters of a round become one."""
WITH_REST: frozenset[Mode] = frozenset({"stack", "svd", "residual"})
"""Modes after which something is left beside the adapter that sites train."""


class AggregationSettings(Settings):
    """The aggregation of LoRA adapters, whose product B A counts, not their factors."""

    mode: Mode = "svd"
    """Rule by which adapters become one. "ab-mean": means of A and of B (FedIT). "pad": the same
    with zeros up to the largest rank, weighted by the norms of the products (HetLoRA). "ffa": mean
    of B, for one frozen A (FFA-LoRA). "stack": factors beside each other, and a fresh adapter
    (FLoRA). "svd": the best approximation of the mean product (FlexLoRA). "residual": means of A
    and of B, and what they miss in a frozen side path (FedEx-LoRA)."""
    residual_rank: int = Field(32, ge=0, le=4096)
    """Components for each module, beside the adapter's, that the server keeps. Under "svd" they
    come back in the next round (error feedback, ours); under "stack" and "residual" sites receive
    them as a side path. What exceeds them is dropped and measured; 0 keeps nothing."""
    target: Literal["changes", "products"] = "changes"
    """Matrix that "svd" approximates. "changes": the adapter before, plus the mean change of the
    products, so that a site of low rank does not lower what it cannot hold (ours). "products":
    the mean of the products (FlexLoRA)."""
    absent: Literal["ignore", "count"] = "ignore"
    """Weight of sites that do not train a module. "ignore": its mean is over the sites that train
    it. "count": an absent site counts as no change, so that one site alone moves it less (ours)."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        fields = type(self).model_fields
        if self.residual_rank != fields["residual_rank"].default and self.mode not in WITH_REST:
            yield f"residual_rank: without effect under mode={self.mode!r}; remove it"
        if self.target == "products" and self.mode != "svd":
            yield f"target: without effect under mode={self.mode!r}; remove it"


AB_MEAN = AggregationSettings(mode="ab-mean")
"""The published FedIT, which is FedAvg of the factors."""
