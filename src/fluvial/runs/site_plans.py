"""Plans of all sites, made as the set-up of a run makes them, without a round."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fluvial.data import SiteTexts
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import local_fleet
from fluvial.federation.store import StateStore
from fluvial.methods.fedpipe.planner.advice import RATES, Uncoded, advised_codec, advised_method
from fluvial.methods.fedpipe.planner.deadline import default_deadline_s, uniform_under_training
from fluvial.methods.fedpipe.planner.decision import Models, Planner
from fluvial.methods.fedpipe.planner.plan import SitePlan
from fluvial.methods.fedpipe.planner.profile import MOST_RATE, Profile
from fluvial.methods.fedpipe.planner.refusal import Refusal, refusal
from fluvial.methods.fedpipe.planner.time import speed_at
from fluvial.methods.fedpipe.server import FedPipeServer
from fluvial.methods.measuring import Texts
from fluvial.models.pool import ModelPool
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig
from fluvial.runs.opening import check_settings, given, site_of, tasks_of, texts_of
from fluvial.runs.other_methods import alternatives
from fluvial.runs.planned import check_planned
from fluvial.runs.run import Run
from fluvial.storage.files import private


def site_plans(config: RunConfig) -> dict[str, Any]:
    """Return the plan of each site, and the method and codec for them, as JSON values.

    The sites measure themselves and probe the weights in this process, one after another; no round
    is run, and what was written is removed. A site without a plan is named with the reason. Raises
    `ConfigError` for a method that makes no plans, and for what a run would refuse.
    """
    check_planned(config.method.name, budget=False)

    alone = config.fleet.model_copy(
        update={"workers": 1, "on_failure": "skip", "quorum": LEAST_QUORUM}
    )
    config = config.model_copy(update={"fleet": alone, "compare": ()})
    torch.set_num_threads(config.fleet.threads)

    with private(), TemporaryDirectory() as folder, RunFolder(Path(folder) / "plan") as files:
        pool = ModelPool(config.model, config.adapter)
        texts = texts_of(config, pool)
        check_settings(config, pool.layout, pool.outline.base, texts)
        run = Run(config, files, pool, texts, _without_files)
        server = run.server
        assert isinstance(server, FedPipeServer)
        setup = server.setup(run.fleet)
        return _described(config, server, setup, run.fleet, pool, len(texts.names))


def _without_files(config: RunConfig, _folder: RunFolder, pool: ModelPool, texts: Texts) -> Fleet:
    """Return a fleet whose sites keep everything in memory: their folder is removed, and an error
    in it could not be read any more."""
    assert isinstance(texts, SiteTexts), "the data of all sites is here"
    open_site = partial(site_of, config, pool=pool, texts=texts, store=StateStore(None))
    return local_fleet(texts.names, open_site, tasks_of(config), config.fleet)


LEAST_QUORUM = 1e-9
"""Quorum that every number of sites is, so that a site without a plan is shown and not raised."""


def _described(
    config: RunConfig,
    server: FedPipeServer,
    setup: Mapping[str, Any],
    fleet: Fleet,
    pool: ModelPool,
    sites: int,
) -> dict[str, Any]:
    """Return the plans of a server half after its `setup`, and what suits the sites."""
    deciding = server.deciding
    models = {site: deciding.models(profile) for site, profile in server.profiles.items()}
    planners = deciding.planners(server.scores, server.profiles)
    facts = given(config, pool.layout, pool.outline.base, sites)
    deadline_s = server.config.deadline_s
    refusals = {
        site: refusal(
            planners[site],
            site,
            models[site],
            deadline_s,
            alternatives(facts, models[site], deciding.format),
        )
        for site in sorted(models)
        if site not in server.plans
    }
    failed = {failure.site: failure.reason for failure in fleet.failures}
    method = advised_method(server.plans, list(refusals.values()))

    return {
        "model": config.model.name_or_path,
        "candidates": len(deciding.uninformed),
        "deadline_s": deadline_s,
        "full_load_s": _full_load_s(planners, models),
        "uniform_under_training": _uniform_under_training(config, deadline_s, planners, models),
        "objective": server.config.planner.objective,
        "sites": [
            {
                "name": site,
                "limits": _limits(server.profiles.get(site), server.plans.get(site)),
                "plan": setup["plans"].get(site),
                "refused": _reason(refusals.get(site), failed.get(site)),
            }
            for site in fleet.sites
        ],
        "measured_in": setup.get("measured_in", {}),
        "gap": max(
            (
                planners[site].gap(models[site], plan, deadline_s)
                for site, plan in server.plans.items()
            ),
            default=0.0,
        ),
        "method": {"name": method.name, "why": method.why},
        "codec": _codec(server, planners, models),
    }


def _full_load_s(planners: Mapping[str, Planner], models: Mapping[str, Models]) -> float | None:
    """Return the deadline within which the middle site trains on all of its data at one rank; None
    where no site holds the base."""
    if not models:
        return None
    return default_deadline_s(planners[min(planners)], models)


def _uniform_under_training(
    config: RunConfig,
    deadline_s: float | None,
    planners: Mapping[str, Planner],
    models: Mapping[str, Models],
) -> dict[str, float]:
    """Return the share of each site's data that LoRA of the run's rank and batch would leave
    untrained by the deadline; empty without one."""
    if deadline_s is None:
        return {}
    return {
        site: uniform_under_training(
            planners[site],
            models[site],
            deadline_s,
            batch=config.train.per_device_train_batch_size,
            length=models[site].profile.tokens[-1].length,
            rank=config.lora.r,
        )
        for site in sorted(models)
    }


def _limits(profile: Profile | None, plan: SitePlan | None) -> dict[str, Any] | None:
    """Return what a site may use, with its speed at the planned batch."""
    if profile is None:
        return None

    curve = profile.speeds[profile.format]
    batch = curve[0].batch if plan is None else plan.setting.batch
    return {
        "memory_bytes": profile.memory_bytes,
        "tokens_s": speed_at(curve, batch),
        "up_bytes_s": _known(profile.up_bytes_s),
        "down_bytes_s": _known(profile.down_bytes_s),
        "latency_s": profile.latency_s,
        "samples": profile.samples,
        "tokens": profile.all_tokens,
    }


def _known(rate: float) -> float | None:
    """Return a rate of a link; None for one of which nothing is known."""
    return rate if rate < MOST_RATE else None


def _reason(refused: Refusal | None, failed: str | None) -> str | None:
    """Return why a site has no plan, without its name; None where it has one."""
    return failed if refused is None else str(refused).removeprefix(f"site {refused.site!r}: ")


def _codec(
    server: FedPipeServer, planners: Mapping[str, Planner], models: Mapping[str, Models]
) -> dict[str, Any] | None:
    """Return the codec that suits the sites with a plan; None where there is none."""
    deadline_s = server.config.deadline_s
    choices = sorted({*RATES, server.deciding.rate})
    rates = {}
    rounds = {}
    for site in sorted(server.plans):
        best = planners[site].at_rates(choices).plan(models[site], deadline_s)
        uncoded = planners[site].at_rates((1,)).plan(models[site])
        assert best is not None
        assert uncoded is not None
        rates[site] = best.setting.rate
        predicted = uncoded.prediction
        rounds[site] = Uncoded(predicted.seconds, predicted.link_s / predicted.seconds)

    if not rates:
        return None
    advice = advised_codec(rates, rounds)
    return {"name": advice.name, "why": advice.why, "rates": rates}
