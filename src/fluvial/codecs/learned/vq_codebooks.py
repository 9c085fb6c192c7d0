"""The training of codebooks: Lloyd's algorithm with an entropy constraint from a k-means++
start."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluvial.codecs.learned.vq_vectors import Floats, VectorFactor, group_weights, normalised
from fluvial.wire.tensors import Layout, Named

_START = 1 << 13
"""Vectors of each factor among which k-means++ chooses."""
_PRIOR = 30
"""Vectors' worth of the factor's frequencies that a tensor's own are mixed with."""
_TOTAL = 1 << 14
LARGEST_VALUE = 1e4
"""The largest magnitude of a codeword's values; those of `fit` are near 1."""


def codeword_bits(frequencies: Tensor) -> Tensor:
    """Return the bits of every codeword (tensors, codebook) by its frequencies."""
    counts = frequencies.double()
    return (counts.sum(1, keepdim=True) / counts).log2().float()


def nearest(x: Tensor, book: Tensor, lengths: Tensor, prices: Tensor) -> Tensor:
    """Return for vectors x (count, width) the codeword (count,) of least |x - c|^2 + price * bits;
    prices (count,)."""
    left = torch.cat([x, torch.ones(len(x), 1), prices[:, None]], dim=1)
    right = torch.cat([-2 * book, book.square().sum(1, keepdim=True), lengths[:, None]], dim=1)
    return (left @ right.T).argmin(1)


def samples_of(
    factors: Sequence[VectorFactor],
    sizes: Floats,
    layout: Layout,
    updates: Sequence[Named],
    share: float,
    draw: torch.Generator,
) -> list[tuple[Tensor, Tensor]]:
    """Return for every factor vectors (samples, width) of all updates and their weights
    (samples,)."""
    vectors: list[list[Tensor]] = [[] for _ in factors]
    weights: list[list[Tensor]] = [[] for _ in factors]

    for update in updates:
        rows, scales = normalised(layout.flatten(update), layout, factors, sizes)
        weight = group_weights(scales, sizes)
        for index, (x, factor) in enumerate(zip(rows, factors, strict=True)):
            sampled = x if share >= 1 else x[torch.rand(len(x), generator=draw) < share]
            vectors[index].append(sampled)
            weights[index].append(
                torch.full((len(sampled),), weight[factor.group], dtype=torch.float32)
            )

    return [(torch.cat(x), torch.cat(w)) for x, w in zip(vectors, weights, strict=True)]


def first_codewords(x: Tensor, number: int, draw: torch.Generator) -> Tensor:
    """Return `number` codewords: zero, then vectors of x (samples, width) drawn with odds |x -
    nearest one so far|^2."""
    x = x[torch.randperm(len(x), generator=draw)[:_START]]
    book = torch.zeros(number, x.shape[1])
    distance = x.square().sum(1)

    for index in range(1, number):
        if not bool(distance.sum() > 0):
            break
        book[index] = x[int(torch.multinomial(distance, 1, generator=draw))]
        distance = torch.minimum(distance, (x - book[index]).square().sum(1))

    return book


def lloyd_step(
    books: Tensor,
    lengths: Tensor,
    price: float,
    seen: Sequence[tuple[Tensor, Tensor]],
    factors: Sequence[VectorFactor],
) -> tuple[Tensor, Tensor, float]:
    """Return one step at this price of a bit: new codebooks, new frequencies, bits for a vector."""
    sums = torch.zeros_like(books)
    mass = torch.zeros(books.shape[:2])
    counts = torch.zeros(len(factors), books.shape[1])
    bits = total = 0.0

    for index, ((x, weight), factor) in enumerate(zip(seen, factors, strict=True)):
        prices = (price / weight.clamp_min(1e-30)).clamp_max(1e6)
        chosen = nearest(x, books[factor.kind], lengths[index], prices)
        sums[factor.kind].index_add_(0, chosen, weight[:, None] * x)
        mass[factor.kind].index_add_(0, chosen, weight)
        counts[index] = torch.bincount(chosen, minlength=books.shape[1])
        bits += float(lengths[index][chosen].sum())
        total += len(x)

    moved = torch.where(mass[..., None] > 0, sums / mass[..., None].clamp_min(1e-30), books)
    moved[:, 0] = 0  # what is not worth a bit
    return (
        moved.clamp(-LARGEST_VALUE, LARGEST_VALUE),
        smoothed_frequencies(counts, factors),
        bits / max(total, 1),
    )


def smoothed_frequencies(counts: Tensor, factors: Sequence[VectorFactor]) -> Tensor:
    """Return int16 (tensors, codebook) of sum near 2^14, from counts of each tensor and of all
    tensors of its factor."""
    kinds = torch.tensor([factor.kind for factor in factors])
    pooled = torch.full((2, counts.shape[1]), 0.5).index_add_(0, kinds, counts)
    mixed = counts + _PRIOR * (pooled / pooled.sum(1, keepdim=True))[kinds]

    return (mixed / mixed.sum(1, keepdim=True) * _TOTAL).round().clamp_min(1).to(torch.int16)
