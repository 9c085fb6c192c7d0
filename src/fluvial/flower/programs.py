"""Paths of Flower's programs, and the environment in which they run."""

import os
import re
import shutil
import sys
from pathlib import Path

from fluvial.errors import ConfigError
from fluvial.flower import QUIET

_SETTINGS = QUIET | {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
    "PYTHONUNBUFFERED": "1",
}
"""Environment of Flower's programs, in which a run also installs no packages, and each line is
printed at once, to a pipe or a file too."""
_MEMORY = {"MALLOC_ARENA_MAX": "2"}
"""Default for glibc, whose arena of each thread otherwise keeps the memory of a large message."""

_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = rf"(?=.{{1,253}}:[0-9]+$){_LABEL}(\.{_LABEL})*\.?"
_ADDRESS = re.compile(rf"(?P<host>{_NAME}|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{{1,5}})")
"""Form of an address: a name of DNS, or an address of IPv4 or IPv6, and a port."""


def program(name: str) -> str:
    """Return the path of one of Flower's programs; raise `ConfigError` if it is not installed."""
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.exists() else shutil.which(name)

    if not path:
        raise ConfigError(f"{name} is not installed; run pip install 'fluvial[flower]'")
    return path


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of Flower's programs, with their home inside `folder`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {
        **_MEMORY,
        **os.environ,
        **_SETTINGS,
        "PATH": path,
        "FLWR_HOME": str(folder.resolve() / "flower"),
    }


def split_address(text: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT; raise `ConfigError`."""
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found["port"]) < 2**16:
        raise ConfigError(
            f"address {text!r:.80}: write HOST:PORT, such as fluvial.example.org:8000; a host is "
            "an ASCII name or an address, that of IPv6 in brackets, such as [::1]:8000"
        )
    return found["host"], int(found["port"])


def warn(text: str) -> None:
    """Write a warning for an operator to standard error."""
    sys.stderr.write(f"warning: {text}\n")
