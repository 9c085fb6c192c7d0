"""`fluvial site`: set up, register and run a site of a deployment over many machines."""

from pathlib import Path
from typing import Annotated

import typer

from fluvial.cli.console import (
    CLICK_SUGGESTS,
    Insecure,
    ServerFolder,
    SiteFolder,
    print_line,
    working,
)
from fluvial.cli.launched import in_first_process

app = typer.Typer(
    help="Many machines: a site.", no_args_is_help=True, suggest_commands=not CLICK_SUGGESTS
)


@app.command()
def init(
    folder: SiteFolder,
    name: Annotated[str, typer.Option(help="The site's name in runs and reports.")],
    server: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:8000",
    ca: Annotated[Path | None, typer.Option(help="The server's ca.crt.")] = None,
    channel_key: Annotated[
        Path | None,
        typer.Option(help="The server's channel.pub, for methods that talk over a secure channel."),
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Make a site's folder: key pair and settings."""
    from fluvial.flower import site_operator

    next_steps = site_operator.site_init(
        folder, name=name, server=server, ca=ca, channel_key=channel_key, insecure=insecure
    )

    for line in next_steps:
        print_line(line)


@app.command()
def register(
    server: ServerFolder, public_key: Annotated[Path, typer.Argument(help="The site's NAME.pub.")]
) -> None:
    """Let a site join; run by the server's operator."""
    from fluvial.flower import server_operator

    with working("registering the site"):
        answer = server_operator.register(server, public_key)
    print_line(answer.strip())


@app.command()
def start(
    folder: SiteFolder,
    stock: Annotated[
        bool,
        typer.Option("--stock", help="Flower's own execution: a new process for each message."),
    ] = False,
) -> None:
    """Run a site until it is stopped."""
    from fluvial.flower import site_operator

    with in_first_process():
        code = site_operator.site_start(folder, warm=not stock)
    raise typer.Exit(code)
