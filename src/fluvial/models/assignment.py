"""The assignment of a site: layout and ranks of its adapter, batch size, type and formats of its
base.

Every site of a run has the run's own assignment, unless a method gives it another one. It is a
value: it travels in a message where it differs from the run's, and it is the key of `ModelPool`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from torch import nn

from fluvial.errors import ConfigError, WireError
from fluvial.models.adapters import SIDE, is_side, module_of, module_ranks
from fluvial.models.quantisation import FLOAT, Quantisation
from fluvial.models.tuning import read_shapes
from fluvial.wire.payload import Value
from fluvial.wire.tensors import Layout, Named, factor

Precision = Literal["float32", "bfloat16", "float16"]
"""Type of the base's weights that are not quantised; adapters are always fp32."""

KEY = "assignment"
"""Name of the message value that carries an assignment."""

MOST_SEQUENCES = 10**6
"""Sequences of one forward pass that an assignment may ask for at most."""


@dataclass(frozen=True)
class Assignment:
    """The layout, ranks, batch, precision and quantisation of one site's training."""

    layout: Layout
    """Layout of the adapter with its side path, or of all weights."""
    ranks: tuple[tuple[str, int], ...]
    """Rank by adapted module, in order of the names; empty where all weights are tuned. A module of
    rank 0 is not trained."""
    batch: int
    """Sequences of one forward pass in training."""
    precision: Precision
    side: tuple[tuple[str, int], ...] = ()
    """Rank by module, above 0 and in order of the names, of a side path: a second adapter that a
    site receives and does not train. It carries what the ranks cannot hold."""
    quantisation: Quantisation = FLOAT
    """Formats of the base's linear weights."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        batch: int,
        precision: Precision,
        quantisation: Quantisation = FLOAT,
    ) -> "Assignment":
        """Return the assignment to train what is tuned in `model`, which may be on the meta
        device."""
        ranks = tuple(module_ranks(model).items())
        return cls(read_shapes(model), ranks, batch, precision, quantisation=quantisation)

    @property
    def trained(self) -> Layout:
        """The layout of what a site trains: all but the side path."""
        return Layout(tuple(entry for entry in self.layout.shapes if not is_side(entry[0])))

    def with_ranks(self, ranks: int | Mapping[str, int]) -> "Assignment":
        """Return this assignment with one rank for all modules, or with those of some modules.

        A factor A (rank, in) and its B (out, rank) change with the rank; a module of rank 0 has no
        factors. Raises `ConfigError` for a module without an adapter, a rank that is not from 0 to
        the module's smaller dimension, or no rank above 0.
        """
        own = dict(self.ranks)
        wanted = dict.fromkeys(own, ranks) if isinstance(ranks, int) else dict(ranks)
        if not own:
            raise ConfigError("there is no rank to set, because all weights are tuned")

        self._check_ranks(wanted)
        assert all(own[name] for name in wanted), "a module of rank 0 has lost its shape"
        if not any((own | wanted).values()):
            raise ConfigError("every module has rank 0, so that nothing is trained")

        shapes = tuple(
            (name, shape if is_side(name) else _resized(name, shape, own, wanted))
            for name, shape in self.layout.shapes
            if is_side(name) or wanted.get(module_of(name), 1)
        )
        return replace(self, layout=Layout(shapes), ranks=tuple((own | wanted).items()))

    def with_side(self, ranks: Mapping[str, int], run: "Assignment") -> "Assignment":
        """Return this assignment with a side path of these ranks by module, and no other.

        `run` has the shapes of all modules. Raises `ConfigError` as `with_ranks` does, and for
        experts in one tensor, whose product is not B A.
        """
        wanted = {name: rank for name, rank in sorted(ranks.items()) if rank}
        run._check_ranks(ranks)
        own = dict(run.ranks)
        shapes = {name: shape for name, shape in self.layout.shapes if not is_side(name)}

        for name, shape in run.trained.shapes:
            module = module_of(name)
            if module not in wanted:
                continue
            if (shape[0] if factor(name) == "A" else shape[1]) != own[module]:
                raise ConfigError(f"module {module!r} has its experts in one tensor; no side path")
            shapes[side_name(name)] = _resized(name, shape, own, wanted)

        layout = Layout(tuple(sorted(shapes.items())))
        return replace(self, layout=layout, side=tuple(wanted.items()))

    def _check_ranks(self, wanted: Mapping[str, int]) -> None:
        """Raise `ConfigError` for ranks of modules that have none, or beyond their dimensions."""
        own = dict(self.ranks)
        for name, rank in wanted.items():
            if name not in own:
                raise ConfigError(f"module {name!r:.100} has no adapter; {min(own)!r} has one")

            most = self.width(name)
            if not 0 <= rank <= most:
                raise ConfigError(f"rank of {name!r}: {rank} is not from 0 to {most}")

    def fitting(self, state: Named) -> "Assignment":
        """Return this assignment with the ranks of the factors in `state`, which may lack some."""
        own = dict(self.layout.shapes)
        ranks = {
            module_of(name): tensor.shape[0]
            for name, tensor in state.items()
            if factor(name) == "A" and tuple(tensor.shape) != own[name]
        }
        return self.with_ranks(ranks) if ranks else self

    def width(self, module: str) -> int:
        """Return the smaller dimension of an adapted module, which bounds its rank."""
        return min(
            shape[1] if factor(name) == "A" else shape[0]
            for name, shape in self.layout.shapes
            if factor(name) and module_of(name) == module
        )

    def to_values(self, run: "Assignment") -> dict[str, Value]:
        """Return the message values that turn the run's assignment into this one, or none if it is
        the run's.

        The sizes of a rank travel by module where they differ, or as one number for all.
        """
        own = dict(run.ranks)
        assert own.keys() == dict(self.ranks).keys(), "an assignment of another model"
        ranks = {name: rank for name, rank in self.ranks if rank != own[name]}
        values: dict[str, Value] = {}

        if ranks:
            uniform = set(dict(self.ranks).values())
            values["ranks"] = uniform.pop() if len(uniform) == 1 else cast(Value, ranks)
        if self.side != run.side:
            values["side"] = cast(Value, dict(self.side))
        if self.batch != run.batch:
            values["batch"] = self.batch
        if self.precision != run.precision:
            values["precision"] = self.precision
        if self.quantisation != run.quantisation:
            values["quantization"] = self.quantisation.to_value()

        return {KEY: values} if values else {}

    @classmethod
    def from_values(cls, values: Mapping[str, Value], run: "Assignment") -> "Assignment":
        """Return the inverse of `to_values`; raises `WireError` that names the wrong value."""
        given = values.get(KEY)
        if given is None:
            return run

        if not isinstance(given, dict) or not given:
            raise WireError(f"{KEY}: expected names and values, found {type(given).__name__}")

        unknown = sorted(given.keys() - {"ranks", "side", "batch", "precision", "quantization"})
        if unknown:
            raise WireError(f"{KEY}: unknown name {unknown[0]!r:.40}")

        assignment = run
        if "ranks" in given:
            try:
                assignment = run.with_ranks(_read_ranks(given["ranks"], "ranks"))
            except ConfigError as error:
                raise WireError(f"{KEY}.ranks: {error}") from error

        if "side" in given:
            side = _read_ranks(given["side"], "side")
            if isinstance(side, int):
                raise WireError(f"{KEY}.side: expected ranks by module")
            try:
                assignment = assignment.with_side(side, run)
            except ConfigError as error:
                raise WireError(f"{KEY}.side: {error}") from error

        batch = given.get("batch", run.batch)
        if type(batch) is not int or not 1 <= batch <= MOST_SEQUENCES:
            raise WireError(
                f"{KEY}.batch: {batch!r:.40} is not a number from 1 to {MOST_SEQUENCES}"
            )

        precision = given.get("precision", run.precision)
        if precision not in get_args(Precision):
            raise WireError(
                f"{KEY}.precision: {precision!r:.40} is none of {', '.join(get_args(Precision))}"
            )

        quantisation = run.quantisation
        if "quantization" in given:
            where = f"{KEY}.quantization"
            quantisation = Quantisation.from_value(given["quantization"], where)
            if quantisation and not run.ranks:
                raise WireError(f"{where}: all weights are tuned, and a quantised one cannot be")

        return replace(
            assignment,
            batch=batch,
            precision=cast(Precision, precision),
            quantisation=quantisation,
        )


def by_layout(assignments: Mapping[str, Assignment]) -> dict[Layout, list[str]]:
    """Return the sites of each distinct layout, in order of `assignments`.

    Sites of one layout can share a codec and a mean.
    """
    sites: dict[Layout, list[str]] = {}
    for name, assignment in assignments.items():
        sites.setdefault(assignment.layout, []).append(name)

    return sites


def _read_ranks(given: Value, place: str) -> int | dict[str, int]:
    """Return one rank, or ranks by module, from a message; raises `WireError`."""
    if type(given) is int:
        return given

    if not isinstance(given, dict) or not given:
        raise WireError(f"{KEY}.{place}: expected a rank, or ranks by module")

    ranks = {}
    for name, rank in given.items():
        if type(rank) is not int:
            raise WireError(
                f"{KEY}.{place}: rank of {name!r:.100} is {rank!r:.40}, expected a number"
            )
        ranks[name] = rank

    return ranks


def side_name(name: str) -> str:
    """Return the name of a factor of the side path, beside the factor `name` of the adapter."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.{SIDE}.{leaf}"


def _resized(
    name: str, shape: tuple[int, ...], own: Mapping[str, int], wanted: Mapping[str, int]
) -> tuple[int, ...]:
    """Return the shape of a factor whose module has another rank.

    Where the experts of a layer are one tensor, its factors have the rank times the experts.
    """
    module = module_of(name)
    if module not in wanted:
        return shape

    rows, columns = shape
    if factor(name) == "A":
        return rows // own[module] * wanted[module], columns
    return rows, columns // own[module] * wanted[module]
