"""Lengths of records in tokens, and the sequences that they make."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fluvial.data.faults import Faults
from fluvial.data.records import Record
from fluvial.data.templates import with_template
from fluvial.data.tokenise import Tokenizing, refusal
from fluvial.errors import ConfigError
from fluvial.models.hf import PreTrainedTokenizerBase
from fluvial.runs.proposal.excerpts import counted
from fluvial.runs.proposal.models import ModelFacts
from fluvial.runs.proposal.records import DataFacts, SeparateFacts

PLAIN = "plain"
"""Chat template for a tokenizer without one."""

ROUGH = 2048
"""Most tokens of a sequence that are proposed, whatever the context of the model."""
WINDOW = 512
"""Most tokens of a window of plain text that are proposed."""

FAR = 2
"""Times the usual length beyond which a record is an exception, which may be cut."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of a sample of records, in tokens."""

    tokens: tuple[int, ...]
    """Tokens of each record to train on, sorted."""
    answers: tuple[int, ...]
    """Tokens with loss of each record, also of those held out, sorted."""
    heldout: tuple[int, ...] = ()
    """Tokens of each held-out record with a source of its own, sorted."""
    is_estimated: bool = field(default=False, kw_only=True)
    """True where a long record was counted by its first characters."""

    @property
    def longest(self) -> int:
        """Return the tokens of the longest record."""
        return max(self.tokens[-1:] + self.heldout[-1:])

    @property
    def sample(self) -> str:
        """Return how many records were looked at, in words."""
        remarks = [f"held out: {len(self.heldout):,}"] if self.heldout else []
        remarks += ["long ones by their first characters"] if self.is_estimated else []
        looked = f"{len(self.tokens) + len(self.heldout):,} looked at"
        return f"{looked} ({'; '.join(remarks)})" if remarks else looked

    @property
    def longest_answer(self) -> int:
        """Return the tokens with loss of the record that has most of them."""
        return self.answers[-1]

    @property
    def mean(self) -> float:
        """Return the mean length of the records to train on."""
        return sum(self.tokens) / len(self.tokens)

    def quantile(self, share: float) -> int:
        """Return the length that this share of the records to train on does not exceed."""
        return _quantile(self.tokens, share)

    def longer_than(self, length: int) -> int:
        """Return how many records of the sample are longer than `length`."""
        return sum(tokens > length for tokens in (*self.tokens, *self.heldout))

    def sequences(self, length: int, *, text: bool) -> float:
        """Return the sequences of `length` that a record makes on average: text is cut in
        windows."""
        if not text:
            return 1.0
        return sum(math.ceil(tokens / length) for tokens in self.tokens) / len(self.tokens)


def measure_lengths(
    facts: DataFacts, model: ModelFacts, heldout: Sequence[DataFacts] = ()
) -> Lengths:
    """Return the lengths of a sample of the records, and of those held out, by the model's
    tokenizer; raises `ConfigError` where none of them can be read or rendered."""
    chats = any(each.is_conversation for each in (facts, *heldout))
    tokenizer = _tokenizer(model, is_conversation=chats)
    records = facts.sample()
    if not records:
        faults = Faults()
        for part in facts.parts.values() if isinstance(facts, SeparateFacts) else [facts]:
            part.include_faults(faults)
        faults.raise_any()
    return _lengths(records, facts.source, tokenizer, heldout)


def include_unfit(
    parts: Sequence[DataFacts],
    heldout: Sequence[DataFacts],
    model: ModelFacts,
    faults: Mapping[str, Faults],
) -> None:
    """Add the records that the chat template cannot render, and those that do not fit the proposed
    length, to `faults` of their source.

    `parts` are the records of all sites, and `heldout` those that are measured beside them.
    """
    if not parts:
        return

    chats = any(facts.is_conversation for facts in (*parts, *heldout))
    tokenizer = _tokenizer(model, is_conversation=chats)
    with faults[parts[0].source].catch():
        sample = [record for part in parts for record in part.sample()]
        lengths = _lengths(sample, parts[0].source, tokenizer, heldout)
        is_text = parts[0].form == "text"
        length = proposed_length(lengths, model.context, text=is_text)
        overlong = proposed_overlong(lengths, length, text=is_text) or "cut"
        tokenizing = Tokenizing(tokenizer, length, overlong=overlong, context=model.context)

        for facts in {each.source: each for each in (*parts, *heldout)}.values():
            found = tokenizing(facts.records())
            if found.faults.count:
                faults[facts.source].include_all(found.faults)
            if found.surplus.refused:
                faults[facts.source].add(refusal(found.surplus, tokenizing, found.records, {}))


def _tokenizer(model: ModelFacts, *, is_conversation: bool) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, with a chat template where conversations need one."""
    needed = is_conversation and not model.has_template
    return with_template(model.tokenizer, PLAIN if needed else None)


def _lengths(
    records: Sequence[Record],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Sequence[DataFacts],
) -> Lengths:
    tokenizing = Tokenizing(tokenizer, max_length=10**7)
    trained, faults = counted(records, tokenizing)
    if not trained:
        reason = faults.first[0] if faults.count else "all records are empty"
        raise ConfigError(f"--data {source!r}: no record can be used: {reason}")

    # Sites may share a source, in which a record counts once.
    apart = {facts.source: facts.sample() for facts in heldout}
    measured, _ = counted([each for sample in apart.values() for each in sample], tokenizing)
    return Lengths(
        tuple(sorted(each.tokens for each in trained)),
        tuple(sorted(each.learned for each in (*trained, *measured))),
        tuple(sorted(each.tokens for each in measured)),
        is_estimated=any(each.is_estimated for each in (*trained, *measured)),
    )


def _quantile(tokens: Sequence[int], share: float) -> int:
    """Return the length that this share of sorted lengths does not exceed."""
    return tokens[min(len(tokens) - 1, math.ceil(share * len(tokens)) - 1)]


def proposed_length(lengths: Lengths, context: int | None, *, text: bool) -> int:
    """Return the tokens of a sequence, within the context: those of the longest record that has at
    most `FAR` times what 99 % of the records need; of plain text, what these need. Held-out records
    count as those to train on do, however few they are.

    A batch is padded to its own longest record, so a length that few records have costs little.
    """
    most = min(context or ROUGH, WINDOW if text else ROUGH)
    needed = 0
    for tokens in filter(None, (lengths.tokens, lengths.heldout)):
        usual = _quantile(tokens, 0.99)
        fitting = usual if text else max(each for each in tokens if each <= FAR * usual)
        needed = max(needed, fitting)
    return max(8, min(most, max(32, 16 * math.ceil(needed / 16))))


def proposed_overlong(
    lengths: Lengths, length: int, *, text: bool
) -> Literal["cut", "shorten_prompt"] | None:
    """Return the treatment of records of more than `length` tokens; None where there are none, and
    for text, which is cut into windows."""
    if text or not lengths.longer_than(length):
        return None
    return "shorten_prompt" if lengths.longest_answer < length else "cut"
