"""Where the live stream listens."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where the live stream listens, and its certificate."""

    host: str = "127.0.0.1"
    """Address of the network interface."""
    port: int = 0
    """Port; 0 takes a free one."""
    certificate: Path | None = None
    """Certificate of the server with those between it and its authority; None is plain text."""
    key: Path | None = None
    """Private key of the certificate."""
