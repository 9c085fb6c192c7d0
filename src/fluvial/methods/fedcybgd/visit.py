"""The site's half of FedCyBGD: receive a model, train one block of it, send what changed."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import nn

from fluvial.codecs import build
from fluvial.exchange import STALE, coder_of, encode
from fluvial.federation.sites import Site, round_of
from fluvial.methods.fedcybgd.config import Config, partition
from fluvial.methods.fedcybgd.download.holder import Received
from fluvial.methods.fedcybgd.download.receive import receive
from fluvial.methods.fedcybgd.proxy import slim
from fluvial.models.frozen import stream
from fluvial.models.loading import fill
from fluvial.models.pool import ModelPool
from fluvial.models.tuning import checkpoint_layers, tuned_parameters
from fluvial.seeds import generator
from fluvial.training.config import TrainConfig
from fluvial.training.train import TrainReport, train
from fluvial.wire.payload import Payload, frame_payload


@contextmanager
def borrow(
    pool: ModelPool,
    received: Received,
    *,
    trainable: Collection[str] = (),
    hold: Literal["memory", "disk"] = "memory",
    checkpointing: bool = False,
) -> Iterator[nn.Module]:
    """Yield the model that a site was sent; parameters named in `trainable` require gradients, and
    nothing else does."""
    # Copied, because it is trained in place.
    start = {
        name: tensor.to(pool.outline.dtypes[name], copy=True)
        for name, tensor in received.start.items()
    }
    frozen = received.rest.names - start.keys()

    if not pool.full:
        rest = {name: received.rest.get(name) for name in frozen}
        with pool.model(start | rest, trainable=trainable, checkpointing=checkpointing) as model:
            yield model
        return

    model = pool.blank()
    if received.manifest is not None:
        model = slim(model, received.manifest)
    if hold == "disk":
        model = stream(model, received.rest, start, pool.device)
    else:
        fill(model, lambda name, _: start[name] if name in start else received.rest.get(name))
        model.to(pool.device)

    for name, parameter in tuned_parameters(model).items():
        parameter.requires_grad_(name in trainable)
    if checkpointing:
        checkpoint_layers(model)

    yield model


def _orders(site: Site, message: Payload) -> tuple[int, int, int]:
    """Return the block, round, and visits that share the steps; raises `WireError`."""
    index = message.whole("block", 0, 2**31)
    visits = message.whole("visits", 1, 2**20)
    return index, round_of(site, message), visits


def visit(site: Site, message: Payload) -> Payload:
    """Train one block with the others frozen, and return its coded change."""
    config: Config = site.method
    parts = partition(config, site.layout)
    index, round, visits = _orders(site, message)
    received = receive(config.download, site, message, parts, codec=site.codec)

    if received is None:
        return STALE

    block = parts.blocks[index]
    examples = site.load().train
    settings = site.train.in_round(round, site.rounds)
    with site.stopwatch.time("training"):
        report = _tuned(
            site, received, settings, index, round, visits, block.layout.names, hold=config.hold
        )
    update = report.weights

    for name, tensor in update.items():
        tensor -= received.start[name]
    del received  # a block is large, and coding it takes memory too
    coder = coder_of(build(site.codec, block.layout), {})
    frame, _ = encode(site, coder, update, round, suffix=f"-{index}")

    return frame_payload(
        frame, n=len(examples), loss=report.loss, visit=message.value("visit", str)
    )


def _tuned(
    site: Site,
    received: Received,
    settings: TrainConfig,
    index: int,
    round: int,
    visits: int,
    names: Sequence[str],
    *,
    hold: Literal["memory", "disk"],
) -> TrainReport:
    """Train the parameters `names` of the received model, which is gone when this returns."""
    pool = site.pool
    examples = site.load().train
    checkpointing = settings.gradient_checkpointing

    with borrow(pool, received, trainable=names, hold=hold, checkpointing=checkpointing) as model:
        return train(
            model,
            examples,
            settings,
            pad_token_id=pool.tokenizer.pad_token_id,
            generator=generator(
                site.seed, *(("train", index) if visits > 1 else ("train",)), round, site.name
            ),
            steps=max(1, settings.steps(len(examples)) // visits),
            start=received.start,
        )
