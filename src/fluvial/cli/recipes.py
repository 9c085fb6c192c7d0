"""`fluvial recipes`: list the configurations that come with the package, print or write one."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fluvial.cli.console import out, print_line
from fluvial.errors import ConfigError
from fluvial.storage import recipes as shipped
from fluvial.storage.files import write_whole


def recipes(
    name: Annotated[str | None, typer.Argument(help="Name of a recipe, to print it.")] = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="Write the recipe to a file.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """List the recipes, or print or write one to change it.

    A recipe runs under its name too, as in `fluvial run recipe:quickstart`; paths in it are then
    relative to the working directory.
    """
    if name is None:
        if write is not None:
            raise ConfigError("--write: without effect without the name of a recipe; add one")
        _list()
        return

    text = shipped.text(name)
    if write is None:
        typer.echo(text, nl=False)
        return

    if write.exists() and not force:
        raise ConfigError(f"--write: {str(write)!r} exists; name another file, or add --force")
    write_whole(write, text.encode(), "choose another --write")
    check = shlex.join(["fluvial", "check", str(write)])
    print_line(f"wrote {write}: change what is yours, then  {check}")


def _list() -> None:
    from fluvial.report.tables import table

    rows = [[name, shipped.summary(name)] for name in shipped.names()]
    out.print(table(["recipe", "what it does"], rows, "", left=2))
