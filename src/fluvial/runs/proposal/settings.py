"""The settings of a first run, as they follow from model, data and limits, each with its why."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from fluvial.codecs.auto import AutoSettings
from fluvial.data.faults import listed, shown
from fluvial.errors import ConfigError
from fluvial.models.targets import LoraSettings
from fluvial.runs.proposal.aims import DEFAULT_ROUNDS, PASSES, Aim, aim_of, is_small
from fluvial.runs.proposal.document import Section, Setting, toml_value
from fluvial.runs.proposal.heldout import ALL, Heldout
from fluvial.runs.proposal.lengths import PLAIN, Lengths, proposed_overlong
from fluvial.runs.proposal.limits import Limit, method_for
from fluvial.runs.proposal.methods import method_sections
from fluvial.runs.proposal.models import ModelFacts, can_quantise
from fluvial.runs.proposal.records import DataFacts, SeparateFacts
from fluvial.runs.proposal.same_form import WHY
from fluvial.runs.proposal.sites import Sites, answer_pairs, unused_columns
from fluvial.training.config import TrainConfig
from fluvial.wire.tensors import Layout

RATE_OF_7B = 1.5e-4
"""CG-FedLLM's learning rate for 7 B parameters, from which that of other sizes follows."""
LARGEST_RATE = 5e-3
MEASURED = 100
"""Most held-out sequences of a site that are measured."""
LONGEST_WRITTEN = 32
"""Most tokens of an answer that is written, to be compared with the right one."""
KEY = re.compile(r"[A-Za-z0-9_-]+")
"""Key of TOML that needs no quotes."""


@dataclass(frozen=True)
class Answers:
    """Facts about model and data, and the answers of the user of `fluvial init`."""

    model: ModelFacts
    model_path: str
    """Name of the model as the file has it."""
    data: DataFacts
    data_path: str
    """Name of the source as the file has it."""
    sites: Sites
    lengths: Lengths
    max_length: int
    limits: frozenset[Limit]
    template: str | None = None
    """Chat template that is asked for, as the file has it."""
    uplink_mbps: float | None = None
    public_path: str | None = None
    """Source of public text as the file has it."""
    data_paths: Mapping[str, str] = field(default_factory=dict)
    """Names of the sources of sites that have one each, as the file has them."""
    heldout: Mapping[str, Heldout] = field(default_factory=dict)
    """Held-out records with a source of their own, by site or of all, see `heldout.fitted`."""
    heldout_paths: Mapping[str, str] = field(default_factory=dict)
    """Names of their sources, as the file has them."""

    @property
    def heldout_share(self) -> float:
        """Return the least share of the usual ones that leaves a held-out record to each site
        without a source of these; 0 where there is no such site."""
        counts = self.sharing.values()
        if not counts:
            return 0.0
        least = min(counts)
        return next(share for share in (0.1, 0.2, 0.3, 0.5) if 0 < round(share * least) < least)

    @property
    def sharing(self) -> dict[str, int]:
        """Return the sites that hold out a share of their records."""
        if ALL in self.heldout:
            return {}
        return {name: count for name, count in self.kept.items() if name not in self.heldout}

    @property
    def kept(self) -> dict[str, int]:
        """Return the sites with two records or more; one with a single record cannot take part."""
        return {name: count for name, count in self.sites.counts.items() if count > 1}

    @property
    def sequences(self) -> dict[str, float]:
        """Return the training sequences of each site, about."""
        each = self.lengths.sequences(self.max_length, text=self.data.form == "text")
        share = self.heldout_share
        return {
            name: count * (1 - share if name in self.sharing else 1) * each
            for name, count in self.kept.items()
        }

    @property
    def assumed(self) -> tuple[str, ...]:
        """Return what was assumed for lack of an answer, with the remedy."""
        slow = "slow-links" in self.limits and method_for(self.limits) == "cgfedllm"
        if self.uplink_mbps is not None or not slow:
            return ()
        return (
            f"no uplink is known, so updates are sent at 1/{self.rate:g} of fp32; name the slowest "
            "uplink in Mbit/s with --uplink, or change codec.rate",
        )

    @property
    def small(self) -> bool:
        """Return whether the model is taken as new to every task."""
        return is_small(self.model.parameters)

    @property
    def aim(self) -> Aim:
        """Return the steps and rounds that the run aims at; noise is added in each round."""
        return aim_of(self.model.parameters, private="privacy" in self.limits)

    @property
    def rank(self) -> int:
        """Return the rank of the adapter."""
        return min(LoraSettings().r, self.model.narrowest)

    @property
    def adapter_values(self) -> int:
        """Return the values of the adapter."""
        return self.rank * self.model.adapted

    @property
    def rate(self) -> float:
        """Return how many times smaller than fp32 an update is sent."""
        return round(AutoSettings(uplink_mbps=self.uplink_mbps).target(self.layout), 1)

    @property
    def layout(self) -> Layout:
        """Return the layout of an update, as one tensor."""
        return Layout((("adapter", (self.adapter_values,)),))


def sections(answers: Answers) -> list[Section]:
    """Return the tables of a configuration; raises `ConfigError` where two sites are not left."""
    if len(answers.kept) < 2:
        raise ConfigError(
            f"--data {answers.data.source!r}: only {len(answers.kept)} sites have two records or "
            "more, one to train on and one held out; two such sites are needed"
        )

    train = _train(answers)
    values = TrainConfig.model_validate({each.key: each.value for each in train.settings})
    steps = values.steps(0)
    return [
        Section("", [*_rounds(answers, values.logical_batch, steps), *_compare(answers)]),
        _model(answers),
        _lora(answers),
        _data(answers),
        *_by_site(answers),
        train,
        *method_sections(
            answers.limits,
            list(answers.kept),
            rate=answers.rate,
            update_bytes=answers.layout.raw_bytes,
            uplink_mbps=answers.uplink_mbps,
            public=answers.public_path is not None,
            clip_norm=_clip_norm(answers, values.learning_rate, steps),
        ),
        _evaluate(answers),
    ]


def _rounds(answers: Answers, batch: int, steps: int) -> list[Setting]:
    middle = median(answers.sequences.values())
    wanted = max(PASSES * middle / batch, answers.aim.least_steps) / steps
    rounds = min(answers.aim.most_rounds, max(answers.aim.least_rounds, math.ceil(wanted)))
    passes = rounds * steps * batch / middle
    why = f"{rounds * steps} steps, about {passes:.2g} passes over the data of a middle site"
    return [] if rounds == DEFAULT_ROUNDS else [Setting("rounds", rounds, why)]


def _compare(answers: Answers) -> list[Setting]:
    method = method_for(answers.limits)
    if method == "flglm" or "privacy" in answers.limits:
        return []
    if method == "cgfedllm":
        why = "each site alone, and the same run without compression"
        return [Setting("compare", ["local", "fedavg"], why)]
    return [Setting("compare", ["local"], "each site alone: what the federation must be ahead of")]


def _model(answers: Answers) -> Section:
    model = answers.model
    settings = [Setting("name_or_path", answers.model_path, model.words())]
    remarks = []
    if model.wants_float32 and "small-memory" not in answers.limits:
        why = f"quicker than {model.dtype} on the CPU of this machine, at twice the memory"
        settings.append(Setting("dtype", "float32", why))
    if "small-memory" in answers.limits:
        if can_quantise():
            why = "the frozen base in 4 bits a value (QLoRA); only adapters travel"
            settings.append(Setting("quantization", "nf4", why))
        else:
            remarks.append(
                'quantization = "nf4" holds the base in 4 bits; install it first: pip install '
                "'fluvial[quantization]'"
            )
    return Section("[model]", settings, remarks=remarks)


def _lora(answers: Answers) -> Section:
    settings = []
    if answers.rank != LoraSettings().r:
        why = "no linear module of the model is wider"
        settings.append(Setting("r", answers.rank, why))
    return Section("[lora]", settings)


def _source(answers: Answers, data: DataFacts, path: str, site: str = ALL) -> list[Setting]:
    """Return the settings of a source of records and of its held-out records: where they lie, and
    how they are read."""
    settings = [Setting("source", path, f"{len(data.rows):,} records, {data.form}")]
    for key, value in data.files.reading.items():
        settings.append(Setting(key, value, "as the file was found; `fluvial preview` shows it"))
    if data.columns:
        why = "our field = your column"
        settings.append(Setting("columns", dict(data.columns), why))
    if data.read_as is not None:
        settings.append(Setting("read_as", data.read_as, WHY[data.read_as]))
    apart = answers.heldout.get(site)
    if data.numbers or (apart is not None and apart.facts.numbers):
        settings.append(Setting("numbers", "text", "some texts are JSON numbers"))
    if apart is None:
        return settings

    why = "held-out records of this site"
    if site == ALL:
        why = "held-out records, divided among the sites as the others"
    elif list(answers.heldout_paths.values()).count(answers.heldout_paths[site]) > 1:
        why = "held-out records that sites share"
    settings.append(Setting("heldout_source", answers.heldout_paths[site], why))
    if apart.reading:
        settings.append(Setting("heldout", dict(apart.reading), apart.reading_why))
    return settings


def chat_template(answers: Answers, data: DataFacts, site: str = ALL) -> list[Setting]:
    """Return the chat template of records, or held-out records, that are conversations, where one
    is asked for or the tokenizer has none."""
    apart = answers.heldout.get(site)
    chats = data.is_conversation or (apart is not None and apart.facts.is_conversation)
    if chats and answers.template is not None:
        return [Setting("chat_template", answers.template, "asked for with --chat-template")]
    if not chats or answers.model.has_template:
        return []
    why = "roles as words, since the tokenizer has no chat template"
    return [Setting("chat_template", PLAIN, why)]


def _by_site(answers: Answers) -> list[Section]:
    """Return a table for the source of each site, where each has one of its own."""
    if not isinstance(answers.data, SeparateFacts):
        return []
    return [
        Section(
            f"[data.by_site.{toml_value(name) if not KEY.fullmatch(name) else name}]",
            [
                *_source(answers, part, answers.data_paths[name], name),
                *chat_template(answers, part, name),
            ],
            remarks=_not_used(answers, part, f" at {shown(name)}"),
        )
        for name, part in answers.data.parts.items()
    ]


def _data(answers: Answers) -> Section:
    data = answers.data
    separate = isinstance(data, SeparateFacts)
    settings = [] if separate else _source(answers, data, answers.data_path)
    settings += [*_sites(answers), *_lengths(answers)]
    settings += [] if separate else chat_template(answers, data)
    if answers.public_path is not None:
        why = "text of no site, on which the codec is chosen"
        settings.append(Setting("public_source", answers.public_path, why))
    return Section("[data]", settings, remarks=[] if separate else _not_used(answers, data))


def _not_used(answers: Answers, data: DataFacts, where: str = "") -> list[str]:
    """Return a comment that names the columns which no setting uses, and how to learn one."""
    unused = unused_columns(data, answers.sites)
    if not unused:
        return []

    pairs = answer_pairs(data, answers.sites)
    remark = f"not used{where}: {listed(unused)}"
    if pairs:
        (text, answer), *_ = pairs
        remark += f"; for {text} -> {answer}: columns = "
        remark += toml_value({"prompt": text, "completion": answer})
    return [remark]


def _sites(answers: Answers) -> list[Setting]:
    by = dict(answers.sites.partition)
    settings = [Setting("partition", by, answers.sites.why)] if by else []
    left_out = sorted(set(answers.sites.counts) - set(answers.kept))
    if left_out:
        why = f"without {', '.join(map(shown, left_out[:5]))}, which have one record each"
        settings.append(Setting("sites", sorted(answers.kept), why))
    share = answers.heldout_share
    counts = answers.sharing
    if counts and share != 0.1:
        least = min(counts, key=lambda name: counts[name])
        why = f"the smallest site, {shown(least)}, has {counts[least]} records"
        settings.append(Setting("heldout_share", share, why))
    largest = max((answers.sequences[name] for name in counts), default=0.0)
    if largest * share / (1 - share) > MEASURED:
        settings.append(Setting("max_heldout", MEASURED, "enough for the mean of a site"))
    return settings


def _lengths(answers: Answers) -> list[Setting]:
    lengths = answers.lengths
    length = answers.max_length
    over = lengths.longer_than(length)
    text = answers.data.form == "text"
    looked = f"the longest record of {lengths.sample} has {lengths.longest} tokens"
    bound = answers.model.context
    why = f"{looked}; the model reads {bound}" if bound and length == bound else looked
    if text and over:
        why += "; longer text is cut into windows"
    settings = [Setting("max_length", length, why)] if length != 128 else []
    how = proposed_overlong(lengths, length, text=text)
    if how is not None:
        whole = how == "shorten_prompt"
        kept = "the beginning of the prompt goes, the answer stays whole" if whole else "the end"
        longer = "1 record is" if over == 1 else f"{over} records are"
        settings.append(Setting("overlong", how, f"{longer} longer: {kept}"))
    return settings


def _train(answers: Answers) -> Section:
    model = answers.model
    small = "small-memory" in answers.limits
    middle = median(answers.sequences.values())
    batch = 8 if middle >= 16 else max(1, int(middle // 2))
    device = batch if model.parameters < 10**9 else min(batch, 4 if model.parameters < 4e9 else 2)
    device = 1 if small else device
    aim = answers.aim
    wanted = max(PASSES * middle / batch, aim.least_steps) / aim.most_rounds
    steps = min(aim.most_steps, max(aim.round_steps, math.ceil(wanted)))
    steps = min(steps, max(2, round(middle / batch)))
    settings = [_learning_rate(model)]
    settings = [each for each in settings if each.value != TrainConfig().learning_rate]

    if device != TrainConfig().per_device_train_batch_size:
        why = "one sequence in a pass: the least memory" if small else "what fits beside the base"
        if batch == device:
            why = "the sites have few records"
        settings.append(Setting("per_device_train_batch_size", device, why))
    if batch != device:
        why = f"{batch} sequences a step in the memory of {device}"
        settings.append(Setting("gradient_accumulation_steps", batch // device, why))

    shown_share = steps * batch / middle
    why = f"of a site in a round: {shown_share:.0%} of the data of a middle site"
    if answers.small:
        why += "; in longer rounds sites drift apart"
    settings.append(Setting("max_steps", steps, why))
    if small:
        why = "activations are computed again, not held"
        settings.append(Setting("gradient_checkpointing", True, why))
    return Section("[train]", settings)


def _evaluate(answers: Answers) -> Section:
    """Return the table that has held-out answers written, where they are short and no secret."""
    longest = answers.lengths.longest_answer
    asked = answers.data.form != "text"
    if not asked or longest > LONGEST_WRITTEN or answers.limits & {"privacy", "base-stays"}:
        return Section("[evaluate]", [])
    why = "held-out answers are written and compared: exact match and F1"
    return Section("[evaluate]", [Setting("max_new_tokens", longest, why)])


def _learning_rate(model: ModelFacts) -> Setting:
    exact = min(LARGEST_RATE, RATE_OF_7B * math.sqrt(7e9 / model.parameters))
    rate = float(f"{exact:.1g}")
    why = "small models take larger steps: 1.5e-4 at 7 B parameters, times the root of the ratio"
    if exact == LARGEST_RATE:
        why = "a small model takes a large step; 1.5e-4 is for 7 B parameters"
    return Setting("learning_rate", rate, why)


def _clip_norm(answers: Answers, learning_rate: float, steps: int) -> float:
    """Return an estimate of an update's norm: under Adam with linear decay, a value moves by about
    a quarter of the sum of the learning rates."""
    moved = learning_rate * (steps + 1) / 2 / 4
    return float(f"{moved * math.sqrt(answers.adapter_values):.1g}")
