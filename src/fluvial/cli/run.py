"""`fluvial run`: run a configuration in this process or over Flower's simulation."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from fluvial import interrupt
from fluvial.cli.console import (
    ConfigPath,
    Format,
    Overrides,
    Resume,
    load_config,
    out,
    print_json,
    program_name,
)
from fluvial.cli.launched import in_first_process, shared
from fluvial.cli.progress import run_progress
from fluvial.storage.recipes import stem
from fluvial.storage.run_files import CONFIG, check_free, in_use


def run(
    config: ConfigPath,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; default runs/NAME.")
    ] = None,
    resume: Resume = False,
    fleet: Annotated[
        Literal["process", "flower"],
        typer.Option("--fleet", help="Sites in this process, or in Flower's simulation."),
    ] = "process",
    overrides: Overrides = None,
    format: Format = "table",
) -> None:
    """Run a configuration: baselines, rounds, held-out measures and the final weights."""
    path = folder or Path("runs") / stem(config)
    interrupt.set_advice(partial(_resume_advice, path))
    if not shared() and not in_use(path):
        check_free(path, resume=resume)
    settings = load_config(config, overrides)

    with in_first_process(), run_progress(settings, quiet=format == "json") as progress:
        if fleet == "flower":
            from fluvial.flower.simulate import simulate as execute
        else:
            from fluvial.runs.run import execute

        from fluvial.report.live import with_page

        for event in with_page(execute(settings, path, resume=resume), settings, path):
            progress.show(event)

    interrupt.set_advice(str)
    assert event.kind == "result"
    if format == "json":
        print_json(event.values)
        return

    from fluvial.report.harness_table import run_tasks
    from fluvial.report.result_tables import (
        closing_words,
        result_table,
        verdict_line,
    )
    from fluvial.report.site_tables import site_table
    from fluvial.storage.run_files import read_run

    finished = read_run(path)
    out.print(result_table(event.values, finished["config"]))
    out.print(verdict_line(finished))
    if by_site := site_table(finished):
        out.print()
        out.print(by_site)
    for content in run_tasks(event.values):
        out.print(content)
    out.print()
    out.print(closing_words(event.values, path, shlex.join(program_name())))


def _resume_advice(folder: Path) -> str:
    """Return the line that is printed after a signal has stopped the run in `folder`."""
    command = [*program_name(), *sys.argv[1:]]
    if not (folder / CONFIG).exists():
        return f"interrupted before anything was written; start again with:  {shlex.join(command)}"

    command += [] if "--resume" in command else ["--resume"]
    return f"interrupted; finished rounds are saved, continue with:  {shlex.join(command)}"
