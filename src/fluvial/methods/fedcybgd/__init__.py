"""FedCyBGD: full-parameter tuning by cycle block gradient descent.

Wang, Wang, Tang, "Save It All: Enabling Full Parameter Tuning for Federated LLMs via Cycle Block
Gradient Descent", 2024, https://arxiv.org/abs/2406.11187; released code: L3030/FedCyBGD.

The model is cut into blocks. Sites take part one after another; each is sent one block exactly and
the others compressed, trains that block alone, and sends it back. So all weights are trained, while
a site holds gradients and optimizer state of one block and sends only its change.
"""

from torch import nn

from fluvial.codecs import CODECS, CodecSettings
from fluvial.codecs.forecast import frame_size
from fluvial.codecs.quantise import Int8Settings
from fluvial.errors import ConfigError
from fluvial.federation.line import round_s
from fluvial.federation.sites import refuse_learned
from fluvial.methods.fedcybgd.config import CentralCyclicConfig, Config, FedCyBgdConfig, partition
from fluvial.methods.fedcybgd.download import (
    CacheDownload,
    LowBitDownload,
    ProxyDownload,
    StaleDownload,
)
from fluvial.methods.fedcybgd.memory import (
    Cache,
    Form,
    Full,
    LowBit,
    OnDisk,
    Proxy,
    Sizes,
    StaleSubset,
    Width,
    client_memory,
    process_memory,
    visit_bytes,
)
from fluvial.methods.fedcybgd.proxy import Anatomy
from fluvial.methods.fedcybgd.schedule import assignment, groups, wall_clock
from fluvial.methods.fedcybgd.server import FedCyBgdServer
from fluvial.methods.fedcybgd.visit import visit
from fluvial.methods.interface import Forecast, Method
from fluvial.models.frozen import check_streams
from fluvial.models.tuning import tuned_layout
from fluvial.wire.tensors import Layout, factor


def check(config: Config, codec: CodecSettings, layout: Layout) -> None:
    """Refuse a codec that cannot code every block, blocks that are not there, and a proxy of an
    adapter."""
    refuse_learned(codec, config.name)
    parts = partition(config, layout)

    if config.layers_per_block > parts.num_layers:
        raise ConfigError(
            f"method.layers_per_block={config.layers_per_block}: the model has {parts.num_layers} layers; choose at "
            "most as many"
        )

    for block in parts.blocks:
        try:
            CODECS[codec.name].frame_size(codec, block.layout)
        except ConfigError as error:
            raise ConfigError(f"block {block.name!r}: {error}") from error

    proxy = isinstance(config, FedCyBgdConfig) and isinstance(config.download, ProxyDownload)
    if (
        isinstance(config, FedCyBgdConfig)
        and config.hold == "disk"
        and any(factor(name) for name in layout.names)
    ):
        raise ConfigError(
            "method.hold='disk': without effect, because an adapter is tuned; remove it"
        )

    if proxy and any(factor(name) for name in layout.names):
        raise ConfigError(
            "method.download.form='proxy': drops layers of the base, and here an adapter is tuned; set "
            "tune = 'full', or choose form = 'cache'"
        )


def check_model(config: Config, base: nn.Module) -> None:
    """Refuse a proxy that cannot be made of this model, and a model that cannot be read from disk
    as it is used."""
    if isinstance(config, FedCyBgdConfig) and config.hold == "disk":
        check_streams(base)
    if isinstance(config, FedCyBgdConfig) and isinstance(config.download, ProxyDownload):
        anatomy = Anatomy.of(base, config.download.prune)
        for block in partition(config, tuned_layout(base, None)).blocks:
            anatomy.check(block.layers, config.download)


def sent(config: Config, layout: Layout) -> Layout:
    """What a site sends at most in a visit: the largest block."""
    return max(
        (block.layout for block in partition(config, layout).blocks), key=lambda each: each.numel
    )


def forecast(config: FedCyBgdConfig, layout: Layout, known: Forecast) -> list[tuple[str, str]]:
    """Blocks, download and memory of a site by the formulas of `memory`, once all blocks have
    moved."""
    parts = partition(config, layout)
    largest = max(range(len(parts)), key=lambda index: parts.blocks[index].numel)
    sizes = Sizes.of(parts, largest)
    width: Width = 4 if known.width == 4 else 2
    form = _form(config, known, len(parts))
    down = visit_bytes(sizes, form, width=width).down
    used = client_memory(sizes, OnDisk(form) if config.hold == "disk" else form, width=width)
    adapter = any(factor(name) for name in layout.names)
    rows = [
        ("blocks", f"{len(parts)} of up to {sizes.block:,} values"),
        ("in no block, never trained", f"{parts.fixed.numel:,}"),
        ("down to a site in a cycle", f"about {down:,} B as {config.download.form!r}"),
        ("down, whole run", f"about {down * known.sites * known.rounds:,} B to all sites"),
        (
            "memory of a site",
            f"{used.visit():,} B and activations{' and the base' if adapter else ''}",
        ),
    ]

    if not adapter:
        held = OnDisk(form) if config.hold == "disk" else form
        process = process_memory(
            sizes, held, width=width, moved=len(parts), coded=known.frame, workers=1
        )
        rows.append(
            ("memory of one process with all sites", f"up to {process.peak:,} B and activations")
        )

    if known.line is not None:
        assigned = assignment(config.order, clients=known.sites, blocks=len(parts), cycle=0, seed=0)
        visits = groups(assigned, parallel=config.parallel, together=config.merging != "sequential")
        widest = max(map(len, visits))
        each = round_s(down, known.frame, sites=widest, line=known.line)
        whole = wall_clock(visits, [each] * known.sites)
        rows.append(
            (
                "a cycle over fleet.line, over Flower",
                f"{whole:.1f} s and the time of training: {len(visits)} in turn, of up to {widest} visits at once",
            )
        )

    return rows


def notes(config: FedCyBgdConfig) -> list[str]:
    """That a download may be refused, where it has a gate."""
    if not config.gated:
        return []
    return [
        f"the gate is measured when the run starts, and may refuse the download: gradients through "
        f"form={config.download.form!r} must keep a cosine of {config.gate.threshold:g} (method.gate.threshold)"
    ]


def _form(config: FedCyBgdConfig, known: Forecast, blocks: int) -> Form:
    match config.download:
        case ProxyDownload(kept=kept):
            return Proxy(kept)
        case StaleDownload(share=share):
            return StaleSubset(share, blocks)
        case LowBitDownload(codec=codec):
            many = Layout((("matrix", (1024, 64)),))
            return LowBit(8 * frame_size(codec, many) / many.numel, blocks - 1)
        case CacheDownload():
            return Cache(known.sites, blocks, known.frame)

    return Full()


def reads_public(config: Config, _codec: CodecSettings) -> bool:
    """Whether scores, gradients or losses on public text are asked for."""
    if isinstance(config, CentralCyclicConfig):
        return False
    return (
        config.gated or isinstance(config.download, ProxyDownload) or config.accept.on != "always"
    )


METHOD = Method(
    FedCyBgdConfig,
    FedCyBgdServer,
    {"visit": visit},
    paper="Wang, Wang, Tang, Save It All: Enabling Full Parameter Tuning for Federated LLMs via Cycle Block Gradient "
    "Descent (FedCyBGD), 2024, https://arxiv.org/abs/2406.11187",
    codec=Int8Settings(),
    tunes=("full", "lora"),
    receives="own code",
    sent=sent,
    forecast=forecast,
    notes=notes,
    check=check,
    check_model=check_model,
    reads_public=reads_public,
)
CENTRAL_CYCLIC = Method(
    CentralCyclicConfig,
    FedCyBgdServer,
    {"visit": visit},
    paper="The centralised cyclic baseline: block after block on the union of the data",
    sends="nothing",
    tunes=("full", "lora"),
    pooled=True,
    sent=sent,
    check=check,
)
