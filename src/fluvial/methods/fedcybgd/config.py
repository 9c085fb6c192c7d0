"""Settings of FedCyBGD and of its centralised twin; defaults are the paper's where it gives
values, but for the order and the form of download, where others were measured to be better."""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field

from fluvial.federation.config import BOUNDS, Bound
from fluvial.methods.fedcybgd.blocks import Extra, Partition
from fluvial.methods.fedcybgd.blocks import partition as partition_layout
from fluvial.methods.fedcybgd.download import (
    LOSSY,
    CacheDownload,
    DownloadConfig,
    FullDownload,
    ProxyDownload,
)
from fluvial.methods.fedcybgd.guards import AcceptConfig, GateConfig
from fluvial.methods.fedcybgd.schedule import Order
from fluvial.methods.interface import MethodSettings
from fluvial.wire.tensors import Layout

Merge = Literal["sequential", "average", "overwrite"]


class FedCyBgdConfig(MethodSettings):
    """FedCyBGD. A round is a cycle: every site makes one visit, so rounds are passes as in
    FedAvg."""

    moved: ClassVar[Mapping[str, str]] = {
        "decay": "train.round_scheduler_type, which baselines of the run share,"
    }

    name: Literal["fedcybgd"] = "fedcybgd"
    order: Order = "latin"
    """Assignment of blocks to sites in a cycle: by a Latin square, in which every site meets every
    block ("latin", or "latin-random" with sites and blocks shuffled), "ascending" (the paper's
    default) and "descending" by number, "random", "pairs" where the sites of a block start from one
    state (FedBAvg), or "full", one block of all weights that goes from site to site."""
    extra: tuple[Extra, ...] = ()
    """Blocks beside the decoder layers; the paper trains none of them."""
    layers_per_block: int = Field(1, ge=1, le=10**6)
    """Number of decoder layers in a block."""
    num_blocks: int | None = Field(None, ge=1, le=10**6)
    """Number of blocks of about equal size, instead of `layers_per_block`; layers and `extra` are
    cut between matrices too."""
    parallel: int = Field(1, ge=1, le=10**6)
    """Blocks that are trained at the same time from the same model (Jacobi); 1 is strictly one
    after another."""
    merge: Merge | None = None
    """Sites that share a block in a cycle: train it in turn, or together and "average" (the default
    of "pairs") or "overwrite", where the last one wins (the released code)."""
    weighting: Literal["samples", "equal"] = "samples"
    """Weights of the visits in an average; the released code has equal ones."""
    damping: float = Field(1.0, gt=0, le=1)
    """Share of a block's update that the server applies."""
    download: DownloadConfig = CacheDownload()
    """Form in which a site receives the blocks that it does not train."""
    hold: Literal["memory", "disk"] = "memory"
    """Place of the blocks that are not trained during a visit; from disk each weight is read when
    it is used, and costs no memory."""
    gate: GateConfig = GateConfig()
    """Least quality of a compressed download, measured before round 1."""
    accept: AcceptConfig = AcceptConfig()
    """Condition under which the server takes a step."""

    @property
    def merging(self) -> Merge:
        """Treatment of sites that share a block, the order's default filled in."""
        return self.merge or ("average" if self.order == "pairs" else "sequential")

    @property
    def gated(self) -> bool:
        """True where the gradient through the download is measured, and the download may be
        refused."""
        return isinstance(self.download, LOSSY) and self.gate.threshold > 0

    @property
    def bounds(self) -> frozenset[Bound]:
        """Return the bound on lengths, and that on weights where visits are averaged by samples."""
        if self.merging == "average" and self.weighting == "samples":
            return BOUNDS
        return frozenset({"max_update_growth"})

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        default = type(self).model_fields
        given = self.model_fields_set

        if self.order == "full":
            for name in ("extra", "layers_per_block", "num_blocks", "parallel", "merge"):
                if name in given and getattr(self, name) != default[name].default:
                    yield (
                        f"{name}: without effect under order='full', which has one block; remove it"
                    )

            if isinstance(self.download, ProxyDownload):
                yield (
                    "download.form='proxy': nothing is left to compress under order='full'; use "
                    "'cache'"
                )

        yield from _two_counts(self)
        if self.num_blocks is not None and isinstance(self.download, ProxyDownload):
            yield (
                "num_blocks: a proxy drops whole layers, and such a block may end within one; use "
                "layers_per_block"
            )

        if self.hold == "disk" and self.download.form in ("full", "proxy"):
            yield (
                f"hold='disk': form={self.download.form!r} brings the whole model in one message, "
                "and keeps nothing; choose form = 'cache' or 'low-bit'"
            )

        if self.order == "pairs" and self.merging == "sequential":
            yield (
                "merge='sequential': order='pairs' trains a block from one state; use "
                "order='ascending'"
            )
        if self.weighting != "samples" and self.merging != "average":
            yield "weighting: without effect unless merge='average' or order='pairs'; remove it"
        if "gate" in given and not isinstance(self.download, LOSSY):
            yield f"gate: without effect, because form={self.download.form!r} is exact; remove it"


class CentralCyclicConfig(MethodSettings):
    """All data at one place, one block at a time: in every round each block gets its share of the
    steps."""

    name: Literal["central_cyclic"] = "central_cyclic"
    order: Literal["ascending", "descending", "latin-random"] = "ascending"
    """Order of the blocks in a round."""
    extra: tuple[Extra, ...] = ()
    """Blocks beside the decoder layers; the paper trains none of them."""
    layers_per_block: int = Field(1, ge=1, le=10**6)
    """Number of decoder layers in a block."""
    num_blocks: int | None = Field(None, ge=1, le=10**6)
    """Number of blocks of about equal size, instead of `layers_per_block`; layers and `extra` are
    cut between matrices too."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        yield from _two_counts(self)

    @property
    def bounds(self) -> frozenset[Bound]:
        """Return the bound on lengths: visits are compared, and none is averaged."""
        return frozenset({"max_update_growth"})

    @property
    def download(self) -> FullDownload:
        """Return the form of a download at the place of all data: everything, exact."""
        return FullDownload()

    @property
    def hold(self) -> Literal["memory"]:
        """Return the place of the blocks that are not trained."""
        return "memory"


Config = FedCyBgdConfig | CentralCyclicConfig


def _two_counts(config: Config) -> Iterator[str]:
    if config.num_blocks is not None and config.layers_per_block != 1:
        yield "layers_per_block: without effect beside num_blocks; remove one of the two"


def partition(config: Config, layout: Layout) -> Partition:
    """Return the blocks of a run; both ends find the same ones."""
    return partition_layout(
        layout,
        extra=config.extra,
        layers_per_block=config.layers_per_block,
        num_blocks=config.num_blocks,
        whole=config.order == "full",
    )
