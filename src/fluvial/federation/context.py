"""What a server half may use of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fluvial.codecs import CodecSettings
from fluvial.data import Example
from fluvial.models.pool import ModelPool
from fluvial.training.train import TrainConfig
from fluvial.wire.tensors import Layout


@dataclass(frozen=True)
class Context:
    """What a server half may use; it sees no site's data."""

    seed: int
    rounds: int
    layout: Layout
    codec: CodecSettings
    downlink: CodecSettings | None
    """How the adapter goes down; None sends it as it is."""
    train: TrainConfig
    open_bench: Callable[[], ModelPool]
    """The base model, for a method that simulates sites on public text."""
    secret: Callable[[], bytes]
    """The server's own 32 secret bytes for this run; the same after it is resumed."""
    public: Callable[[], dict[str, list[Example]]]
    """Public text; raises `ConfigError` if there is none."""


Metrics = dict[str, Any]
"""Plain values of one round: at least `loss`, the mean training loss of the sites in nats per label
token, and `sites`, how many of them answered."""
