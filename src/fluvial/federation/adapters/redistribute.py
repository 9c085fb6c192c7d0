"""The adapter that one site receives: its ranks of the whole adapter, and a side path.

A site computes with W + s (B A + side). B A has the site's own ranks and is trained; the side path
is frozen and holds the largest components of what B A leaves out. So a site has the whole change of
a module that it does not train, as far as the rank of its side path reaches. Merging that into the
base instead would need a base of its own for each site, and a quantised base cannot take it.
"""

from fluvial.federation.adapters.low_rank import total
from fluvial.federation.adapters.whole import (
    WholeAdapter,
    modules_of,
    read_factors,
    write_factors,
)
from fluvial.models.adapters import is_side
from fluvial.models.assignment import Assignment, side_name
from fluvial.wire.tensors import Named


def redistribute(whole: WholeAdapter, assignment: Assignment) -> Named:
    """Return the tensors of `assignment.layout` for a site, fp32.

    After the mode "svd", the first r components are the best approximation of rank r. Asserts that
    no rank is above that of the whole adapter.
    """
    tensors: Named = {}
    ranks = dict(assignment.ranks)
    side = dict(assignment.side)

    for module in modules_of(whole.adapter):
        adapter = read_factors(whole.adapter, module)
        rank = ranks.get(module, 0)
        assert rank <= adapter.rank, f"{module}: rank {rank} of {adapter.rank}"
        if rank:
            tensors |= write_factors(adapter.first(rank), module)

        if module in side:
            left_out = total([adapter.after(rank), whole.rest_of(module)]).sorted()
            path = write_factors(left_out.first(side[module]).padded(side[module]), module)
            tensors |= {side_name(name): tensor for name, tensor in path.items()}

    assert tensors.keys() == set(assignment.layout.names), "an assignment of another model"
    return tensors


def without_side(tensors: Named) -> Named:
    """Return the factors that a site trains."""
    return {name: tensor for name, tensor in tensors.items() if not is_side(name)}
