"""Sources that come with Python: names for `data.source` that are no files."""

from collections.abc import Callable
from dataclasses import dataclass

from fluvial.data import keywords, stdlib
from fluvial.data.examples import Example
from fluvial.data.forms import Form
from fluvial.data.records import Record, Text
from fluvial.storage.paths import BUNDLED

Parts = tuple[list[Record], list[Record]]
"""Records of a site to train on, and held-out records."""


@dataclass(frozen=True)
class Bundled:
    """A source whose sites, held-out records and public text are given."""

    form: Form
    site_names: Callable[[], tuple[str, ...]]
    site: Callable[[str], Parts]
    public: Callable[[], dict[str, list[Record]]]
    """Records that belong to no site, in parts by where they are from."""


def _records(documents: list[stdlib.Document]) -> list[Record]:
    return [Record(document.name, Text(document.text)) for document in documents]


def _texts(site: str) -> Parts:
    text = stdlib.site_text(site)
    return _records(text.train), _records(text.heldout)


def _packages() -> dict[str, list[Record]]:
    return {name: _records(documents) for name, documents in stdlib.public_packages().items()}


SOURCES = {
    "stdlib": Bundled("text", stdlib.site_names, _texts, _packages),
    "stdlib-keywords": Bundled(
        "prompt_completion", keywords.site_names, keywords.site_records, keywords.public_records
    ),
}
"""Each bundled source by its name."""

assert tuple(SOURCES) == BUNDLED, "each bundled source has records"


def even_parts(packages: dict[str, list[Example]], parts: int = 8) -> dict[str, list[Example]]:
    """Join packages into `parts` groups of like size; the next package joins the smallest group."""
    groups: list[tuple[list[str], list[Example]]] = [([], []) for _ in range(parts)]
    for name in sorted(packages, key=lambda name: (-len(packages[name]), name)):
        names, examples = min(groups, key=lambda group: len(group[1]))
        names.append(name)
        examples += packages[name]

    return {names[0]: examples for names, examples in groups if examples}
