"""Training sequences made from records, with counts of what did not fit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fluvial.data.chat import encode_chat
from fluvial.data.examples import (
    IGNORE_INDEX,
    Example,
    Overlong,
    Question,
    windows,
    without_beginning,
)
from fluvial.data.faults import SHOWN, Faults, are
from fluvial.data.forms import Form
from fluvial.data.packing import pack
from fluvial.data.record_reader import RecordReader
from fluvial.data.records import Chat, Record, Text
from fluvial.errors import ConfigError
from fluvial.models.encoding import Encoder
from fluvial.models.hf import PreTrainedTokenizerBase


@dataclass
class Surplus:
    """Counts of the records that are longer than a sequence."""

    records: int = 0
    """Records longer than `max_length`."""
    tokens: int = 0
    """Tokens cut off, at either end."""
    dropped: int = 0
    """Records left out."""
    refused: int = 0
    """Records without a token of the answer left, or refused by `overlong = "refuse"`."""
    longest: int = 0
    """Tokens of the longest record."""
    places: list[str] = field(default_factory=list)
    """Names of the first refused records."""

    def __iadd__(self, other: "Surplus") -> "Surplus":
        self.records += other.records
        self.tokens += other.tokens
        self.dropped += other.dropped
        self.refused += other.refused
        self.longest = max(self.longest, other.longest)
        self.places = (self.places + other.places)[:SHOWN]

        return self


@dataclass
class Tokenized:
    """The sequences of a list of records, with counts of what was cut off."""

    examples: list[Example] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    """Questions of records with an answer: completions, outputs, last turns of the assistant."""
    asked: list[int] = field(default_factory=list)
    """Number of the record of each question, from 0 on."""
    records: int = 0
    unknown: int = 0
    """Records with a character that the tokenizer does not know."""
    surplus: Surplus = field(default_factory=Surplus)
    faults: Faults = field(default_factory=Faults)
    """Faults of conversations that a chat template cannot render."""

    @property
    def truncated_records(self) -> int:
        """Records that lost some tokens."""
        return self.surplus.records

    @property
    def truncated_tokens(self) -> int:
        """Tokens that were cut off."""
        return self.surplus.tokens


@dataclass(frozen=True)
class Tokenizing:
    """Settings that make sequences of records."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    loss_on: Literal["answer", "all"] = "answer"
    overlong: Overlong = "cut"
    context: int | None = None
    """Tokens that the model reads at most; None where that is not known, or without a limit."""

    def __call__(self, records: Iterable[Record]) -> Tokenized:
        """Return token ids and labels of `records`.

        Text is cut into windows of `max_length` and so loses nothing; what is longer in other forms
        is treated as `overlong` says. Raise `ConfigError` for a tokenizer without EOS.
        """
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no EOS token, so a model could never learn to stop; set one in "
                "its folder"
            )

        encoder = Encoder.of(self.tokenizer)
        result = Tokenized()
        unknown = self._unknown

        for record in records:
            result.records += 1
            try:
                example, question = self._example(record, encoder)
            except ConfigError as error:
                result.faults.include(error, record.place)
                continue

            result.unknown += unknown in example.input_ids
            if isinstance(record.content, Text):
                result.examples += windows(example, self.max_length)
            else:
                self._fit(record, example, question, len(encoder.prefix), result)

        return result

    @property
    def _unknown(self) -> int | None:
        """Return the token of a character that the tokenizer does not know; None without one."""
        token: int | None = self.tokenizer.unk_token_id
        ends = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return None if token in ends else token  # where it is one of them, it stands in all records

    def _example(self, record: Record, encoder: Encoder) -> tuple[Example, Question | None]:
        content = record.content
        if isinstance(content, Text):
            ids = encoder.ended(encoder.prompt(content.text))
            return Example(ids, ids), None

        if isinstance(content, Chat):
            return encode_chat(record.place, content, self.tokenizer, self.loss_on)

        before = encoder.prompt(content.prompt)
        after = (
            encoder.continued(content.prompt, before, content.answer)
            if content.joined
            else encoder.answer(content.answer)
        )
        labels = [IGNORE_INDEX] * len(before) if self.loss_on == "answer" else before

        return Example([*before, *after], [*labels, *after]), Question(
            content.prompt, content.answer, content.references
        )

    def _fit(
        self,
        record: Record,
        example: Example,
        question: Question | None,
        first: int,
        result: Tokenized,
    ) -> None:
        """Put a record into `result`, cut to `max_length` or counted as `overlong` says."""
        surplus = result.surplus
        length = len(example.input_ids)
        surplus.longest = max(surplus.longest, length)
        fitting = example

        if length > self.max_length:
            surplus.records += 1
            if self.overlong == "drop":
                surplus.dropped += 1
                return

            if self.overlong == "shorten_prompt":
                fitting = without_beginning(example, length - self.max_length, first)
            fitting = fitting.cut(0, self.max_length)

        if (self.overlong == "refuse" and length > self.max_length) or not fitting.learns:
            surplus.refused += 1
            if len(surplus.places) < SHOWN:
                surplus.places.append(f"{record.place} ({length} tokens)")
            return

        surplus.tokens += length - len(fitting.input_ids)
        result.examples.append(fitting)
        if question is not None:
            result.questions.append(question)
            result.asked.append(result.records - 1)


def refusal(
    surplus: Surplus, tokenizing: Tokenizing, records: int, by_site: Mapping[str, int]
) -> str:
    """Return the one message for all records that do not fit, with their counts and the
    remedies."""
    why = (
        'and data.overlong = "refuse" allows none'
        if tokenizing.overlong == "refuse"
        else "and of their answer no token is left"
    )
    sites = ", ".join(f"{name} {count}" for name, count in by_site.items())
    places = ", ".join(surplus.places[:5]) + (", ..." if surplus.refused > 5 else "")

    return (
        f"{surplus.refused} of {records} records {are(surplus.refused)} longer than "
        f"data.max_length={tokenizing.max_length}, {why}"
        f"{f' (by site: {sites})' if sites else ''}: {places}. "
        f"{_longer(surplus.longest, tokenizing)}, or set data.overlong to "
        '"shorten_prompt" (the beginning of the prompt goes) or "drop"'
    )


def _longer(longest: int, tokenizing: Tokenizing) -> str:
    """Return what lets a record of `longest` tokens fit; no setting raises the model's context."""
    context = tokenizing.context
    if context is None or longest <= context:
        return f"Raise data.max_length (the longest record has {longest} tokens)"

    reads = f"the model reads at most {context} tokens and the longest record has {longest}"
    others = "shorten the records, choose a model with a longer context"
    if tokenizing.max_length < context:
        return f"Raise data.max_length to {context} at most ({reads}), {others}"
    return f"Raising data.max_length cannot help ({reads}): {others}"


def tokenize(
    records: Iterable[tuple[str, Mapping[str, Any]]],
    form: Form,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    packing: bool = False,
    loss_on: Literal["answer", "all"] = "answer",
    overlong: Overlong = "cut",
) -> Tokenized:
    """Return token ids and labels of `records`, pairs of a name for messages and the fields (see
    `Tokenizing` and, for `packing`, `pack`).

    Raise `DataError` with every record that is not of the form, cannot be rendered or does not fit.
    """
    reader = RecordReader(form, {})
    faults = Faults()
    checked = []

    for name, fields in records:
        try:
            checked.append(reader.read(name, fields))
        except ConfigError as error:
            faults.include(error, name)

    tokenizing = Tokenizing(tokenizer, max_length, loss_on, overlong)
    result = tokenizing(checked)
    if result.faults.count:
        faults.include_all(result.faults)
    if result.surplus.refused:
        faults.add(refusal(result.surplus, tokenizing, result.records, {}))

    faults.raise_any()
    if packing:
        result.examples = pack(result.examples, max_length)
    return result
