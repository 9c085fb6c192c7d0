"""The methods of Fluvial, and the configuration of each.

A new method is a file in this folder, with its import, its entry in `METHODS` and its config in
`MethodConfig` below.
"""

from typing import Annotated, Literal, get_args

from pydantic import Field

from fluvial.methods import (
    cgfedllm,
    ecolora,
    fedavg,
    fedcybgd,
    fedpipe,
    fedsa,
    fedsb,
    flasc,
    flglm,
    local,
)
from fluvial.methods.cgfedllm.config import CgFedLlmConfig
from fluvial.methods.ecolora.config import EcoLoraConfig
from fluvial.methods.fedavg import CentralConfig, FedAvgConfig
from fluvial.methods.fedcybgd.config import CentralCyclicConfig, FedCyBgdConfig
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedsa import FedSaConfig
from fluvial.methods.fedsb import FedSbConfig
from fluvial.methods.flasc import FlascConfig
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.interface import Context, Method, Metrics, Server
from fluvial.methods.local import LocalConfig

__all__ = [
    "BASELINES",
    "METHODS",
    "Baseline",
    "Context",
    "Method",
    "MethodConfig",
    "Metrics",
    "Server",
]

METHODS: dict[str, Method] = {
    "fedavg": fedavg.METHOD,
    "cgfedllm": cgfedllm.METHOD,
    "fedcybgd": fedcybgd.METHOD,
    "fedsa": fedsa.METHOD,
    "fedsb": fedsb.METHOD,
    "flasc": flasc.METHOD,
    "ecolora": ecolora.METHOD,
    "flglm": flglm.METHOD,
    "fedpipe": fedpipe.METHOD,
    "local": local.METHOD,
    "central": fedavg.CENTRAL,
    "central_cyclic": fedcybgd.CENTRAL_CYCLIC,
}
"""Every method by its name in a configuration."""

Baseline = Literal["local", "central", "fedavg"]
"""Methods whose uncompressed runs others are compared with, in the order of tables."""
BASELINES: tuple[Baseline, ...] = get_args(Baseline)

MethodConfig = Annotated[
    FedAvgConfig
    | CgFedLlmConfig
    | FedCyBgdConfig
    | FedSaConfig
    | FedSbConfig
    | FlascConfig
    | EcoLoraConfig
    | FlGlmConfig
    | FedPipeConfig
    | LocalConfig
    | CentralConfig
    | CentralCyclicConfig,
    Field(discriminator="name"),
]
"""The `[method]` table of a configuration."""
