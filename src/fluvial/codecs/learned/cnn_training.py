"""The training of `cnn`: squared error plus a price on the bits of the rounded latent."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fluvial import seeds
from fluvial.codecs.learned.cnn_networks import STRIDE, build_decoder, build_encoder
from fluvial.codecs.learned.cnn_signals import (
    CNNSettings,
    normalised,
    num_channels,
    padded,
    rank_of,
    to_signals,
)
from fluvial.codecs.learned.cnn_tables import THRESHOLD
from fluvial.wire.tensors import Layout, Named

logger = logging.getLogger(__name__)

_WINDOW = 256
"""Features that a training signal has at most."""
_BATCH = 64
"""Signals of each length in a step of `train`."""


@dataclass(frozen=True)
class Trained:
    """Networks after training, and the loss on the way."""

    encoder: nn.Module
    decoder: nn.Module
    loss_curve: list[tuple[int, float]]
    """(iteration, mean squared error on normalised updates) of every step."""


def train(settings: CNNSettings, layout: Layout, updates: Sequence[Named], *, seed: int) -> Trained:
    """Train one autoencoder for all factors, on the CPU; every update counts the same.

    Minimises squared error plus price times bits of the rounded latent. The price is -dD/dR of a
    white source at the rate, with D = 2^(-2R).
    """
    shape = rank_of(layout), num_channels(layout, settings), settings.hidden
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "cnn", "init"))
        encoder = build_encoder(*shape)
        decoder = build_decoder(*shape)

    spread = nn.Parameter(torch.zeros(shape[1], 1))
    weights = [*encoder.parameters(), *decoder.parameters(), spread]
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
    seen = _by_length(layout, settings, updates)
    draw = seeds.generator(seed, "cnn", "batches")
    price = 2 * math.log(2) * 2.0 ** (-64 / settings.rate)
    curve = []

    for iteration in range(1, settings.iterations + 1):
        error = torch.zeros(())
        bits = torch.zeros(())
        number = 0

        for signals in seen:
            x = _draw(signals, draw)
            latent = encoder(x)
            rounded = latent + (_round(latent) - latent).detach()
            error = error + (decoder(rounded) - x).square().sum()
            bits = bits + _laplace_bits(rounded, spread).sum()
            number += x.numel()

        optimizer.zero_grad()
        torch.autograd.backward((error + price * bits) / number)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        curve.append((iteration, float(error.detach()) / number))

        if iteration % 100 == 0:
            logger.info(
                "cnn: iteration %d of %d, error %.3f",
                iteration,
                settings.iterations,
                curve[-1][1],
            )

    return Trained(encoder, decoder, curve)


def _by_length(layout: Layout, settings: CNNSettings, updates: Sequence[Named]) -> list[Tensor]:
    """Return all signals (number, rank, features), those of one length together."""
    by_length: dict[int, list[Tensor]] = {}
    for update in updates:
        for x in to_signals(normalised(layout.flatten(update), layout, settings), layout):
            by_length.setdefault(x.shape[1], []).append(padded(x))

    return [torch.stack(signals) for _, signals in sorted(by_length.items())]


def _draw(signals: Tensor, draw: torch.Generator) -> Tensor:
    """Return a batch of random signals, cut to one random window if they are long."""
    chosen = signals[torch.randint(len(signals), (_BATCH,), generator=draw)]
    spare = max(signals.shape[2] - _WINDOW, 0) // STRIDE
    start = STRIDE * int(torch.randint(spare + 1, (1,), generator=draw))
    return chosen[:, :, start : start + _WINDOW]


def _round(latent: Tensor) -> Tensor:
    return torch.copysign(torch.floor(latent.abs() + (1 - THRESHOLD)), latent)


def _laplace_bits(latent: Tensor, spread: Tensor) -> Tensor:
    """Return the bits of whole numbers under a Laplace law of scale e^spread (channels, 1)."""
    scale = spread.clamp(-5, 10).exp()

    def below(x: Tensor) -> Tensor:
        return 0.5 + 0.5 * torch.sign(x) * -torch.expm1(-x.abs() / scale)

    return -(below(latent + 0.5) - below(latent - 0.5)).clamp_min(1e-9).log2()
