"""Opening of a run's sites: their data, their tasks, and whether all settings fit together."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from torch import nn

from fluvial.data import Example, SiteData, SiteTexts
from fluvial.errors import ConfigError, wrong_return
from fluvial.federation.sites import COMMON_TASKS, Site, Task
from fluvial.federation.store import StateStore
from fluvial.methods.interface import Given, Plan
from fluvial.methods.measuring import Texts
from fluvial.models.base_weights import check_constant
from fluvial.models.behaviour import check_positions
from fluvial.models.encoding import Encoder
from fluvial.models.outline import Outline
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import check_length, context_length, dtype_of
from fluvial.runs.config import RunConfig
from fluvial.training.config import TrainConfig
from fluvial.training.processes import refuse_alone
from fluvial.wire.tensors import Layout


class Records(Protocol):
    """The records of one site, or of all sites of this process."""

    notes: list[str]

    @property
    def names(self) -> Sequence[str]:
        """Names of the sites."""
        ...

    @property
    def load(self) -> Callable[[str], SiteData]:
        """Return the data of the site of this name."""
        ...

    def pooled(self) -> SiteData:
        """Return the data of all sites together."""
        ...


def texts_of(config: RunConfig, pool: ModelPool, owner: str | None = None) -> SiteTexts:
    """Return the data of all sites, or of the one site `owner`, for the model of `pool`."""
    return SiteTexts(
        config.data,
        pool.tokenizer,
        seed=config.seed,
        owner=owner,
        num_embeddings=pool.outline.num_embeddings,
        context=pool.outline.context,
    )


def site_of(
    config: RunConfig, name: str, pool: ModelPool, texts: Records, store: StateStore
) -> Site:
    """Return the site `name` for one message, with the data that `texts` has for it."""
    return Site(
        name=name,
        seed=config.seed,
        pool=pool,
        load=texts.pooled if config.entry.traits.pooled else partial(texts.load, name),
        train=train_config(config, len(texts.names)),
        codec=config.coding,
        method=config.method,
        downlink=config.downlink,
        store=store,
        rounds=config.rounds,
    )


def check_processes(config: RunConfig) -> None:
    """Raise `RefusalError` for a run that the processes of this site cannot train together."""
    refuse_alone(config.model.device, config.method.name, shares=config.entry.traits.shares_steps)


def train_config(config: RunConfig, sites: int) -> TrainConfig:
    """Return [train]; where data is pooled, with as many steps as all sites together."""
    if not config.entry.traits.pooled or config.train.max_steps is None:
        return config.train
    return config.train.model_copy(update={"max_steps": config.train.max_steps * sites})


def tasks_of(config: RunConfig) -> dict[str, Task]:
    """Return the tasks of this run by name; beside a promise of privacy only those it counts."""
    tasks = {**COMMON_TASKS, **config.entry.tasks}
    promise = config.promise

    if promise is None:
        return tasks
    return {name: task for name, task in tasks.items() if name in promise.tasks}


def check_settings(config: RunConfig, layout: Layout, base: nn.Module, texts: Texts) -> Plan:
    """Return the method's plan, once everything is known to fit together.

    `base` may be without weights. Raises `ConfigError` for settings that cannot work together, and
    for a method that lacks public text.
    """
    check_processes(config)
    planned = config.entry.plan(config.method, given(config, layout, base, len(texts.names), texts))
    if not isinstance(planned, Plan):
        raise ConfigError(wrong_return(f"plan of method {config.method.name!r}", planned, "a Plan"))
    if config.promise is not None:
        config.promise.report(config.rounds, config.rounds)  # raises where no noise is enough

    check_constant(base)
    if config.data.packing:
        check_positions(base, config.model.name_or_path)
    check_length(context_length(base), config.data.max_length)
    if isinstance(texts, SiteTexts):
        _check_sample(config, texts, context_length(base))
    if planned.reads_public:
        texts.public()

    return planned


def _check_sample(config: RunConfig, texts: SiteTexts, context: int | None) -> None:
    """Raise `ConfigError` where the sample's prompt leaves the model no room for an answer."""
    prompt = config.evaluate.sample_prompt
    if prompt is None or context is None:
        return

    length = len(Encoder.of(texts.tokenizer).prompt(prompt))
    if length >= context:
        raise ConfigError(
            f"evaluate.sample_prompt: has {length} tokens and fills the model's context of "
            f"{context}; shorten it"
        )


def settled(config: RunConfig, layout: Layout, base: nn.Module, sites: int) -> RunConfig:
    """Return `config` with everything chosen that its method's settings leave open.

    The choice follows from the configuration, the model's shapes and the number of sites, so it is
    the same wherever it is made. Raises `ConfigError` where nothing fits.
    """
    method = config.entry.settled(config.method, given(config, layout, base, sites))
    return config if method == config.method else config.model_copy(update={"method": method})


def given(
    config: RunConfig, layout: Layout, base: nn.Module, sites: int, texts: Texts | None = None
) -> Given:
    """Return the facts about a run of `config` with `sites` that a plan is made from.

    `texts` has the sites' data where it is here.
    """
    here = texts if isinstance(texts, SiteTexts) and not config.entry.traits.pooled else None
    return Given(
        layout=layout,
        base=base,
        width_bytes=dtype_of(config.model).itemsize,
        codec=config.coding,
        downlink=config.downlink,
        train=config.train,
        sites=1 if config.entry.traits.pooled else sites,
        rounds=config.rounds,
        line=config.fleet.line,
        on_failure=config.fleet.on_failure,
        deadline_s=config.fleet.deadline_s,
        seed=config.seed,
        examples=None if here is None else partial(_examples, here),
        quantisation=config.model.quantisation,
        correction_rank=config.model.quantization_correction,
        max_length=config.data.max_length,
        outline=Outline(config.model, config.adapter),
        names=() if texts is None else tuple(texts.names),
    )


def _examples(texts: SiteTexts) -> dict[str, list[Example]]:
    return {name: texts.load(name).train for name in texts.names}
