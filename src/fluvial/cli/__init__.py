"""The command `fluvial`: its list of commands, its log and its exit codes.

Each command imports what it needs when it is called, so that `fluvial --help` starts at once.
"""

import errno
import logging
import sys
from typing import Annotated

import typer

from fluvial import __version__, interrupt
from fluvial.cli import (
    chat,
    check,
    compare,
    evaluate,
    export,
    init,
    plan,
    recipes,
    run,
    server,
    show,
    site,
    submit,
)
from fluvial.cli.console import CLICK_SUGGESTS, LogFormat, out, print_error
from fluvial.errors import FluvialError

app = typer.Typer(
    help="Fine-tune one language model over many sites whose data must stay where it is.",
    no_args_is_help=True,
    suggest_commands=not CLICK_SUGGESTS,
    pretty_exceptions_enable=False,
)
START = "Start"
RUN = "Run"
LOOK = "Look at results"
MACHINES = "Many machines"
OF_THE_MACHINE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE),
)
"""Numbers of errors that say what a path is like, and nothing about the program."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Numbers of errors that say what a disk is like; a write that fails names no file."""
app.command("init", rich_help_panel=START)(init.init)
app.command("recipes", rich_help_panel=START)(recipes.recipes)
app.command("check", rich_help_panel=RUN)(check.check)
app.command("preview", rich_help_panel=RUN)(check.preview)
app.command("plan", rich_help_panel=RUN)(plan.plan)
app.command("run", rich_help_panel=RUN)(run.run)
app.command("compare", rich_help_panel=RUN, cls=compare.SeedsCommand)(compare.compare)
app.command("show", rich_help_panel=LOOK)(show.show)
app.command("evaluate", rich_help_panel=LOOK)(evaluate.evaluate)
app.command("chat", rich_help_panel=LOOK)(chat.chat)
app.command("export", rich_help_panel=LOOK)(export.export)
app.add_typer(server.app, name="server", rich_help_panel=MACHINES)
app.add_typer(site.app, name="site", rich_help_panel=MACHINES)
app.command("submit", rich_help_panel=MACHINES)(submit.submit)
app.command("status", rich_help_panel=MACHINES)(submit.status)
app.command("logs", rich_help_panel=MACHINES)(submit.logs)
app.command("stop", rich_help_panel=MACHINES)(submit.stop)


def main() -> None:
    """Run the command; print an error of the user as one message and exit with code 1."""
    interrupt.install()
    try:
        app()
    except FluvialError as error:
        print_error(type(error).__name__, str(error))
        sys.exit(1)
    except OSError as error:
        of_a_path = error.errno in OF_THE_MACHINE and error.filename is not None
        if not of_a_path and error.errno not in FULL:
            raise
        where = "a file cannot be written" if error.filename is None else error.filename
        remedy = "; free some space" if error.errno in FULL else ""
        print_error("OSError", f"{where}: {error.strerror}{remedy}")
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log every message to standard error.")
    ] = False,
) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit

    handler = logging.StreamHandler(sys.stderr)
    # The handler has the level, because a progress bar lowers that of the library's logger.
    handler.setLevel(logging.INFO if verbose else logging.WARNING)
    handler.setFormatter(LogFormat())
    logging.basicConfig(level=handler.level, handlers=[handler])
    # It reports at import, with or without a quantised base, that another library is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
