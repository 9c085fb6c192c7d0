"""The settings that a budget leaves open, and a configuration with a choice in their place."""

from dataclasses import dataclass
from typing import Any

from fluvial.errors import CheckpointError, ConfigError
from fluvial.runs.config import RunConfig
from fluvial.storage import toml
from fluvial.storage.run_files import BUDGET, anew


@dataclass(frozen=True)
class Open:
    """Which settings a budget chooses: those that the configuration does not set."""

    target_modules: bool
    r: bool
    max_steps: bool
    rounds: bool
    """True only with `budget.total_steps`."""
    codec: bool
    downlink: bool
    """True only beside a limit that counts downloads."""

    @classmethod
    def of(cls, config: RunConfig) -> "Open":
        """Return what `config` leaves open."""
        lora = config.lora.model_fields_set
        train = config.train.model_fields_set
        return cls(
            "target_modules" not in lora,
            "r" not in lora,
            not train & {"max_steps", "num_train_epochs"},
            config.budget is not None
            and config.budget.total_steps is not None
            and "rounds" not in config.model_fields_set,
            config.codec is None,
            config.downlink is None
            and config.budget is not None
            and config.budget.counts_downloads,
        )

    def __bool__(self) -> bool:
        """Return True where something is open."""
        return any(vars(self).values())


def opened(config: RunConfig) -> Open:
    """Return what `config` leaves open, before anything is chosen; raises `ConfigError` for
    candidates of what is not open, and where trials have no public text."""
    free = Open.of(config)
    budget = config.budget
    steps = "train.max_steps or train.num_train_epochs"
    names = {
        "total_steps": (free.rounds and free.max_steps, steps if free.rounds else "rounds"),
        "target_modules": (free.target_modules, "lora.target_modules"),
        "r": (free.r, "lora.r"),
        "max_steps": (free.max_steps, steps),
        "codecs": (free.codec, "[codec]"),
        "downlinks": (free.downlink, "[downlink]"),
    }
    for name, (is_open, setting) in names.items():
        if budget is not None and not is_open and budget.differs(name):
            raise ConfigError(
                f"budget.{name}: without effect, because {setting} is set, which it would choose; "
                "remove one of the two"
            )

    named = config.data.bundled or config.data.public_source is not None
    if budget is not None and free and not named:
        raise ConfigError(
            "data.public_source: a budget makes its trials on public text, and none is named; name "
            "a file in the language and form of the sites' data, or remove [budget] and set lora.r "
            "and [codec]"
        )

    return free


def nothing_fits(config: RunConfig, free: Open, tried: int) -> str:
    """Return the refusal of a budget that is too small for each of `tried` adapters: what does not
    fit, and the remedy."""
    budget = config.budget
    assert budget is not None
    limits = [f"budget.{name}={limit:.12g}" for name, limit in budget.limits.items() if limit]
    rounds = f"in {config.rounds} rounds"
    if free.rounds:
        rounds = f"in the fewest rounds of {budget.total_steps} steps"
    if free.codec:
        words = f"no adapter of {tried} tried has a codec that needs so little {rounds}; "
    else:
        rate = config.coding.model_dump().get("rate")
        codec = f"{config.coding.name!r}" + ("" if rate is None else f" at rate={rate:g}")
        adapter = "the adapter that is set" if tried == 1 else f"each of {tried} adapters tried"
        words = (
            f"the codec that is set, {codec}, needs more with {adapter} {rounds}; "
            f"{'' if rate is None else 'raise codec.rate, '}remove [codec] so that the budget "
            "chooses it, "
        )
    if budget.counts_downloads and config.downlink is not None:
        words += "remove [downlink], which is set too, so that the budget chooses it, "
    words += "allow more, or run fewer rounds"
    return f"{', '.join(limits)}: {words}"


def settle(config: RunConfig, record: dict[str, Any], place: str = BUDGET) -> RunConfig:
    """Return `config` with the choice of `record` in the place of what it leaves open; raises
    `CheckpointError` for a record without a choice. `place` names the file of the record."""
    free = Open.of(config)
    if not free:
        return config
    table = config.model_dump(exclude_unset=True)
    try:
        chosen = record["chosen"]
        for key, name in (("lora", "target_modules"), ("lora", "r"), ("train", "max_steps")):
            if getattr(free, name) and name in chosen:
                table.setdefault(key, {})[name] = chosen[name]
        if free.rounds:
            table["rounds"] = chosen["rounds"]
        if free.codec:
            table["codec"] = chosen["codec"]
        if free.downlink and chosen["downlink"] is not None:
            table["downlink"] = chosen["downlink"]
    except KeyError as error:
        fault = f"{place}: the choice of the budget has no {error.args[0]!r}"
        raise CheckpointError(f"{fault}; {anew()}") from None
    except (TypeError, AttributeError):
        raise CheckpointError(f"{place}: holds no choice of a budget; {anew()}") from None
    try:
        return toml.read(type(config), table, f"{place}, the choice of the budget")
    except ConfigError as error:
        raise CheckpointError(f"{error}; {anew()}") from None
