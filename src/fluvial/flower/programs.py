"""Flower's programs: where they are, and the environment they run in."""

import os
import shutil
import sys
from pathlib import Path

from fluvial.errors import ConfigError
from fluvial.flower import QUIET

_SETTINGS = QUIET | {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
}
"""Nor an installation while a run runs."""
_MEMORY = {"MALLOC_ARENA_MAX": "2"}
"""Of glibc, where the environment does not say otherwise: every thread's own arena keeps what a
large message took."""


def program(name: str) -> str:
    """The path of one of them; raises `ConfigError` if it is not installed."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)

    if not found:
        raise ConfigError(f"{name} is not installed; run pip install 'fluvial[flower]'")
    return found


def environment(folder: Path) -> dict[str, str]:
    """Flower's home inside the folder, its own programs on the path, nothing that calls out."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {
        **_MEMORY,
        **os.environ,
        **_SETTINGS,
        "PATH": path,
        "FLWR_HOME": str(folder.resolve() / "flower"),
    }


def split_address(text: str) -> tuple[str, int]:
    """Host and port; raises `ConfigError`."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"address {text!r}: write HOST:PORT, such as fluvial.example.org:8000")
    return host, int(port)


def warn(text: str) -> None:
    """Tell an operator."""
    sys.stderr.write(f"warning: {text}\n")
