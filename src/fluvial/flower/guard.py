"""A process that ends the others of a site when the one that started them dies, however it dies.

`kill -9` leaves a process no time to end its children. A fork of it does that, because it sees that
its parent process has changed. This needs neither a thread in a process that forks nor a system
call of Linux.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOOK_S = 0.2
"""Seconds between two looks at whether the parent process is there."""
GRACE_S = 10.0
"""Seconds in which a process ends by itself on SIGTERM, as a SuperNode that leaves its server."""


@contextmanager
def guarded(*children: int) -> Iterator[None]:
    """End the processes `children` when this process dies in the body.

    After an error in the body too, the guard ends them as soon as this process has ended.
    """
    parent = os.getpid()
    guard = os.fork()
    if guard == 0:
        try:
            _watch(parent, children)
        finally:
            os._exit(0)

    yield
    os.kill(guard, signal.SIGKILL)
    os.waitpid(guard, 0)


def alive(process: int) -> bool:
    """Return True if there is a process of this number that has not ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return not _is_zombie(process)


def _is_zombie(process: int) -> bool:
    """Return True for a process that has ended and that its parent has not looked at; False where
    the system does not say."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[:1] == ["Z"]


def _watch(parent: int, children: tuple[int, ...]) -> None:
    """Wait until the process `parent` has ended, then end `children`."""
    # Signals to the whole group, such as Ctrl-C, are the parent's to handle.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    while os.getppid() == parent:
        time.sleep(LOOK_S)

    _send(signal.SIGTERM, children)
    until_s = time.monotonic() + GRACE_S
    while any(alive(child) for child in children) and time.monotonic() < until_s:
        time.sleep(LOOK_S)
    _send(signal.SIGKILL, children)


def _send(number: signal.Signals, children: tuple[int, ...]) -> None:
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, number)
