"""`fluvial init`: look at a model and at records, ask what is missing, write a configuration."""

import shlex
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from fluvial.cli.console import err, out, print_line, program_name
from fluvial.cli.progress import spinner
from fluvial.errors import ConfigError
from fluvial.formatting import safe_text
from fluvial.storage.files import write_whole, writing

if TYPE_CHECKING:
    from fluvial.runs.proposal.models import ModelFacts
    from fluvial.runs.proposal.proposing import Proposal
    from fluvial.runs.proposal.records import DataFacts
    from fluvial.runs.proposal.sites import Sites

T = TypeVar("T")
ANOTHER = "name another file"
"""Remedy where the file cannot be written."""


def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("fluvial.toml"),
    model: Annotated[
        str | None, typer.Option(help="A model's folder or hub id, or 'embedded'.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A file, a folder of files, or a hub id of a data set; given several times, each "
            "is a site, and NAME=PATH names it."
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="FIELD=YOUR_COLUMN, such as completion=answer, or SITE:FIELD=YOUR_COLUMN for one "
            "of several --data; may be repeated."
        ),
    ] = None,
    site_column: Annotated[
        str | None, typer.Option(help="The column with the owner's name, or 'file'.")
    ] = None,
    sites: Annotated[
        int | None, typer.Option(min=2, help="Equal shares, where no record names its owner.")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="slow-links, small-memory, base-stays, unequal-sites, privacy or none; may be "
            "repeated."
        ),
    ] = None,
    uplink: Annotated[
        float | None, typer.Option(min=1e-6, max=1e6, help="The slowest uplink, in Mbit/s.")
    ] = None,
    public: Annotated[
        str | None, typer.Option(help="A file with text of no site, to choose the codec on.")
    ] = None,
    heldout: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out records: a file, or a folder with a file of each site. With several "
            "--data, all sites are measured on this file; SITE=FILE is for one of them, and may "
            "be repeated."
        ),
    ] = None,
    no_input: Annotated[
        bool,
        typer.Option("--yes", "-y", "--no-input", help="Ask nothing; take what the data suggest."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented configuration for your model and records, and check it.

    Asks five questions on a terminal; options answer them before.
    """
    if file.exists() and not force:
        raise ConfigError(f"{file}: exists; name another file, or add --force")
    if site_column is not None and sites is not None:
        raise ConfigError("--sites: without effect beside --site-column; remove one")

    from fluvial.data.faults import DataError, Faults

    several = data is not None and len(data) > 1
    faults = Faults()
    for option, given in (("--site-column", site_column), ("--sites", sites)):
        if several and given is not None:
            faults.add(
                f"{option}: without effect beside several --data, each of which is a site; remove "
                "it"
            )

    asks = not no_input and _on_terminal()
    from fluvial.runs.proposal.columns import of_one_source, renamed_columns
    from fluvial.runs.proposal.given import read_given
    from fluvial.runs.proposal.heldout import fitted
    from fluvial.runs.proposal.limits import LIMITS, Limit, limits_of, method_for, reads_public
    from fluvial.runs.proposal.models import look_at_model
    from fluvial.runs.proposal.proposing import propose
    from fluvial.runs.proposal.records import facts_about, read_records
    from fluvial.runs.proposal.separate import named_sources, separate, site_names
    from fluvial.runs.proposal.sites import sites_by_source

    renamed = renamed_columns(column or [], site_names(data or []))
    of_all = {} if several else of_one_source(renamed)
    chosen_limits: frozenset[Limit] | None = None
    with faults.catch():
        chosen_limits = None if limit is None else limits_of(limit)
        if limit is not None or not asks:
            _check_public(public, reads_public(chosen_limits or frozenset()))

    def decide(facts: "DataFacts") -> None:
        if not asks:
            divided = _sites(facts, site_column, sites, asks)
            if not renamed:
                _with_answers(facts, divided, asks)

    @cache
    def looked_at_model(name: str) -> "ModelFacts":
        with spinner("looking at the model"):
            return look_at_model(name)

    with spinner("reading the records"):
        named = read_given(data or [], heldout or [], public)
    unfit = None if model is None else _error_of(looked_at_model, model)
    if unfit is not None:
        faults.include(unfit)
    if not asks or named.is_faulty or faults.count:
        known = None if model is None or unfit is not None else looked_at_model(model)
        named.include_faults(renamed, decide, known, faults)
    if unfit is not None and faults.count == 1:
        raise unfit  # it may be of a kind of its own
    faults.raise_any()

    def looked_at_data(name: str) -> "DataFacts":
        if data:
            files = named.data[0]
        else:
            with spinner("reading the records"):
                files = read_records(named_sources([name])[0][1])
        return facts_about(files, of_all, partial(_columns, name) if asks else None)

    facts = _answer(
        "Model: a folder, a hub id, or embedded",
        model,
        "--model",
        asks,
        looked_at_model,
        "embedded",
    )
    _found(facts.words(), asks)
    records: DataFacts
    if several:
        separate_records = separate(named.data, renamed, _columns if asks else None)
        records, divided = separate_records, sites_by_source(separate_records)
    else:
        records = _answer(
            "Records: a file, a folder or a hub id",
            data[0] if data else None,
            "--data",
            asks,
            looked_at_data,
        )
        divided = _sites(records, site_column, sites, asks)
    _found(f"{len(records.rows):,} records, form {records.forms}", asks)
    _found(divided.words(), asks)
    if not renamed:
        records = _with_answers(records, divided, asks)
    apart = fitted(named.heldout, records)

    if chosen_limits is None and asks:
        for name, meaning in LIMITS.items():
            err.print(f"  {name}: {meaning}", markup=False)
    question = "What limits the run? Several with commas"
    chosen = (
        _answer(question, None, "--limit", asks, lambda words: limits_of([words]), "none")
        if chosen_limits is None and asks
        else chosen_limits or frozenset()
    )
    _check_public(public, reads_public(chosen))
    if "slow-links" in chosen and uplink is None and asks:
        uplink = _answer("Slowest uplink in Mbit/s", None, "--uplink", asks, _mbps, "2")

    try:
        with spinner("counting tokens and checking"):
            proposal = propose(
                file,
                facts,
                records,
                divided,
                chosen,
                uplink_mbps=uplink,
                public=public,
                heldout=apart,
            )
    except DataError as error:
        raise DataError(
            [f"{error}\n{file}: not written; mend these records and call `fluvial init` again"]
        ) from None

    with writing(file, ANOTHER):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, proposal.text.encode(), ANOTHER)
    _report(file, proposal, plans=method_for(chosen) == "fedpipe")


def _on_terminal() -> bool:
    """Return whether there is a person who can answer."""
    return sys.stdin.isatty() and err.is_terminal


def _error_of(look: Callable[[str], object], name: str) -> ConfigError | None:
    """Return the error that a look at `name` ends with, None without one."""
    try:
        look(name)
    except ConfigError as error:
        return error
    return None


def _answer(
    question: str,
    given: str | None,
    option: str,
    asks: bool,
    read: Callable[[str], T],
    default: str | None = None,
) -> T:
    """Return what `read` makes of an option or of an answer; a wrong answer is asked for again.

    Raises `ConfigError` for a wrong option, and for a missing one where nobody can be asked.
    """
    if given is not None:
        return read(given)
    if not asks:
        raise ConfigError(
            f"{option}: missing, and there is no terminal to ask on; add {option}"
            if not _on_terminal()
            else f"{option}: missing, and --yes asks nothing; add {option}"
        )

    while True:
        try:
            return read(typer.prompt(question, default=default, err=True).strip())
        except ConfigError as error:
            err.print(safe_text(str(error)), style="red", markup=False)


def _sites(records: "DataFacts", site_column: str | None, sites: int | None, asks: bool) -> "Sites":
    """Return the partition that is given, found or answered; raises `ConfigError` without one."""
    from fluvial.runs.proposal import sites as known

    def read(answer: str) -> "Sites":
        if answer.isdecimal():
            return known.equal_sites(records, int(answer))
        if answer == "file":
            return known.sites_by_file(records)
        found = known.sites_by_column(records, answer)
        if asks and site_column is None and answer not in known.likely_columns(records):
            _confirm_owner(answer, found)
        return found

    if sites is not None:
        return known.equal_sites(records, sites)
    if site_column is not None:
        return read(site_column)

    found = known.found_sites(records)
    likely = known.likely_columns(records)
    if asks:
        for column in likely[:5]:
            err.print(f"  {safe_text(column)}: {known.sites_by_column(records, column).words()}")
        by = dict(found.partition) if found else {}
        proposed = str(by.get("column", "file")) if found else None
        question = "Who owns what: a column, 'file' (a file is a site), or a number of equal shares"
        return _answer(question, None, "--site-column", asks, read, proposed)
    if found is not None:
        return found

    hint = f" (perhaps {' or '.join(likely[:3])})" if likely else ""
    raise ConfigError(
        f"--site-column: no column of {records.source!r} is certain to name the owner of a "
        f"record{hint}; name it, or divide the records into equal shares with --sites 4"
    )


def _confirm_owner(column: str, found: "Sites") -> None:
    """Ask whether a column names owners that is a text of the records, or has a value in one record
    only; raises `ConfigError` where it does not."""
    question = safe_text(f"{column!r} would make {found.words()}. Is each of them an owner?")
    if not typer.confirm(question, default=False, err=True):
        raise ConfigError("name the column of the owners, 'file', or a number of equal shares")


def _with_answers(records: "DataFacts", sites: "Sites", asks: bool) -> "DataFacts":
    """Return the records with the column of answers that the user names, if one may be left over.

    Raises `ConfigError` where one may be, and nobody can be asked.
    """
    from fluvial.runs.proposal.columns import as_options
    from fluvial.runs.proposal.records import facts_about
    from fluvial.runs.proposal.sites import answer_pairs

    pairs = answer_pairs(records, sites)
    if not pairs:
        return records

    text = pairs[0][0]
    names = " or ".join(repr(answer) for _, answer in pairs)
    if not asks:
        alone = shlex.quote(f"text={text}")
        raise ConfigError(
            f"--column: {names} may be the answer to the text {text!r}. To learn it: "
            f"{as_options(*pairs[0])}. To learn the text alone: --column {alone}"
        )

    def read(answer: str) -> "DataFacts":
        if answer == "none":
            return records
        return facts_about(records.files, {"prompt": text, "completion": answer})

    question = safe_text(f"Column with the answer to {text!r}, perhaps {names}; none: text alone")
    return _answer(question, None, "--column", asks, read, "none")


def _columns(source: str, names: Sequence[str]) -> dict[str, str]:
    """Return the columns of question and answer, or of a text, as the user answers."""
    from fluvial.runs.proposal.columns import names_shown

    err.print(f"  columns of {safe_text(source)}: {safe_text(names_shown(names))}", markup=False)
    first = typer.prompt("Column with the text, or with the question", err=True)
    question = "Column with the answer, or Enter where there is none"
    answer = typer.prompt(question, default="", show_default=False, err=True)
    return {"prompt": first, "completion": answer} if answer else {"text": first}


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


def _found(words: str, asks: bool) -> None:
    if asks:
        err.print(f"  {words}", style="dim", markup=False)


def _report(file: Path, proposal: "Proposal", *, plans: bool) -> None:
    """Print what was found, the main figures of the check, and the next commands; `plans` says that
    the method plans each site."""
    from fluvial.report.plan_tables import figures_table

    for line in proposal.found:
        out.print(safe_text(line), markup=False)
    out.print(figures_table(proposal.planned))
    for note in proposal.planned["notes"][1:]:
        out.print(f"• {safe_text(note)}", markup=False)

    for line in proposal.assumed:
        out.print(f"• assumed: {safe_text(line)}", markup=False)

    program = shlex.join(program_name())
    print_line(f"\nwrote {file}, and checked it. Next:")
    before = [["preview", file], ["plan", file]] if plans else [["preview", file]]
    for words in (*before, ["check", file, "--time"], ["run", file]):
        how_long = "  # how long the run takes here" if "--time" in words else ""
        print_line(f"  {program} {shlex.join(map(str, words))}{how_long}")
