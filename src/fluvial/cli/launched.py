"""Commands that torchrun starts several times: the first process runs them, the others help."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from fluvial.cli.console import err


def shared() -> bool:
    """Return True where torchrun has started several processes of this command."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def in_first_process() -> Iterator[None]:
    """Run the body in the first process; the others take part in its trainings and end with it."""
    if not shared():
        yield
        return

    from fluvial.training.processes import Processes

    here = Processes.here()
    if here is None:
        yield
    elif here.rank:
        trainings = here.serve()
        err.print(f"process {here.rank} took part in {trainings} trainings", highlight=False)
        raise typer.Exit
    else:
        try:
            yield
        finally:
            here.end()
