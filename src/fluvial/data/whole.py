"""All records of one source as sequences to measure, without sites and without training."""

from dataclasses import dataclass

from fluvial.data.config import DataConfig
from fluvial.data.examples import Example, Question
from fluvial.data.faults import Faults
from fluvial.data.sources import Source, read_source
from fluvial.data.templates import with_template
from fluvial.data.tokenise import Surplus, Tokenizing, refusal
from fluvial.formatting import safe_line
from fluvial.models.hf import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Whole:
    """Sequences and questions of a source to measure; never empty."""

    examples: list[Example]
    """Sequences to measure: the first `max_heldout`, or all."""
    questions: list[Question]
    records: int
    unmeasured: int
    """Sequences beyond `max_heldout`."""
    surplus: Surplus
    forms: list[str]
    notes: list[str]
    """Remarks on the files."""


def read_whole(config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> Whole:
    """Return the records of `config.source`; `where` names it in messages.

    Raise `DataError` with all faults of its files, or `ConfigError` for a setting that does not fit
    them.
    """
    faults = Faults()
    source = Source(where, config.source, config.split, config.reading(), strict=False)
    found = read_source(source, faults)
    faults.raise_any()

    changed = with_template(tokenizer, config.chat_template)
    tokenizing = Tokenizing(changed, config.max_length, config.loss_on, config.overlong)
    tokens = tokenizing([entry.record for entry in found.entries])
    faults.include_all(tokens.faults)

    if tokens.surplus.refused:
        faults.add(refusal(tokens.surplus, tokenizing, tokens.records, {}))
    if not tokens.examples and not faults.count:
        dropped = tokens.surplus.dropped
        lost = (
            f": {dropped} records are longer than data.max_length and were dropped"
            if dropped
            else ""
        )
        faults.add(f"{safe_line(config.source)} ({where}): holds nothing to measure{lost}")

    faults.raise_any()

    most = config.max_heldout or len(tokens.examples)
    return Whole(
        tokens.examples[:most],
        tokens.questions[: config.max_heldout],
        tokens.records,
        len(tokens.examples[most:]),
        tokens.surplus,
        sorted(set(found.forms)),
        found.notes,
    )
