"""The sites' text: its sources, its partition, its tokens and labels."""

from fluvial.data.config import DataConfig, SourceSettings
from fluvial.data.examples import IGNORE_INDEX, Example, Question
from fluvial.data.faults import DataError
from fluvial.data.overlap import Overlap, independent
from fluvial.data.records import Numbers
from fluvial.data.templates import inlined_template, with_template
from fluvial.data.texts import POOLED, SiteData, SiteTexts
from fluvial.data.tokenise import Tokenized, tokenize
from fluvial.data.whole import Whole, read_whole

__all__ = [
    "IGNORE_INDEX",
    "POOLED",
    "DataConfig",
    "DataError",
    "Example",
    "Numbers",
    "Overlap",
    "Question",
    "SiteData",
    "SiteTexts",
    "SourceSettings",
    "Tokenized",
    "Whole",
    "independent",
    "inlined_template",
    "read_whole",
    "tokenize",
    "with_template",
]
