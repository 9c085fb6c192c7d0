"""The data of every site: read once, checked as a whole, tokenised when a site is used."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from fluvial.data.bundled import SOURCES, even_parts
from fluvial.data.config import DataConfig
from fluvial.data.examples import Example, Question
from fluvial.data.faults import Faults, are, shown
from fluvial.data.forms import CONVERSATIONS
from fluvial.data.leaks import Leaks
from fluvial.data.packing import pack
from fluvial.data.partition import Iid, split
from fluvial.data.record_kinds import PROMPT, TEXT, commonest
from fluvial.data.records import Record
from fluvial.data.site_names import check_names, chosen, mixed_remarks
from fluvial.data.site_records import SiteRecords
from fluvial.data.site_remarks import Written, end_ids, unasked
from fluvial.data.templates import with_template, writes_date
from fluvial.data.tokenise import Surplus, Tokenized, Tokenizing, refusal
from fluvial.errors import ConfigError
from fluvial.models.hf import PreTrainedTokenizerBase
from fluvial.seeds import derive

logger = logging.getLogger(__name__)

CACHED_SITES = 32
POOLED = "pooled"
"""Name of the one site of the centralised baseline; its data are `SiteTexts.pooled()`."""


@dataclass(frozen=True)
class SiteData:
    """The sequences of one site, to train and to measure on; never empty."""

    train: list[Example]
    heldout: list[Example]
    questions: list[Question]
    """Held-out prompts with their answers, for exact match."""
    records: int
    truncated_records: int
    truncated_tokens: int
    dropped_records: int = 0
    unmeasured: int = 0
    """Held-out sequences beyond `max_heldout`, which are not measured."""
    heldout_records: int = 0
    """Records that are held out, of all `records`."""


@dataclass(frozen=True)
class _Tokens:
    """The tokens of one site, before any refusal."""

    train: Tokenized
    heldout: Tokenized

    @property
    def surplus(self) -> Surplus:
        """Surplus of training and held-out records together."""
        both = Surplus()
        both += self.train.surplus
        both += self.heldout.surplus
        return both


class SiteTexts:
    """The data of all sites; records are read once, tokens are made when a site is used.

    Raises `DataError` with all faults of all files, or `ConfigError` for a setting that does not
    fit them.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        owner: str | None = None,
        num_embeddings: int | None = None,
        context: int | None = None,
    ) -> None:
        """Read the records; all belong to the one site `owner`, where there is one.

        A token id from `num_embeddings` (rows of the model's embedding) on is a fault of the data;
        `context` is the tokens that the model reads at most.
        """
        self.config = config
        self.seed = seed
        self._num_embeddings = num_embeddings
        self._context = context
        self.tokenizer = with_template(tokenizer, config.chat_template)
        records = SiteRecords(config, seed, owner)
        self.notes = records.notes
        """Remarks on the files for their owner: records that are left out, names that are alike."""
        self.forms = records.forms
        """Forms of the records that were read."""
        self.num_train: dict[str, int] = {}
        """Training sequences of each site, once `check` has counted them."""
        self.num_questions = 0
        """Held-out questions of all sites, once `check` has counted them."""
        self._records = records
        faults = Faults()
        self._public_records = cache(records.public)
        self._bundled = SOURCES[config.source] if config.bundled else None
        self._parts = records.read(faults) if self._bundled is None else None

        if faults.count and owner is None and config.public_source is not None:
            self._try_public(faults)  # so that one message has its faults too

        faults.raise_any()
        if self._bundled is None:
            self.names = tuple(sorted(self._parts or ()))
        else:
            self.forms.add(self._bundled.form)
            self.names = self._bundled.site_names()
            if config.sites is not None:
                self.names = chosen(self.names, config.sites)
        check_names(self.names, "data.by_site" if config.by_site else "data.partition")
        self._tokens = lru_cache(CACHED_SITES)(self._tokenise)
        self.load = lru_cache(CACHED_SITES)(self._load)
        self.public = cache(self._public)

    @property
    def sample_from(self) -> Literal["site", "public"]:
        """Return the owner of what `sample` returns; bundled text is public."""
        return "site" if self._bundled is None else "public"

    def sample(self) -> SiteData:
        """Return the data of the first site that has a question, to show the model on; those of
        the first site where none has one."""
        if self.forms == {"text"}:
            return self.load(self.names[0])
        sites = map(self.load, self.names)
        return next((data for data in sites if data.questions), self.load(self.names[0]))

    def end_ids(self) -> frozenset[int]:
        """Return the tokens that end the answers of the first site with questions."""
        return end_ids(self.sample().questions, self.tokenizer.eos_token_id)

    def pooled(self) -> SiteData:
        """Return the data of all sites together, for the centralised baseline."""
        sites = [self.load(name) for name in self.names]
        return SiteData(
            [example for site in sites for example in site.train],
            [example for site in sites for example in site.heldout],
            [question for site in sites for question in site.questions],
            sum(site.records for site in sites),
            sum(site.truncated_records for site in sites),
            sum(site.truncated_tokens for site in sites),
            sum(site.dropped_records for site in sites),
            sum(site.unmeasured for site in sites),
            sum(site.heldout_records for site in sites),
        )

    def trained_questions(self, name: str) -> list[Question]:
        """Return the questions of a site's training records; plain text has none."""
        return self._tokens(name).train.questions

    def check(self) -> list[str]:
        """Tokenise every site and return remarks on all data.

        Raise `DataError` with the faults of all sites together. Records that do not fit into
        `max_length` are counted over all sites, in one message.
        """
        faults = Faults()
        surplus = Surplus()
        records = 0
        leaks = Leaks()
        written = Written(self.tokenizer)
        left_out = 0
        refused: dict[str, int] = {}
        questions: dict[str, int] = {}

        for number, name in enumerate(self.names, start=1):
            logger.info("counting tokens of site %d of %d", number, len(self.names))
            tokens = self._tokens(name)
            records += tokens.train.records + tokens.heldout.records
            surplus += tokens.surplus
            measured = tokens.heldout.examples[: self.config.max_heldout]
            left_out += len(tokens.heldout.examples) - len(measured)
            self.num_train[name] = len(self._sequences(tokens.train.examples))
            asked = tokens.heldout.questions[: self.config.max_heldout]
            questions[name] = len(asked)
            leaks.add(name, tokens.train.examples, measured)
            written.add(name, tokens.train, tokens.heldout, asked)

            if tokens.surplus.refused:
                refused[name] = tokens.surplus.refused

            self._own_faults(name, tokens, faults)

        if refused:
            faults.add(
                refusal(
                    surplus,
                    self._tokenizing(),
                    records,
                    {shown(site): n for site, n in refused.items()},
                )
            )

        if self.config.public_source is not None:
            self._try_public(faults)

        faults.raise_any()
        self.num_questions = sum(questions.values())
        return [
            *self.notes,
            *mixed_remarks(self.names),
            *self._remarks(surplus, records),
            *self._cut(left_out),
            *unasked(questions),
            *written.remarks(),
            *leaks.remarks("data.by_site.{}" if self.config.by_site else "data"),
        ]

    def mostly(self) -> str:
        """Return what most records of all sites are: `CHAT`, `PROMPT` or `TEXT`."""
        if self._parts is None:
            return TEXT if self.forms == {"text"} else PROMPT
        return commonest(r for parts in self._parts.values() for some in parts for r in some)

    def idle(self) -> dict[str, str]:
        """Return the settings that change nothing in records of these forms, by their place, and
        why; after `check`, which reads all of them."""
        forms = self.forms | self._records.public_forms
        idle = {}
        if forms == {"text"}:
            idle = dict.fromkeys(("data.loss_on", "data.overlong"), "all records are plain text")
        if not forms & CONVERSATIONS:
            idle["data.chat_template"] = "no record is a conversation"
        idle |= self._records.idle(self.names)
        if not self.num_questions:
            idle["evaluate.max_new_tokens"] = "no held-out record has a question"

        return idle

    def _cut(self, left_out: int) -> list[str]:
        if not left_out:
            return []
        return [
            f"held-out measures are of the first {self.config.max_heldout} sequences of a site "
            f"(data.max_heldout); {left_out} of all sites are not measured"
        ]

    def _remarks(self, surplus: Surplus, records: int) -> list[str]:
        remarks = []
        if surplus.records:
            how = {"drop": "left out", "shorten_prompt": "cut at the beginning of the prompt"}
            done = how.get(self.config.overlong, "cut at the end")
            remarks.append(
                f"{surplus.records} of {records} records {are(surplus.records)} longer than "
                f"data.max_length={self.config.max_length} and {are(surplus.records)} {done} "
                f"(data.overlong; the longest has {surplus.longest} tokens)"
            )

        if writes_date(self.tokenizer) and self.forms & CONVERSATIONS:
            remarks.append(
                "the chat template writes today's date; it is given 26 July 2024 on every day"
            )

        return remarks

    # -- tokens ------------------------------------------------------------

    def _tokenizing(self, site: str | None = None) -> Tokenizing:
        """Return what makes sequences of the records of a site, or of public text."""
        config = self.config
        own = None if site is None else config.by_site.get(site)
        tokenizer = with_template(self.tokenizer, None if own is None else own.chat_template)
        return Tokenizing(
            tokenizer, config.max_length, config.loss_on, config.overlong, self._context
        )

    def _sequences(self, examples: list[Example]) -> list[Example]:
        """Return `examples` as they are trained on; what is measured is never packed."""
        return pack(examples, self.config.max_length) if self.config.packing else examples

    def _tokenise(self, name: str) -> _Tokens:
        train, heldout = self._records_of(name)
        tokenizing = self._tokenizing(name)
        return _Tokens(tokenizing(train), tokenizing(heldout))

    def _records_of(self, name: str) -> tuple[Sequence[Record], Sequence[Record]]:
        """Return the records of one site: to train on, and held out."""
        if self._bundled is not None:
            return self._bundled.site(name)
        assert self._parts is not None, "the records were read"
        return self._parts[name]

    def _load(self, name: str) -> SiteData:
        """Return the tokens of one site.

        Raise `DataError` for records that cannot be rendered or do not fit, and for a site that has
        nothing to train on, or nothing held out.
        """
        tokens = self._tokens(name)
        faults = Faults()
        train = tokens.train
        heldout = tokens.heldout
        surplus = tokens.surplus

        if surplus.refused:
            faults.add(refusal(surplus, self._tokenizing(), train.records + heldout.records, {}))

        self._own_faults(name, tokens, faults)
        faults.raise_any()
        return SiteData(
            self._sequences(train.examples),
            heldout.examples[: self.config.max_heldout],
            heldout.questions[: self.config.max_heldout],
            train.records + heldout.records,
            surplus.records,
            surplus.tokens,
            surplus.dropped,
            len(heldout.examples[self.config.max_heldout :]) if self.config.max_heldout else 0,
            heldout.records,
        )

    def _own_faults(self, name: str, tokens: _Tokens, faults: Faults) -> None:
        """Add the faults of one site, apart from records that do not fit."""
        for tokenized, what in ((tokens.train, "to train on"), (tokens.heldout, "held out")):
            if tokenized.faults.count:
                faults.include_all(tokenized.faults)
            elif not tokenized.examples and not tokenized.surplus.refused:
                dropped = tokenized.surplus.dropped
                lost = (
                    f" (dropped because longer than data.max_length: {dropped})" if dropped else ""
                )
                site = f"data: site {shown(name)}"
                faults.add(
                    f"{site} has no records {what}{lost}; give it some, or leave the site out", site
                )

            self._check_ids(tokenized.examples, f"data, site {shown(name)}", faults)

    def _check_ids(self, examples: Sequence[Example], where: str, faults: Faults) -> None:
        largest = max((max(example.input_ids) for example in examples), default=0)
        if self._num_embeddings is not None and largest >= self._num_embeddings:
            faults.add(
                f"{where}: the text has a token of id {largest}, and the model embeds ids up to "
                f"{self._num_embeddings - 1}; use the tokenizer that belongs to the model, or "
                "resize the model (resize_token_embeddings) and save it anew",
                where,
            )

    # -- public text -------------------------------------------------------

    def _try_public(self, faults: Faults) -> None:
        try:
            self._public_records()
        except ConfigError as error:
            faults.include(error)

    def _public(self) -> dict[str, list[Example]]:
        """Return examples of text that belongs to no site, in parts that can stand for sites.

        Raise `ConfigError` when the configuration names no public text.
        """
        if self._bundled is not None and self.config.public_source is None:
            return even_parts(
                {
                    name: self._sequences(self._tokenizing()(records).examples)
                    for name, records in self._bundled.public().items()
                }
            )

        if self.config.public_source is None:
            raise ConfigError(
                "data.public_source: a codec that learns from public text needs some, in the "
                "language and form of the sites' data; name a file, or set "
                "method.tgap.source='sites' (each site then sends raw updates once)"
            )

        records = self._public_records()
        parts = split(
            None, len(records), Iid(sites=min(8, len(records))), derive(self.seed, "public") % 2**32
        )
        tokens = {
            name: self._tokenizing()([records[number] for number in numbers])
            for name, numbers in parts.items()
        }
        faults = Faults()
        surplus = Surplus()

        for tokenized in tokens.values():
            faults.include_all(tokenized.faults)
            surplus += tokenized.surplus

        if surplus.refused:
            faults.add(
                f"data.public_source: {refusal(surplus, self._tokenizing(), len(records), {})}"
            )

        faults.raise_any()
        return {name: self._sequences(made.examples) for name, made in tokens.items()}
