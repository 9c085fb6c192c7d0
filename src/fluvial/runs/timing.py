"""Times for `fluvial check --time`: what is measured here, and the time of a round from it."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fluvial.codecs import build, must_learn, read_settings
from fluvial.codecs.auto import AutoSettings, Use, candidates
from fluvial.codecs.coding_time import coding_s
from fluvial.codecs.quantise import Int8Settings
from fluvial.federation.in_process import concurrency
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.runs.budget.preview import shown
from fluvial.runs.config import RunConfig
from fluvial.runs.opening import settled, texts_of
from fluvial.runs.set_up_time import SetUp, pre_training, set_up
from fluvial.runs.step_time import ENOUGH_S, Clock, time_answers, time_steps
from fluvial.training.evaluate import heldout

HELDOUT_SEQUENCES = 16


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
    remarks: Sequence[str] = ()
    """Remarks on the model that its weights tell."""


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
    config: RunConfig, clock: Clock = time.perf_counter, *, enough_s: float = ENOUGH_S
) -> tuple[MeasuredTimes, Work, SetUp]:
    """Load the model, train some steps on records of the largest site, measure some held-out text
    and write some answers. Return the times, the work of a round, and that of the set-up.

    Steps are timed until they take about `enough_s`. Nothing is written. Raises `ConfigError` for
    what cannot be loaded.
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

    step_s, call_s = time_steps(config, pool, data.train, clock, enough_s)
    some = data.heldout[:HELDOUT_SEQUENCES]

    with pool.model(initial_state(pool.layout, config.seed)) as model:
        before = clock()
        heldout(model, some, pad_token_id=pool.tokenizer.pad_token_id)
        heldout_s = (clock() - before) / len(some)
        answer_s = time_answers(config, pool, model, data.questions, clock)

    coding = _time_coding(config, pool, clock)
    downlink_s = _time_downlink(config, pool, clock)
    found = MeasuredTimes(
        largest,
        loaded - started,
        step_s,
        call_s,
        heldout_s,
        answer_s,
        downlink_s,
        coding,
        pool.end_remarks(ends=texts.end_ids()),
    )
    tgap = pre_training(config)
    public = texts.public() if tgap is not None and tgap.source == "public" else {}
    trained = {name: site.train for name, site in sites.items()}
    work = work_of(
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


def work_of(
    config: RunConfig,
    train_sequences: Sequence[int],
    heldout_sequences: Sequence[int],
    questions: Sequence[int],
) -> Work:
    """Return the work of the sites in a round, from the sequences and questions of each."""
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
