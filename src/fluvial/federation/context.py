"""View of a run for a server half."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluvial.codecs import CodecSettings
from fluvial.data import Example
from fluvial.federation.line import Line
from fluvial.models.pool import ModelPool
from fluvial.training.config import TrainConfig
from fluvial.wire.tensors import Layout


@dataclass(frozen=True)
class Context:
    """Values of a run that a server half may use; no data of a site is among them."""

    seed: int
    rounds: int
    layout: Layout
    codec: CodecSettings
    downlink: CodecSettings | None
    """Codec of the adapter in the downlink; None sends the adapter exactly."""
    train: TrainConfig
    open_pool: Callable[[], ModelPool]
    """Opener of the base model, for a method that simulates sites on public text."""
    secret: Callable[[], bytes]
    """Reader of the server's 32 secret bytes for this run, the same after it is resumed."""
    public: Callable[[], dict[str, list[Example]]]
    """Reader of the public text; raises `ConfigError` if there is none."""
    ensemble: Path | None = None
    """Folder of TGAP's snapshots; None keeps them in memory."""
    line: Line | None = None
    """Line between a site and the server, where the configuration describes one."""


Metrics = dict[str, Any]
"""Plain values of one round: at least `loss`, the mean training loss of the sites in nats per label
token, and `sites`, how many of them answered."""
