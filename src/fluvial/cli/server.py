"""`fluvial server`: set up and run the server of a deployment over many machines."""

from pathlib import Path
from typing import Annotated

import typer

from fluvial.cli.console import CLICK_SUGGESTS, Insecure, ServerFolder, print_line

app = typer.Typer(
    help="Many machines: the server.", no_args_is_help=True, suggest_commands=not CLICK_SUGGESTS
)


@app.command()
def init(
    folder: ServerFolder,
    address: Annotated[
        str, typer.Option(help="HOST:PORT at which sites reach the server.")
    ] = "127.0.0.1:8000",
    certificate: Annotated[
        Path | None, typer.Option(help="Your own certificate; by default one is made.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="The certificate's private key.")] = None,
    ca: Annotated[
        Path | None, typer.Option(help="The authority that signed the certificate.")
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Make a server's folder: certificate authority, server certificate, settings."""
    from fluvial.flower import server_operator

    next_steps = server_operator.server_init(
        folder, address=address, insecure=insecure, certificate=certificate, key=key, ca=ca
    )

    for line in next_steps:
        print_line(line)


@app.command()
def start(folder: ServerFolder) -> None:
    """Run the server until it is stopped."""
    from fluvial.flower import server_operator

    server_operator.server_start(folder)


@app.command()
def renew(folder: ServerFolder) -> None:
    """Renew the server's certificate; sites need no change."""
    from fluvial.flower import server_operator

    print_line(server_operator.renew(folder))
