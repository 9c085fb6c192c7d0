"""The processes that train one model together: each takes a share of every batch."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fluvial.errors import RefusalError

BUCKET = 2**24
"""Values that are summed over the processes at a time."""


class Team:
    """One process alone, which has every share; see `Processes.team` for several."""

    rank = 0
    """Number of this process."""
    size = 1
    """Number of processes."""

    def micro_batch(self, sequences: int, most: int) -> int:
        """Return the sequences of a forward pass, at most `most`, so that every process has some
        where there are enough."""
        return min(most, -(-sequences // self.size))

    def sum_gradients(
        self,
        parameters: Sequence[nn.Parameter],  # noqa: ARG002
        loss: float,
    ) -> float:
        """Give every process the sum of all gradients; return the sum of the losses."""
        return loss

    def decide(self, go_on: bool) -> bool:
        """Return the decision of the first process."""
        return go_on


ALONE = Team()
"""The one process of a training that no other takes part in."""


class Together(Team):
    """One of several processes, within torch's default process group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: float) -> float:
        """See `Team`; a gradient that no process has stays away."""
        header = torch.tensor([loss, *(float(p.grad is not None) for p in parameters)])
        reduced(header)
        present = header[1:].tolist()

        bucket: list[nn.Parameter] = []
        for parameter, holders in zip(parameters, present, strict=True):
            if not holders:
                continue
            if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
                self._sum(bucket)
                bucket = []
            bucket.append(parameter)

        self._sum(bucket)
        return float(header[0])

    def _sum(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their sums, which are made in fp32."""
        if not parameters:
            return

        parts = [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten().float()
            for p in parameters
        ]
        flat = torch.cat(parts)
        reduced(flat)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, values in zip(parameters, torch.split(flat, sizes), strict=True):
            parameter.grad = values.view_as(parameter).to(parameter.dtype)

    def decide(self, go_on: bool) -> bool:
        """See `Team`."""
        decision = torch.tensor([float(go_on and self.rank == 0)])
        reduced(decision)
        return bool(decision)

    def send(self, data: bytes) -> None:
        """Send bytes of the first process to all others."""
        exchanged(torch.tensor([len(data)]))
        exchanged(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def receive(self) -> bytes:
        """Return the bytes that the first process sends."""
        size = exchanged(torch.zeros(1, dtype=torch.int64))
        return exchanged(torch.empty(int(size), dtype=torch.uint8)).numpy().tobytes()


class LostError(RefusalError):
    """Another process of a training has ended."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this site's training has ended; what it printed says why"
        )


def reduced(values: Tensor) -> None:
    """Sum `values` over all processes, in place; raises `LostError` where one has ended."""
    try:
        dist.all_reduce(values)
    except RuntimeError as error:
        raise LostError from error


def exchanged(values: Tensor) -> Tensor:
    """Return `values` of the first process, in place; raises `LostError` where one has ended."""
    try:
        dist.broadcast(values, src=0)
    except RuntimeError as error:
        raise LostError from error
    return values
