"""Settings that change nothing in this run, known once its sites, plan and records are.

What the tables alone tell is refused earlier, by `RunConfig`. Baselines of a run share its tables,
so only the method itself is held to them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fluvial.data import SiteTexts
from fluvial.errors import ConfigError
from fluvial.methods import METHODS
from fluvial.methods.interface import Plan
from fluvial.methods.measuring import Texts
from fluvial.models.cpu_types import slow_types
from fluvial.runs.config import RunConfig
from fluvial.runs.opening import train_config

_SCHEDULE = "train.lr_scheduler_type"
_OF_STEPS = (_SCHEDULE, "train.warmup_ratio", "train.warmup_steps")
"""Settings that shape the learning rate over the steps of a round."""


def refuse_idle(config: RunConfig, planned: Plan, texts: Texts) -> None:
    """Raise `ConfigError` with every setting that has another value than its default and no effect.

    Records that are here have been checked (`SiteTexts.check`); those of a deployment are not, and
    neither are settings that depend on them.
    """
    idle = {**planned.idle, **_idle_in_steps(config, planned, texts)}
    if isinstance(texts, SiteTexts):
        idle |= texts.idle()

    lines = [
        f"{place}: without effect, because {why}; remove it" for place, why in _chosen(config, idle)
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def idle_remarks(config: RunConfig, planned: Plan, texts: Texts) -> Iterator[str]:
    """Yield remarks on settings that are no mistake: those of the method, on settings without
    effect, and on a float type that makes this machine slow.

    A run may be a short trial of a longer one. Methods are compared by one file, and not all of
    them read public text. A file for many machines names their sites.
    """
    later = dict(planned.later)
    if config.rounds == 1:
        later["train.round_scheduler_type"] = "it has 1 round, which has the whole learning rate"
    for place, why in _chosen(config, later):
        yield f"{place}: without effect in this run, because {why}"

    yield from _long_warmup(config, planned, texts)
    yield from planned.remarks()
    if isinstance(texts, SiteTexts):
        yield from slow_types(config.model, autocast=config.train.bf16)
    names = sorted(texts.names)
    if isinstance(texts, SiteTexts) and config.fleet.sites and sorted(config.fleet.sites) != names:
        yield (
            "fleet.sites: without effect in this run, because all sites of the data are here and "
            f"take part ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        )

    measures_public = config.promise is not None and not config.promise.measures
    read = planned.reads_public or measures_public or config.budget is not None
    if config.data.public_source is None or read:
        return

    yield (
        f"data.public_source: not used, because method {config.method.name!r} reads no public text "
        "with these settings"
    )


def _chosen(config: RunConfig, idle: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield those of `idle` whose value is not the default, with the reason."""
    chosen = config.model_dump(exclude_defaults=True)
    yield from ((place, why) for place, why in idle.items() if _holds(chosen, place))


def _idle_in_steps(config: RunConfig, planned: Plan, texts: Texts) -> dict[str, str]:
    """Return the settings of the learning rate where all training is of one step a round."""
    if any(METHODS[name].traits.pooled for name in config.compare):
        return {}  # pooled data has a step for each site
    if _steps(config, planned, texts) != 1:
        return {}
    why = "no site takes more than one optimizer step in a round"
    flat = config.train.lr_scheduler_type == "constant"  # which is what one step has
    return {place: why for place in _OF_STEPS if not (flat and place == _SCHEDULE)}


def _long_warmup(config: RunConfig, planned: Plan, texts: Texts) -> Iterator[str]:
    """Yield a remark where the warm-up is longer than a round, whose learning rate thus never
    reaches its peak: the schedule begins anew in each round."""
    steps = _steps(config, planned, texts)
    warmup = config.train.warmup_steps
    if steps is None or warmup <= steps:
        return
    remedy = f"set fewer than {steps:,}, or train.warmup_ratio" if steps > 1 else "remove it"
    yield (
        f"train.warmup_steps = {warmup:,}: no site takes more than {steps:,} optimizer "
        f"{'step' if steps == 1 else 'steps'} in a round, so the learning rate rises to "
        f"{steps / warmup:.1%} of train.learning_rate at most, and begins anew in each round; "
        f"{remedy}"
    )


def _steps(config: RunConfig, planned: Plan, texts: Texts) -> int | None:
    """Return the most optimizer steps that a visit to a site takes; None where that is unknown."""
    train = train_config(config, len(texts.names))
    if train.max_steps is not None:
        return max(1, train.max_steps // planned.visits)
    if not isinstance(texts, SiteTexts) or planned.reads_public:
        return None  # simulated sites train on public text, by passes over it

    counts = texts.num_train.values()
    most = sum(counts) if config.entry.traits.pooled else max(counts)
    return max(1, train.steps(most) // planned.visits)


def _holds(table: Mapping[str, Any], place: str) -> bool:
    """Return true if nested tables have a value at a dotted place."""
    inner: Any = table
    for name in place.split("."):
        if not isinstance(inner, Mapping) or name not in inner:
            return False
        inner = inner[name]

    return True
