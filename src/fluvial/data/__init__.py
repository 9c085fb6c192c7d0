"""Text of the sites: where it comes from, how it is split, how it becomes tokens and labels."""

from fluvial.data.records import IGNORE_INDEX, Example, Question, Tokenized, tokenize
from fluvial.data.sources import POOLED, DataConfig, SiteData, SiteTexts

__all__ = [
    "IGNORE_INDEX",
    "POOLED",
    "DataConfig",
    "Example",
    "Question",
    "SiteData",
    "SiteTexts",
    "Tokenized",
    "tokenize",
]
