"""`fluvial show`: print a run from its folder, and draw it as a page."""

from pathlib import Path
from typing import Annotated

import typer

from fluvial.cli.console import Format, err, print_content


def show(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write one self-contained HTML page.")
    ] = None,
    format: Format = "table",
) -> None:
    """Print a run: its rounds, result and bytes."""
    from fluvial.report.damage import damage_reported
    from fluvial.report.show import run_tables
    from fluvial.storage.run_files import read_run

    content = read_run(folder)
    with damage_reported(folder):
        print_content(content, format, run_tables)

    if html is not None:
        with err.status("drawing"), damage_reported(folder):
            from fluvial.report.page import write_page

            write_page(content, html)

        err.print(f"wrote {html}", markup=False)
