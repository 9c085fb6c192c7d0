"""The methods. A file beside, and here its import, its entry and its config, make a new one."""

from typing import Annotated

from pydantic import Field

from fluvial.methods import cgfedllm, fedavg, local
from fluvial.methods.cgfedllm import CgFedLlmConfig
from fluvial.methods.fedavg import CentralConfig, FedAvgConfig
from fluvial.methods.interface import Context, Method, Metrics, Server
from fluvial.methods.local import LocalConfig

__all__ = ["METHODS", "Context", "Method", "MethodConfig", "Metrics", "Server"]

METHODS: dict[str, Method] = {
    "fedavg": fedavg.METHOD,
    "cgfedllm": cgfedllm.METHOD,
    "local": local.METHOD,
    "central": fedavg.CENTRAL,
}
"""Every method by its name in a configuration."""

MethodConfig = Annotated[FedAvgConfig | CgFedLlmConfig | LocalConfig | CentralConfig, Field(discriminator="name")]
"""The `[method]` table of a configuration."""
