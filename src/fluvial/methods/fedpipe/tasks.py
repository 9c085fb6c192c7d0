"""The tasks of a site: measure itself, probe the weights, keep a plan, train by it."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fluvial.codecs import CodecSettings
from fluvial.codecs.forecast import frame_size
from fluvial.data import Example
from fluvial.errors import RefusalError, WireError
from fluvial.exchange import STALE, LocalUpdate, Terms, receive_exchange
from fluvial.federation import sites
from fluvial.federation.adapters import factor_names, modules_of
from fluvial.federation.sites import Site, train_locally
from fluvial.formatting import human_bytes
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.deciding import Deciding
from fluvial.methods.fedpipe.importance import Meter, spectrum
from fluvial.methods.fedpipe.measure import full_load, held, measured
from fluvial.methods.fedpipe.planner.profile import Profile
from fluvial.methods.fedpipe.probe_pass import probe_pass
from fluvial.methods.fedpipe.site_configuration import (
    MOST_VERSIONS,
    VERSION,
    SiteConfiguration,
    format_of,
    with_format,
)
from fluvial.models.assignment import Assignment
from fluvial.models.layer_lists import num_layers
from fluvial.models.states import initial_state
from fluvial.training.config import TrainConfig
from fluvial.wire.payload import Payload, Value
from fluvial.wire.tensors import Named, add

PLAN = "plan"
"""Slot of the site's plan."""
PROFILE = "profile"
"""Slot of the site's last profile."""
STEPS = "steps"
"""Name of the reply value that carries the local steps that were made."""
SECONDS = "s"
"""Name of the reply value that carries seconds, as text of one length, so that the bytes of a run
do not depend on the time that it takes."""
MEMORY_SLACK = 1.1
"""Memory of a plan over that of the site, up to which the site takes it: predictions are that
exact."""
MOST_SECONDS = 999_999.999
LEAST_SECONDS = 0.001
"""Least seconds that training counts with: a slowness of zero would never change again."""
_SECONDS_FORM = re.compile(r"[0-9]{6}\.[0-9]{3}")


def terms(config: FedPipeConfig, codec: CodecSettings) -> Terms:  # noqa: ARG001 - the same for all
    """Return what server and sites agree on."""
    basis = config.aggregation.basis
    return Terms(factors=config.factors, basis="resized" if basis == "fixed" else basis)


def run_assignment(site: Site) -> Assignment:
    """Return the assignment of the run, at whose ranks the server has the adapter."""
    return site.pool.assignment(site.train.per_device_train_batch_size)


def _held(site: Site) -> Assignment:
    """Return the run's assignment in the format in which the site holds the base: that of its
    profile, once it has one."""
    config: FedPipeConfig = site.method
    run = run_assignment(site)
    stored = site.recall(PROFILE)
    if not stored.values:
        first = held(config, site.pool, site.name, site.memory_mb)
        return replace(first, batch=run.batch)

    format = Profile.from_values(stored.values).format
    return run if format == format_of(run) else with_format(run, format)


def _profile(site: Site) -> Profile:
    """Return what the site has measured of itself; where it has lost it, measure again."""
    stored = site.recall(PROFILE)
    if stored.values:
        return Profile.from_values(stored.values)
    known = measured(site, site.method)
    site.keep(PROFILE, Payload(values=known.to_values()))
    return known


def _deciding(site: Site) -> Deciding:
    """Return what plans of the run share, as the site works it out for itself."""
    return Deciding.of(site.method, site.pool, site.codec, site.downlink, site.seed)


def evaluate(site: Site, message: Payload) -> Payload:
    """Measure on held-out text as all methods do, over the base as the site holds it."""
    base = _held(site)
    site.assigned = replace(
        site.assignment, precision=base.precision, quantisation=base.quantisation
    )
    return sites.evaluate(site, message)


def profile(site: Site, message: Payload) -> Payload:  # noqa: ARG001 - it asks for all of it
    """Measure memory, speed and data of the site; the answer has no text and no weight."""
    config: FedPipeConfig = site.method
    values = measured(site, config).to_values()
    site.keep(PROFILE, Payload(values=values))
    return Payload(values=values)


def probe(site: Site, message: Payload) -> Payload:
    """Tune a probe adapter on every candidate weight, and send the score and the spectrum of each.

    The adapter itself is dropped. A batch that the site's memory has no room for is a smaller one,
    one whose layers are recomputed, one of a smaller rank, or one of shorter sequences, by what its
    profile measured.
    Raises `WireError` where none fits, and `RefusalError` where none of those that fit has a label.
    """
    config: FedPipeConfig = site.method
    number = message.whole("number", 0, site.rounds)
    known = _profile(site)
    if not known.peaks:
        raise WireError("probe: the memory of this site has no room for a pass")

    examples = site.load().train
    longest = max(len(example.input_ids) for example in examples)
    fitting = probe_pass(
        config,
        _deciding(site),
        _held(site),
        known,
        longest,
        checkpointing=site.train.gradient_checkpointing,
    )
    site.assigned = fitting.assignment
    start = initial_state(site.layout, site.seed)
    if fitting.room < longest:
        examples = _with_room(examples, max(2, fitting.room), known.memory_bytes)
    modules = modules_of(site.layout.names)
    meter = Meter(modules)

    def watch(parameters: Mapping[str, nn.Parameter]) -> bool:
        gradients = {
            name: parameter.grad.cpu()
            for name, parameter in parameters.items()
            if parameter.grad is not None
        }
        meter.watch({name: p.detach().cpu() for name, p in parameters.items()}, gradients)
        return True

    settings = site.train.model_copy(
        update={
            "max_steps": config.probe_steps,
            "num_train_epochs": 1.0,
            "gradient_checkpointing": fitting.checkpointing,
        }
    )
    update, _ = train_locally(
        site,
        start,
        number,
        examples=examples,
        purpose="probe",
        settings=settings,
        watch=watch,
    )
    factors = add(start, update)
    scores = meter.score(factors, config.importance)
    spectra = [_energies(factors, module, config.probe_rank) for module in modules]

    return Payload(
        {
            "score": torch.tensor([scores[module] for module in modules], dtype=torch.float32),
            "spectrum": torch.stack(spectra),
        },
        {"n": len(examples)},
    )


def _energies(factors: Named, module: str, rank: int) -> torch.Tensor:
    """Return the squared singular values of a probe's change, fp32 (rank,); zeros follow them."""
    name_b, name_a = factor_names(module)
    sigma = spectrum(factors[name_a], factors[name_b])
    energies = torch.zeros(rank, dtype=torch.float32)
    energies[: len(sigma)] = sigma.square().float()
    return energies


def configure(site: Site, message: Payload) -> Payload:
    """Keep the plan in `message`; raises `WireError` for one that the settings do not allow, or for
    which the site has no memory by what it measured itself."""
    config: FedPipeConfig = site.method
    run = run_assignment(site)
    plan = SiteConfiguration.from_payload(message, run)
    sequences = full_load(site.train, len(site.load().train))
    plan.check_allowed(config.planner, config.aggregation, run, sequences)
    layers = num_layers(site.pool.outline.base) or 0
    if any(layer >= layers for layer, _ in plan.assignment.quantisation.layers):
        raise WireError(f"plan: a layer has a format of its own, beyond the {layers} of the model")
    message.whole(VERSION, 1, MOST_VERSIONS)
    _check_memory(site, plan)
    site.keep(PLAN, message)
    return Payload()


def _check_memory(site: Site, plan: SiteConfiguration) -> None:
    """Raise `WireError` for a plan that needs more memory than the site has."""
    profile = _profile(site)
    needed = _deciding(site).memory_bytes(profile, plan)
    if needed > MEMORY_SLACK * profile.memory_bytes:
        raise WireError(
            f"plan: training by it needs {human_bytes(needed)}, more than the "
            f"{human_bytes(profile.memory_bytes)} of this site"
        )


def train(site: Site, message: Payload) -> Payload:
    """Tune the received adapter by the site's plan, and send the change of what is tuned."""
    config: FedPipeConfig = site.method
    stored = site.recall(PLAN)
    if stored.values.get(VERSION) != message.whole(VERSION, 1, MOST_VERSIONS):
        return STALE

    plan = SiteConfiguration.from_payload(stored, run_assignment(site))
    site.assigned = plan.assignment
    received = receive_exchange(site, message, terms(config, site.codec))
    if isinstance(received, Payload):
        return received

    examples = shortened(received.examples(site), plan.length)
    upload = Upload.of(site, config, plan)
    pace = Pace(upload.training_s, config.budget(site.name).speed)
    update, report = train_locally(
        site,
        received.adapter,
        received.round,
        examples=examples,
        factors=config.factors,
        settings=settings_of(site.train, config, plan),
        watch=pace.watch,
    )
    further: dict[str, Value] = {
        STEPS: report.steps,
        SECONDS: f"{min(pace.seconds, MOST_SECONDS):010.3f}",
    }
    share = upload.share(pace.seconds)
    return received.reply(site, LocalUpdate(update, len(examples), report.loss, further, share))


@dataclass(frozen=True)
class Upload:
    """The time that a site has for its update before the deadline."""

    deadline_s: float | None
    least: float
    """Share of the update that is sent whatever the time."""
    whole_s: float
    """Seconds of the whole update on the site's link; 0 where the whole is sent in any case."""

    @classmethod
    def of(cls, site: Site, config: FedPipeConfig, plan: SiteConfiguration) -> "Upload":
        """Return the time of a site that trains by `plan`."""
        whole_s = 0.0
        if plan.up_bytes_s is not None:
            whole_s = frame_size(site.codec, plan.assignment.trained) / plan.up_bytes_s
        return cls(config.deadline_s, config.share_of_upload(site.codec), whole_s)

    @property
    def training_s(self) -> float | None:
        """Seconds for the local steps, until the least share must leave; None with no deadline."""
        return None if self.deadline_s is None else self.deadline_s - self.least * self.whole_s

    def share(self, seconds: float) -> float:
        """Return the share of the update that can be sent after `seconds` of training."""
        if self.deadline_s is None or not self.whole_s:
            return 1.0
        return min(1.0, max(self.least, (self.deadline_s - seconds) / self.whole_s))


def shortened(examples: Sequence[Example], length: int) -> list[Example]:
    """Return the sequences cut to `length` tokens, without those that have no label left.

    Raises `RefusalError` where none has, because uncut ones would need more memory than planned.
    """
    cut = [example.cut(0, length) for example in examples]
    learning = [example for example in cut if example.learns]
    if not learning:
        raise RefusalError(
            f"method.planner.lengths: no sequence of this site has a label in its first {length} "
            "tokens; remove the lengths that end before the answers"
        )
    return learning


def _with_room(examples: Sequence[Example], length: int, memory: int) -> list[Example]:
    """Return the sequences cut to the `length` that `memory` bytes have room for in a probe.

    Raises `RefusalError` where none has a label left.
    """
    try:
        return shortened(examples, length)
    except RefusalError as error:
        raise RefusalError(
            f"probe: {memory:,} B of memory have room for the first {length} tokens of a sequence, "
            "where no sequence of this site has a label; raise method.budgets.memory_mb, or set "
            "method.planner.selection='all', which probes nothing"
        ) from error


def settings_of(run: TrainConfig, config: FedPipeConfig, plan: SiteConfiguration) -> TrainConfig:
    """Return the training of a site: its steps, its checkpointing, its learning rate."""
    ratio = plan.assignment.batch / run.per_device_train_batch_size
    scale = ratio**0.5 if config.learning_rate_by_batch == "sqrt" else 1.0
    return run.model_copy(
        update={
            "max_steps": plan.steps,
            "num_train_epochs": 1.0,
            "gradient_checkpointing": plan.checkpointing,
            "learning_rate": run.learning_rate * scale,
        }
    )


class Pace:
    """The pace of the local steps: they end at the deadline, and wait where a site is slowed down.

    A site whose budget says that it has a share of the machine's speed sleeps after each step for
    as long as the step would have lasted beyond its own time.
    """

    def __init__(self, deadline_s: float | None, speed: float) -> None:
        self._began = time.monotonic()
        self._step = self._began
        self._deadline_s = deadline_s
        self._speed = min(speed, 1.0)
        self._longest_s = 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds since the first step began."""
        return time.monotonic() - self._began

    def watch(self, parameters: Mapping[str, nn.Parameter]) -> bool:  # noqa: ARG002
        """Return whether a step as long as the longest so far fits before the deadline."""
        took_s = time.monotonic() - self._step
        if self._speed < 1:
            time.sleep(took_s * (1 / self._speed - 1))

        now = time.monotonic()
        self._longest_s = max(self._longest_s, now - self._step)
        self._step = now
        return self._deadline_s is None or self.seconds + self._longest_s < self._deadline_s


def read_seconds(reply: Payload) -> float:
    """Return the seconds of training in a reply; raises `WireError` for no such text."""
    text = reply.value(SECONDS, str)
    if not _SECONDS_FORM.fullmatch(text):
        raise WireError(f"message value {SECONDS!r}: {text!r:.40} is no number of seconds")
    return float(text)
