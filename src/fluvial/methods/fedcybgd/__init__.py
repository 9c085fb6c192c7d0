"""FedCyBGD: full-parameter tuning by cycle block gradient descent.

Wang, Wang, Tang, "Save It All: Enabling Full Parameter Tuning for Federated LLMs via Cycle Block
Gradient Descent", 2024, https://arxiv.org/abs/2406.11187; released code: L3030/FedCyBGD.

The model is cut into blocks. Sites take part one after another; each is sent one block exactly and
the others compressed, trains that block alone, and sends it back. So all weights are trained, while
a site holds gradients and optimizer state of one block and sends only its change.
"""

from functools import partial

from torch import nn

from fluvial.codecs import CODECS, CodecSettings
from fluvial.codecs.forecast import frame_size
from fluvial.codecs.quantise import IdentitySettings, Int8Settings
from fluvial.errors import ConfigError
from fluvial.exchange import check_fixed_rate
from fluvial.federation.bounds import FEWEST_COMPARED
from fluvial.federation.line import round_s
from fluvial.federation.sites import refuse_learned
from fluvial.formatting import human_seconds
from fluvial.methods.fedcybgd.blocks import is_sparse
from fluvial.methods.fedcybgd.config import CentralCyclicConfig, Config, FedCyBgdConfig, partition
from fluvial.methods.fedcybgd.download import (
    CacheDownload,
    LowBitDownload,
    ProxyDownload,
    StaleDownload,
)
from fluvial.methods.fedcybgd.memory import client_memory, process_memory
from fluvial.methods.fedcybgd.proxy import Anatomy
from fluvial.methods.fedcybgd.schedule import assignment, groups, wall_clock
from fluvial.methods.fedcybgd.server import FedCyBgdServer
from fluvial.methods.fedcybgd.visit import visit
from fluvial.methods.fedcybgd.visit_sizes import (
    Cache,
    Form,
    Full,
    LowBit,
    OnDisk,
    Proxy,
    Sizes,
    StaleSubset,
    Width,
    visit_bytes,
)
from fluvial.methods.idle import idle_feedback
from fluvial.methods.interface import CheckRow, Forecast, Given, Method, Plan, Traits
from fluvial.methods.planning import UNCOUNTED, frame_rows, uncoded
from fluvial.methods.traffic import FULL_LOSS, Bytes, Traffic, answer, coded_frame, unknown
from fluvial.models.frozen import check_streams
from fluvial.models.tuning import tuned_layout
from fluvial.wire.tensors import Layout, factor

_LONG_VISIT = 20
"""Characters that the name of a visit may have beyond the shortest one's."""


def plan(config: FedCyBgdConfig, given: Given) -> Plan:
    """Refuse a codec that cannot code every block, and a download that does not fit the model."""
    check_blocks(config, given.codec, given.layout)
    _check_adapter(config, given.layout)
    _check_model(config, given.base)

    sent = largest_block(config, given.layout)
    public = isinstance(config.download, ProxyDownload) or config.accept.on != "always"
    return Plan(
        sent,
        partial(forecast, config, given, sent),
        notes=notes(config),
        reads_public=config.gated or public,
        idle=_idle(config, given),
    )


def _idle(config: FedCyBgdConfig, given: Given) -> dict[str, str]:
    """Return the settings that cannot change this run, and why."""
    blocks = len(partition(config, given.layout))
    fixed = config.order in ("ascending", "descending", "pairs", "full")
    idle = {
        **idle_feedback(given, steady=given.on_failure == "stop", period=1 if fixed else blocks),
        **_uncompared(given.sites * given.rounds),
    }
    if config.order != "random" and given.sites <= blocks:
        apart = f"no two of {given.sites} sites share one of {blocks} blocks"
        places = ("fleet.max_weight_share", "method.merge", "method.weighting")
        idle |= dict.fromkeys(places, apart)

    return idle


def _uncompared(visits: int) -> dict[str, str]:
    """Return the bound on lengths, where no update has enough before it to be compared with."""
    if visits > FEWEST_COMPARED:
        return {}
    return {
        "fleet.max_update_growth": (
            f"the run has {visits} visits, and an update is compared with {FEWEST_COMPARED} or "
            "more before it"
        )
    }


def plan_central(config: CentralCyclicConfig, given: Given) -> Plan:
    """Return the plan of a run whose pooled data trains block by block; raises `ConfigError` for
    blocks larger than the model."""
    check_blocks(config, given.codec, given.layout)
    sent = largest_block(config, given.layout)
    traffic = partial(predict, config, given)
    blocks = len(partition(config, given.layout))
    return Plan(
        sent,
        partial(uncoded, config, given, traffic, sent, "none"),
        idle=_uncompared(blocks * given.rounds),
        visits=blocks,
    )


def predict(config: Config, given: Given, round: int) -> Traffic:  # noqa: ARG001 - as in all rounds
    """Predict the bytes up of one visit to any block; with pooled data, of visits to all."""
    blocks = partition(config, given.layout).blocks
    around = answer(loss=FULL_LOSS, visit="1.0") + Bytes(0, _LONG_VISIT)
    frames = [
        coded_frame(given.codec, block.layout, sparse=is_sparse(block, given.layout))
        for block in blocks
    ]
    updates = [frame + around for frame in frames]
    down = unknown("a visit brings what changed since the site's last one, see the rows above")

    if isinstance(config, CentralCyclicConfig):
        return Traffic(down, sum(updates, start=Bytes()))

    least = min(update.least for update in updates)
    return Traffic(down, Bytes(least, max(update.most for update in updates)))


def notes(config: FedCyBgdConfig) -> list[str]:
    """Return a line about the gate, where the download has one."""
    if not config.gated:
        return []

    return [
        "the gate is measured when the run starts, and may refuse the download: gradients "
        f"through form={config.download.form!r} must keep a cosine of "
        f"{config.gate.threshold:g} (method.gate.threshold)"
    ]


def largest_block(config: Config, layout: Layout) -> Layout:
    """Return the layout of the largest block, the most that a site sends in a visit."""
    blocks = partition(config, layout).blocks
    return max((block.layout for block in blocks), key=lambda layout: layout.numel)


def check_blocks(config: Config, codec: CodecSettings, layout: Layout) -> None:
    """Raise `ConfigError` for blocks that are not there, or that the codec cannot code."""
    refuse_learned(codec, config.name)
    check_fixed_rate(codec, "each visit changes another block")
    parts = partition(config, layout)

    if config.layers_per_block > parts.num_layers:
        raise ConfigError(
            f"method.layers_per_block={config.layers_per_block}: the model has {parts.num_layers} "
            "layers; choose at most as many"
        )

    for block in parts.blocks:
        try:
            CODECS[codec.name].frame_size(codec, block.layout)
        except ConfigError as error:
            raise ConfigError(f"block {block.name!r}: {error}") from error


def _check_adapter(config: FedCyBgdConfig, layout: Layout) -> None:
    """Refuse what is about the weights of the base where an adapter is tuned."""
    if not any(factor(name) for name in layout.names):
        return

    if config.hold == "disk":
        raise ConfigError(
            "method.hold='disk': without effect, because an adapter is tuned; remove it"
        )

    if isinstance(config.download, ProxyDownload):
        raise ConfigError(
            "method.download.form='proxy': drops layers of the base, and here an adapter is tuned; "
            "set tune = 'full', or choose form = 'cache'"
        )


def _check_model(config: FedCyBgdConfig, base: nn.Module) -> None:
    """Refuse a proxy that cannot be made of this model, and one that cannot be read from disk."""
    if config.hold == "disk":
        check_streams(base)
    if isinstance(config.download, ProxyDownload):
        anatomy = Anatomy.of(base, config.download.prune)
        for block in partition(config, tuned_layout(base, None)).blocks:
            anatomy.check(block.layers, config.download)


def forecast(config: FedCyBgdConfig, given: Given, sent: Layout) -> Forecast:
    """Predict blocks, download and memory of a site by `memory`, once all blocks have moved."""
    frame = frame_size(given.codec, sent)
    parts = partition(config, given.layout)
    largest = max(range(len(parts)), key=lambda index: parts.blocks[index].numel)
    sizes = Sizes.of(parts, largest)
    width: Width = 4 if given.width_bytes == 4 else 2
    form = _form(config, given, frame, len(parts))
    held = OnDisk(form) if config.hold == "disk" else form
    down = visit_bytes(sizes, form, width=width).down
    used = client_memory(sizes, held, width=width)
    adapter = any(factor(name) for name in given.layout.names)
    rows = [
        *frame_rows(config, given, frame),
        ("blocks", f"{len(parts)} of up to {sizes.block:,} values"),
        ("in no block, never trained", f"{parts.fixed.numel:,}"),
        ("down to a site in a cycle", f"about {down:,} B as {config.download.form!r}"),
        (
            "down, whole run",
            f"about {down * given.sites * given.rounds:,} B to all sites, {UNCOUNTED}",
        ),
        (
            "memory of a site",
            f"{used.visit():,} B and activations{' and the base' if adapter else ''}",
        ),
    ]

    if not adapter:
        process = process_memory(sizes, held, width=width, moved=len(parts), coded=frame, workers=1)
        rows.append(
            ("memory of one process with all sites", f"up to {process.peak:,} B and activations")
        )

    if given.line is not None:
        rows.append(_over_line(config, given, frame, down, len(parts)))

    down_size = frame_size(IdentitySettings(), given.layout)
    return Forecast(frame, down_size, partial(predict, config, given), rows)


def _over_line(
    config: FedCyBgdConfig, given: Given, frame: int, down: int, blocks: int
) -> CheckRow:
    assert given.line is not None
    assigned = assignment(config.order, clients=given.sites, blocks=blocks, cycle=0, seed=0)
    visits = groups(assigned, parallel=config.parallel, together=config.merging != "sequential")
    widest = max(map(len, visits))
    visit_s = round_s(down, frame, sites=widest, line=given.line)
    cycle_s = wall_clock(visits, [visit_s] * given.sites)
    return (
        "a cycle over fleet.line, over Flower",
        f"{human_seconds(cycle_s)} and the time of training: {len(visits)} in turn, of up to "
        f"{widest} visits at once",
    )


def _form(config: FedCyBgdConfig, given: Given, frame: int, blocks: int) -> Form:
    match config.download:
        case ProxyDownload(kept=kept):
            return Proxy(kept)
        case StaleDownload(share=share):
            return StaleSubset(share, blocks)
        case LowBitDownload(codec=codec):
            many = Layout((("matrix", (1024, 64)),))
            return LowBit(8 * frame_size(codec, many) / many.numel, blocks - 1)
        case CacheDownload():
            return Cache(given.sites, blocks, frame)

    return Full()


METHOD = Method(
    FedCyBgdConfig,
    FedCyBgdServer,
    {"visit": visit},
    paper="Wang, Wang, Tang, Save It All: Enabling Full Parameter Tuning for Federated LLMs via "
    "Cycle Block Gradient Descent (FedCyBGD), 2024, https://arxiv.org/abs/2406.11187",
    plan=plan,
    traits=Traits(
        "FedCyBGD",
        tunes=("full", "lora"),
        codec=Int8Settings(),
        receives="own code",
        quantised=False,
        shares_steps=False,
    ),
)
CENTRAL_CYCLIC = Method(
    CentralCyclicConfig,
    FedCyBgdServer,
    {"visit": visit},
    paper="The centralised cyclic baseline: block after block on the union of the data",
    plan=plan_central,
    traits=Traits(
        "central, block after block",
        tunes=("full", "lora"),
        sends="nothing",
        quantised=False,
        shares_steps=False,
        pooled=True,
        baseline=True,
    ),
)
