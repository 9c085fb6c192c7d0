"""Checks of a codec against the layout and the pre-training, before anything is trained."""

import torch

from fluvial.codecs import CODECS, CodecSettings, must_learn
from fluvial.codecs.auto import AutoSettings
from fluvial.codecs.base import OWN_CODES, AdaptiveCodec, SnrDrivenSettings
from fluvial.codecs.klt.moments import MomentCodec, num_bytes
from fluvial.errors import ConfigError
from fluvial.exchange.own_codec import check_own
from fluvial.exchange.tgap import TgapConfig
from fluvial.exchange.weighting import scales
from fluvial.models.states import no_change
from fluvial.wire.payload import Limits
from fluvial.wire.tensors import Layout, Named


def check_codec(codec: CodecSettings, config: TgapConfig, layout: Layout) -> None:
    """Raise `ConfigError` if the codec cannot code `layout`, or has nothing to learn from."""
    name: str = codec.name
    if codec.weighted:
        if (
            isinstance(codec, AutoSettings)
            or config.refit != "no"
            or config.source == "sites-covariance"
        ):
            raise ConfigError(
                "codec.weighted: not with codec 'auto', a refit, or tgap.source='sites-covariance'"
            )

        scales(
            {factor: no_change(shape) for factor, shape in layout.shapes} | _partners(layout),
            layout,
        )

    if must_learn(codec) and config.source == "none":
        raise ConfigError(
            f"method.tgap.source='none': codec {name!r} must be trained; choose 'public' or 'sites'"
        )

    if config.source == "sites-covariance":
        _check_moments(codec, layout)
    if not isinstance(codec, AutoSettings):
        _check_layout(codec, layout)


def _check_layout(codec: CodecSettings, layout: Layout) -> None:
    """Raise `ConfigError` if a codec cannot code `layout` at its rate."""
    kind = CODECS[codec.name]
    kind.frame_size(codec, layout)
    if kind.code in OWN_CODES:
        check_own(codec, layout)


def can_code(codec: CodecSettings, layout: Layout) -> bool:
    """Return whether a codec can code `layout` at its rate."""
    try:
        _check_layout(codec, layout)
    except ConfigError:
        return False
    return True


def check_unequal(codec: CodecSettings) -> None:
    """Raise `ConfigError` for a codec that learns from updates of one layout, or whose rate
    follows their mean.

    Each other layout would need a fit of its own, from the updates of the few sites that have it,
    and another one after each new plan.
    """
    name: str = codec.name
    if must_learn(codec):
        raise ConfigError(
            f"codec.name={name!r} learns from updates of one layout, and the sites' adapters have "
            "unequal ranks or a side path: each layout would need a fit from the updates of the "
            "few sites that have it; choose a codec that needs no fit, such as 'trellis' or "
            "'int8', or equal ranks under method 'cgfedllm'"
        )
    check_fixed_rate(codec, "sites of unequal ranks, or with a side path, have no common mean")


def check_fixed_rate(codec: CodecSettings, why: str) -> None:
    """Raise `ConfigError` for a codec whose rate follows its noise, where `why` forbids it."""
    if isinstance(codec, SnrDrivenSettings) and codec.snr_driven:
        setting = "noise_ratio" if codec.snr_db is None else "snr_db"
        raise ConfigError(f"codec.{setting}: {why}; set codec.rate instead")


def check_refit(codec: CodecSettings, config: TgapConfig, rounds: int) -> None:
    """Raise `ConfigError` for a refit that never happens in a run of `rounds`."""
    if config.refit == "no":
        return

    name: str = codec.name
    if not isinstance(codec, AutoSettings) and not issubclass(CODECS[name], AdaptiveCodec):
        raise ConfigError(
            f"method.tgap.refit: without effect, because codec {name!r} cannot be refitted; remove "
            "it, or choose codec.name='klt'"
        )

    if config.refit_every >= rounds:
        raise ConfigError(
            f"method.tgap.refit_every={config.refit_every}: refits the codec in no round, because "
            f"the run has {rounds} rounds; set a smaller number, or remove method.tgap.refit"
        )


def _check_moments(codec: CodecSettings, layout: Layout) -> None:
    """Raise `ConfigError` if second moments cannot fit the codec, or are too many for a message."""
    name: str = codec.name
    if not must_learn(codec):
        raise ConfigError(
            f"method.tgap.source='sites-covariance': codec {name!r} learns nothing, so no moments "
            "are needed; choose 'none', or 'sites' to have it measured"
        )

    if not isinstance(codec, AutoSettings) and not issubclass(CODECS[name], MomentCodec):
        raise ConfigError(needs_updates(codec))

    need = num_bytes(layout)
    most = Limits().max_bytes
    if need > most:
        raise ConfigError(
            f"method.tgap.source='sites-covariance': the moments of one site take {need:,} bytes, "
            f"over the {most:,} of a message, because they grow with the square of the layers' "
            "width; choose fewer lora.target_modules, or source 'public' or 'sites'"
        )


def needs_updates(codec: CodecSettings) -> str:
    """Return why moments cannot fit a codec that learns from updates themselves."""
    able = ", ".join(repr(name) for name, kind in CODECS.items() if issubclass(kind, MomentCodec))
    return (
        f"method.tgap.source='sites-covariance': codec {codec.name!r} learns from updates "
        f"themselves, which no site sends; choose codec.name={able} or 'auto', or source 'public' "
        "or 'sites'"
    )


def _partners(layout: Layout) -> Named:
    """Return zeros for the factors that sites receive and do not send."""
    swap = {".lora_A.": ".lora_B.", ".lora_B.": ".lora_A."}
    names = [
        name.replace(mark, swap[mark]) for name in layout.names for mark in swap if mark in name
    ]

    return {name: torch.zeros(1) for name in names if name not in layout.names}
