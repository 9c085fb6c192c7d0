"""Cells and contenders of `benchmarks.fedcybgd`."""

from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.cgfedllm.bed import CORPORA, Table


@dataclass(frozen=True)
class Cell:
    """A model, its sites' text and how it is trained."""

    name: str
    corpus: str
    """Name of a corpus in `benchmarks.cgfedllm.bed.CORPORA`."""
    length: int
    """Tokens of a sequence."""
    batch: int
    heldout: int
    """Sequences of a site."""
    rate: float
    """Centre of the learning rates of Fed-full; found in single runs with seed 0, as are the next
    and each `pace`."""
    lora_rate: float
    """And of LoRA."""
    layers_per_pair: int
    """Layers in a block of FedBAvg, so that eight sites are at least two to a block."""

    @property
    def present(self) -> bool:
        """Return True where this checkout has the files of the cell."""
        return CORPORA[self.corpus].present


_STORIES: Any = {
    "length": 128,
    "batch": 4,
    "heldout": 24,
    "rate": 2e-3,
    "lora_rate": 8e-3,
    "layers_per_pair": 2,
}
_BABY: Any = _STORIES | {"rate": 2e-4, "lora_rate": 4e-3}
CELLS = {
    cell.name: cell
    for cell in (
        Cell("embedded", "stdlib", 64, 8, 48, rate=1e-3, lora_rate=5e-3, layers_per_pair=1),
        Cell("fairytales", "fairytales", **_STORIES),
        Cell("shakespeare", "shakespeare", **_STORIES),
        Cell("fairytales, babyllama105", "fairytales, babyllama105", **_BABY),
        Cell("shakespeare, babyllama105", "shakespeare, babyllama105", **_BABY),
    )
}


@dataclass(frozen=True)
class Bed:
    """How much is run of every contender."""

    rounds: int
    steps: int
    """Steps of a site in a round."""
    heldout: int | None
    """Sequences of a site; the cell's own where None, as of `length`."""
    length: int | None
    seeds: int
    paces: tuple[float, ...]
    """The grid of learning rates, in units of a contender's centre: the same for all, rising by
    factors of 2."""
    further: int
    """Rates that are tried beyond the grid at most, one by one, where the best lies at its edge."""


@dataclass(frozen=True)
class Match:
    """Bytes up that a contender is to have in common with another."""

    name: str
    """Name of the other contender."""
    by: Literal["rank", "rate", "rounds"]
    """The largest rank, or the least rate, whose frame is no larger; or as many rounds as come to
    the same bytes."""


@dataclass(frozen=True)
class Contender:
    """One competitor, as tables of a configuration."""

    name: str
    method: Table
    tune: Literal["full", "lora"] = "full"
    codec: Table | None = None
    match: Match | None = None
    pace: float = 1.0
    """Centre of its learning rates, in units of the cell's."""
    rounds: float = 1.0
    """Rounds, in units of the bed's."""
    tier: int = 1
    """Contenders of tier 1 come first."""
    falls: bool = False
    """True where the learning rate falls along half a cosine over the rounds."""


REFERENCE = "fed-full"
INT8 = "fedcybgd int8"
OURS = "fedcybgd hadamard 1/16"
LORA = "lora r 8, equal passes"
FEDBAVG = "fedbavg int8"
CYCLIC = "central cyclic"
CENTRAL = "central"
EMBEDDINGS = f"{OURS}, embeddings too"
WIDE = f"{OURS}, embeddings too, two layers a block"
CUT = "fedcybgd int8, embeddings too, four equal blocks"
LONGER = f"{CUT}, 1.5 times the passes"
LATIN: Table = {"name": "fedcybgd", "order": "latin"}
GROUPED: Table = LATIN | {"parallel": 4, "hold": "disk"}
"""As configs/fedcybgd.toml, with the rest of the model on disk."""
EQUAL_BLOCKS: Table = LATIN | {"hold": "disk", "extra": ["embeddings"], "num_blocks": 4}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _hadamard(rate: float, **more: Any) -> Table:
    return {"name": "hadamard", "rate": rate, **more}


CONTENDERS = (
    Contender(REFERENCE, {"name": "fedavg"}, codec={"name": "identity"}),
    Contender(INT8, LATIN, codec={"name": "int8"}, pace=0.5),
    Contender(OURS, GROUPED, codec=_hadamard(16), falls=True),
    Contender(FEDBAVG, {"name": "fedcybgd", "order": "pairs"}, codec={"name": "int8"}, pace=0.5),
    Contender(LORA, {"name": "fedavg"}, "lora", {"name": "identity"}),
    Contender(
        "lora int8, bytes of fedcybgd int8",
        {"name": "fedavg"},
        "lora",
        {"name": "int8"},
        Match(INT8, "rank"),
    ),
    Contender(
        "lora r 8 hadamard + EF, bytes of fedcybgd hadamard 1/16",
        {"name": "fedavg"},
        "lora",
        _hadamard(1, error_feedback=True),
        Match(OURS, "rate"),
    ),
    Contender(CYCLIC, {"name": "central_cyclic"}, pace=0.5),
    Contender(CENTRAL, {"name": "central"}, pace=0.5),
    Contender(
        "fedcybgd int8, parallel 2",
        LATIN | {"parallel": 2},
        codec={"name": "int8"},
        pace=0.5,
        tier=2,
    ),
    Contender(
        "fedcybgd int8, parallel 4",
        LATIN | {"parallel": 4},
        codec={"name": "int8"},
        pace=0.5,
        tier=2,
    ),
    Contender("fedcybgd int8, cosine", LATIN, codec={"name": "int8"}, tier=2, falls=True),
    Contender(
        f"{OURS} + EF", GROUPED, codec=_hadamard(16, error_feedback=True), tier=2, falls=True
    ),
    Contender("fedcybgd hadamard 1/32", GROUPED, codec=_hadamard(32), tier=2, falls=True),
    Contender(
        "fedcybgd hadamard 1/32 + EF",
        GROUPED,
        codec=_hadamard(32, error_feedback=True),
        tier=2,
        falls=True,
    ),
    Contender(
        EMBEDDINGS, GROUPED | {"extra": ["embeddings"]}, codec=_hadamard(16), tier=2, falls=True
    ),
    Contender(
        WIDE,
        GROUPED | {"extra": ["embeddings"], "layers_per_block": 2},
        codec=_hadamard(16),
        tier=2,
        falls=True,
    ),
    Contender(CUT, EQUAL_BLOCKS, codec={"name": "int8"}, tier=2, falls=True),
    Contender(LONGER, EQUAL_BLOCKS, codec={"name": "int8"}, rounds=1.5, tier=2, falls=True),
    Contender(
        "lora r 8 int8, more rounds to bytes of fedcybgd int8",
        {"name": "fedavg"},
        "lora",
        {"name": "int8"},
        Match(INT8, "rounds"),
        tier=2,
    ),
    Contender(
        "fed-full hadamard + EF, bytes of fedcybgd int8",
        {"name": "fedavg"},
        codec=_hadamard(1, error_feedback=True),
        match=Match(INT8, "rate"),
        tier=2,
    ),
)
"""In the order of their importance. Of FedCyBGD, the first is the default and the second what
configs/fedcybgd.toml recommends. FedAvg has one learning rate in all its rounds here."""
QUICK_NAMES = (REFERENCE, INT8, OURS, LORA, CONTENDERS[5].name)


def contender(name: str) -> Contender:
    """Return the contender of that name."""
    return next(each for each in CONTENDERS if each.name == name)
