"""The forms of records, and the choice of a file's form by its columns.

| form                | fields                                       | loss on                |
|---------------------|----------------------------------------------|------------------------|
| `text`              | `text`                                       | everything             |
| `prompt_completion` | `prompt`, `completion`                       | the completion and EOS |
| `messages`          | `messages`: list of `{"role", "content"}`    | the assistant's turns  |
| `alpaca`            | `instruction`, `output`, optional `input`    | the output and EOS     |
| `sharegpt`          | `conversations`: list of `{"from", "value"}` | the turns of "gpt"     |
| `choices`           | `question`, `choices`, `answer`              | the letter and EOS     |
| `lettered_choices`  | `question`, `A`, `B` to `J`, `answer`        | the letter and EOS     |

Prompt/completion and Alpaca records may have `references`, a list of further right answers; where
it names the column of the answer, that lists all right ones, the one to learn first.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from fluvial.data.faults import listed, shown
from fluvial.data.multiple_choice import LETTERS
from fluvial.errors import ConfigError

Form = Literal[
    "text", "prompt_completion", "messages", "alpaca", "sharegpt", "choices", "lettered_choices"
]
FORMS: tuple[Form, ...] = get_args(Form)
REQUIRED_FIELDS: dict[Form, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "choices": ("question", "choices", "answer"),
    "lettered_choices": ("question", *LETTERS[:2], "answer"),
}
OPTIONAL_FIELDS: dict[Form, tuple[str, ...]] = {
    "prompt_completion": ("references",),
    "alpaca": ("input", "references"),
    "choices": ("context", "subject"),
    "lettered_choices": (*LETTERS[2:], "context", "subject"),
}
ANSWERS: dict[Form, str] = {"prompt_completion": "completion", "alpaca": "output"}
"""The field with the answer of a record; its column may be that of `references` too."""
CONVERSATIONS: frozenset[str] = frozenset({"messages", "sharegpt"})
"""Forms that a chat template renders."""
FORMS_OF_CHOICES: tuple[Form, ...] = ("choices", "lettered_choices")
"""Forms of questions with choices."""
WORDED: frozenset[str] = frozenset({"alpaca", *FORMS_OF_CHOICES})
"""Forms of prompts with words of their own around what the record has."""
OBJECTS: frozenset[str] = frozenset({"choices"})
"""Fields whose value may be an object."""
FIELDS = tuple(
    dict.fromkeys(
        name for form in FORMS for name in (*REQUIRED_FIELDS[form], *OPTIONAL_FIELDS.get(form, ()))
    )
)
"""All fields that `data.columns` may rename."""


def fields_of(form: Form) -> tuple[str, ...]:
    """Return the fields that a record of `form` may have."""
    return (*REQUIRED_FIELDS[form], *OPTIONAL_FIELDS.get(form, ()))


def detect_form(columns: Sequence[str], where: str) -> Form:
    """Return the form whose fields are all among `columns`.

    Raise `ConfigError` if none or several fit.
    """
    present = {*columns, *(OBJECTS & objects_of(columns))}
    fits = [form for form in FORMS if present.issuperset(REQUIRED_FIELDS[form])]

    if len(fits) > 1 and "text" in fits:
        fits.remove("text")  # many instruction sets carry a rendered `text` beside their fields
    if len(fits) != 1:
        known = "; ".join(f"{form}: {', '.join(REQUIRED_FIELDS[form])}" for form in FORMS)
        found = f"[{listed(sorted(columns))}]"
        raise ConfigError(
            f"{where}: fields {found} fit {'no form' if not fits else ' and '.join(fits)}. Set "
            "data.form, or rename fields with data.columns, such as "
            f"{{completion = 'answer'}}{_near(columns)}. Forms and their fields: {known}"
        )

    return fits[0]


def objects_of(columns: Iterable[str]) -> frozenset[str]:
    """Return the names of the objects that have some of the columns, `outer` for `outer.inner`."""
    return frozenset(name.rpartition(".")[0] for name in columns if "." in name)


def _near(columns: Iterable[str]) -> str:
    """Return a hint for columns that differ from a field in blanks and case only."""
    near = {name.strip().casefold(): name for name in sorted(columns) if name not in FIELDS}
    pairs = [f"{field} = {shown(near[field])}" for field in FIELDS if field in near]
    return f" (here perhaps columns = {{{', '.join(pairs)}}})" if pairs else ""


def resolve(
    form: Form | Literal["auto"], columns: Mapping[str, str], found: Sequence[str], where: str
) -> Form:
    """Return the form of a file with the columns `found`, some of which `columns` renames.

    Raise `ConfigError`, naming the file `where`, if the settings do not fit the file.
    """
    objects = objects_of(found)
    for field, column in columns.items():
        if column not in found and not (field in OBJECTS and column in objects):
            raise ConfigError(
                f"{where}: data.columns: {field} = {shown(column)}, but the data has the columns "
                f"{listed(found)}"
            )

    renamed = {
        column
        for field, column in columns.items()
        if field != "references" or column not in ANSWERS.values()
    }
    ours = [*(name for name in (*found, *(OBJECTS & objects)) if name not in renamed), *columns]
    chosen = detect_form(ours, where) if form == "auto" else form
    missing = [field for field in REQUIRED_FIELDS[chosen] if field not in ours]

    if missing:
        raise ConfigError(
            f"{where}: form {chosen!r} needs the field {missing[0]!r}; found {listed(found)}. Set "
            "data.form, or rename a field with data.columns, such as "
            f"{{{missing[0]} = 'NAME'}}{_near(found)}"
        )

    idle = [field for field in columns if field not in fields_of(chosen)]
    if idle:
        column = columns[idle[0]]
        swapped = column in fields_of(chosen)
        remedy = f"our field comes first: {{{column} = {idle[0]!r}}}" if swapped else "remove it"
        raise ConfigError(
            f"{where}: data.columns: {idle[0]} is without effect, because the form {chosen!r} has "
            f"the fields {', '.join(fields_of(chosen))}; {remedy}"
        )

    return chosen
