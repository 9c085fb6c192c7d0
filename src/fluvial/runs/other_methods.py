"""Memory of a site under FedCyBGD and FL-GLM, for sites that cannot hold a base for LoRA."""

from functools import partial

from fluvial.errors import ConfigError
from fluvial.methods.fedcybgd.blocks import partition
from fluvial.methods.fedcybgd.memory import client_memory
from fluvial.methods.fedcybgd.visit_sizes import Full, OnDisk, Sizes, Width
from fluvial.methods.fedpipe.planner.decision import Models
from fluvial.methods.fedpipe.planner.formats import Format
from fluvial.methods.fedpipe.planner.refusal import Alternative
from fluvial.methods.flglm.choice import cuts, profile
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.interface import Given
from fluvial.models.tuning import tuned_layout


def alternatives(given: Given, models: Models, format: Format) -> list[Alternative]:
    """Return the other methods with a site's memory for each, without those that cannot train this
    model.

    FedCyBGD trains one block and reads the others from disk; FL-GLM has the cut with the least
    memory at a site. Activations are those of one sequence, recomputed, and the reserve is that of
    `models`.
    """
    pass_bytes = models.memory.activations(format, 1, given.max_length, checkpointing=True)
    methods = (
        ("fedcybgd", "one block of the model", partial(_block_bytes, given, pass_bytes)),
        ("flglm", "the first and last layers of the model", partial(_ends_bytes, given)),
    )
    others = []
    for name, why, needed in methods:
        try:
            others.append(Alternative(name, needed() + models.memory.reserve, why))
        except ConfigError:
            continue  # it cannot train this model, and is no way out

    return others


def _block_bytes(given: Given, pass_bytes: int) -> int:
    """Return the bytes of a visit to the largest block of all weights."""
    parts = partition(tuned_layout(given.base, None))
    largest = max(range(len(parts)), key=lambda number: parts.blocks[number].numel)
    width: Width = 4 if given.width_bytes == 4 else 2
    return client_memory(Sizes.of(parts, largest), OnDisk(Full()), width=width).visit(pass_bytes)


def _ends_bytes(given: Given) -> int:
    """Return the bytes of a site under the cut that leaves least to it."""
    config = FlGlmConfig(front="auto", back="auto")
    return min(cut.site.total for cut in cuts(config, partial(profile, config, given)))
