"""All records of one source as sequences to measure, without sites and without training."""

from dataclasses import dataclass

from fluvial.data.config import DataConfig
from fluvial.data.examples import Example, Question
from fluvial.data.faults import Faults, shown
from fluvial.data.partition import Natural
from fluvial.data.rows import columns_of
from fluvial.data.sources import Source, classes_of, read_source
from fluvial.data.templates import with_template
from fluvial.data.tokenise import Surplus, Tokenizing, refusal
from fluvial.errors import ConfigError
from fluvial.formatting import safe_line
from fluvial.models.hf import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Whole:
    """Sequences and questions of a source to measure; never empty."""

    examples: list[Example]
    """Sequences to measure: the first `max_heldout`, or all."""
    questions: list[Question]
    sites: list[str]
    """Site of each question; empty where no field names it."""
    records: int
    unmeasured: int
    """Sequences beyond `max_heldout`."""
    surplus: Surplus
    forms: list[str]
    notes: list[str]
    """Remarks on the files."""


def read_whole(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    site_field: str | None = None,
    *,
    site_required: bool = True,
    context: int | None = None,
) -> Whole:
    """Return the records of `config.source`; `where` names it in messages, and `context` is the
    tokens that the model reads at most.

    `site_field` is the column with the name of a record's site; unless it is required, a source
    without this column has no sites.

    Raise `DataError` with all faults of its files, or `ConfigError` for a setting that does not fit
    them.
    """
    faults = Faults()
    source = Source(where, config.source, config.split, config.reading(), strict=False)
    found = read_source(source, faults)
    faults.raise_any()

    sites = None
    if site_field is not None:
        known = columns_of([entry.row for entry in found.entries])
        if site_field in known:
            sites = classes_of(found.entries, Natural(column=site_field), where, faults)
            faults.raise_any()
        elif site_required:
            raise ConfigError(
                f"--site-field {site_field!r}: {safe_line(config.source)} ({where}) has the "
                f"columns {', '.join(map(shown, known))}"
            )

    changed = with_template(tokenizer, config.chat_template)
    tokenizing = Tokenizing(changed, config.max_length, config.loss_on, config.overlong, context)
    tokens = tokenizing([entry.record for entry in found.entries])
    faults.include_all(tokens.faults)

    if tokens.surplus.refused:
        faults.add(refusal(tokens.surplus, tokenizing, tokens.records, {}))
    if not tokens.examples and not faults.count:
        dropped = tokens.surplus.dropped
        lost = (
            f" (records dropped because longer than data.max_length: {dropped})" if dropped else ""
        )
        faults.add(f"{safe_line(config.source)} ({where}): holds nothing to measure{lost}")

    faults.raise_any()

    asked = tokens.questions[: config.max_heldout]
    most = config.max_heldout or len(tokens.examples)
    return Whole(
        tokens.examples[:most],
        asked,
        [] if sites is None else [sites[number] for number in tokens.asked[: len(asked)]],
        tokens.records,
        len(tokens.examples[most:]),
        tokens.surplus,
        sorted(set(found.forms)),
        found.notes,
    )
