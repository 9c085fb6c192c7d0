"""`fluvial init`: look at a model and at records, ask what is missing, write a configuration."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluvial.cli.console import finite, out, print_line, program_name
from fluvial.cli.progress import spinner
from fluvial.errors import ConfigError
from fluvial.formatting import safe_text
from fluvial.storage.files import write_whole, writing

if TYPE_CHECKING:
    from fluvial.runs.proposal.duration import Duration
    from fluvial.runs.proposal.proposing import Proposal

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
        float | None,
        typer.Option(min=1e-6, max=1e6, callback=finite, help="The slowest uplink, in Mbit/s."),
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
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="Chat template of conversations in place of the tokenizer's: chatml, llama3, "
            "zephyr, gemma, mistral, plain, or a file with a Jinja template."
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

    from fluvial.cli.interview import Interview, Options, on_terminal, with_command
    from fluvial.data.faults import DataError
    from fluvial.runs.proposal.limits import method_for
    from fluvial.runs.proposal.proposing import propose

    options = Options(
        model=model,
        data=data or [],
        column=column or [],
        site_column=site_column,
        sites=sites,
        limit=limit,
        uplink=uplink,
        public=public,
        heldout=heldout or [],
        chat_template=chat_template,
        asks=not no_input and on_terminal(),
    )
    answers = Interview(options).answers()
    try:
        with spinner("counting tokens and checking"):
            proposal = propose(
                file,
                answers.model,
                answers.records,
                answers.sites,
                answers.limits,
                uplink_mbps=answers.uplink,
                public=public,
                heldout=answers.heldout,
            )
    except DataError as error:
        words = f"{error}\n{file}: not written; mend these records and call `fluvial init` again"
        raise with_command(DataError([words])) from None

    with writing(file, ANOTHER):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, proposal.text.encode(), ANOTHER)
    _report(file, proposal, plans=method_for(answers.limits) == "fedpipe")


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

    print_line(f"\nwrote {file}, and checked it. Next:")
    _print_commands(str(file), proposal.duration, plans=plans)


def _print_commands(file: str, duration: "Duration", *, plans: bool) -> None:
    """Print the next commands, and one for a first look where the run is long."""
    from fluvial.runs.remaining import rough

    program = shlex.join(program_name())
    before = [["preview", file], ["plan", file]] if plans else [["preview", file]]
    remarks = {"check": "measures how long the run takes here", "run": duration.words()}
    for words in (*before, ["check", file, "--time"], ["run", file]):
        remark = f"  # {remarks[words[0]]}" if words[0] in remarks else ""
        print_line(f"  {program} {shlex.join(words)}{remark}")

    if duration.overrides:
        shorter = ["run", file, "--out", str(Path("runs") / f"{Path(file).stem}-first")]
        for override in duration.overrides:
            shorter += ["--set", override]
        print_line(f"For a first look, in about {rough(duration.first_look_s)}:")
        print_line(f"  {program} {shlex.join(shorter)}")
