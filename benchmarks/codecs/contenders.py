"""Cells and contenders of the benchmarks of codecs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.cgfedllm.bed import CORPORA, Table
from fluvial.codecs import must_learn
from fluvial.errors import ConfigError
from fluvial.methods import METHODS
from fluvial.runs.config import RunConfig, parse

SMALL = ("fairytales", "shakespeare", "mini_ops", "babi")
"""Corpora on stories260k, d 64."""
LARGE = tuple(f"{name}, babyllama105" for name in SMALL)
"""The same on babyllama105, d 128."""
CELLS = (*SMALL, *LARGE, "stdlib")
"""The last is the embedded model, d 128, with Python's standard library."""
Role = Literal["reference", "ours", "published", "assembled"]


@dataclass(frozen=True)
class Contender:
    """One competitor, as tables of a configuration; everything else is the same for all."""

    name: str
    role: Role
    """"published" is a scheme as its authors ship it, in both directions; "assembled" is
    another's codec in our FedAvg, with error feedback where it is biased, which is stronger than
    it was published."""
    codec: Table | None = None
    downlink: Table | None = None
    method: Table = field(default_factory=lambda: {"name": "fedavg"})
    tier: int = 1
    """Contenders of tier 1 come first."""
    rate: float | None = None
    """The rate under which claims compare it."""
    lora: Table = field(default_factory=dict)
    """Settings of the adapter that differ from rank 8 on the attention."""
    steps: int = 1
    """Factor of the local steps of a round."""
    rounds: float = 1
    """Factor of the rounds."""


def _coded(
    codec: str,
    rate: float,
    *,
    role: Role,
    tier: int = 1,
    feedback: bool = True,
    down: Table | None = None,
    **more: Any,
) -> Contender:
    """Return a codec with a rate in FedAvg."""
    table = {"name": codec, "rate": rate, **more} | ({"error_feedback": True} if feedback else {})
    both = "" if down is None else f", down {down['name']} 1/{down['rate']:g}"
    name = f"{codec} 1/{rate:g}{' + EF' if feedback else ''}{both}"
    return Contender(name, role, table, down, tier=tier, rate=rate)


def _judged(codec: str, rate: float) -> Contender:
    """Return a learned codec that the gate may refuse: measured all the same."""
    method = {"name": "cgfedllm", "gate": "report"}
    table = {"name": codec, "rate": rate, "error_feedback": True}

    return Contender(
        f"{codec} 1/{rate:g} + EF", "assembled", table, method=method, tier=2, rate=rate
    )


LORA: Table = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "attention"}
"""The adapter of contenders that name no other: that of CG-FedLLM."""
DOWN: Table = {"name": "trellis", "rate": 32}
"""The downlink of contenders that are ours."""
ASSEMBLED_DOWN: Table = {"name": "hadamard", "rate": 32}
"""And of those that are assembled."""
REFERENCE = "uncompressed"
CONTENDERS = (
    Contender(REFERENCE, "reference", {"name": "identity"}),
    _coded("trellis", 64, role="ours"),
    _coded("klt", 64, role="ours"),
    _coded("hadamard", 64, role="assembled"),
    _coded("klt_trellis", 64, role="ours"),
    _coded("eden", 64, role="assembled", feedback=False),
    _coded("dct_top_k", 64, role="assembled"),
    _coded("top_k", 64, role="assembled", value_bits="best"),
    _coded("powersgd", 64, role="assembled"),
    Contender("auto", "ours", {"name": "auto"}, rate=64),
    _coded("trellis", 128, role="ours"),
    _coded("klt", 128, role="ours"),
    _coded("klt_trellis", 128, role="ours"),
    _coded("hadamard", 128, role="assembled"),
    Contender("nf4, both ways", "published", {"name": "nf4"}, {"name": "nf4"}),
    Contender("int8, both ways", "published", {"name": "int8"}, {"name": "int8"}),
    Contender("flasc", "published", method={"name": "flasc"}),
    Contender("ecolora", "published", method={"name": "ecolora"}),
    Contender(
        "powersgd 1/64 + EF, both ways",
        "published",
        {"name": "powersgd", "rate": 64, "error_feedback": True},
        {"name": "powersgd", "rate": 64},
    ),
    _coded("trellis", 64, role="ours", down=DOWN),
    _coded("trellis", 64, role="ours", down={"name": "trellis", "rate": 64}),
    _coded("hadamard", 64, role="assembled", down=ASSEMBLED_DOWN),
    *(
        _coded("trellis", rate, role="ours", down={"name": "powersgd", "rate": down})
        for rate, down in ((64, 64), (64, 32), (128, 64))
    ),
    _coded("trellis", 32, role="ours", tier=2),
    _coded("trellis", 16, role="ours", tier=2),
    _coded("hadamard", 32, role="assembled", tier=2),
    _coded("trellis", 256, role="ours", tier=2),
    _coded("klt_trellis", 256, role="ours", tier=2),
    _coded("hadamard", 256, role="assembled", tier=2),
    Contender("auto, down trellis 1/32", "ours", {"name": "auto"}, DOWN, tier=2, rate=64),
    _coded("trellis", 128, role="ours", down=DOWN, tier=2),
    _coded("hadamard", 128, role="assembled", down=ASSEMBLED_DOWN, tier=2),
    _coded("eden", 128, role="assembled", feedback=False, tier=2),
    _coded("klt", 32, role="ours", tier=2),
    _coded("klt", 16, role="ours", tier=2),
    _judged("vq", 64),
    _judged("cnn", 64),
)
"""In the order of their importance."""


@dataclass(frozen=True)
class Bed:
    """How much is run of every contender."""

    rounds: int
    steps: int
    batch: int
    tgap_rounds: int
    heldout: int
    """Held-out sequences of each site."""
    seeds: int
    learning_rates: tuple[float, ...]
    """The grid, the same for every contender (see `grid`); the best of seed 0 is used for all
    seeds."""
    target: int
    """The round whose uncompressed loss is the target."""


def grid(cell: str, bed: Bed) -> tuple[float, ...]:
    """Return the learning rates of one cell; stories260k learns best at about twice the rate of the
    other models."""
    times = 2 if CORPORA[cell].model == "stories260k" else 1
    return tuple(times * rate for rate in bed.learning_rates)


def only(cell: str, bed: Bed, learning_rate: float) -> Bed:
    """Return a bed with no other learning rate than this one of its grid."""
    place = grid(cell, bed).index(learning_rate)
    return replace(bed, learning_rates=bed.learning_rates[place : place + 1])


def resolve(
    cell: str, contender: Contender, bed: Bed, *, learning_rate: float, seed: int
) -> RunConfig:
    """Return the configuration of one run; raises `ConfigError` where the package lacks what the
    contender needs."""
    tables = CORPORA[cell].tables()
    sample = {"sample_tokens": 1} if METHODS[contender.method["name"]].traits.exports else {}
    table: Table = {
        **tables,
        "data": tables["data"] | {"max_length": 128, "max_heldout": bed.heldout},
        "seed": seed,
        "rounds": round(contender.rounds * bed.rounds),
        "lora": LORA | contender.lora,
        "train": {
            "learning_rate": learning_rate,
            "per_device_train_batch_size": bed.batch,
            "max_steps": contender.steps * bed.steps,
        },
        "method": contender.method,
        "evaluate": {"every": 1, **sample},
        "fleet": {"workers": 1},
    }
    table |= {"codec": contender.codec} if contender.codec is not None else {}
    table |= {"downlink": contender.downlink} if contender.downlink is not None else {}
    where = f"{cell}, {contender.name}"
    config = parse(table, where)

    if must_learn(config.coding):
        table["method"] = {
            **contender.method,
            "tgap": {"source": "public", "rounds": bed.tgap_rounds},
        }
        config = parse(table, where)

    return config


def possible(
    contenders: Sequence[Contender], skip: Callable[[str], None], bed: Bed
) -> list[Contender]:
    """Return the contenders that the package can be configured for; each other one is given to
    `skip`."""
    found = []
    for contender in contenders:
        try:
            resolve("stdlib", contender, bed, learning_rate=bed.learning_rates[0], seed=0)
        except ConfigError as error:
            skip(str(error).splitlines()[0].split(";")[0])
        else:
            found.append(contender)

    return found
