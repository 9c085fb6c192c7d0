"""The whole adapter at the server: the factors that sites begin from, and what is left beside."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fluvial.federation.adapters.low_rank import LowRank, total
from fluvial.models.adapters import is_side, module_of
from fluvial.wire.payload import Payload, join, split
from fluvial.wire.tensors import Layout, Named, factor


@dataclass(frozen=True)
class WholeAdapter:
    """The change of every adapted weight, in units of B A, as the server knows it."""

    adapter: Named
    """Factors by name, fp32. Their first r components are what a site of rank r trains."""
    rest: Named = field(default_factory=dict)
    """Factors by the same names, fp32, components of falling size: what the adapter does not
    hold. A module may be missing."""

    def product(self, module: str) -> LowRank:
        """Return the change of one weight, adapter and rest together."""
        return total([read_factors(self.adapter, module), self.rest_of(module)])

    def rest_of(self, module: str) -> LowRank:
        """Return the rest of one module, of rank 0 where there is none."""
        if factor_names(module)[0] in self.rest:
            return read_factors(self.rest, module)
        return read_factors(self.adapter, module).first(0)

    def merged(self, ranks: Mapping[str, int]) -> "WholeAdapter":
        """Return the same change without a rest, in factors of `ranks` by module.

        Components are sorted; those beyond a rank are left out, and zeros fill what is missing.
        """
        adapter: Named = {}
        for module, rank in ranks.items():
            product = self.product(module).sorted().first(rank)
            adapter |= write_factors(product.padded(rank), module)
        return WholeAdapter(adapter)

    def state(self) -> Payload:
        """Return all that `restored` needs."""
        return join({"adapter": Payload(self.adapter), "rest": Payload(self.rest)})

    def restored(self, state: Payload) -> "WholeAdapter":
        """Return the adapter whose `state` this was; raises `WireError` for another layout."""
        halves = split(state, ("adapter", "rest"))
        Layout.of(self.adapter).check(halves["adapter"].tensors, "checkpoint")
        return WholeAdapter(halves["adapter"].tensors, halves["rest"].tensors)


def modules_of(names: Iterable[str]) -> list[str]:
    """Return the modules that have factors among `names`, sorted, side paths left out."""
    factors = (name for name in names if factor(name) == "A" and not is_side(name))
    return sorted(map(module_of, factors))


def factor_names(module: str) -> tuple[str, str]:
    """Return the names of the factors B and A of a module."""
    return f"{module}.lora_B.weight", f"{module}.lora_A.weight"


def read_factors(tensors: Named, module: str) -> LowRank:
    """Return the product of the factors of a module."""
    b, a = factor_names(module)
    return LowRank.of(tensors[b], tensors[a])


def write_factors(product: LowRank, module: str) -> Named:
    """Return the factors of a module by name, fp32."""
    b, a = factor_names(module)
    return {
        a: product.right.float().contiguous(),
        b: product.left.float().contiguous(),
    }
