"""Seconds of a run's set-up on this machine, estimated from measured steps and codings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fluvial.codecs import CODECS, must_learn
from fluvial.codecs.auto import AutoSettings, Use, candidates
from fluvial.data import Example
from fluvial.exchange.recoding import PASSES
from fluvial.exchange.tgap import TgapConfig, d1_of
from fluvial.federation.in_process import concurrency
from fluvial.methods.cgfedllm.config import CgFedLlmConfig
from fluvial.methods.fedavg import FedAvgConfig
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.runs.config import RunConfig
from fluvial.wire.tensors import Layout


@dataclass(frozen=True)
class SetUp:
    """Work before round 1 that fits or chooses a codec."""

    steps: Sequence[int] = ()
    """Optimizer steps of each site, or simulated site, in a round of the pre-training."""
    rounds: int = 0
    """Rounds of the pre-training."""
    codings: int = 0
    """Updates that the codec codes to be measured."""
    workers: int = 1
    """Sites that work at a time."""

    def seconds(self, *, step_s: float, call_s: float, coding_s: float) -> float:
        """Return the seconds of all of it; sites that work at a time share the machine."""
        times = [steps * step_s + call_s for steps in self.steps]
        round_s = max(math.fsum(times) / self.workers, max(times, default=0.0))
        return self.rounds * round_s + self.codings * coding_s


def set_up(
    config: RunConfig,
    layout: Layout,
    train: Mapping[str, Sequence[Example]],
    public: Mapping[str, Sequence[Example]],
) -> SetUp:
    """Return the set-up of a run whose sites train on `train` and whose public text is `public`."""
    tgap = pre_training(config)
    if tgap is None:
        return SetUp()

    if tgap.source == "public":
        names = sorted(public)[: tgap.simulated_sites]
        counts = [len(public[name]) for name in names]
    else:
        counts = [len(d1_of(examples, tgap.share)) for examples in train.values()]

    measured = (tgap.rounds - tgap.training_rounds) * len(counts)
    codings = 0 if _learned(config, layout) else measured
    if isinstance(config.coding, AutoSettings):
        codings = measured * (1 + PASSES * config.coding.error_feedback)
    steps = [config.train.steps(count) for count in counts]
    workers = max(1, min(concurrency(config.fleet), len(counts)))
    return SetUp(steps, tgap.rounds, codings, workers)


def pre_training(config: RunConfig) -> TgapConfig | None:
    """Return the settings of the pre-training that a run begins with; None without any."""
    method = config.method
    if not isinstance(method, CgFedLlmConfig | FedAvgConfig):
        return None
    if isinstance(method, FedAvgConfig) and not must_learn(config.coding):
        return None
    return None if method.tgap.source == "none" else method.tgap


def left_out(config: RunConfig, layout: Layout) -> list[str]:
    """Return what a run does here that no estimate has."""
    parts = {
        "the fit of a learned codec": pre_training(config) is not None and _learned(config, layout),
        "the trials of [budget]": config.budget is not None,
        "the sites' profiles": isinstance(config.method, FedPipeConfig),
        "measures of each site's model at the others": config.evaluate.cross_site,
        "evaluate.tasks": bool(config.evaluate.tasks),
    }
    return [words for words, known in parts.items() if known]


def _learned(config: RunConfig, layout: Layout) -> bool:
    """Return whether a codec is fitted, as the run's or as a candidate of `auto`."""
    settings = config.coding
    if not isinstance(settings, AutoSettings):
        return must_learn(settings)
    tables = candidates(settings, layout, Use(config.rounds))
    return any(CODECS[str(table["name"])].learned for table in tables)
