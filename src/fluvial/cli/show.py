"""`fluvial show`: print a run or a comparison from its folder, and draw it as a page."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from fluvial.cli.console import Format, err, print_content
from fluvial.storage.run_files import JsonObject


def show(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, or of a comparison.")],
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write one self-contained HTML page.")
    ] = None,
    format: Format = "table",
) -> None:
    """Print a run: its rounds, result and bytes. Of a comparison, print its tables."""
    from fluvial.report.damage import damage_reported
    from fluvial.report.show import run_tables
    from fluvial.storage.run_files import COMPARED, read_file, read_run

    compared = read_file(folder / COMPARED) if folder.is_dir() else None
    content = read_run(folder) if compared is None else compared
    with damage_reported(folder):
        print_content(content, format, run_tables if compared is None else _comparison_tables)

    if html is not None:
        with err.status("drawing"), damage_reported(folder):
            from fluvial.report.page import page_of, write_html

            write_html(page_of(content) if compared is None else _page(content, folder), html)

        err.print(f"wrote {html}", markup=False)


def _comparison_tables(content: JsonObject) -> RenderableType:
    """Return the tables of compare.json."""
    from fluvial.report.comparison_tables import comparison_tables
    from fluvial.runs.comparison.result import Compared

    return comparison_tables(Compared.model_validate_json(json.dumps(content)))


def _page(content: JsonObject, folder: Path) -> bytes:
    """Return the page of compare.json."""
    from fluvial.report.comparison_page import comparison_page
    from fluvial.runs.comparison.result import Compared

    return comparison_page(Compared.model_validate_json(json.dumps(content)), folder)
