"""Fine-tune one language model over many sites whose data must stay where it is.

The names of `__all__` are the public interface; docs/python.md explains them. Each is imported when
it is first used, so that `import fluvial` loads no torch.
"""

from typing import TYPE_CHECKING

from fluvial.lazy import imported_when_used

if TYPE_CHECKING:
    from fluvial.api import Result, check, load_config, load_result, plan, run
    from fluvial.codecs.base import Codec, CodecSettings
    from fluvial.errors import ConfigError, FluvialError, WireError
    from fluvial.exchange import Exchange
    from fluvial.federation.fleet import Fleet
    from fluvial.federation.sites import Site
    from fluvial.methods.interface import Context, Method, MethodSettings, Plan, Server, Traits
    from fluvial.runs.config import RunConfig
    from fluvial.wire.frame import Reader
    from fluvial.wire.payload import Payload
    from fluvial.wire.tensors import Layout, WeightedMean

__version__ = "0.1.0"
__all__ = [
    "Codec",
    "CodecSettings",
    "ConfigError",
    "Context",
    "Exchange",
    "Fleet",
    "FluvialError",
    "Layout",
    "Method",
    "MethodSettings",
    "Payload",
    "Plan",
    "Reader",
    "Result",
    "RunConfig",
    "Server",
    "Site",
    "Traits",
    "WeightedMean",
    "WireError",
    "check",
    "load_config",
    "load_result",
    "plan",
    "run",
]
__getattr__ = imported_when_used(
    __name__,
    {
        "fluvial.api": ("Result", "check", "load_config", "load_result", "plan", "run"),
        "fluvial.codecs.base": ("Codec", "CodecSettings"),
        "fluvial.errors": ("ConfigError", "FluvialError", "WireError"),
        "fluvial.exchange": ("Exchange",),
        "fluvial.federation.fleet": ("Fleet",),
        "fluvial.federation.sites": ("Site",),
        "fluvial.methods.interface": (
            "Context",
            "Method",
            "MethodSettings",
            "Plan",
            "Server",
            "Traits",
        ),
        "fluvial.runs.config": ("RunConfig",),
        "fluvial.wire.frame": ("Reader",),
        "fluvial.wire.payload": ("Payload",),
        "fluvial.wire.tensors": ("Layout", "WeightedMean"),
    },
)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted([*__all__, "__version__"])
