"""Excerpts of long records: their tokens are counted on the first characters of each text."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fluvial.data.examples import IGNORE_INDEX
from fluvial.data.faults import Faults
from fluvial.data.records import Answered, Chat, Record, Text
from fluvial.data.tokenise import Tokenizing

MOST = 2**15
"""Characters of a record that are tokenised: several times the longest sequence that is proposed,
so that a longer record is known to be longer."""
MOST_IN_ALL = 4_000_000
"""Characters of all records of a sample that are tokenised; some seconds, in most tokenizers."""


@dataclass(frozen=True)
class Counted:
    """Tokens of a record; estimated where it has more than `MOST` characters."""

    tokens: int
    learned: int
    """Tokens with loss."""
    is_estimated: bool = False


def counted(records: Sequence[Record], tokenizing: Tokenizing) -> tuple[list[Counted], Faults]:
    """Return the tokens of evenly spaced records, and the faults of those that a chat template
    cannot render.

    At most `MOST_IN_ALL` characters are tokenised, about. `tokenizing` must cut nothing.
    """
    read = sum(min(MOST, sum(map(len, _texts(record)))) for record in records)
    looked = records[:: max(1, math.ceil(read / MOST_IN_ALL))]
    excerpts = [(record, excerpt(record)) for record in looked]

    whole = tokenizing(record for record, part in excerpts if part is record)
    counts = [_counted(example.labels) for example in whole.examples]
    faults = whole.faults
    for record, part in excerpts:
        if part is not record:
            found = tokenizing([part])
            faults.include_all(found.faults)
            counts += [_scaled(_counted(each.labels), record, part) for each in found.examples]

    return counts, faults


def excerpt(record: Record) -> Record:
    """Return the record with at most `MOST` characters: each text keeps its beginning, and short
    ones stay whole. Return the same object where nothing is cut."""
    content = record.content
    texts = _texts(record)
    if sum(map(len, texts)) <= MOST:
        return record

    each = max(1, MOST // len(texts))
    if isinstance(content, Text):
        return replace(record, content=Text(content.text[:each]))
    if isinstance(content, Answered):
        cut = replace(content, prompt=content.prompt[:each], answer=content.answer[:each])
        return replace(record, content=cut)

    turns = [{**turn, "content": turn["content"][:each]} for turn in content.messages]
    return replace(record, content=replace(content, messages=turns))


def _texts(record: Record) -> list[str]:
    """Return the texts of a record that are tokenised."""
    content = record.content
    if isinstance(content, Text):
        return [content.text]
    if isinstance(content, Answered):
        return [content.prompt, content.answer]
    return [turn["content"] for turn in content.messages]


def _counted(labels: Sequence[int]) -> Counted:
    return Counted(len(labels), sum(label != IGNORE_INDEX for label in labels))


def _scaled(counts: Counted, record: Record, part: Record) -> Counted:
    """Return the tokens of a record by those of its excerpt: as many for each character."""
    asked, answered = (
        max(1, _characters(whole)) / max(1, _characters(cut))
        for whole, cut in zip(_sides(record), _sides(part), strict=True)
    )
    learned = round(counts.learned * answered)
    rest = round((counts.tokens - counts.learned) * asked)
    return Counted(rest + learned, learned, is_estimated=True)


def _sides(record: Record) -> tuple[list[str], list[str]]:
    """Return the texts of a record without loss, and those with loss."""
    content = record.content
    if not isinstance(content, Chat):
        *asked, answered = _texts(record)
        return asked, [answered]

    roles = [turn["role"] == "assistant" for turn in content.messages]
    texts = list(zip(roles, _texts(record), strict=True))
    return [text for said, text in texts if not said], [text for said, text in texts if said]


def _characters(texts: Iterable[str]) -> int:
    return sum(map(len, texts))
