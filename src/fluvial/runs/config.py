"""The configuration of a run: TOML written by people, checked as a whole before anything is
loaded."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from fluvial import caller
from fluvial.codecs import CodecConfig, CodecSettings, must_learn
from fluvial.codecs.quantise import IdentitySettings
from fluvial.data import DataConfig, inlined_templates
from fluvial.errors import ConfigError
from fluvial.federation.config import FleetConfig
from fluvial.methods import METHODS, Baseline, Method, MethodConfig
from fluvial.methods.aggregating import AveragingSettings
from fluvial.methods.fedavg import FedAvgConfig
from fluvial.methods.interface import Promise, Tune
from fluvial.methods.measuring import EvaluateConfig
from fluvial.models.part_tuning import PartTuning, Tuning, tunes_weights
from fluvial.models.pretrained import ModelConfig
from fluvial.models.targets import LoraSettings
from fluvial.runs.budget.config import BudgetConfig
from fluvial.runs.budget.fit import budget_conflicts
from fluvial.runs.trackers import Tracker
from fluvial.runs.without_effect import useless
from fluvial.settings import Settings
from fluvial.storage import paths, toml
from fluvial.storage.recipes import table_of
from fluvial.training.config import TrainConfig


class RunConfig(Settings):
    """Everything that defines a run."""

    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Seed of every random stream of the run."""
    rounds: int = Field(20, ge=1, le=10**6)
    """Number of rounds; CG-FedLLM has 20 with Dolly, 5 with C-Eval, 8 with MMLU."""
    compare: tuple[Baseline, ...] = ()
    """Baselines that are run first with the same data, steps and code."""
    page: Literal["rounds", "end", "never"] = "rounds"
    """Times at which report.html, the page of the run, is written into its folder: after rounds, as
    often as takes at most a hundredth of the run's time; at the end; or never."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers that get the measures of each round, by accelerate's names. They write into the
    run's folder, and report nothing over a network unless their own environment variables say
    so."""
    profile: tuple[int, ...] = ()
    """Rounds of which torch.profiler writes a trace into the run's folder, such as `[2]`: the first
    round also warms up. Sites in other processes are not traced."""
    model: ModelConfig = ModelConfig()
    tune: Tune | None = None
    """Weights that are tuned: a LoRA adapter ("lora"), or all ("full"); unset, the method's
    default."""
    lora: LoraSettings = LoraSettings()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    method: MethodConfig = FedAvgConfig()
    """Method of the run, and its settings."""
    codec: CodecConfig | None = None
    """Codec of the updates; unset, the method's default."""
    downlink: CodecConfig | None = None
    """Codec of the adapter on its way to the sites, against what a site already holds; unset, the
    adapter is sent exactly."""
    fleet: FleetConfig = FleetConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    budget: BudgetConfig | None = None
    """Cost limits, within which settings that are not set are chosen by trials; unset, these have
    their defaults."""

    @property
    def entry(self) -> Method:
        """The method."""
        return METHODS[self.method.name]

    @property
    def coding(self) -> CodecSettings:
        """The codec's settings, the method's default filled in."""
        return self.codec or self.entry.traits.codec

    @property
    def tuned(self) -> Tune:
        """Return what is tuned, the method's default filled in."""
        return self.tune or self.entry.traits.tunes[0]

    @property
    def adapter(self) -> Tuning:
        """The adapter's settings; None where all weights are tuned, or the kinds of parts."""
        return self.method.tuning(self.tuned, self.lora)

    @property
    def promise(self) -> Promise | None:
        """Return the differential privacy that the method promises, if any."""
        return self.method.promise()

    def conflicts(self) -> Iterator[str]:
        """Yield what does not fit together among the tables."""
        yield from self._beside_the_promise()
        yield from self._unfit_for_what_is_tuned()
        yield from self._without_effect()
        yield from self._downlink_conflicts()
        yield from budget_conflicts(self)

        beyond = [number for number in self.profile if not 1 <= number <= self.rounds]
        if beyond:
            yield f"profile: there is no round {beyond[0]}; the run has rounds 1 to {self.rounds}"
        if self.method.name in self.compare:
            yield f"compare: {self.method.name!r} is the method itself; remove it from the list"

    def _beside_the_promise(self) -> Iterator[str]:
        """Yield what would leave the sites beside what differential privacy counts."""
        if self.promise is None:
            return

        if self.compare:
            yield (
                f"compare: {', '.join(self.compare)} would send undisturbed updates or losses of "
                "the same data, which method.privacy does not count; remove it, and run these on "
                "their own where that may leave"
            )

        for name in ("every", "max_new_tokens"):
            if getattr(self.evaluate, name) and not self.promise.measures:
                yield (
                    f"evaluate.{name}: without effect, because method.privacy.heldout='none' "
                    "measures nothing at the sites; remove it, or set heldout='exact', which is "
                    "outside epsilon"
                )

    def _unfit_for_what_is_tuned(self) -> Iterator[str]:
        if self.tuned not in self.entry.traits.tunes:
            known = " or ".join(self.entry.traits.tunes)
            yield f"tune={self.tuned!r}: method {self.method.name!r} tunes {known} only; remove it"

        as_lora, as_full = (self.method.tuning(tune, self.lora) for tune in get_args(Tune))
        if as_lora == as_full and "tune" in self.model_fields_set and not self.compare:
            yield "tune: without effect, because method.parts names every part; remove it"

        adapter = self.adapter
        by_parts = isinstance(adapter, PartTuning) or self.tuned == "lora"
        adapts = adapter.tunes("lora") if isinstance(adapter, PartTuning) else adapter is not None
        compared = bool(self.compare) and self.tuned == "lora"
        if not adapts and not compared and "lora" in self.model_fields_set:
            yield (
                "lora: without effect, because no part of the model has an adapter; remove it, or "
                "set a part of method.parts to 'lora'"
                if by_parts
                else "lora: without effect, because all weights are tuned; remove it, or "
                "set tune = 'lora'"
            )

        yield from self._unfit_for_a_quantised_base()

        if (
            self.tuned == "full"
            and self.codec is not None
            and (must_learn(self.codec) or self.codec.weighted)
        ):
            does = "learns" if must_learn(self.codec) else "scales by partners"
            yield (
                f"codec: {self.codec.name!r} {does} among LoRA factors, and here all weights are "
                "tuned; choose a codec that learns nothing, such as 'int8' or 'hadamard', "
                "without 'weighted'"
            )

    def _unfit_for_a_quantised_base(self) -> Iterator[str]:
        why = None

        if not self.entry.traits.quantised:
            why = f"method {self.method.name!r} trains, sends or cuts the base's float weights"
        elif tunes_weights(self.adapter):
            why = (
                "weights of the base are tuned, and steps of training are far smaller than those "
                "of 4 or 8 bits"
            )

        if why is not None:
            for name in self.model.quantisation_settings:
                yield f"model.{name}: {why}; remove it, or tune an adapter under another method"

    def _without_effect(self) -> Iterator[str]:
        for table, settings in (("codec", self.codec), ("downlink", self.downlink)):
            if settings is None or settings.error_feedback:
                continue
            if settings.feedback_decay != CodecSettings.model_fields["feedback_decay"].default:
                yield (
                    f"{table}.feedback_decay: without effect, because error_feedback is false; "
                    "remove it"
                )

        traits = self.entry.traits
        if self.data.packing and not traits.packs:
            yield (
                f"data.packing: method {self.method.name!r} sends each record's hidden states by "
                "themselves; remove it"
            )
        chosen = f", which {traits.coded_by} choose" if traits.coded_by else ""
        why = {"own code": f"has a code of its own{chosen}", "nothing": "sends no update"}.get(
            traits.sends
        )
        for table, settings in (("codec", self.codec), ("downlink", self.downlink)):
            if settings is not None and why is not None:
                yield (
                    f"{table}: without effect, because method {self.method.name!r} {why}; remove it"
                )

        if (
            self.codec is not None
            and self.codec.weighted
            and why is None
            and not self.entry.traits.weighted
        ):
            yield (
                f"codec.weighted: without effect, because method {self.method.name!r} codes its "
                "updates as they are; remove it"
            )
        elif isinstance(self.codec, IdentitySettings) and self.codec.weighted:
            yield (
                "codec.weighted: without effect, because codec 'identity' loses nothing; remove it"
            )

        if isinstance(self.codec, IdentitySettings) and self.codec.error_feedback:
            yield (
                "codec.error_feedback: without effect, because codec 'identity' loses nothing; "
                "remove it"
            )

        if self.evaluate.cross_site and "local" not in self.compare:
            yield (
                "evaluate.cross_site: without effect, because the models of single sites are those "
                "of the baseline 'local'; add it to compare, or remove this"
            )

        yield from self._useless_to_the_method()
        if self.evaluate.every > self.rounds:
            yield (
                f"evaluate.every={self.evaluate.every}: without effect, because the run has "
                f"{self.rounds} rounds; choose at most as many, or remove it"
            )

    def _useless_to_the_method(self) -> Iterator[str]:
        """Yield what is set in `[fleet]` and `[evaluate]` and changes nothing under the method."""
        tables: dict[str, Settings] = {"fleet": self.fleet, "evaluate": self.evaluate}
        for setting in useless(self.method, self.entry.traits):
            if getattr(tables[setting.table], setting.name) != setting.default:
                yield (
                    f"{setting.table}.{setting.name}: without effect, because method "
                    f"{self.method.name!r} {setting.why} with these settings; remove it"
                )

    def _downlink_conflicts(self) -> Iterator[str]:
        if self.downlink is None or self.entry.traits.sends != "codec":
            return

        why = {"own code": "has a downlink of its own", "exact": "sends exact adapters"}.get(
            self.entry.traits.receives
        )
        if why is not None:
            yield f"downlink: without effect, because method {self.method.name!r} {why}; remove it"
        if must_learn(self.downlink):
            yield (
                f"downlink.name={self.downlink.name!r} must be learned, and nothing is learned for "
                "the downlink; choose a codec that learns nothing, such as 'trellis'"
            )

        if self.downlink.error_feedback:
            yield "downlink.error_feedback: the downlink always has error feedback; remove it"
        if self.downlink.weighted:
            yield "downlink.weighted: only the uplink can be weighted; remove it"
        if self.downlink.snr_driven:
            yield (
                "downlink: snr_db and noise_ratio follow errors that sites report, and these have "
                "none of the downlink; set downlink.rate"
            )

    def baseline(self, name: Baseline) -> "RunConfig":
        """Return the same run with another method, uncompressed, without further baselines and
        without settings that the other has no use for; "fedavg" moves the adapter as this run."""
        left_out = {"codec", "downlink", "compare", "budget", "page", "profile"}
        table = self.model_dump(exclude=left_out, exclude_unset=True)
        entry = METHODS[name]
        table.get("evaluate", {}).pop("cross_site", None)
        for setting in useless(entry.config.model_validate({"name": name}), entry.traits):
            table.get(setting.table, {}).pop(setting.name, None)

        if self.tuned == "full":  # of parts with an adapter, which a baseline does not have
            table.pop("lora", None)

        method: dict[str, Any] = {"name": name}
        if name == "fedavg" and isinstance(self.method, AveragingSettings):
            method |= self.method.server_optimizer
        return RunConfig.model_validate({**table, "method": method, "tune": self.tuned})

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, as JSON types."""
        return self.model_copy(update={"codec": self.coding, "tune": self.tuned}).model_dump(
            mode="json"
        )


def load(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    as_written: bool = False,
    kind: type[RunConfig] | None = None,
) -> RunConfig:
    """Read a TOML file and apply overrides, each a line of TOML such as `method.fraction = 0.5`.

    Relative paths in the file are relative to its folder, those of overrides to the working
    directory, and the result has them whole. With `as_written` they stay, for sites that have them
    elsewhere. `recipe:NAME` is the recipe of that name, with paths relative to the working
    directory. Raises `ConfigError` with every problem found, its place and the nearest known key.
    """
    table = table_of(path, as_written=as_written)
    for line in overrides:
        change = override(line)
        table = merge(table, change if as_written else paths.here(change))

    where = f"{path} with {caller.overrides()}" if overrides else str(path)
    return with_chat_template(parse(table, where, kind=kind))


def with_chat_template(config: RunConfig) -> RunConfig:
    """Return `config` with the text of the chat template's file, so that a site needs no file of
    the server's."""
    data = inlined_templates(config.data)
    return config if data is config.data else config.model_copy(update={"data": data})


def parse(table: dict[str, Any], where: str, *, kind: type[RunConfig] | None = None) -> RunConfig:
    """Return the configuration of a table; its paths are relative to the working directory.

    `kind` is a class that knows further methods or codecs.
    """
    return toml.read(kind or RunConfig, table, where)


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Dotted names of the settings in which two resolved configurations differ."""
    left = dict(_flat(ours))
    right = dict(_flat(theirs))
    return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def override(line: str) -> dict[str, Any]:
    """The table that one line of TOML stands for; raises `ConfigError`."""
    try:
        return toml.parsed(line)
    except ValueError as error:
        key, _, value = line.partition("=")
        hint = (
            "; text needs quotes: " + caller.setting(f'{key.strip()}="{value.strip()}"')
            if value and len(value) < 300
            else "; write key=value"
        )
        raise ConfigError(
            f"{caller.overrides()} {line!r:.300}: not a line of TOML ({error}){hint}"
        ) from None


def merge(table: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` over `table`, key by key; another method, codec or partition takes the place of the
    whole table."""
    if any(tag in change and tag in table and change[tag] != table[tag] for tag in toml.TAGS):
        return change

    merged = dict(table)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )

    return merged
