"""The choice of a cut: memory of both ends, bytes and time of a round, and what a server can read.

Everything here is a function of a profile in numbers. Of the cuts that keep all bounds, the one
with the shortest round over the line is chosen, or with the fewest bytes where no line is known; of
equal ones that with the least memory at a site, then with the deeper front. So larger bounds only
add cuts to choose from, and never make the choice worse.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from fluvial.errors import ConfigError
from fluvial.formatting import human_bytes, human_seconds
from fluvial.methods.flglm.footprint import Footprint
from fluvial.methods.flglm.leakage.measured import GRADIENTS
from fluvial.models.part_tuning import PartKind, Place

Open = int | Literal["auto"]
"""A number of layers, or that it is chosen."""

NO_CUT_PROTECTS = (
    "no cut alone protects the text; raise the bound, add noise (method.noise; for a bound below "
    f"{GRADIENTS:.0%}, freeze front and middle too, so that no gradient is sent), or use another "
    "method"
)


@dataclass(frozen=True)
class Cost:
    """Bytes of one site in a round, both ways, and the seconds of the round over the line."""

    bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Profile:
    """Costs of the cuts of a model, in numbers."""

    ends_weights: int
    """Bytes of the weights outside the layers, which are a site's."""
    ends_optimizer: int
    """Bytes that stay beside the tuned ones among them: optimizer, and their values before."""
    layer_weights: tuple[int, ...]
    """Bytes of the weights of each layer."""
    layer_optimizer: Mapping[PartKind, Sequence[int]]
    """The bytes that stay beside what is tuned in each layer, by the kind of its part."""
    footprint: Footprint
    kinds: Mapping[Place, PartKind]
    """Tuned weights of each part."""
    replicas: int
    """Replicas of the server's layers at a time."""
    cost: Callable[[int, int], Cost]
    """Bytes and seconds of a cut, by its layers in front and behind."""
    read: Callable[[int], float]
    """Share of the tokens that a server reads, as measured, by the layers in front."""

    @property
    def layers(self) -> int:
        """Return the number of layers."""
        return len(self.layer_weights)

    def cut(self, front: int, back: int) -> "Candidate":
        """Return the cut with so many layers in front and behind."""
        first = slice(0, front)
        middle = slice(front, self.layers - back)
        last = slice(self.layers - back, self.layers)
        site_weights = self.ends_weights + sum(self.layer_weights[first] + self.layer_weights[last])
        site_optimizer = self.ends_optimizer
        site_optimizer += sum(self.layer_optimizer[self.kinds["front"]][first])
        site_optimizer += sum(self.layer_optimizer[self.kinds["back"]][last])
        server_optimizer = sum(self.layer_optimizer[self.kinds["middle"]][middle])
        server_passes = self.footprint.server(self.layers - front - back, self.replicas)
        cost = self.cost(front, back)

        return Candidate(
            front,
            back,
            Memory(site_weights, site_optimizer, self.footprint.site(front, back)),
            Memory(
                sum(self.layer_weights[middle]), self.replicas * server_optimizer, server_passes
            ),
            cost,
            self.read(front),
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one end in training."""

    weights: int
    optimizer: int
    passes: int
    """Activations, gradients, and what an optimizer's step needs."""

    @property
    def total(self) -> int:
        """Return all of it."""
        return self.weights + self.optimizer + self.passes


@dataclass(frozen=True)
class Bounds:
    """Bounds on a cut; None is none."""

    site: float | None = None
    """Bytes of a site."""
    server: float | None = None
    """Bytes of the server."""
    read: float | None = None
    """Share of the tokens that the server may read."""


@dataclass(frozen=True)
class Candidate:
    """A cut, and what it costs."""

    front: int
    back: int
    site: Memory
    server: Memory
    cost: Cost
    read: float

    @cached_property
    def key(self) -> tuple[float, int, int]:
        """The order in which cuts are preferred."""
        time = self.cost.bytes if self.cost.seconds is None else self.cost.seconds
        return (time, self.site.total, self.back)

    def refusal(self, bounds: Bounds) -> str:
        """Return the reasons against this cut; empty where there are none."""
        reasons = []
        for end, memory, most in (
            ("site", self.site, bounds.site),
            ("server", self.server, bounds.server),
        ):
            if most is not None and memory.total > most:
                reasons.append(
                    f"{end}_memory_mb: it needs {human_bytes(memory.total)} there, more than "
                    f"{human_bytes(most)}"
                )

        if bounds.read is not None and self.read > bounds.read:
            reasons.append(too_readable(self.read, bounds.read))
        return "; ".join(reasons)

    def excess(self, bounds: Bounds) -> float:
        """Return the largest of its figures in units of their bounds; above 1 it is refused."""
        figures = (
            (self.site.total, bounds.site),
            (self.server.total, bounds.server),
            (self.read, bounds.read),
        )
        return max((figure / most for figure, most in figures if most is not None), default=0.0)

    def words(self, bounds: Bounds, *, steps: int | None) -> str:
        """Return memory, bytes and time, and why the cut is refused where it is."""
        per = "a step" if steps is None else "a round"
        parts = [
            f"site {human_bytes(self.site.total)}",
            f"server {human_bytes(self.server.total)}",
            f"{human_bytes(self.cost.bytes)} {per} at most",
        ]
        if self.cost.seconds is not None:
            parts.append(human_seconds(self.cost.seconds))
        refusal = self.refusal(bounds)
        return ", ".join(parts) + (f"; refused: {refusal}" if refusal else "")


def too_readable(read: float, most: float) -> str:
    """Return the reason against a cut of whose tokens a server reads more than the share `most`."""
    return (
        f"leakage.most: a server read {read:.0%} of the tokens where this was measured, more than "
        f"{most:.0%}"
    )


def candidates(profile: Profile, front: Open, back: Open) -> list[Candidate]:
    """Return the cuts that settings leave open, the preferred ones first."""
    most = profile.layers - 2
    fronts = range(1, most + 1) if front == "auto" else [front]
    backs = range(1, most + 1) if back == "auto" else [back]
    cuts = [profile.cut(p, q) for p in fronts for q in backs if p + q < profile.layers]
    return sorted(cuts, key=lambda each: each.key)


def choose(cuts: Sequence[Candidate], bounds: Bounds) -> Candidate:
    """Return the preferred cut within `bounds`; raises `ConfigError` where there is none."""
    for each in cuts:
        if not each.refusal(bounds):
            return each

    if not cuts:
        raise ConfigError(
            "method.front and method.back: no cut leaves a layer to the server; take fewer layers"
        )
    nearest = min(cuts, key=lambda each: each.excess(bounds))
    further = ""
    if len(cuts) > 1:
        further = f"; none of the {len(cuts)} cuts keeps all bounds, and this one comes nearest"
    memory = nearest.excess(replace(bounds, read=None)) > 1
    remedy = (
        "shorten data.max_length, lower train.per_device_train_batch_size, set "
        "train.gradient_checkpointing, or raise the bound"
        if memory
        else NO_CUT_PROTECTS
    )
    raise ConfigError(
        f"method.front={nearest.front} and method.back={nearest.back}: method."
        f"{nearest.refusal(bounds)}{further}; {remedy}"
    )
