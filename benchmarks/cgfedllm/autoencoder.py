"""The part `autoencoder` of `benchmarks.cgfedllm`: the paper's autoencoder, trained as well as it
can be.

What its training settings change, at three rates and for three kinds of coded objects; then gate
and loss of federated runs with the best settings of each rate. The bound is the error of the best
linear code on white data, 1 - rate. Fits are taken from `--cache`, in the order of `plan`; what is
not reached in `--minutes` is listed as skipped.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.cgfedllm.bed import (
    Size,
    Table,
    Training,
    config,
    ensemble,
    fitted,
    gate_row,
    outcome,
)
from benchmarks.codecs.cache import Cache
from benchmarks.report import Claim, Row, show
from fluvial.exchange import gate
from fluvial.exchange.representation import Representation

Kind = Literal["deltas of Adam", "gradients of SGD", "states"]
"""Objects that are coded: updates of some steps of Adam, of one step of SGD, whole adapters."""
ADAM: Kind = "deltas of Adam"
GRADIENTS: Training = (("optim", "sgd"), ("max_steps", 1), ("learning_rate", 0.5))
"""Training whose update is a clipped gradient."""
STAGES = (2, 4, 6)
RATES = (2e-4, 1e-3, 3e-3, 1e-2)
BEST: dict[str, Any] = {"learning_rate": 3e-3, "schedule": "cosine", "crop": 64}
"""The package's defaults."""
CORPUS = "stdlib"


@dataclass(frozen=True)
class Fit:
    """One training of the autoencoder, and what becomes of it."""

    what: Literal["gate", "loss"]
    """Held-out updates alone, or a federated run with the gate set to report."""
    stages: int
    training: tuple[tuple[str, Any], ...] = tuple(BEST.items())
    """Settings of the codec."""
    kind: Kind = ADAM
    seed: int = 0

    def described(self) -> Row:
        """Return the row's key columns."""
        described = {"what": self.what, "kind": self.kind, "rate": 2**self.stages}
        return {**described, **dict(self.training), "seed": self.seed}


def plan(seeds: int) -> Iterator[Fit]:
    """Yield the fits, the most telling first."""

    def fit(stages: int, **change: Any) -> Fit:
        return Fit("gate", stages, tuple({**BEST, **change}.items()))

    def other_rates(stages: int) -> Iterator[Fit]:
        for rate in RATES:
            if rate != BEST["learning_rate"]:
                yield fit(stages, learning_rate=rate)

    yield from (fit(stages) for stages in STAGES)
    yield from other_rates(2)
    yield from (Fit("loss", stages) for stages in STAGES)
    for stages in STAGES:
        yield Fit("gate", stages, kind="gradients of SGD")
        yield Fit("gate", stages, kind="states")

    yield from other_rates(4)
    yield from other_rates(6)
    for seed in range(1, seeds):
        yield from (Fit("loss", stages, seed=seed) for stages in STAGES)

    for rate in RATES:
        yield fit(2, learning_rate=rate, schedule="constant")
    for rate in RATES:
        yield fit(2, learning_rate=rate, crop="whole")
        yield fit(2, learning_rate=rate, schedule="constant", crop="whole")
    for stages in STAGES[1:]:
        for rate in RATES:
            yield fit(stages, learning_rate=rate, schedule="constant")
            yield fit(stages, learning_rate=rate, crop="whole")


def autoencoder(
    size: Size, corpora: Sequence[str], cache: Path | None, minutes: float
) -> tuple[list[Row], list[Claim], list[str]]:
    """Return rows, claims, and a line for each fit that time left out."""
    if CORPUS not in corpora:
        return [], [], [f"autoencoder: it is measured on {CORPUS} alone"]

    known = Cache(cache)
    deadline = time.time() + 60 * minutes
    rows = []
    skipped = []

    for fit in plan(size.seeds):
        described = fit.described() | {"iterations": size.iterations}
        key = _key(described, size)
        row = known.find(key)
        if row is None and time.time() >= deadline:
            named = ", ".join(f"{name} {value}" for name, value in described.items())
            skipped.append(f"autoencoder, no time left: {named}")
            continue

        rows.append(row or known.add(key, {**described, **_measured(fit, size)}))

    for seed in sorted({row["seed"] for row in rows if row["what"] == "loss"}):
        described = {"what": "loss", "kind": ADAM, "codec": "identity", "rate": 1, "seed": seed}
        key = _key(described, size)
        rows.append(known.find(key) or known.add(key, {**described, **_uncompressed(seed, size)}))

    columns = {name: name for name in ("what", "kind", "rate", "learning_rate", "schedule")}
    columns |= {name: name for name in ("crop", "seed", "error", "bound", "cosine", "loss")}
    show("The paper's autoencoder", columns | {"passes": "gate"}, rows)
    plain = [{name: row[name] for name in row if name not in ("key", "failed")} for row in rows]

    return [{"part": "autoencoder", **row} for row in plain], _claims(rows), skipped


def _key(described: Row, size: Size) -> str:
    """Return the key of a fit; the size is that of its bed."""
    content = json.dumps({**described, "size": vars(size)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _measured(fit: Fit, size: Size) -> Row:
    table: Table = {"name": "resnet", "canvas": "grouped", "stages": fit.stages}
    table |= {"iterations": size.iterations, **dict(fit.training)}
    bound = 1 - 1 / 2**fit.stages
    if fit.what == "loss":
        return {"bound": bound, **_run(table, fit.seed, size)}

    representation: Representation = "state" if fit.kind == "states" else "delta"
    train = GRADIENTS if fit.kind == "gradients of SGD" else None
    found = ensemble(CORPUS, size, "sites", seed=fit.seed, train=train)
    since = time.perf_counter()
    codec = fitted(table, found.layout, found.training, representation)
    fit_s = time.perf_counter() - since
    report = gate.measure(codec, found.training, found.heldout, representation)

    return {"bound": bound, **gate_row(report), "fit_s": fit_s}


def _run(table: Table, seed: int, size: Size) -> Row:
    """Return the gate's figures and the loss of a run whose codec learned from public text."""
    tgap = {"source": "public", "rounds": size.tgap_rounds}
    method: Table = {"name": "cgfedllm", "gate": "report", "tgap": tgap}
    found = outcome(config(CORPUS, size, method=method, codec=table, seed=seed, workers=1))
    if "stopped" in found:
        return found

    return found | {"error": found["gate_error"], "passes": found["gate_passed"]}


def _uncompressed(seed: int, size: Size) -> Row:
    method: Table = {"name": "cgfedllm", "tgap": {"source": "none"}}
    run = config(CORPUS, size, method=method, codec={"name": "identity"}, seed=seed, workers=1)
    return outcome(run)


def _claims(rows: Sequence[Row]) -> list[Claim]:
    """Return the claims; those without a fit have no value and do not hold."""
    adam = [row for row in rows if row["kind"] == ADAM and "passes" in row]
    ours = [row for row in adam if BEST.items() <= row.items()]

    def share(rate: int) -> float | None:
        passed = [row["passes"] for row in ours if row["rate"] == rate]
        return sum(passed) / len(passed) if passed else None

    def least(rate: int) -> float | None:
        errors = [row["error"] for row in adam if row["rate"] == rate]
        return min(errors) if errors else None

    return [
        Claim(
            "at 1/4 it passes the gate with the defaults: share of the fits",
            share(4),
            1,
            "at least",
        ),
        Claim("at 1/4 its least error is near the linear bound, 0.75", least(4), 0.77, "at most"),
        Claim(
            "at 1/64 it passes the gate with the defaults: share of the fits",
            share(64),
            0,
            "at most",
        ),
        Claim("at 1/64 its least error over all training settings", least(64), 0.95, "at least"),
    ]
