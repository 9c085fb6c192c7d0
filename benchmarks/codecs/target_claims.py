"""Claims on bytes until a loss is reached."""

import itertools
from collections.abc import Callable, Sequence
from statistics import mean

from benchmarks.codecs.figures import half_width
from benchmarks.report import Claim, Row


def _reached(row: Row) -> bool:
    """Return True where every seed was run and reached the target."""
    return bool(row["seeds"]) and row["complete"] and row["reached"] == row["seeds"]


def _fewest(rows: Sequence[Row], key: str) -> float | None:
    """Return the fewest bytes among those that reached the target."""
    return min((row[key] for row in rows if _reached(row)), default=None)


def _least(rows: Sequence[Row], key: str) -> float | None:
    """Return the fewest bytes with which an opponent reached the target; if none did, the fewest
    spent, a lower bound."""
    done = _fewest(rows, key)
    return (
        done if done is not None else min((row[key] for row in rows if row["seeds"]), default=None)
    )


def _is(key: str, *values: str) -> Callable[[Row], bool]:
    return lambda row: row[key] in values


def _ratios(
    rows: Sequence[Row], ours: Callable[[Row], bool], theirs: Callable[[Row], bool], key: str
) -> dict[str, float | None]:
    """Return, for each cell, the fewest bytes of ours over theirs.

    The ratio is None where no choice of ours reached the target.

    Cells where one side was not run are left out.
    """
    found: dict[str, float | None] = {}
    for cell in dict.fromkeys(row["cell"] for row in rows):
        here = [row for row in rows if row["cell"] == cell]
        choices = [row for row in here if ours(row) and row["seeds"]]
        other = _least(list(filter(theirs, here)), key)

        if choices and other is not None:
            best = _fewest(choices, key)
            found[cell] = None if best is None else best / other

    return found


def _worst(values: Sequence[float | None]) -> float | None:
    """Return the largest; None if there is none, or one is missing."""
    present = [value for value in values if value is not None]
    return max(present) if present and len(present) == len(values) else None


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Return the four kinds of claims, each over the cells that were run.

    Claim 1 sets the best that can be configured here, whoever invented the codec, against schemes
    as published; claim 4 sets what is new here, trellis, klt and auto, against the best that can be
    assembled from the rest.
    """
    found = []
    for name in dict.fromkeys(row["contender"] for row in rows if row["role"] == "published"):
        ratios = _ratios(
            rows, _is("role", "ours", "assembled"), _is("contender", name), "bytes_all"
        )
        worst = _worst(list(ratios.values()))
        title = (
            f"1: the best choice's amortised bytes over those of {name}, worst of {len(ratios)} "
            "cells"
        )
        found.append(Claim(title, worst, 0.25, "at most"))

    losing, compared = _auto(rows)
    if compared:
        name = (
            f"2: cells of {len(compared)} in which auto ends worse than the best at its rate, "
            "beyond the interval"
        )
        found.append(Claim(name, float(len(losing)), 0, "at most"))

    found += _losses(rows)
    for key, what in (("bytes_up", "up"), ("bytes_all", "amortised")):
        ratios = _ratios(rows, _is("role", "ours"), _is("role", "assembled"), key)
        if ratios:
            share = mean(ratio is not None and ratio <= 0.6 for ratio in ratios.values())
            name = (
                f"4: share of {len(ratios)} cells where our bytes {what} are 0.6 of the best "
                "assembled opponent's"
            )
            found.append(Claim(name, share, 0.5, "at least"))

    return found


def _auto(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Cells in which auto loses, and all in which it was compared: mean difference against its
    paired interval."""
    losing = []
    compared = []

    for row in rows:
        if row["contender"] != "auto" or not row["seeds"]:
            continue

        others = [
            other
            for other in rows
            if other["seeds"] == row["seeds"]
            and all(other[key] == row[key] for key in ("cell", "rate", "both_ways"))
        ]
        best = min(others, key=lambda other: other["loss"])
        differences = [
            own - other for own, other in zip(row["losses"], best["losses"], strict=True)
        ]
        compared.append(row["cell"])

        if mean(differences) > (half_width(differences) or 0.0):
            losing.append(row["cell"])

    return losing, compared


def _losses(rows: Sequence[Row]) -> list[Claim]:
    """Claim 3, of our codecs with error feedback."""
    found = []
    for codec, rate in itertools.product(("trellis", "klt", "klt_trellis"), (16, 32, 64, 128)):
        ours = [row for row in rows if row["contender"] == f"{codec} 1/{rate} + EF"]
        if not ours:
            continue
        if rate <= 32:
            beyond = [
                row["excess"] - row["excess_half"]
                if row["seeds"] and row["excess_half"] is not None
                else None
                for row in ours
            ]
            name = (
                f"3: {codec} 1/{rate}: loss over uncompressed less its interval, nats, worst of "
                f"{len(ours)} cells"
            )
            found.append(Claim(name, _worst(beyond), 0.0, "at most"))
        else:
            name = (
                f"3: {codec} 1/{rate}: loss over uncompressed, less 1, worst of {len(ours)} cells"
            )
            bar = 0.005 if rate == 64 else 0.015
            found.append(
                Claim(name, _worst([row.get("excess_relative") for row in ours]), bar, "at most")
            )

    return found
