"""The assignment of blocks to clients, cycle by cycle (Fig. 3 of the paper; C2 in the released
`workflow.py`; Latin square and groups: ours).

Clients and blocks are counted from 0, cycles too. In a cycle every client makes one visit.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from fluvial.seeds import generator

Order = Literal["ascending", "descending", "random", "latin", "latin-random", "pairs", "full"]


def assignment(order: Order, *, clients: int, blocks: int, cycle: int, seed: int) -> list[int]:
    """Return the block of every client in `cycle`.

    ascending c mod D, the same in every cycle (the paper's default) descending D - 1 - c mod D
    random each client draws its blocks without repetition; a cycle may leave blocks out, as in the
    paper latin (c + cycle) mod D: every client meets every block in D cycles latin-random the same
    with clients and blocks shuffled once by the seed: random, and nothing is left out pairs c mod
    D; clients of one block train it from the same state (FedBAvg) full one block, the whole model,
    handed from client to client
    """
    assert clients >= 1 <= blocks, "somebody trains something"
    assert cycle >= 0, "cycles are counted from 0"

    if order == "random":
        return [
            _draws(seed, client, cycle // blocks, blocks)[cycle % blocks]
            for client in range(clients)
        ]

    if order == "latin-random":
        rows = torch.randperm(clients, generator=generator(seed, "clients")).tolist()
        columns = torch.randperm(blocks, generator=generator(seed, "blocks")).tolist()
        return [columns[(row + cycle) % blocks] for row in rows]

    shift = cycle if order == "latin" else 0
    upwards = [(client + shift) % blocks for client in range(clients)]
    return [blocks - 1 - block for block in upwards] if order == "descending" else upwards


def _draws(seed: int, client: int, turn: int, blocks: int) -> list[int]:
    """Return the blocks of a client in order; once it has met all, the next turn begins."""
    drawn: list[int] = torch.randperm(
        blocks, generator=generator(seed, "order", client, turn)
    ).tolist()
    return drawn


def groups(assigned: Sequence[int], *, parallel: int, together: bool) -> list[list[int]]:
    """Return the clients in the order of their visits; those of one group start from the same
    model.

    With `together` the clients of a block visit in the same group (FedBAvg), else no group has a
    block twice. A group has at most `parallel` blocks, which lie as far apart as can be.
    """
    assert parallel >= 1, "a group has a block"
    units: list[list[int]] = [[client] for client in range(len(assigned))]

    if together:
        blocks = dict.fromkeys(assigned)
        units = [
            [client for client, mine in enumerate(assigned) if mine == block] for block in blocks
        ]

    if parallel == 1:
        return units

    made = []
    for sweep in _sweeps(units, assigned):
        count = math.ceil(len(sweep) / parallel)
        upwards = sorted(sweep, key=lambda unit: assigned[unit[0]])
        made += [
            [client for unit in upwards[start::count] for client in unit] for start in range(count)
        ]

    return made


def wall_clock(
    groups: Sequence[Sequence[int]], seconds: Sequence[float], *, deadline_s: float = math.inf
) -> float:
    """Return the seconds of a cycle in which client c takes `seconds[c]`: a group waits for its
    slowest, or until the deadline."""
    return sum(min(max(seconds[client] for client in group), deadline_s) for group in groups)


def _sweeps(units: Sequence[list[int]], assigned: Sequence[int]) -> list[list[list[int]]]:
    """Return the runs of units in order, as long as no block comes twice in one."""
    sweeps: list[list[list[int]]] = []
    met: set[int] = set()

    for unit in units:
        block = assigned[unit[0]]
        if not sweeps or block in met:
            sweeps.append([])
            met = set()

        sweeps[-1].append(unit)
        met.add(block)

    return sweeps
