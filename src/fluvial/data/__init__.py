"""The sites' text: its sources, its partition, its tokens and labels.

Each name is imported when it is first used, so that settings of data are read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
_MODULES = {
    "fluvial.data.config": (
        "DataConfig",
        "SourceSettings",
    ),
    "fluvial.data.examples": (
        "IGNORE_INDEX",
        "Example",
        "Question",
    ),
    "fluvial.data.faults": ("DataError",),
    "fluvial.data.overlap": (
        "Overlap",
        "independent",
    ),
    "fluvial.data.records": ("Numbers",),
    "fluvial.data.templates": (
        "inlined_templates",
        "with_template",
    ),
    "fluvial.data.texts": (
        "POOLED",
        "SiteData",
        "SiteTexts",
    ),
    "fluvial.data.tokenise": (
        "Tokenized",
        "tokenize",
    ),
    "fluvial.data.whole": (
        "Whole",
        "read_whole",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a name of the package when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fluvial.data' has no attribute {name!r}")

    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value

    return value
