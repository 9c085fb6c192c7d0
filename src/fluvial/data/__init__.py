"""The sites' text: its sources, its partition, its tokens and labels.

Each name is imported when it is first used, so that settings of data are read without torch.
"""

from typing import TYPE_CHECKING

from fluvial.lazy import imported_when_used

if TYPE_CHECKING:
    from fluvial.data.config import DataConfig, SourceSettings
    from fluvial.data.examples import IGNORE_INDEX, Example, Question
    from fluvial.data.faults import DataError
    from fluvial.data.overlap import Overlap, independent
    from fluvial.data.records import Numbers
    from fluvial.data.templates import inlined_templates, with_template
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
    "inlined_templates",
    "read_whole",
    "tokenize",
    "with_template",
]
__getattr__ = imported_when_used(
    __name__,
    {
        "fluvial.data.config": ("DataConfig", "SourceSettings"),
        "fluvial.data.examples": ("IGNORE_INDEX", "Example", "Question"),
        "fluvial.data.faults": ("DataError",),
        "fluvial.data.overlap": ("Overlap", "independent"),
        "fluvial.data.records": ("Numbers",),
        "fluvial.data.templates": ("inlined_templates", "with_template"),
        "fluvial.data.texts": ("POOLED", "SiteData", "SiteTexts"),
        "fluvial.data.tokenise": ("Tokenized", "tokenize"),
        "fluvial.data.whole": ("Whole", "read_whole"),
    },
)
