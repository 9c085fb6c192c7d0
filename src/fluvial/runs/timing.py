"""Timing for `fluvial check --time`: one optimizer step here, and the time of a round from it."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fluvial.codecs import build, must_learn, read_settings
from fluvial.codecs.auto import AutoSettings, Use, candidates
from fluvial.codecs.coding_time import coding_s
from fluvial.codecs.quantise import Int8Settings
from fluvial.federation.in_process import concurrency
from fluvial.formatting import human_seconds
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.models.outline import Outline
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.runs.budget.preview import shown
from fluvial.runs.config import RunConfig
from fluvial.runs.opening import settled, texts_of
from fluvial.runs.remaining import rough
from fluvial.runs.set_up_time import SetUp, left_out, pre_training, set_up
from fluvial.runs.step_time import Clock, time_answers, time_steps
from fluvial.training.evaluate import heldout

HELDOUT_SEQUENCES = 16


LEAST_LOSS_S = 1.0
"""Seconds of an update that a codec loses against a faster one, from which it is remarked."""


@dataclass(frozen=True)
class MeasuredTimes:
    """Seconds as measured on this machine, alone, with `fleet.threads` threads."""

    site: str
    """The site whose records were used: the one with the most."""
    load_s: float
    """Load of tokenizer, base and data."""
    step_s: float
    """One optimizer step."""
    call_s: float
    """Training of a site in a round, beside its steps."""
    heldout_s: float
    """Loss of one held-out sequence."""
    answer_s: float = 0.0
    """One written answer of the untuned model; 0 where the run asks for none."""
    downlink_s: float = 0.0
    """Coding and decoding an adapter that goes down; 0 where it is not coded, or its codec is
    fitted."""
    coding: "MeasuredCoding | None" = None
    """Time of the codec; None where it must be fitted first, or codes something else than this
    adapter."""


@dataclass(frozen=True)
class MeasuredCoding:
    """Seconds and bytes of the codec of updates and, beside it, of `int8`."""

    codec: str
    """Name of the codec; under `auto`, the candidate that learns nothing."""
    coding_s: float
    """Encoding and decoding of one update."""
    frame_bytes: int
    """Bytes of a frame, at most."""
    int8_coding_s: float
    """Encoding and decoding of one update by `int8`."""
    int8_frame_bytes: int
    """Bytes of its frame."""

    def loss_s(self, up_mbit_s: float) -> float:
        """Return the seconds by which coding and upload take longer than with `int8`."""
        saved = self.int8_frame_bytes - self.frame_bytes
        return self.coding_s - self.int8_coding_s - 8 * saved / (1e6 * up_mbit_s)


@dataclass(frozen=True)
class Work:
    """The work of the sites in a round."""

    steps: Sequence[int]
    """Optimizer steps of each site."""
    heldout: Sequence[int]
    """Held-out sequences of each site."""
    questions: Sequence[int]
    """Answers that each site writes in a measure; nothing where the run asks for none."""
    cohort: int
    """Sites of a round."""
    workers: int
    """Sites that work at a time: on this machine those that share it, on many machines all."""


@dataclass(frozen=True)
class Predicted:
    """Seconds of a run, from measured ones."""

    training_s: float
    """Training in one round, all sites of the cohort."""
    measuring_s: float
    """Measuring held-out text of all sites, once, with the answers that the run asks for."""
    line_s: float
    """The rest of a round over fleet.line, with the codec's time; 0 where no line is set."""
    run_s: float
    """All rounds and held-out measures of the method; set-up and baselines apart."""

    @property
    def round_s(self) -> float:
        """Seconds of one round: training and the rest of it over fleet.line."""
        return self.training_s + self.line_s


def measure(
    config: RunConfig, clock: Clock = time.perf_counter
) -> tuple[MeasuredTimes, Work, SetUp]:
    """Load the model, train some steps on records of the largest site, measure some held-out text
    and write some answers. Return the times, the work of a round, and that of the set-up.

    Nothing is written. Raises `ConfigError` for what cannot be loaded.
    """
    torch.set_num_threads(config.fleet.threads)
    started = clock()
    pool = ModelPool(config.model, config.adapter)
    pool.load()
    texts = texts_of(config, pool)
    config, _ = shown(config, texts)
    chosen = settled(config, pool.layout, pool.outline.base, len(texts.names))
    if chosen.adapter != config.adapter:  # which names the cut
        pool = ModelPool(config.model, chosen.adapter)

    sites = {name: texts.load(name) for name in texts.names}
    largest = max(sites, key=lambda name: len(sites[name].train))
    data = sites[largest]
    loaded = clock()

    step_s, call_s = time_steps(config, pool, data.train, clock)
    some = data.heldout[:HELDOUT_SEQUENCES]

    with pool.model(initial_state(pool.layout, config.seed)) as model:
        before = clock()
        heldout(model, some, pad_token_id=pool.tokenizer.pad_token_id)
        heldout_s = (clock() - before) / len(some)
        answer_s = time_answers(config, pool, model, data.questions, clock)

    coding = _time_coding(config, pool, clock)
    downlink_s = _time_downlink(config, pool, clock)
    found = MeasuredTimes(
        largest, loaded - started, step_s, call_s, heldout_s, answer_s, downlink_s, coding
    )
    tgap = pre_training(config)
    public = texts.public() if tgap is not None and tgap.source == "public" else {}
    trained = {name: site.train for name, site in sites.items()}
    work = _work(
        config,
        [len(site.train) for site in sites.values()],
        [len(site.heldout) for site in sites.values()],
        [len(site.questions) for site in sites.values()],
    )
    return found, work, set_up(config, pool.layout, trained, public)


def predict(
    found: MeasuredTimes, work: Work, *, rounds: int, every: int, line_s: float = 0.0
) -> Predicted:
    """Return the times of a run whose sites do `work` in each of `rounds`, measured every `every`
    rounds.

    Sites share the workers; a round is as long as its longest site, or as all its work divided by
    the workers. At the end held-out text is measured twice, by the base and by the result.
    """
    times = sorted((steps * found.step_s + found.call_s for steps in work.steps), reverse=True)
    share = work.cohort / len(times)
    training_s = max(math.fsum(times) * share / work.workers, times[0])
    answers = work.questions or [0] * len(work.heldout)
    measures = [
        sequences * found.heldout_s + count * found.answer_s
        for sequences, count in zip(work.heldout, answers, strict=True)
    ]
    measuring_s = max(math.fsum(measures) / work.workers, *measures)
    times_measured = 2 + (rounds // every if every else 0)
    run_s = rounds * (training_s + line_s) + times_measured * measuring_s

    return Predicted(training_s, measuring_s, line_s, run_s)


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
    notes = list(planned["notes"])
    coding = found.coding
    apart = _apart(config, found, work, planned["round_over_line_s"])
    if apart and coding is not None:
        notes += _coding_note(config, coding)
    if isinstance(config.method, FedPipeConfig):
        notes.append(
            "times are those of the run's own batch and steps; the plan of a site has others, and "
            "`fluvial plan` predicts their time"
        )
    ahead = predict(found, work, rounds=config.rounds, every=config.evaluate.every)
    bound = (
        "" if config.entry.traits.sends == "codec" or config.entry.traits.pooled else ", at most"
    )
    rows = [
        ("loading model and data, measured", human_seconds(found.load_s)),
        (f"one optimizer step at {found.site}, measured", human_seconds(found.step_s)),
    ]
    if coding is not None:
        words = f"{human_seconds(coding.coding_s)}; int8 {human_seconds(coding.int8_coding_s)}"
        rows.append((f"coding and decoding an update by {coding.codec}, measured", words))
    set_up_s = ahead_of_rounds.seconds(
        step_s=found.step_s, call_s=found.call_s, coding_s=coding.coding_s if coding else 0.0
    )
    if set_up_s:
        what = "set-up: pre-training, and measures of the codec, from these"
        rows.append((what, f"about {rough(set_up_s)}"))
    if found.answer_s:
        rows.append(("one written answer, measured", human_seconds(found.answer_s)))
    written = " with written answers" if found.answer_s else ""
    rows += [
        (
            f"training in a round on this machine, {work.workers} sites at a time{bound}",
            human_seconds(ahead.training_s),
        ),
        (
            f"measuring held-out text of all sites{written} on this machine, once",
            human_seconds(ahead.measuring_s),
        ),
    ]
    here_s = started_s + found.load_s + set_up_s + _here_s(config, found, planned["sites"])
    comparisons = f" with {', '.join(config.compare)} before it" if config.compare else ""
    unknown = left_out(config, Outline(config.model, config.adapter).assignment.layout)
    apart_from = f", apart from {' and '.join(unknown)}" if unknown else ""
    rows.append(
        (
            f"`fluvial run` on this machine{comparisons}, from start to end{apart_from}",
            f"about {rough(here_s)}",
        )
    )
    if apart:
        many = "over fleet.line, each site on a machine like this"
        what = "training and coding" if coding else "training"
        rows += [
            (f"a round {many}, with {what}{bound}", human_seconds(apart.round_s)),
            (
                f"{config.rounds} rounds and their measures {many}, set-up and baselines apart",
                f"about {rough(apart.run_s)}",
            ),
        ]

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


def _here_s(config: RunConfig, found: MeasuredTimes, sites: Sequence[Mapping[str, Any]]) -> float:
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
            _work(each, train, measured, asked),
            rounds=each.rounds,
            every=each.evaluate.every,
        ).run_s
        for each, times in runs
    )


def _time_coding(config: RunConfig, pool: ModelPool, clock: Clock) -> MeasuredCoding | None:
    """Return what coding a whole adapter takes, where a codec codes it and needs no fit."""
    if config.entry.traits.sends != "codec" or pool.full:
        return None

    settings = config.coding
    if isinstance(settings, AutoSettings):
        settings = read_settings(candidates(settings, pool.layout, Use(config.rounds))[0])
    if must_learn(settings):
        return None

    plain = Int8Settings()
    codecs = build(settings, pool.layout), build(plain, pool.layout)
    return MeasuredCoding(
        settings.name,
        coding_s(codecs[0], clock),
        codecs[0].frame_size(settings, pool.layout),
        coding_s(codecs[1], clock),
        codecs[1].frame_size(plain, pool.layout),
    )


def _time_downlink(config: RunConfig, pool: ModelPool, clock: Clock) -> float:
    """Return what coding and decoding a whole adapter for the way down takes."""
    settings = config.downlink
    if settings is None or pool.full or must_learn(settings):
        return 0.0
    return coding_s(build(settings, pool.layout), clock)


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


def _work(
    config: RunConfig,
    train_sequences: Sequence[int],
    heldout_sequences: Sequence[int],
    questions: Sequence[int],
) -> Work:
    count = len(train_sequences)
    answers = questions if config.evaluate.max_new_tokens else ()
    if config.entry.traits.pooled:
        steps = [
            config.train.steps(sum(train_sequences)) * (count if config.train.max_steps else 1)
        ]
        return Work(steps, [sum(heldout_sequences)], [sum(answers)], 1, 1)

    cohort = config.method.cohort(count)
    steps = [config.train.steps(sequences) for sequences in train_sequences]

    workers = min(concurrency(config.fleet), cohort)
    return Work(steps, heldout_sequences, answers, cohort, workers)
