"""Questions on Python's standard library: the keyword that begins a line is asked for.

Each of eight sites knows two of the eight keywords, and each keyword is known to two sites. The
held-out questions of every site are on all eight, so that a site alone cannot answer most of them.
Lines to train on and held-out lines are of different files, and no line is in both. The public
questions are on four other keywords, from packages that no site owns.
"""

import zlib
from collections.abc import Iterable
from functools import cache
from itertools import chain

from fluvial.data import stdlib
from fluvial.data.records import Answered, Record
from fluvial.errors import ConfigError

KEYWORDS = ("class", "def", "except", "for", "from", "if", "raise", "return")
PUBLIC = ("assert", "elif", "while", "with")

SHORTEST, LONGEST = 8, 80
"""Characters of a line."""
HELD_OUT_SHARE = 0.3  # of a package group's characters, in whole files
TRAIN = 120
"""Questions of a site for each keyword, at most, so that sites have like weights in the mean."""
HELD_OUT = 4
"""Held-out questions of a site for each keyword, at most."""
LEAST_TRAIN = 60
LEAST_HELD_OUT = 16  # two for each site
GAP = "_"

Lines = dict[str, list[Record]]
"""Questions by the keyword that answers them."""


def site_names() -> tuple[str, ...]:
    """Return the names of the eight sites, sorted; a name has the site's two keywords."""
    return tuple(sorted(_owners()))


def site_records(site: str) -> tuple[list[Record], list[Record]]:
    """Return questions of one site: to train on, and held out.

    Raise `ConfigError` for a name that is no site, and for a Python whose library has too few
    lines.
    """
    if site not in _owners():
        raise ConfigError(
            f"data.source='stdlib-keywords' has no site {site!r}; its sites are "
            f"{', '.join(site_names())}"
        )

    train, heldout = _lines()
    number = site_names().index(site)
    first, second = _owners()[site]
    own = [train[first][0::2][:TRAIN], train[second][1::2][:TRAIN]]
    questions = [records[number :: len(_owners())][:HELD_OUT] for records in heldout.values()]

    return list(chain(*own)), list(chain(*questions))


def public_records() -> dict[str, list[Record]]:
    """Return the public questions, by their keyword."""
    documents = [each for package in stdlib.public_packages().values() for each in package]
    return _enough("public", _questions(documents, PUBLIC), LEAST_TRAIN // 2)


def _owners() -> dict[str, tuple[str, str]]:
    pairs = zip(KEYWORDS, (*KEYWORDS[1:], KEYWORDS[0]), strict=True)
    return {f"{first}-{second}": (first, second) for first, second in pairs}


@cache
def _lines() -> tuple[Lines, Lines]:
    """Return the questions of all sites: to train on, and held out."""
    texts = [stdlib.site_text(name, HELD_OUT_SHARE) for name in stdlib.site_names()]
    train = _questions((each for text in texts for each in text.train), KEYWORDS)
    known = {_prompt(record) for records in train.values() for record in records}
    heldout = _questions((each for text in texts for each in text.heldout), KEYWORDS)
    unknown = {
        keyword: [record for record in records if _prompt(record) not in known]
        for keyword, records in heldout.items()
    }

    return _enough("training", train, LEAST_TRAIN), _enough("held-out", unknown, LEAST_HELD_OUT)


def _questions(documents: Iterable[stdlib.Document], keywords: tuple[str, ...]) -> Lines:
    """Return the distinct questions of `documents`, in an order drawn by a checksum."""
    lines: dict[str, dict[str, Record]] = {keyword: {} for keyword in keywords}

    for document in documents:
        for number, line in enumerate(document.text.splitlines(), start=1):
            keyword, _, rest = line.strip().partition(" ")
            if keyword in lines and SHORTEST <= len(line.strip()) <= LONGEST:
                content = Answered(f"{GAP} {rest}  # {GAP} is ", keyword)
                lines[keyword].setdefault(rest, Record(f"{document.name}:{number}", content))

    return {
        keyword: [found[rest] for rest in sorted(found, key=lambda rest: (_checksum(rest), rest))]
        for keyword, found in lines.items()
    }


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", errors="replace"))


def _prompt(record: Record) -> str:
    assert isinstance(record.content, Answered), "a question has an answer"
    return record.content.prompt


def _enough(what: str, lines: Lines, least: int) -> Lines:
    few = {keyword: len(records) for keyword, records in lines.items() if len(records) < least}
    if few:
        keyword, count = next(iter(few.items()))
        raise ConfigError(
            f"data.source='stdlib-keywords': the library of this Python has {count} {what} lines "
            f"that begin with {keyword!r}, and {least} are needed; install its sources (Debian: "
            "libpython3-stdlib), or set data.source to your own files"
        )

    return lines
