"""Questions that records leave open, and the options of `fluvial init` that would answer them."""

import shlex
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from statistics import fmean

from fluvial.data.faults import Faults
from fluvial.data.json_document import json_list
from fluvial.data.rows import Row
from fluvial.errors import ConfigError
from fluvial.runs.proposal.columns import (
    ABOUT,
    OWNERS,
    as_options,
    has_word_of,
    kinds,
    may_be_answers,
    names_shown,
    numbers_records,
    renaming,
    value_of,
)

LOOKED_AT = 1000
"""Records from which columns are guessed."""
FEW_WORDS = 3
"""Words below which a column is hardly the answer where another one has labels."""
TURNS = {"messages": {"role", "content"}, "conversations": {"from", "value"}}
"""Fields of each turn of a conversation, by our field for the list of turns."""


class UndecidedError(ConfigError):
    """Records leave a question open that options answer, and nobody can be asked."""

    def __init__(
        self, message: str, columns: Mapping[str, str], options: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.columns = columns
        """Likeliest columns to rename: our field = the file's column."""
        self.options = options
        """Likeliest other options, as words of a command."""


@contextmanager
def noting(faults: Faults, undecided: dict[str, UndecidedError], site: str = "") -> Iterator[None]:
    """Add the faults of a `ConfigError` that is raised within to `faults`, and the question that it
    leaves open for a site to `undecided`."""
    try:
        yield
    except ConfigError as error:
        if isinstance(error, UndecidedError):
            undecided[site] = error
        faults.include(error)


def likely_fields(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str]:
    """Return the columns that are likeliest a conversation, question and answer, or a text alone;
    nothing where no column has words.

    Of several columns with words, the two longest are meant, the question before the answer; one
    whose name is usual for something else only where it is the longest. The answer to the only one
    is a label, and so it is where the second one has few words and no classes.
    """
    some = rows[:LOOKED_AT]
    if conversation := _conversation(columns, some):
        return conversation

    values = {name: _filled(some, name) for name in columns}
    wordy = [name for name in columns if _has_words(values[name])]
    wordy = [name for name in wordy if not numbers_records(some, name)]
    wordy.sort(key=lambda name: -fmean(map(len, values[name])))
    meant = wordy[:1] + [name for name in wordy[1:] if not has_word_of(name, (*ABOUT, *OWNERS))]
    if not meant:
        return {}

    text = meant[0]
    labels = [name for name in columns if name != text and may_be_answers(some, name)]
    classes = [name for name in labels if 2 * kinds(some, name)[1] <= len(some)]
    if len(meant) > 1:
        says_little = _num_words(values[meant[1]]) < FEW_WORDS and meant[1] not in classes
        if not (classes and says_little):
            first, second = sorted(meant[:2], key=columns.index)
            return {"prompt": first, "completion": second}
    if not labels:
        return {"text": text}
    return {"prompt": text, "completion": min(labels, key=lambda name: kinds(some, name))}


def unknown_columns(
    source: str, columns: Sequence[str], rows: Sequence[Row], site: str = ""
) -> UndecidedError:
    """Return the error for columns that fit no form, of all records or of those of a site."""
    likely = likely_fields(columns, rows)
    column = likely.get("text", likely.get("prompt", "COLUMN"))
    text = shlex.quote(renaming("text", column, site))
    pair = as_options(likely.get("prompt", "COLUMN"), likely.get("completion", "COLUMN"), site)
    ways = [f"question and answer: {pair}", f"a text alone: --column {text}"]
    if "text" in likely:
        ways.reverse()
    for field in likely.keys() & TURNS.keys():
        told = shlex.quote(renaming(field, likely[field], site))
        ways.insert(0, f"a conversation: --column {told}")
    return UndecidedError(
        f"--data {source!r}: which of the columns {names_shown(columns)} are question and answer, "
        f"or which one is the text? {'Perhaps' if likely else 'Name'} {'; or '.join(ways)}",
        likely,
    )


def unknown_answer(source: str, pairs: Sequence[tuple[str, str]], site: str = "") -> UndecidedError:
    """Return the error for a text beside which columns may hold its answer, see `answer_pairs`."""
    text, answer = pairs[0]
    names = " or ".join(repr(each) for _, each in pairs)
    alone = shlex.quote(renaming("text", text, site))
    return UndecidedError(
        f"--data {source!r}: {names} may be the answer to the text {text!r}. To learn it: "
        f"{as_options(text, answer, site)}. To learn the text alone: --column {alone}",
        {"prompt": text, "completion": answer},
    )


def missing_options(undecided: Mapping[str, UndecidedError], num_sources: int) -> list[str]:
    """Return the options that answer what each site leaves open, as words of a command.

    Where each of the sources leaves the same columns open, these are named once.
    """
    columns = {site: error.columns for site, error in undecided.items()}
    first = next(iter(columns.values()), {})
    if len(columns) == num_sources and all(own == first for own in columns.values()):
        columns = {"": first}
    words = [
        word
        for site, own in columns.items()
        for field, column in own.items()
        for word in ("--column", renaming(field, column, site))
    ]
    return [*words, *(word for error in undecided.values() for word in error.options)]


def has_turns(row: Row, column: str, keys: Set[str]) -> bool:
    """Return whether a cell is a list of objects with these keys, or such a list as JSON."""
    cell = row.cells.get(column)
    try:
        turns = json_list(cell) if isinstance(cell, str) else cell
    except ValueError:
        return False
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(turn, Mapping) and keys <= turn.keys() for turn in turns)
    )


def _conversation(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, str]:
    """Return the column whose every cell is a list of turns, {} without one; of the answers of a
    preference, not the rejected one."""
    for field, keys in TURNS.items():
        found = [name for name in columns if rows and all(has_turns(r, name, keys) for r in rows)]
        found.sort(key=lambda name: has_word_of(name, ("rejected",)))
        if found:
            return {field: found[0]}
    return {}


def _filled(rows: Sequence[Row], column: str) -> list[str]:
    """Return the texts of a column, nothing where more than a tenth of the records have none."""
    texts = [text for row in rows if (text := value_of(row, column)) is not None]
    return texts if len(texts) >= 0.9 * len(rows) else []


def _num_words(texts: Sequence[str]) -> float:
    """Return the mean number of words."""
    return fmean(len(text.split()) for text in texts)


def _has_words(texts: Sequence[str]) -> bool:
    """Return whether most texts have several words, or letters of a script that may not divide
    them."""
    return 2 * sum(" " in text.strip() or not text.isascii() for text in texts) > len(texts)
