"""`fluvial submit`, `status`, `logs` and `stop`: runs on a server of a deployment."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fluvial.cli.console import (
    ConfigPath,
    Format,
    Overrides,
    Resume,
    ServerFolder,
    err,
    load_config,
    print_content,
    print_line,
    program_name,
    working,
)
from fluvial.storage.recipes import stem

RunNumber = Annotated[
    int | None,
    typer.Argument(min=0, max=2**64 - 1, help="The run's number; default the one submitted last."),
]

NO_DEADLINE = (
    "no deadline: the run waits for a site that stops answering; set fleet.deadline_s, the seconds "
    "that an answer may take"
)
"""Remark on a run of a deployment without a deadline."""


def submit(
    config: ConfigPath,
    server: Annotated[Path, typer.Option(help="The server's folder.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; default SERVER/runs/NAME.")
    ] = None,
    resume: Resume = False,
    overrides: Overrides = None,
) -> None:
    """Start a configuration on a server; its registered sites train."""
    from fluvial.flower import server_operator

    path = folder or server / "runs" / stem(config)
    server_operator.check_submission(server, out=path, resume=resume)
    settings = load_config(config, overrides, as_written=True)
    if settings.fleet.deadline_s is None:
        err.print(f"• {NO_DEADLINE}", markup=False, soft_wrap=True)
    with working("giving the run to the server"):
        number = server_operator.submit(settings, server, out=path, resume=resume)
    print_line(f"run {number} in {path}")
    print_line(f"follow it:  {shlex.join(program_name())} logs {server} {number}")


def status(server: ServerFolder, format: Format = "table") -> None:
    """Show a server's runs and sites."""
    from fluvial.flower import server_operator
    from fluvial.report.status_tables import status_tables

    with working("asking the server"):
        content = server_operator.status(server)
    print_content(content, format, status_tables)


def logs(
    server: ServerFolder,
    run: RunNumber = None,
    follow: Annotated[bool, typer.Option(help="Continue until the run ends.")] = True,
) -> None:
    """Print the log of a run; the exit code is 1 when the run has failed or was stopped."""
    from fluvial.flower import server_operator

    server_operator.logs(server, _number(server, run), follow=follow)


def stop(server: ServerFolder, run: RunNumber = None) -> None:
    """Stop a run; `submit --resume` continues it."""
    from fluvial.flower import server_operator

    with working("stopping the run"):
        answer = server_operator.stop(server, _number(server, run))
    print_line(answer.strip())


def _number(server: Path, run: int | None) -> int:
    """Return the number of a run: the given one, or that of the run submitted last."""
    from fluvial.flower import server_operator

    return server_operator.newest(server) if run is None else run
