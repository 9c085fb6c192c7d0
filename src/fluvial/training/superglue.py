"""SuperGLUE in its official JSON lines, as clozes: a text with a gap, and candidates for the gap.

Wang et al., "SuperGLUE: A Stickier Benchmark for General-Purpose Language Understanding Systems",
NeurIPS 2019. The prompts are those of FL-GLM and FedSEA-LLaMA, which follow pattern-exploiting
training (Schick and Schuetze, NAACL 2021).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluvial.data.faults import DataError, Faults, listed
from fluvial.data.fields import encodable
from fluvial.data.readers import read_json
from fluvial.data.rows import Number, Row, described
from fluvial.errors import ConfigError
from fluvial.storage.files import exists

SPLIT = "val.jsonl"
"""File of a task's folder that is measured: the test files have no labels."""
YES_NO = ("Yes", "No")
PLACEHOLDER = "@placeholder"


@dataclass(frozen=True)
class Cloze:
    """A text with a gap, and the candidates for it."""

    name: str
    """Place of the record for messages: file and line."""
    before: str
    candidates: tuple[str, ...]
    answers: tuple[str, ...]
    """Right candidates; in ReCoRD the texts that the answer is compared with, in WSC none where
    the only candidate is wrong."""
    after: str = ""
    words: bool = False
    """True where candidates are fixed words, which are compared by their probability, and not texts
    of the record, which are compared per byte."""
    question: str = ""
    """Question of which this is one of several answers (MultiRC)."""

    def endings(self) -> tuple[str, ...]:
        """Return the texts that may follow `before`."""
        return tuple(candidate + self.after for candidate in self.candidates)


def read_superglue(folder: Path) -> dict[str, list[Cloze]]:
    """Read the labelled records of each task that `folder` has, such as `RTE/val.jsonl`.

    Raises `ConfigError` where there is no task, and naming file and line of every record that is
    not of its task's form, without its text.
    """
    paths = {name: folder / name / SPLIT for name in READERS}
    present = {name: path for name, path in paths.items() if exists(path)}
    if not present:
        raise ConfigError(
            f"{str(folder)!r} has no task of SuperGLUE: expected TASK/{SPLIT} for one or more of "
            f"{', '.join(READERS)}"
        )

    try:
        return _tasks(present)
    except DataError as error:  # about records, which --set reads in another way
        raise ConfigError(str(error)) from error


def _tasks(present: Mapping[str, Path]) -> dict[str, list[Cloze]]:
    faults = Faults()
    tasks: dict[str, list[Cloze]] = {}
    for name, path in present.items():
        clozes: list[Cloze] = []
        try:
            rows = read_json(path).rows
        except ConfigError as error:
            faults.include(error)
            continue

        for row in rows:
            try:
                clozes += READERS[name](row)
            except ConfigError as error:
                faults.include(error, row.place)

        tasks[name] = _with_rivals(clozes) if name == "WSC" else clozes

    faults.raise_any()
    return tasks


# -- the fields of a record ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fields:
    """The fields of one object of a record."""

    place: str
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, place: str, value: Any) -> "_Fields":
        if not isinstance(value, Mapping):
            raise ConfigError(f"{place} must be an object, and is {described(value)}")
        return cls(place, value)

    def value(self, key: str) -> Any:
        if key not in self.fields:
            hint = f"; measure {SPLIT}, test files have no labels" if key == "label" else ""
            raise ConfigError(
                f"{self.place}: field {key!r} is missing; found {listed(sorted(self.fields))}{hint}"
            )
        return self.fields[key]

    def text(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str) or not value.strip():
            held = "blank" if isinstance(value, str) else described(value)
            raise ConfigError(f"{self.place}: {key!r} must be text, and is {held}")
        return encodable(self.place, repr(key), value).strip()

    def truth(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.place}: {key!r} must be true or false: {described(value)}")
        return value

    def number(self, key: str, end: int) -> int:
        """Return a whole number from 0 to `end` - 1."""
        value = self.value(key)
        plain = isinstance(value, Number) and value.text.isdecimal() and len(value.text) < 10
        if not plain or int(value.text) >= end:
            raise ConfigError(
                f"{self.place}: {key!r} must be a whole number from 0 to {end - 1}, and is "
                f"{'another number' if isinstance(value, Number) else described(value)}"
            )
        return int(value.text)

    def one_of(self, key: str, names: Sequence[str]) -> str:
        value = self.value(key)
        if not isinstance(value, str) or value not in names:
            raise ConfigError(f"{self.place}: {key!r} must be {' or '.join(map(repr, names))}")
        return value

    def inner(self, key: str) -> "_Fields":
        return _Fields.of(f"{self.place}: {key}", self.value(key))

    def each(self, key: str) -> list["_Fields"]:
        value = self.value(key)
        if not isinstance(value, list) or not value:
            held = "empty" if isinstance(value, list) else described(value)
            raise ConfigError(f"{self.place}: {key!r} must be a list of objects, and is {held}")
        return [
            _Fields.of(f"{self.place}: {key} {number}", item)
            for number, item in enumerate(value, start=1)
        ]


def _fields(row: Row) -> _Fields:
    return _Fields(str(row.place), row.fields)


def _bare(text: str) -> str:
    """Return a text without the punctuation at its end."""
    return text.rstrip(".?!,;: ")


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _yes_no(fields: _Fields, before: str, yes: bool, question: str = "") -> Cloze:
    answers = YES_NO[:1] if yes else YES_NO[1:]
    return Cloze(fields.place, before, _spaced(YES_NO), _spaced(answers), "", True, question)


def _spaced(candidates: Sequence[str]) -> tuple[str, ...]:
    return tuple(f" {candidate}" for candidate in candidates)


# -- the tasks -------------------------------------------------------------------------------------


def _boolq(row: Row) -> Iterator[Cloze]:
    fields = _fields(row)
    before = f"{_bare(fields.text('passage'))}. Question: {_bare(fields.text('question'))}? Answer:"
    yield _yes_no(fields, before, fields.truth("label"))


def _inference(words: Mapping[str, str]) -> Callable[[Row], Iterator[Cloze]]:
    """Return the reader of RTE or CB; `words` are the candidates by label."""

    def read(row: Row) -> Iterator[Cloze]:
        fields = _fields(row)
        right = words[fields.one_of("label", tuple(words))]
        yield Cloze(
            fields.place,
            f'"{_bare(fields.text("hypothesis"))}"?',
            _spaced(tuple(words.values())),
            _spaced((right,)),
            f', "{fields.text("premise")}"',
            words=True,
        )

    return read


def _copa(row: Row) -> Iterator[Cloze]:
    fields = _fields(row)
    choices = tuple(_lowered(_bare(fields.text(key))) for key in ("choice1", "choice2"))
    joint = {"cause": "because", "effect": "so"}[fields.one_of("question", ("cause", "effect"))]
    listed_choices = " or ".join(f'"{choice}"' for choice in choices)
    before = f"{listed_choices}? {_bare(fields.text('premise'))}, {joint}"
    right = choices[fields.number("label", 2)]
    yield Cloze(fields.place, before, _spaced(choices), _spaced((right,)))


def _wic(row: Row) -> Iterator[Cloze]:
    fields = _fields(row)
    first = fields.text("sentence1")
    second = fields.text("sentence2")
    before = f'"{first}" / "{second}" Similar sense of "{fields.text("word")}"?'
    yield _yes_no(fields, before, fields.truth("label"))


def _wsc(row: Row) -> Iterator[Cloze]:
    """Read one noun for the pronoun of a text; `_with_rivals` adds those of the other records."""
    fields = _fields(row)
    target = fields.inner("target")
    noun = target.text("span1_text")
    pronoun = target.text("span2_text")
    words = fields.text("text").split()
    place = target.number("span2_index", len(words))
    marked = " ".join([*words[:place], f"*{words[place]}*", *words[place + 1 :]])
    before = f"{marked} The pronoun '*{pronoun}*' refers to"
    answers = _spaced((noun,)) if fields.truth("label") else ()
    yield Cloze(fields.place, before, _spaced((noun,)), answers)


def _with_rivals(clozes: Sequence[Cloze]) -> list[Cloze]:
    """Give every record the nouns of all records on the same pronoun of the same text.

    A record that denies its noun is right where another noun is preferred.
    """
    nouns: dict[str, dict[str, None]] = {}
    for cloze in clozes:
        nouns.setdefault(cloze.before, {})[cloze.candidates[0]] = None

    rivals = []
    for cloze in clozes:
        others = [noun for noun in nouns[cloze.before] if noun != cloze.candidates[0]]
        answers = cloze.answers or tuple(others)
        candidates = (cloze.candidates[0], *others)
        rivals.append(Cloze(cloze.name, cloze.before, candidates, answers))

    return rivals


def _multirc(row: Row) -> Iterator[Cloze]:
    passage = _fields(row).inner("passage")
    text = _bare(passage.text("text"))
    for question in passage.each("questions"):
        asked = f"{text}. Question: {_bare(question.text('question'))}? Is it"
        for answer in question.each("answers"):
            before = f'{asked} "{_bare(answer.text("text"))}"?'
            yield _yes_no(answer, before, answer.number("label", 2) == 1, question.place)


def _record(row: Row) -> Iterator[Cloze]:
    fields = _fields(row)
    passage = fields.inner("passage")
    text = passage.value("text")
    passage.text("text")
    entities: dict[str, None] = {}

    for entity in passage.each("entities"):
        start = entity.number("start", len(text))
        end = entity.number("end", len(text))  # of the last character, as in the official files
        if not text[start : end + 1].strip():
            raise ConfigError(f"{entity.place}: no text from 'start' to 'end'")
        entities[text[start : end + 1].strip()] = None

    story = text.strip().replace("@highlight\n", "- ")
    for query in fields.each("qas"):
        before, gap, after = query.text("query").partition(PLACEHOLDER)
        if not gap:
            raise ConfigError(f"{query.place}: 'query' must have {PLACEHOLDER!r}")

        space = " " if before.endswith(" ") else ""
        candidates = tuple(space + entity for entity in entities)
        answers = tuple(answer.text("text") for answer in query.each("answers"))
        yield Cloze(query.place, f"{story}\n{before.rstrip()}", candidates, answers, after)


READERS: dict[str, Callable[[Row], Iterator[Cloze]]] = {
    "BoolQ": _boolq,
    "CB": _inference({"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"}),
    "COPA": _copa,
    "MultiRC": _multirc,
    "ReCoRD": _record,
    "RTE": _inference({"entailment": "Yes", "not_entailment": "No"}),
    "WiC": _wic,
    "WSC": _wsc,
}
"""The reader of a record of each task, by the name of the task's official folder."""
