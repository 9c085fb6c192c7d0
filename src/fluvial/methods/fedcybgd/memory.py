"""Bytes that a client, or one process with all sites, holds during a visit, by formula."""

from dataclasses import dataclass

from fluvial.methods.fedcybgd.visit_sizes import Form, Sizes, Width
from fluvial.training.stepper import AT_ONCE


@dataclass(frozen=True)
class ClientMemory:
    """Bytes that a client holds while `train.train` tunes a block with AdamW.

    Per trained value, for a model in fp32 and in half precision:

                    fp32   half
        weights        4      2
        masters        -      4   fp32, from the first step to the last
        gradient       4      4   in half precision 2 before the step, which turns tensor after
                                  tensor into fp32
        moments        8      8   fp32, two
        start          4      4   fp32: what was received, from which the change is taken; in
                                  `visit` alone
        workspace      4      4   fp32 root of the second moment, of all tensors at once, only
                                  during the step; none from `train.AT_ONCE` values on, where tensor
                                  after tensor is stepped

    Not counted: activations and what autograd saves, one tensor's gradient at a time that is being
    made or converted, messages while they are read or written and updates while they are coded, the
    base under blocks of an adapter, and the libraries.
    """

    frozen: int
    """The rest of the model, in the form held."""
    weights: int
    masters: int
    gradient: int
    moments: int
    workspace: int

    @property
    def states(self) -> int:
        """Without the workspace: of P parameters and b trained ones, none compressed, 4P + 12b in
        fp32, and 2P + 16b in half precision, which is how BAdam counts."""
        return self.frozen + self.weights + self.masters + self.gradient + self.moments

    @property
    def backward(self) -> int:
        """Beside the activations: gradients are still in the model's type, so as large as the
        weights."""
        return self.frozen + 2 * self.weights + self.masters + self.moments

    def peak(self, activations: int = 0) -> int:
        """Return the most at once, where a backward pass needs `activations` besides: there, or in
        the optimizer's step."""
        return max(self.backward + activations, self.states + self.workspace)

    def visit(self, activations: int = 0) -> int:
        """Return `peak` plus what was received, which is subtracted from what was trained at the
        end."""
        return self.peak(activations) + self.gradient


def client_memory(sizes: Sizes, form: Form, *, width: Width) -> ClientMemory:
    """Return the memory of a client that trains one block of a model of `width`; with `Sizes.full`,
    of full tuning."""
    fp32 = 4 * sizes.block
    return ClientMemory(
        frozen=form.held(sizes, width),
        weights=width * sizes.block,
        masters=0 if width == 4 else fp32,
        gradient=fp32,
        moments=2 * fp32,
        workspace=fp32 if sizes.block < AT_ONCE else 0,
    )


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes that one process holds as the server and all sites, where all weights are tuned.

    The base lies on disk; what is not trained is mapped from there, once for all sites that measure
    at a time. Not counted: what `ClientMemory` does not count, and up to 0.2 GB that the allocator
    keeps.
    """

    visit: int
    """A site in its visit: `ClientMemory.visit`."""
    state: int
    """The server's changes, fp32, of the blocks that have moved."""
    log: int
    """The frames of one commit to each of these; more are kept as long as they are smaller than
    their block."""
    merge: int
    """Folding one answer: the decoded update, flattened, two fp64 sums and the mean, of one
    block."""
    evaluate: int
    """Measuring: the base once, the message, and for each site at a time the changes it read and
    put into a model."""

    @property
    def server(self) -> int:
        """Held all the time."""
        return self.state + self.log

    @property
    def peak(self) -> int:
        """The most at once."""
        return self.server + max(self.visit, self.merge, self.evaluate)


def process_memory(
    sizes: Sizes, form: Form, *, width: Width, moved: int, coded: int, workers: int
) -> ProcessMemory:
    """Return the memory of one process with all sites, of which `workers` measure at a time, once
    `moved` blocks have moved.

    `coded` is the bytes of one commit; every block counts as large as the trained one.
    """
    changes = 4 * min(moved * sizes.block, sizes.total)
    return ProcessMemory(
        visit=client_memory(sizes, form, width=width).visit(),
        state=changes,
        log=moved * coded,
        merge=28 * sizes.block,
        evaluate=width * sizes.total + changes + workers * (changes + width * changes // 4),
    )


def badam_bytes(parameters: int, blocks: int) -> float:
    """Return 2M + 16M / D: BAdam's estimate (Luo et al., NeurIPS 2024,
    https://arxiv.org/abs/2404.02827), as if the D blocks were the whole model;
    `ClientMemory.states` has the block's own size in place of M / D."""
    return 2 * parameters + 16 * parameters / blocks
