"""A budget before a run: what would be tried, and the choice alone."""

from typing import Any

import torch

from fluvial.errors import ConfigError
from fluvial.methods.measuring import Texts
from fluvial.models.pool import ModelPool
from fluvial.runs.budget.candidates import Candidate, Costs, adapters, steps_tried, with_choice
from fluvial.runs.budget.choice import choose
from fluvial.runs.budget.config import BudgetConfig
from fluvial.runs.budget.effort import stages
from fluvial.runs.budget.pairs import pairs
from fluvial.runs.budget.settled import Open, nothing_fits, opened
from fluvial.runs.budget.trials import PublicSites
from fluvial.runs.config import RunConfig
from fluvial.runs.opening import texts_of
from fluvial.storage.files import private


def choice_alone(config: RunConfig) -> dict[str, Any]:
    """Return what a run of `config` would choose within its budget; no round of it is run, and
    nothing is written."""
    torch.set_num_threads(config.fleet.threads)
    with private():
        pool = ModelPool(config.model, config.adapter)
        return choose(config, pool, texts_of(config, pool))


def shown(config: RunConfig, texts: Texts) -> tuple[RunConfig, list[str]]:
    """Return `config` with an example of what is open, and notes about the choice; nothing is
    loaded or timed.

    Raises `ConfigError` where nothing is within the bytes of the budget, and where trials have too
    little public text.
    """
    budget = config.budget
    free = opened(config)
    if budget is None:
        return config, []
    sites = budget.simulated_sites(config.method.cohort(len(texts.names)))
    if free:
        PublicSites.of(texts, sites)
    found = _example(config, budget, free, texts)
    if not free:
        both = found.up_bytes + found.down_bytes
        return config, [
            f"budget: nothing is open, and the run is within its bytes: a site sends at most "
            f"{found.up_bytes:,} B, {both:,} B with what it receives"
        ]

    names = {
        "target_modules": "lora.target_modules",
        "r": "lora.r",
        "max_steps": "train.max_steps",
        "rounds": "rounds",
        "codec": "the codec",
        "downlink": "the downlink",
    }
    chosen = ", ".join(words for name, words in names.items() if getattr(free, name))
    most = _most_steps(
        budget.within(config.rounds),
        free,
        config.train.steps(0) if config.train.max_steps else None,
    )
    steps = "" if most is None else f", at most {sites * most:,} optimizer steps at the server"
    return found.config, [
        f"budget: {chosen} will be chosen when the run starts, among "
        f"{len(adapters(budget, free))} adapters and steps, on {sites} simulated "
        f"sites with public text{steps}; the figures here are those of rank {found.config.lora.r} "
        f"on {found.adapter.target_modules or 'the modules of lora.target_modules'} with "
        f"{found.config.coding.name}"
    ]


def _example(config: RunConfig, budget: BudgetConfig, free: Open, texts: Texts) -> Candidate:
    """Return the first candidate that fits, that of the default adapter where it does; raises
    `ConfigError` where none is within the bytes of the budget."""
    costs = Costs(config, budget.model_copy(update={"run_s": None}), texts)
    pool = ModelPool(config.model, config.adapter)
    first_steps = steps_tried(budget, free)[0]
    tried = [each for each in adapters(budget, free) if each.max_steps == first_steps]
    usual = (config.lora.target_modules, config.lora.r)
    tried.sort(key=lambda each: (each.target_modules, each.r) != usual)
    possible = 0
    why = ""
    for adapter in tried:
        try:
            own = pool.beside(with_choice(config, adapter).adapter)
            found = costs.first(adapter, own, pairs(budget, free))
        except ConfigError as error:
            if not ((adapter.target_modules or adapter.r) and str(error).startswith("lora.")):
                raise
            why = str(error)  # the model does not have it
            continue
        if found is not None:
            return found
        possible += 1

    if not possible:
        raise ConfigError(f"budget.target_modules, budget.r: no candidate can be built; {why}")
    raise ConfigError(nothing_fits(config, free, possible))


def _most_steps(budget: BudgetConfig, free: Open, fixed: int | None) -> int | None:
    """Return the optimizer steps of a simulated site in all trials at most; None where they follow
    from the data."""
    steps = steps_tried(budget, free) if free.max_steps else [fixed]
    numbers = [each for each in steps if each is not None]
    if not numbers:
        return None
    num_adapters = len(adapters(budget, free)) // len(numbers)
    return sum(stages(budget, free, num_adapters, numbers))
