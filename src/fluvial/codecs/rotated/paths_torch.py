"""Search of trellis paths in torch, for updates that lie on another device than the CPU; `paths`
says what it computes.

Operations are elementwise, and fused multiply-adds are made of exact fp64 arithmetic, so that every
device finds the path that the CPU finds, bit for bit.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluvial.codecs.rotated.paths_numpy import Plan

Floats = NDArray[np.float32]
Bits = NDArray[np.uint8]
Ints = NDArray[np.int64]

_LANES = 1024
"""Blocks that are searched side by side; at memory 10 their choices take half a megabyte each."""
_MIDDLE = 1 << 28
"""The last 29 bits of an fp64 number that lies in the middle of two fp32 numbers."""


def search(
    rows: Floats,
    plan: Plan,
    book: Floats,
    energies: Floats,
    kinds: Ints,
    scales: Floats,
    device: torch.device,
) -> Bits:
    """Return the bits (blocks * bits,) of the best path for every row (blocks, length), found on
    `device`."""
    columns = torch.from_numpy(np.ascontiguousarray(rows.T)).to(device)
    codes = torch.from_numpy(book).to(device)
    sums = torch.from_numpy(energies).to(device)
    paths = [
        _viterbi(group, plan, codes, sums, kinds, scales)
        for group in torch.split(columns, _LANES, dim=1)
    ]
    path: Bits = torch.cat(paths).reshape(-1).cpu().numpy()
    return path


def _viterbi(
    columns: Tensor, plan: Plan, codes: Tensor, sums: Tensor, kinds: Ints, scales: Floats
) -> Tensor:
    """Return the bits (lanes, bits) of the best path for each column (length, lanes)."""
    states = codes.shape[1]
    lanes = columns.shape[1]
    cost = torch.full((states, lanes), 1e30, device=columns.device)
    cost[0] = 0
    chosen = []
    position = 0
    steps = zip(plan.shifts.tolist(), plan.spans.tolist(), kinds.tolist(), scales, strict=True)

    for shift, span, kind, scale in steps:
        values = columns[position : position + span] * float(scale)
        metric = _products(codes[:span], values) + sums[kind][:, None]
        position += span

        left = states >> shift
        least, choice = _first_least(cost.view(1 << shift, left, lanes))
        chosen.append(choice)
        cost = (metric.view(left, 1 << shift, lanes) + least[:, None]).view(states, lanes)

    return _traced(cost, chosen, plan)


def _first_least(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least of costs (predecessors, left, lanes), and the first predecessor that has it,
    which `argmin` does not promise."""
    least = costs[0].clone()
    choice = torch.zeros(least.shape, dtype=torch.uint8, device=costs.device)

    for number in range(1, len(costs)):
        nearer = costs[number] < least
        choice.masked_fill_(nearer, number)
        least = torch.where(nearer, costs[number], least)

    return least, choice


def _traced(cost: Tensor, chosen: list[Tensor], plan: Plan) -> Tensor:
    """Return the bits (lanes, bits) that lead to the first state of least cost (states, lanes)."""
    states, lanes = cost.shape
    numbers = torch.arange(states, device=cost.device)[:, None]
    state = torch.where(cost == cost.amin(0), numbers, states).amin(0)
    path = torch.zeros((lanes, plan.bits), dtype=torch.uint8, device=cost.device)
    end = plan.bits

    for shift, choice in zip(plan.shifts.tolist()[::-1], chosen[::-1], strict=True):
        for bit in range(shift):
            path[:, end - 1 - bit] = state >> bit & 1
        end -= shift
        before = state >> shift
        state = before + choice.gather(0, before[None])[0].long() * (states >> shift)

    return path


def _products(codes: Tensor, values: Tensor) -> Tensor:
    """Return `codes` (span, states) times `values` (span, lanes) as (states, lanes), by fused
    multiply-adds in rising order."""
    result = codes[0][:, None] * values[0]
    for code, value in zip(codes[1:], values[1:], strict=True):
        result = _fused(code[:, None], value, result)
    return result


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a * b + c of fp32 numbers, rounded once."""
    product = a.double() * b.double()  # exact
    before = c.double()
    total = product + before
    middle = (total.view(torch.int64) & (2 * _MIDDLE - 1)) == _MIDDLE

    # Where fp64 lies in the middle of two fp32 numbers, what fp64 lost says which one is nearer.
    difference = total - before
    lost = (before - (total - difference)) + (product - difference)
    further = torch.nextafter(total, torch.where(lost > 0, torch.inf, -torch.inf).double())
    return torch.where(middle & (lost != 0), further, total).float()
