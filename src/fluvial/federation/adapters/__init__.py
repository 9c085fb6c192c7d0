"""Aggregation of LoRA adapters of equal or unequal ranks, and its opposite, redistribution.

Named tensors, ranks and weights go in, named tensors and measures come out. Nothing here knows a
site, a message or a fleet.
"""

from fluvial.federation.adapters.combine import Combined, SiteChange, combine
from fluvial.federation.adapters.leading import (
    completed,
    factor_length,
    layout_of_ranks,
    leading,
)
from fluvial.federation.adapters.redistribute import redistribute, without_side
from fluvial.federation.adapters.settings import AB_MEAN, AggregationSettings, Mode
from fluvial.federation.adapters.whole import WholeAdapter, factor_names, modules_of

__all__ = [
    "AB_MEAN",
    "AggregationSettings",
    "Combined",
    "Mode",
    "SiteChange",
    "WholeAdapter",
    "combine",
    "completed",
    "factor_length",
    "factor_names",
    "layout_of_ranks",
    "leading",
    "modules_of",
    "redistribute",
    "without_side",
]
