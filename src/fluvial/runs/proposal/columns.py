"""Guesses about a table: the form of its records, and the column that names their owner."""

import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fluvial.data.forms import (
    ANSWERS,
    CONVERSATIONS,
    FIELDS,
    FORMS,
    FORMS_OF_CHOICES,
    REQUIRED_FIELDS,
    Form,
    detect_form,
    fields_of,
    objects_of,
)
from fluvial.data.rows import Number, Row
from fluvial.errors import ConfigError
from fluvial.runs.proposal.choice_columns import with_choices
from fluvial.runs.proposal.usual_names import LIKE, plain_names, usual_name

LISTS = ("", "s", "text", "stext")
"""Ends of the names of columns with a list of right answers, such as `answers.text` of SQuAD."""
LIKELY_FORMS: tuple[Form, ...] = ("messages", "sharegpt", "alpaca", "prompt_completion", "text")
"""Forms in the order in which they are guessed, after those of choices."""
MOST_NAMES = 20
"""Names of columns that a message lists."""
OWNERS = (
    *("site", "hospital", "clinic", "client", "owner", "bank", "branch", "institution", "center"),
    *("centre", "organisation", "organization", "company", "factory", "plant", "department"),
    *("party", "silo", "location", "region", "school", "university", "practice"),
    *("krankenhaus", "klinik", "standort", "filiale", "werk", "hopital", "hôpital", "clinique"),
    *("sucursal", "clinica", "clínica", "ospedale", "filial", "sede"),
)
"""Usual names of the column with the owner of a record."""
MOST_SITES = 200
NUMBERS = ("id", "uuid", "guid", "key", "index", "idx", "nr", "number", "row", "unnamed")
"""Usual names of the column that numbers the records."""
ABOUT = (
    *("date", "time", "timestamp", "year", "month", "day", "url", "link", "source", "license"),
    *("licence", "split", "language", "lang", "author", "name", "age", "sex", "gender", "file"),
    *("filename", "path", "version", "title", "length", "tokens"),
    *("address", "street", "city", "country", "zip", "phone", "email", "adresse", "strasse"),
    *("stadt", "ort", "plz", "telefon", "rue", "ville", "calle", "ciudad", "via"),
)
"""Usual names of columns that say something about a text and are no answer to it."""
CODE = re.compile(r"(?=.*\d)\S+")
"""A value that may be the code of a record: no space, and a digit."""
LONGEST_LABEL = 60
"""Characters of a value that may be a label."""
MOST_CLASSES = 20
"""Values of a column of numbers that may be labels."""


def guessed_columns(
    columns: Sequence[str], rows: Sequence[Row] = ()
) -> tuple[Form, dict[str, str]] | None:
    """Return the form of records with these columns, and the columns to rename (our field = the
    column), None where none fits.

    Fields within an object of the `rows` are looked at where none of the columns fit.
    """
    lists = _lists(columns, rows)
    found = _detected(columns, lists) or with_choices(columns, rows) or _guessed(columns, lists)
    if found is not None:
        return found
    within = [_guessed_within(outer, columns, rows) for outer in _objects(columns, rows)]
    fitting = [each for each in within if each is not None]
    return fitting[0] if len(fitting) == 1 else None


def _detected(columns: Sequence[str], lists: Collection[str]) -> tuple[Form, dict[str, str]] | None:
    """Return the form that the names are those of, and an answer with a list of texts; None where
    they are of none, of several, or of one with choices."""
    try:
        form = detect_form(columns, "data")
    except ConfigError:
        return None
    if form in FORMS_OF_CHOICES:
        return None
    field = ANSWERS.get(form)
    return form, {field: field, "references": field} if field and field in lists else {}


def _guessed(columns: Sequence[str], lists: Collection[str]) -> tuple[Form, dict[str, str]] | None:
    """Return the form and the columns to rename that the names suggest, None where they do not.

    The answer may be one of the `lists`, which are columns with lists of texts.
    """
    plain = plain_names(columns)
    for form in LIKELY_FORMS:
        found = {field: usual_name(plain, field) for field in REQUIRED_FIELDS[form]}
        if form == "alpaca":
            found["input"] = usual_name(plain, "input")
            if found["instruction"] is None and "context" in plain:  # a question about a text
                found["instruction"] = plain.get("question")
        names = [name for name in found.values() if name is not None]
        answer = ANSWERS.get(form)
        if answer and (found[answer] is None or found[answer] in lists):
            found[answer] = found["references"] = _named_list(plain, LIKE[answer], lists)
            names = [name for field, name in found.items() if name and field != "references"]
        required = [found[field] for field in REQUIRED_FIELDS[form]]
        if None not in required and len(set(names)) == len(names):
            listed = found.get("references") is not None
            return form, {
                field: name
                for field, name in found.items()
                if name is not None and (name != field or (listed and field == answer))
            }

    return None


def _named_list(
    plain: Mapping[str, str], usual: Sequence[str], lists: Collection[str]
) -> str | None:
    """Return the first of the `lists` that has a usual name, None where there is none."""
    names = (f"{name}{end}" for name in usual for end in LISTS)
    return next((plain[name] for name in names if plain.get(name) in lists), None)


def _lists(columns: Sequence[str], rows: Sequence[Row]) -> frozenset[str]:
    """Return the columns that have a list of texts in each record."""

    def is_list(cell: object) -> bool:
        return isinstance(cell, list) and bool(cell) and all(isinstance(x, str) for x in cell)

    cells = {name: [row.cells.get(name) for row in rows] for name in columns}
    return frozenset(name for name in columns if rows and all(map(is_list, cells[name])))


def _objects(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Return the names of the objects that have some of the columns."""
    outer = sorted(objects_of(columns))
    return [name for name in outer if any(isinstance(row.cells.get(name), Mapping) for row in rows)]


def _guessed_within(
    outer: str, columns: Sequence[str], rows: Sequence[Row]
) -> tuple[Form, dict[str, str]] | None:
    """Return the form and the columns to rename that the fields of an object suggest.

    Their values must be of the form's types. A text alone is not taken where the record has another
    text beside the object, which may be what is meant.
    """
    inner = [name.rpartition(".")[2] for name in columns if name.rpartition(".")[0] == outer]
    within = _lists([name for name in columns if name.rpartition(".")[0] == outer], rows)
    lists = {name.rpartition(".")[2] for name in within}
    guessed = _detected(inner, lists) or _guessed(inner, lists)
    if guessed is None:
        return None

    form, renamed = guessed
    names = {field: renamed.get(field, field) for field in fields_of(form)}
    found = {field: f"{outer}.{name}" for field, name in names.items() if name in inner}
    kind = list if form in CONVERSATIONS else str | Number | bool
    cells = [
        row.cells.get(found[field])
        for row in rows
        for field in REQUIRED_FIELDS[form]
        if found[field] != found.get("references")
    ]
    if not all(value is None or isinstance(value, kind) for value in cells):
        return None

    others = [name for name in columns if not name.startswith(f"{outer}.")]
    if form == "text" and any(
        " " in (value_of(row, name) or "") for row in rows for name in others
    ):
        return None
    return form, found


def names_shown(columns: Sequence[str]) -> str:
    """Return names of columns as a message lists them."""
    more = f" and {len(columns) - MOST_NAMES} more" if len(columns) > MOST_NAMES else ""
    return ", ".join(columns[:MOST_NAMES]) + more


def form_of(columns: Sequence[str], renamed: Mapping[str, str]) -> Form:
    """Return the form of records some of whose columns are renamed.

    Raises `ConfigError` for a column that is not there, and where no form fits.
    """
    for field, column in renamed.items():
        if column not in columns:
            raise ConfigError(
                f"--column {field}={column}: the records have the columns {names_shown(columns)}"
            )

    fits = [form for form in FORMS if set(REQUIRED_FIELDS[form]) <= {*columns, *renamed}]
    named = [form for form in fits if set(renamed) & set(REQUIRED_FIELDS[form])]
    if not fits:
        raise ConfigError(
            f"--column: with {', '.join(f'{f}={c}' for f, c in renamed.items())} the columns "
            f"{names_shown(columns)} are no form of a record; name prompt and completion, or text"
        )
    return (named or fits)[0]


def value_of(row: Row, column: str) -> str | None:
    """Return the text of a row's cell as a site's name, None where there is none."""
    value: Any = row.cells.get(column)
    if isinstance(value, Number):
        return value.text
    return value if isinstance(value, str) and value.strip() else None


def owner_columns(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Return the columns that may name the owner of a record, the likeliest first.

    Such a column has a value in each record, at least two values, each in some records, and its
    name is usual for it. Columns with other names follow where there is none of those.
    """
    fitting = []
    for column in columns:
        if not rows or value_of(rows[0], column) is None:
            continue
        counts = Counter(value_of(row, column) for row in rows)
        if None not in counts and 2 <= len(counts) <= MOST_SITES and min(counts.values()) >= 2:
            fitting.append(column)

    usual = [column for column in fitting if _rank(column) < len(OWNERS)]
    return sorted(usual or fitting, key=_rank)


def numbers_records(rows: Sequence[Row], column: str) -> bool:
    """Return whether a column tells records apart: by its name, or by a number or a code of each,
    without spaces and of about one length, such as W-0001."""
    if has_word_of(column, NUMBERS):
        return True
    values = [value_of(row, column) or "" for row in rows]
    if len(set(values)) < len(values):
        return False
    lengths = sorted(map(len, values))
    codes = all(CODE.fullmatch(value) for value in values) and lengths[-1] - lengths[0] <= 2
    return codes or all(value.isdecimal() for value in values)


def may_be_answers(rows: Sequence[Row], column: str) -> bool:
    """Return whether a column may hold the answers to a text: short values, of two kinds or more,
    in nine of ten records, that do not tell records apart, and no name that is usual for something
    else."""
    if has_word_of(column, (*ABOUT, *OWNERS)) or numbers_records(rows, column):
        return False
    cells = [row.cells.get(column) for row in rows]
    values = [
        str(cell) if isinstance(cell, bool) else value_of(row, column)
        for row, cell in zip(rows, cells, strict=True)
    ]
    filled = [value for value in values if value is not None]
    if len(filled) < 0.9 * len(rows) or max(map(len, filled), default=0) > LONGEST_LABEL:
        return False
    numeric = all(re.fullmatch(r"[+-]?[\d.,]+", value) for value in filled)
    return 2 <= len(set(filled)) <= (MOST_CLASSES if numeric else len(filled))


def kinds(rows: Sequence[Row], column: str) -> tuple[bool, int]:
    """Return whether a column has numbers, and how many values it has."""
    numbers = any(isinstance(row.cells.get(column), Number) for row in rows)
    return numbers, len({value_of(row, column) for row in rows})


def as_options(text: str, answer: str, site: str = "") -> str:
    """Return the options that make a question of one column and its answer of another, for all
    records or for those of a site."""
    pairs = (renaming("prompt", text, site), renaming("completion", answer, site))
    return " ".join(f"--column {shlex.quote(pair)}" for pair in pairs)


def renaming(field: str, column: str, site: str = "") -> str:
    """Return the value of `--column` by which our `field` is a column, for all records or for those
    of a site."""
    return f"{site}:{field}={column}" if site else f"{field}={column}"


def is_usual_owner(column: str) -> bool:
    """Return whether a column's name is usual for the owner of a record."""
    return _rank(column) < len(OWNERS)


def has_word_of(column: str, words: Collection[str]) -> bool:
    """Return whether the name of a column has one of the words."""
    return not set(_words(column)).isdisjoint(words)


def _rank(column: str) -> int:
    words = _words(column)
    return next((n for n, word in enumerate(OWNERS) if word in words), len(OWNERS))


def _words(column: str) -> list[str]:
    return re.split(r"[\W_]+", column.casefold())


def renamed_columns(pairs: Sequence[str], sites: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """Return the columns to rename, by site: our field = the file's column; those of all sites are
    under "". Raises `ConfigError`.

    Names may hold the marks ":" and "=": the longest name among `sites` is taken.
    """
    renamed: dict[str, dict[str, str]] = {}
    for pair in pairs:
        named = [f"{re.escape(site)}:" for site in sorted(sites, key=len, reverse=True)]
        places = (*named, "", ".+?:")  # that of another site is refused where all sites are known
        form = f"({{}})({'|'.join(FIELDS)})=(.+)"
        fits = (re.fullmatch(form.format(place), pair, re.DOTALL) for place in places)
        found = next(filter(None, fits), None)
        if found is None:
            raise ConfigError(
                f"--column {pair!r:.60}: write FIELD=YOUR_COLUMN, where FIELD is "
                f"{', '.join(FIELDS)}"
            )
        site, field, name = found.groups()
        columns = renamed.setdefault(site.removesuffix(":"), {})
        if field in columns:
            raise ConfigError(
                f"--column {pair!r:.60}: {site}{field} is {columns[field]!r:.40} already; drop one"
            )
        columns[field] = name
    return renamed


def of_one_source(renamed: Mapping[str, dict[str, str]]) -> dict[str, str]:
    """Return the columns of the only source; raises `ConfigError` for those of a site."""
    for site in renamed.keys() - {""}:
        raise ConfigError(
            f"--column {site}:...: a site before the field is for several --data; write FIELD=..."
        )
    return renamed.get("", {})
