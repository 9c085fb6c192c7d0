"""A plan with times, as `fluvial check --time` prints it: rows, remarks and values."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from fluvial.formatting import human_seconds
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.models.outline import Outline
from fluvial.runs.config import RunConfig
from fluvial.runs.remaining import rough
from fluvial.runs.set_up_time import left_out
from fluvial.runs.step_time import Clock
from fluvial.runs.timing import (
    MeasuredCoding,
    MeasuredTimes,
    Predicted,
    Work,
    measure,
    predict,
    work_of,
)

LEAST_LOSS_S = 1.0
"""Seconds of an update that a codec loses against a faster one, from which it is remarked."""


def timed(
    config: RunConfig,
    planned: dict[str, Any],
    clock: Clock = time.perf_counter,
    *,
    started_s: float = 0.0,
) -> dict[str, Any]:
    """Return `planned` (see `plan.plan`) with what was timed and predicted; a command takes
    `started_s` to begin and to check its data."""
    found, work, ahead_of_rounds = measure(config, clock)
    coding = found.coding
    apart = _apart(config, found, work, planned["round_over_line_s"])
    ahead = predict(found, work, rounds=config.rounds, every=config.evaluate.every)
    set_up_s = ahead_of_rounds.seconds(
        step_s=found.step_s, call_s=found.call_s, coding_s=coding.coding_s if coding else 0.0
    )
    here_s = started_s + found.load_s + set_up_s + runs_s(config, found, planned["sites"])
    unknown = left_out(config, Outline(config.model, config.adapter).assignment.layout)
    rows = [
        *_measured_rows(found, set_up_s),
        *_predicted_rows(config, found, work, ahead),
        _here_row(config, here_s, unknown),
        *(_apart_rows(config, apart, coded=coding is not None) if apart else ()),
    ]

    notes = [*planned["notes"], *found.remarks]
    if apart and coding is not None:
        notes += _coding_note(config, coding)
    if isinstance(config.method, FedPipeConfig):
        notes.append(
            "times are those of the run's own batch and steps; the plan of a site has others, and "
            "`fluvial plan` predicts their time"
        )

    return {
        **planned,
        "rows": [*planned["rows"], *({"what": what, "value": value} for what, value in rows)],
        "notes": notes,
        "time": {
            "site": found.site,
            "load_s": found.load_s,
            "step_s": found.step_s,
            "call_s": found.call_s,
            "heldout_sequence_s": found.heldout_s,
            "workers": work.workers,
            "round_training_s": ahead.training_s,
            "measuring_s": ahead.measuring_s,
            "answer_s": found.answer_s,
            "set_up_s": set_up_s,
            "left_out": unknown,
            "coding_s": coding.coding_s if coding else None,
            "run_s": ahead.run_s,
            "here_s": here_s,
            "many_machines": apart and {**asdict(apart), "round_s": apart.round_s},
        },
    }


def _measured_rows(found: MeasuredTimes, set_up_s: float) -> list[tuple[str, str]]:
    """Return the rows of what was measured, and of the set-up that follows from it."""
    rows = [
        ("loading model and data, measured", human_seconds(found.load_s)),
        (f"one optimizer step at {found.site}, measured", human_seconds(found.step_s)),
    ]
    coding = found.coding
    if coding is not None:
        words = f"{human_seconds(coding.coding_s)}; int8 {human_seconds(coding.int8_coding_s)}"
        rows.append((f"coding and decoding an update by {coding.codec}, measured", words))
    if set_up_s:
        what = "set-up: pre-training, and measures of the codec, from these"
        rows.append((what, f"about {rough(set_up_s)}"))
    if found.answer_s:
        rows.append(("one written answer, measured", human_seconds(found.answer_s)))
    return rows


def _predicted_rows(
    config: RunConfig, found: MeasuredTimes, work: Work, ahead: Predicted
) -> list[tuple[str, str]]:
    """Return the rows of a round and of a measure on this machine."""
    written = " with written answers" if found.answer_s else ""
    return [
        (
            f"training in a round on this machine, {work.workers} sites at a time{_bound(config)}",
            human_seconds(ahead.training_s),
        ),
        (
            f"measuring held-out text of all sites{written} on this machine, once",
            human_seconds(ahead.measuring_s),
        ),
    ]


def _here_row(config: RunConfig, here_s: float, unknown: Sequence[str]) -> tuple[str, str]:
    """Return the row of the whole command on this machine."""
    comparisons = f" with {', '.join(config.compare)} before it" if config.compare else ""
    apart_from = f", apart from {' and '.join(unknown)}" if unknown else ""
    what = f"`fluvial run` on this machine{comparisons}, from start to end{apart_from}"
    return what, f"about {rough(here_s)}"


def _apart_rows(config: RunConfig, apart: Predicted, *, coded: bool) -> list[tuple[str, str]]:
    """Return the rows of a run whose sites each have a machine like this."""
    many = "over fleet.line, each site on a machine like this"
    what = "training and coding" if coded else "training"
    return [
        (f"a round {many}, with {what}{_bound(config)}", human_seconds(apart.round_s)),
        (
            f"{config.rounds} rounds and their measures {many}, set-up and baselines apart",
            f"about {rough(apart.run_s)}",
        ),
    ]


def _bound(config: RunConfig) -> str:
    """Return the words of a time that some sites do not need."""
    traits = config.entry.traits
    return "" if traits.sends == "codec" or traits.pooled else ", at most"


def _apart(
    config: RunConfig, found: MeasuredTimes, work: Work, line_s: float | None
) -> Predicted | None:
    """Return the times of a run whose sites each have a machine like this, so that all of a round
    work at the same time; None where the transfers of a round over `fleet.line` are not known."""
    if not line_s:
        return None
    coding_s = found.coding.coding_s if found.coding else 0.0
    return predict(
        found,
        replace(work, workers=len(work.steps)),
        rounds=config.rounds,
        every=config.evaluate.every,
        line_s=line_s + coding_s,
    )


def runs_s(config: RunConfig, found: MeasuredTimes, sites: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds of a run in this process, where nothing crosses a line, with the
    baselines before it; `sites` are those of `plan.plan`."""
    train = [site["train"] for site in sites]
    measured = [site["heldout"] for site in sites]
    asked = [site["questions"] for site in sites]
    coded = replace(found, call_s=found.call_s + (found.coding.coding_s if found.coding else 0.0))
    runs = [(config.baseline(name), found) for name in config.compare] + [(config, coded)]
    return config.rounds * found.downlink_s + math.fsum(
        predict(
            times,
            work_of(each, train, measured, asked),
            rounds=each.rounds,
            every=each.evaluate.every,
        ).run_s
        for each, times in runs
    )


def _coding_note(config: RunConfig, coding: MeasuredCoding) -> list[str]:
    """Return a remark where the codec takes much longer than the upload that it saves."""
    line = config.fleet.line
    if line is None or coding.loss_s(line.up_mbit_s) < LEAST_LOSS_S:
        return []

    loss = f"{human_seconds(coding.loss_s(line.up_mbit_s))} longer than with int8"
    return [
        f"codec: with {coding.codec}, coding and upload of an update take {loss} at "
        f"{line.up_mbit_s:g} Mbit/s; where time matters more than bytes, choose a faster codec, or "
        "more fleet.threads"
    ]
