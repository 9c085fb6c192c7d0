"""The training of `resnet`: mean squared error on random squares of the normalised canvases.

The paper states the loss, Adam and a learning rate of 2e-4; schedule, squares and number of steps
are ours. At that rate the networks are still at their initial state after some hundred steps.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fluvial import seeds
from fluvial.codecs.base import CodecSettings
from fluvial.codecs.learned.canvas import Canvas
from fluvial.codecs.learned.resnet_networks import build_decoder, build_encoder

logger = logging.getLogger(__name__)

Beta = Annotated[float, Field(ge=0, lt=1)]
Schedule = Literal["cosine", "constant"]
Crop = Annotated[int, Field(ge=2)] | Literal["whole"]


class TrainingSettings(CodecSettings):
    """Training of the two networks."""

    iterations: int = Field(3000, ge=1, le=10**6)
    """Number of Adam steps of the fit; ours, after the reproduction."""
    batch_size: int = Field(4, ge=1, le=10**6)
    """Number of updates in a step of the fit; ours, after the reproduction."""
    crop: Crop = 64
    """Side of the square that a step sees of each update, cut at a random place of the latent grid;
    it has at least two cells of that grid, 2^(stages + 1). "whole": the whole canvas, whose cost
    grows with the model. Ours."""
    learning_rate: float = Field(3e-3, ge=1e-12, le=1)
    """Adam's learning rate at the start of the fit. Ours; the paper's is 2e-4."""
    schedule: Schedule = "cosine"
    """Course of the learning rate: it falls to 0 along half a cosine (ours), or it stays
    (the paper states none)."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""


@dataclass(frozen=True)
class Trained:
    """Networks after training, on the CPU, and the loss on the way."""

    encoder: nn.Sequential
    decoder: nn.Sequential
    loss_curve: list[tuple[int, float]]
    """(iteration, mean squared error on the normalised squares) of every step."""


def train(
    settings: TrainingSettings, canvas: Canvas, samples: Sequence[list[Tensor]], *, seed: int
) -> Trained:
    """Train one autoencoder for all clients and layers, on the GPU if there is one.

    `samples` are the canvases (rows, cols) of each normalised update.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "resnet", "init"))
        encoder = build_encoder(canvas.stages)
        decoder = build_decoder(canvas.stages)

    network = nn.Sequential(encoder, decoder).to(device).train()
    optimizer = torch.optim.Adam(
        network.parameters(), lr=settings.learning_rate, betas=settings.betas
    )
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: share_of_rate(step, settings.iterations, settings.schedule)
    )
    batches = _batches(
        len(samples), settings.batch_size, seeds.generator(seed, "resnet", "batches")
    )
    places = seeds.generator(seed, "resnet", "places")
    curve = []

    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        for iteration, batch in zip(range(1, settings.iterations + 1), batches, strict=False):
            optimizer.zero_grad()
            total = 0.0
            for group, (rows, cols) in enumerate(canvas.shapes):
                squares = [
                    cut(samples[index][group], settings.crop, canvas.stages, places)
                    for index in batch
                ]
                images = torch.stack(squares)[:, None].to(device)
                loss = nn.functional.mse_loss(network(images), images)
                loss = loss * (rows * cols / canvas.numel)
                torch.autograd.backward(loss)
                total += float(loss.detach())

            optimizer.step()
            rates.step()
            curve.append((iteration, total))
            if iteration % 20 == 0:
                logger.info(
                    "autoencoder: iteration %d of %d, error %.3f",
                    iteration,
                    settings.iterations,
                    total,
                )

    return Trained(encoder.cpu(), decoder.cpu(), curve)


def share_of_rate(step: int, steps: int, schedule: Schedule) -> float:
    """Return the share of the learning rate in step `step`, counted from 0, of `steps`."""
    return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * step / steps)) / 2


def cut(canvas: Tensor, crop: Crop, stages: int, places: torch.Generator) -> Tensor:
    """Return a random square of a canvas (rows, cols), on the grid of its latent.

    A side that is shorter than the square is taken whole. So are both for "whole".
    """
    if crop == "whole":
        return canvas

    grid = 2**stages
    side = max(2, -(-crop // grid))  # cells of the latent
    for dim in (0, 1):
        cells = canvas.shape[dim] // grid
        if cells > side:
            start = int(torch.randint(cells - side + 1, (1,), generator=places))
            canvas = canvas.narrow(dim, start * grid, side * grid)

    return canvas


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield endless batches of at most `size` out of `count`; every update once in an epoch."""
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, max(count - size, 0) + 1, size):
            yield order[start : start + size]
