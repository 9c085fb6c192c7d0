"""Gate: measure a codec on snapshots of later rounds, before the first federated round.

All errors are those of the *innovation*, the difference to the received adapter, whatever is sent:
a codec that always returns the training mean has a state error of 0.4 % and an innovation cosine
below zero.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from torch import Tensor

from fluvial.codecs.base import Codec, Snapshot
from fluvial.exchange.recoding import Recoded
from fluvial.exchange.report import Errors, GateReport, shortcomings
from fluvial.exchange.representation import Representation, coded_object, innovation
from fluvial.wire.tensors import (
    Named,
    WeightedMean,
    cosine,
    energy,
    factor,
    is_finite,
    only,
    relative_error,
    subtract,
    zeros_like,
)

RankFactors = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Columns and rows of a change of rank 2r: (dB, B + dB), and (A, dA)."""


def measure(
    codec: Codec,
    training: Sequence[Snapshot],
    heldout: Sequence[Snapshot],
    representation: Representation,
) -> GateReport:
    """Code every held-out snapshot and compare; `training` gives the predictors.

    Both must not be empty.
    """
    assert training, "no training snapshots"
    recoded = Recoded.of(codec, heldout, representation)
    coded = recoded.coded
    decoded = recoded.decoded
    guesses = recoded.guesses
    cosines = recoded.cosines
    contraction = recoded.contraction
    finite = all(is_finite(tensors) for tensors in decoded)
    predictors = {
        name: _errors(heldout, [predict(snapshot) for snapshot in heldout])
        for name, predict in _predictors(training, heldout, representation).items()
    }
    errors = _errors(heldout, guesses)
    mixed = _errors(heldout, recoded.shuffled).all
    lost = sum(energy(subtract(x, y)) for x, y in zip(coded, decoded, strict=True))
    signal = sum(energy(x) for x in coded)
    b_true = math.sqrt(sum(energy(only(x, "B")) for x in coded))
    b_decoded = math.sqrt(sum(energy(only(y, "B")) for y in decoded))
    coded_a, coded_b = (_pooled(coded, decoded, which) for which in ("A", "B"))
    aggregate_cosine = aggregate(heldout, guesses, cosine)
    failed = shortcomings(finite, contraction, errors, predictors, mixed)
    ratio = b_decoded / b_true if b_true > 0 else 0.0

    return GateReport(
        snapshots=len(heldout),
        bytes_per_update=sum(map(len, recoded.frames)) / len(heldout),
        raw_bytes=codec.layout.raw_bytes,
        errors=errors,
        predictors=predictors,
        shuffled_error=mixed,
        product_error=_product_error(heldout, guesses),
        coded_error_a=coded_a,
        coded_error_b=coded_b,
        cosine=sum(cosines) / len(cosines),
        aggregate_cosine=aggregate_cosine,
        b_norm_ratio=ratio,
        snr=signal / lost if lost > 0 else 1e30,
        snr_printed=signal * codec.layout.numel / lost if lost > 0 else 1e30,
        contraction=contraction,
        failed=failed,
        reproduction={
            "finite": finite,
            "A error < 1": coded_a < 1,
            "B error < 1": coded_b < 1,
            "innovation cosine >= 0.90": sum(cosines) / len(cosines) >= 0.90,
            "B norm ratio in [0.5, 2]": 0.5 <= ratio <= 2,
            "aggregate cosine >= 0.90": aggregate_cosine >= 0.90,
            "depends on the input": mixed > errors.all,
        },
    )


def _predictors(
    training: Sequence[Snapshot], heldout: Sequence[Snapshot], representation: Representation
) -> dict[str, Callable[[Snapshot], Named]]:
    """Return guesses that need no message, by name."""
    average = _mean(
        coded_object(snapshot.received, snapshot.update, representation) for snapshot in training
    )
    means: dict[int, WeightedMean] = {}
    for snapshot in (*training, *heldout):
        means.setdefault(snapshot.round, WeightedMean()).add(snapshot.update, 1)

    by_round = {round: mean.mean() for round, mean in means.items()}

    def previous(snapshot: Snapshot) -> Named:
        earlier = [round for round in by_round if round < snapshot.round]
        return by_round[max(earlier)] if earlier else zeros_like(snapshot.update)

    return {
        "zero": lambda snapshot: zeros_like(snapshot.update),
        "training mean": lambda snapshot: innovation(snapshot.received, average, representation),
        "previous round": previous,
    }


def _mean(tensors: Iterable[Named]) -> Named:
    mean = WeightedMean()
    for named in tensors:
        mean.add(named, 1)

    return mean.mean()


def _errors(heldout: Sequence[Snapshot], guesses: Sequence[Named]) -> Errors:
    true = [snapshot.update for snapshot in heldout]
    return Errors(
        a=_pooled(true, guesses, "A"),
        b=_pooled(true, guesses, "B"),
        all=_pooled(true, guesses, None),
        aggregate=aggregate(heldout, guesses, relative_error),
    )


def _pooled(
    true: Sequence[Named], guesses: Sequence[Named], which: Literal["A", "B"] | None
) -> float:
    lost = signal = 0.0
    for x, y in zip(true, guesses, strict=True):
        names = [name for name in x if which is None or factor(name) == which]
        lost += energy({name: x[name] - y[name] for name in names})
        signal += energy({name: x[name] for name in names})

    return lost / signal if signal > 0 else 0.0


def aggregate(
    heldout: Sequence[Snapshot], guesses: Sequence[Named], measure: Callable[[Named, Named], float]
) -> float:
    """Return the mean over held-out rounds of `measure` between true and guessed mean update."""
    measures = []
    for round in sorted({snapshot.round for snapshot in heldout}):
        members = [index for index, snapshot in enumerate(heldout) if snapshot.round == round]
        measures.append(
            measure(
                _mean([heldout[i].update for i in members]), _mean([guesses[i] for i in members])
            )
        )

    return sum(measures) / len(measures)


def _product_error(heldout: Sequence[Snapshot], guesses: Sequence[Named]) -> float:
    """Return the relative squared error of dM = dB A + (B + dB) dA.

    It is computed by Gram matrices of the 2r columns, never as d x d.
    """
    lost = signal = 0.0
    for snapshot, guess in zip(heldout, guesses, strict=True):
        for name_a in only(snapshot.received, "A"):
            name_b = name_a.replace(".lora_A.", ".lora_B.")
            a = snapshot.received[name_a].double()
            b = snapshot.received[name_b].double()

            def change(
                update: Named,
                a: Tensor = a,
                b: Tensor = b,
                name_a: str = name_a,
                name_b: str = name_b,
            ) -> RankFactors:
                d_b = update[name_b].double()
                d_a = (
                    update[name_a].double() if name_a in update else a.new_zeros(a.shape)
                )  # FFA freezes A
                return (d_b, b + d_b), (a, d_a)

            def product(left: RankFactors, right: RankFactors) -> float:
                return float(
                    sum(
                        ((p.T @ q) * (x @ y.T)).sum()
                        for p, x in zip(*left, strict=True)
                        for q, y in zip(*right, strict=True)
                    )
                )

            true = change(snapshot.update)
            guessed = change(guess)
            signal += product(true, true)
            lost += product(true, true) - 2 * product(true, guessed) + product(guessed, guessed)

    return lost / signal if signal > 0 else 0.0
