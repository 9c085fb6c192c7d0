"""The site's half of a download: reads a message into the model that the site trains."""

from fluvial.codecs import CodecSettings
from fluvial.errors import WireError
from fluvial.methods.fedcybgd.blocks import Partition
from fluvial.methods.fedcybgd.download import (
    CacheDownload,
    DownloadConfig,
    LowBitDownload,
    ProxyDownload,
    StaleDownload,
)
from fluvial.methods.fedcybgd.download.holder import (
    Holder,
    Overlay,
    Received,
    base_source,
    check_tensors,
)
from fluvial.methods.fedcybgd.download.low_bit import decode_others
from fluvial.methods.fedcybgd.download.replay import replay
from fluvial.methods.fedcybgd.proxy import Anatomy, Manifest, slim
from fluvial.models.weight_sources import MemorySource
from fluvial.wire.payload import Payload


def receive(
    config: DownloadConfig,
    holder: Holder,
    message: Payload,
    parts: Partition,
    *,
    codec: CodecSettings,
) -> Received | None:
    """Return the model that `message` brings; None if it builds on something that the site does not
    hold.

    `codec` is of what sites send up, which a cache replays.
    """
    index = message.value("block", int)
    if not 0 <= index < len(parts):
        raise WireError(f"visit: block {index}, and there are {len(parts)}")

    layout = holder.pool.layout
    block = parts.blocks[index].layout
    if isinstance(config, CacheDownload):
        return replay(holder, message, parts, index, codec)

    start = {name: message.tensors[name] for name in block.names if name in message.tensors}
    block.check(start, f"block {index}")
    others = {name: tensor for name, tensor in message.tensors.items() if name not in start}

    if isinstance(config, LowBitDownload):
        rest = decode_others(config, holder, others, message.value("versions", list), parts, index)
        return None if rest is None else Received(start, rest)

    kinds = holder.pool.outline.dtypes
    manifest = None
    expected = {name: shape for name, shape in layout.shapes if name not in start}
    rest = MemorySource(others)

    if isinstance(config, ProxyDownload):
        blank = holder.pool.blank()
        anatomy = Anatomy.of(blank, config.prune)
        manifest = Manifest.from_values(
            message.value("manifest", dict), anatomy, parts.blocks[index].layers
        )
        slimmed = slim(blank, manifest).named_parameters()
        expected = {
            name: tuple(parameter.shape) for name, parameter in slimmed if name not in start
        }

    if isinstance(config, StaleDownload):
        rest = Overlay(base_source(holder), [MemorySource(others)])
        expected = {name: shape for name, shape in expected.items() if name in others}

    check_tensors(others, expected, kinds)
    return Received(start, rest, manifest)
