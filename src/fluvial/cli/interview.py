"""The questions of `fluvial init`: options answer them, or a person on a terminal does."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeVar

import typer

from fluvial.cli.console import err, repeated_command
from fluvial.cli.progress import spinner
from fluvial.data.chat import ANY_ROLE, OTHER_TEMPLATE
from fluvial.data.faults import DataError, Faults
from fluvial.errors import ConfigError
from fluvial.formatting import safe_text
from fluvial.runs.proposal import sites as known
from fluvial.runs.proposal.columns import names_shown, of_one_source, renamed_columns
from fluvial.runs.proposal.given import Given, read_given
from fluvial.runs.proposal.heldout import Heldout, fitted
from fluvial.runs.proposal.limits import LIMITS, Limit, limits_of, reads_public
from fluvial.runs.proposal.models import ModelFacts, look_at_model
from fluvial.runs.proposal.records import DataFacts, RecordFiles, facts_about, read_records
from fluvial.runs.proposal.separate import named_sources, separate, site_names
from fluvial.runs.proposal.sites import Sites, answer_pairs, sites_by_source
from fluvial.runs.proposal.undecided import TURNS, UndecidedError, likely_fields, unknown_answer

T = TypeVar("T")
NO_ANSWER = "none"
"""Word typed for the column of the answers where there is none."""


@dataclass(frozen=True)
class Options:
    """The options of `fluvial init`, and whether somebody can be asked for what is missing."""

    model: str | None
    data: Sequence[str]
    column: Sequence[str]
    site_column: str | None
    sites: int | None
    limit: list[str] | None
    uplink: float | None
    public: str | None
    heldout: Sequence[str]
    chat_template: str | None
    asks: bool

    @property
    def several(self) -> bool:
        """Return whether each of several sources is a site."""
        return len(self.data) > 1


@dataclass(frozen=True)
class Answers:
    """Everything that a proposal is made from."""

    model: ModelFacts
    records: DataFacts
    sites: Sites
    limits: frozenset[Limit]
    uplink: float | None
    """Megabits a second."""
    heldout: Mapping[str, Heldout]


class Interview:
    """Options, and answers to the questions that they leave open.

    Raises `ConfigError` for all faults of the options together, and for what is missing where
    nobody can be asked.
    """

    def __init__(self, given: Options) -> None:
        self.given = given
        self.renamed = renamed_columns(given.column, site_names(given.data))
        self._of_all = {} if given.several else of_one_source(self.renamed)
        self._look = cache(partial(_look_at_model, template=given.chat_template))

    def answers(self) -> Answers:
        """Return all answers; what was found is shown between the questions."""
        faults = Faults()
        limits = self._given_limits(faults)
        with spinner("reading the records"):
            named = read_given(self.given.data, self.given.heldout, self.given.public)
        self._raise_faults(named, faults)

        question = "Model: a folder, a hub id, or embedded"
        model = self._answer(question, self.given.model, "--model", self._look, "embedded")
        self._found(model.words())
        records, sites = self._records(named)
        heldout = fitted(named.heldout, records)
        chosen = self._limits(limits)
        _check_public(self.given.public, reads_public(chosen))
        return Answers(model, records, sites, chosen, self._uplink(chosen), heldout)

    def _given_limits(self, faults: Faults) -> frozenset[Limit] | None:
        """Return the limits of the options, None without any; note faults of options."""
        given = self.given
        for option, value in (("--site-column", given.site_column), ("--sites", given.sites)):
            if given.several and value is not None:
                faults.add(
                    f"{option}: without effect beside several --data, each of which is a site; "
                    "remove it"
                )
        limits: frozenset[Limit] | None = None
        with faults.catch():
            limits = None if given.limit is None else limits_of(given.limit)
            if given.limit is not None or not given.asks:
                _check_public(given.public, reads_public(limits or frozenset()))
        return limits

    def _raise_faults(self, named: Given, faults: Faults) -> None:
        """Raise those of the options, of the model and of the records in one error."""
        missing: list[str] = []
        name = self.given.model
        unfit = None if name is None else _error_of(self._look, name)
        if unfit is not None:
            faults.include(unfit)
        if not self.given.asks or named.is_faulty or faults.count:
            facts = None if name is None or unfit is not None else self._look(name)
            missing = named.include_faults(self.renamed, self._decide, facts, faults)
        if unfit is not None and faults.count == 1:
            raise unfit  # it may be of a kind of its own
        try:
            faults.raise_any()
        except DataError as error:
            raise with_command(error, missing) from None

    def _decide(self, facts: DataFacts) -> None:
        """Raise what the records of one source leave undecided, where nobody can be asked."""
        if not self.given.asks:
            sites = self._sites(facts)
            if not self.renamed:
                self._with_answers(facts, sites)

    def _records(self, named: Given) -> tuple[DataFacts, Sites]:
        """Return the records of all sources and who owns them."""
        records: DataFacts
        if self.given.several:
            apart = separate(named.data, self.renamed, _columns if self.given.asks else None)
            records, sites = apart, sites_by_source(apart)
        else:
            source = self.given.data[0] if self.given.data else None
            question = "Records: a file, a folder or a hub id"
            look = partial(self._look_at_data, named)
            records = self._answer(question, source, "--data", look)
            sites = self._sites(records)
        self._found(f"{len(records.rows):,} records, form {records.forms}")
        self._found(sites.words())
        if not self.renamed:
            records = self._with_answers(records, sites)
        return records, sites

    def _look_at_data(self, named: Given, name: str) -> DataFacts:
        """Return the facts of the one source that is given, or that an answer names."""
        if self.given.data:
            files = named.data[0]
        else:
            with spinner("reading the records"):
                files = read_records(named_sources([name])[0][1])
        return facts_about(files, self._of_all, _columns if self.given.asks else None)

    def _sites(self, records: DataFacts) -> Sites:
        """Return the partition that is given, found or answered."""
        given = self.given

        def read(answer: str) -> Sites:
            if answer.isdecimal() and answer not in records.names and given.site_column is None:
                return known.equal_sites(records, int(answer))
            if answer == "file" and answer not in records.names:
                return known.sites_by_file(records)
            found = known.sites_by_column(records, answer)
            if (
                given.asks
                and given.site_column is None
                and answer not in known.likely_columns(records)
            ):
                _confirm_owner(answer, found)
            return found

        if given.sites is not None:
            return known.equal_sites(records, given.sites)
        if given.site_column is not None:
            return read(given.site_column)

        found = known.found_sites(records)
        likely = known.likely_columns(records)
        if given.asks:
            for column in likely[:5]:
                err.print(
                    f"  {safe_text(column)}: {known.sites_by_column(records, column).words()}"
                )
            by = dict(found.partition) if found else {}
            proposed = str(by.get("column", "file")) if found else None
            question = (
                "Who owns what: a column, 'file' (a file is a site), or a number of equal shares"
            )
            return self._answer(question, None, "--site-column", read, proposed)
        if found is not None:
            return found

        hint = f" (perhaps {' or '.join(likely[:3])})" if likely else ""
        raise UndecidedError(
            f"--site-column: no column of {records.source!r} is certain to name the owner of a "
            f"record{hint}; name it, or divide the records into equal shares with --sites 4",
            {},
            ["--site-column", likely[0]] if likely else ["--sites", "4"],
        )

    def _with_answers(self, records: DataFacts, sites: Sites) -> DataFacts:
        """Return the records with the column of answers that is named, if one may be left over.

        Raises `ConfigError` where one may be, and nobody can be asked.
        """
        pairs = answer_pairs(records, sites)
        if not pairs:
            return records

        if not self.given.asks:
            raise unknown_answer(records.source, pairs)
        text = pairs[0][0]
        names = " or ".join(repr(answer) for _, answer in pairs)

        def read(answer: str) -> DataFacts:
            if answer == NO_ANSWER:
                return records
            return facts_about(records.files, {"prompt": text, "completion": answer})

        question = safe_text(
            f"Column with the answer to {text!r}, perhaps {names}; none: text alone"
        )
        return self._answer(question, None, "--column", read, NO_ANSWER)

    def _limits(self, given: frozenset[Limit] | None) -> frozenset[Limit]:
        """Return the limits that are given or answered."""
        if given is not None or not self.given.asks:
            return given or frozenset()
        for name, meaning in LIMITS.items():
            err.print(f"  {name}: {meaning}", markup=False)
        question = "What limits the run? Several with commas"
        return self._answer(question, None, "--limit", lambda words: limits_of([words]), "none")

    def _uplink(self, limits: frozenset[Limit]) -> float | None:
        """Return the slowest uplink that is given, or answered where it is a limit."""
        if "slow-links" in limits and self.given.uplink is None and self.given.asks:
            return self._answer("Slowest uplink in Mbit/s", None, "--uplink", _mbps, "2")
        return self.given.uplink

    def _answer(
        self,
        question: str,
        given: str | None,
        option: str,
        read: Callable[[str], T],
        default: str | None = None,
    ) -> T:
        """Return what `read` makes of an option or of an answer; a wrong answer is asked for again.

        Raises `ConfigError` for a wrong option, and for a missing one where nobody can be asked.
        """
        if given is not None:
            return read(given)
        if not self.given.asks:
            raise ConfigError(
                f"{option}: missing, and there is no terminal to ask on; add {option}"
                if not on_terminal()
                else f"{option}: missing, and --yes asks nothing; add {option}"
            )

        while True:
            try:
                return read(typer.prompt(question, default=default, err=True).strip())
            except ConfigError as error:
                err.print(safe_text(str(error)), style="red", markup=False)

    def _found(self, words: str) -> None:
        """Show what was found, to whom is asked."""
        if self.given.asks:
            err.print(f"  {words}", style="dim", markup=False)


def on_terminal() -> bool:
    """Return whether there is a person who can answer."""
    return sys.stdin.isatty() and err.is_terminal


def _look_at_model(name: str, template: str | None) -> ModelFacts:
    with spinner("looking at the model"):
        return look_at_model(name, template)


def _error_of(look: Callable[[str], object], name: str) -> ConfigError | None:
    """Return the error that a look at `name` ends with, None without one."""
    try:
        look(name)
    except ConfigError as error:
        return error
    return None


def _confirm_owner(column: str, found: Sites) -> None:
    """Ask whether a column names owners that is a text of the records, or has a value in one record
    only; raises `ConfigError` where it does not."""
    question = safe_text(f"{column!r} would make {found.words()}. Is each of them an owner?")
    if not typer.confirm(question, default=False, err=True):
        raise ConfigError("name the column of the owners, 'file', or a number of equal shares")


def _columns(files: RecordFiles) -> dict[str, str]:
    """Return the columns of question and answer, or of a text, as the user answers; the likeliest
    are proposed."""
    columns = safe_text(names_shown(files.names))
    err.print(f"  columns of {safe_text(files.source)}: {columns}", markup=False)
    likely = likely_fields(files.names, files.rows)
    for field in likely.keys() & TURNS.keys():
        question = f"Column with the conversation; {NO_ANSWER}: question and answer, or a text"
        column = typer.prompt(question, likely[field], err=True)
        if column != NO_ANSWER:
            return {field: column}

    proposed = likely.get("prompt", likely.get("text"))
    first = typer.prompt("Column with the question, or with a text alone", proposed, err=True)
    question = "Column with the answer; none: text alone"
    answer = typer.prompt(question, default=likely.get("completion", NO_ANSWER), err=True)
    return {"text": first} if answer == NO_ANSWER else {"prompt": first, "completion": answer}


def with_command(error: DataError, missing: Sequence[str] = ()) -> DataError:
    """Return the error with the command that was given and the options that may mend it, if there
    are some: the `missing` ones, and another chat template where one refuses a role."""
    words = str(error)
    options = list(missing)
    if OTHER_TEMPLATE in words:
        remedy = OTHER_TEMPLATE.replace("set data.chat_template to", "add --chat-template with")
        words = words.replace(OTHER_TEMPLATE, remedy)
        options += ["--chat-template", ANY_ROLE]
    if not options:
        return error
    return DataError(
        [f"{words}\nThe command with the likeliest answers:\n  {repeated_command(options)}"]
    )


def _check_public(public: str | None, reads_public: bool) -> None:
    """Raise `ConfigError` for public text that the method of the limits does not read."""
    if public is not None and not reads_public:
        raise ConfigError(
            "--public: without effect on the method of these limits; remove it, or add --limit "
            "slow-links"
        )


def _mbps(words: str) -> float:
    try:
        rate = float(words)
    except ValueError:
        rate = 0.0
    if not 1e-6 <= rate <= 1e6:
        raise ConfigError(f"--uplink {words!r:.40}: a number of megabits a second, such as 2")
    return rate
