"""A run: set-up, rounds, checkpoints, result."""

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from fluvial.data import POOLED, SiteTexts
from fluvial.errors import (
    ConfigError,
    GateError,
    PrivacyError,
    check_call,
    wrong_return,
)
from fluvial.exchange.versions import INSTALL
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import local_fleet
from fluvial.federation.meter import AUDIT, Kind
from fluvial.federation.releases import secret_of
from fluvial.methods.interface import Context, Reporting, Server
from fluvial.methods.measuring import Texts
from fluvial.models.pool import ModelPool
from fluvial.runs.beginning import begun
from fluvial.runs.budget.choice import choose
from fluvial.runs.budget.settled import settle
from fluvial.runs.checkpoint import RunFolder, copy_finished
from fluvial.runs.config import RunConfig
from fluvial.runs.cross_site import OwnModels, own_models_everywhere
from fluvial.runs.harness import check_tasks, measure_tasks
from fluvial.runs.idle import idle_remarks, refuse_idle
from fluvial.runs.metrics import check_metrics
from fluvial.runs.model_card import write_cards
from fluvial.runs.opening import check_settings, settled, site_of, tasks_of, texts_of
from fluvial.runs.profiling import profiled
from fluvial.runs.result import directed, recorded, result_of, traffic_of
from fluvial.runs.right_answers import answers_of, measured
from fluvial.runs.trackers import check_trackers, tracked
from fluvial.storage.files import private
from fluvial.storage.run_files import BUDGET, COMPARE, CONFIG, REFUSED, SETUP, read_result
from fluvial.wire.payload import Payload, Value

logger = logging.getLogger(__name__)

K = TypeVar("K")


@dataclass(frozen=True)
class Event:
    """A step of a run, as those who watch it see it."""

    method: str
    kind: str
    """"setup", "round" or "result"."""
    values: dict[str, Any]


Assemble = Callable[[RunConfig, RunFolder, ModelPool, Texts], Fleet]
"""Makes the fleet of one method's run."""


def in_process(config: RunConfig, folder: RunFolder, pool: ModelPool, texts: Texts) -> Fleet:
    """Return a fleet of all sites in this process."""
    assert isinstance(texts, SiteTexts), "the data of all sites is here"
    names = (POOLED,) if config.entry.traits.pooled else texts.names
    open_site = partial(site_of, config, pool=pool, texts=texts, store=folder.store)
    return local_fleet(names, open_site, tasks_of(config), config.fleet)


def execute(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    assemble: Assemble = in_process,
    texts: Callable[[RunConfig, ModelPool], Texts] | None = None,
    lent: Mapping[str, Path] | None = None,
) -> Iterator[Event]:
    """Run the baselines of `config`, each in a folder of its own, then its method.

    Yield what happens; the last event is the result. Finished folders of equal baselines, by name
    in `lent`, are copied and not made again.

    Raises `CheckpointError` when `folder` holds a run and `resume` is not set, or holds another
    run's configuration.
    """
    check_trackers(config.report_to)
    with private(), RunFolder(folder) as main:
        config, choice = begun(main, config, resume=resume)
        torch.set_num_threads(config.fleet.threads)
        pool = ModelPool(config.model, config.adapter)  # one for all that tune alike
        known = texts(config, pool) if texts else texts_of(config, pool)  # before any weights
        if texts is None or pool.full:  # else the sites are elsewhere, and check what they load
            pool.check_behaviour(known.end_ids() if isinstance(known, SiteTexts) else None)
            if config.data.packing:
                pool.check_packing()

        if config.budget is not None and choice is None:
            choice = choose(config, pool, known)
            config = settle(config, choice)
            main.write_json(BUDGET, choice)
            pool = pool.beside(config.adapter)

        if config.evaluate.cross_site and assemble is not in_process:
            raise ConfigError(
                "evaluate.cross_site: the models of the baseline 'local' stay at their sites, and "
                "these are not in this process; remove it, or run over fleet 'process'"
            )

        baselines = [(config.baseline(name), folder / COMPARE / name) for name in config.compare]
        layout, base = pool.layout, pool.outline.base
        runs = [*baselines, (settled(config, layout, base, len(known.names)), folder)]
        pools: list[ModelPool] = []
        for each, _ in runs:  # the method's own is the last
            alike = [one for one in (pool, *pools) if one.tuning == each.adapter]
            pools.append(alike[0] if alike else ModelPool(each.model, each.adapter))
            planned = check_settings(each, pools[-1].layout, base, known)
        remarks = known.check() if isinstance(known, SiteTexts) else []
        refuse_idle(config, planned, known)
        check_tasks(config)
        for remark in [*remarks, *idle_remarks(config, planned, known)]:
            logger.warning("%s", remark)

        if read_result(folder) is None:  # the digests of a finished run know its files
            main.write_json(CONFIG, recorded(config, [each for each, _ in baselines], known))
        own_models: OwnModels | None = None
        for number, ((each, path), own) in enumerate(zip(runs, pools, strict=True)):
            logger.info("%s: run %d of %d", each.method.name, number + 1, len(runs))
            if path == folder:
                run = Run(each, main, own, known, assemble, choice, own_models)
                yield from tracked(run.events(), each, main, folder)
                continue

            copy_finished((lent or {}).get(each.method.name), path)
            with RunFolder(path) as baseline:
                run = Run(each, baseline, own, known, assemble)
                yield from tracked(run.events(), each, baseline, folder)
            if config.evaluate.cross_site and each.method.name == "local":
                fleet = in_process(each, baseline, own, known)
                own_models = partial(own_models_everywhere, each, baseline, fleet, own.layout)


class Run:
    """One method on one configuration in one folder."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        pool: ModelPool,
        texts: Texts,
        assemble: Assemble = in_process,
        choice: dict[str, Any] | None = None,
        own_models: OwnModels | None = None,
    ) -> None:
        """Take a run that begins or goes on; `choice` is what was chosen within its budget, and
        `own_models` measures the models of its baseline `local`."""
        self.own_models = own_models
        self.choice = {} if choice is None else {"budget": choice}
        self.config = config
        self.folder = folder
        self.pool = pool
        self.texts = texts
        method = config.entry
        self.context = Context(
            seed=config.seed,
            rounds=config.rounds,
            layout=self.pool.layout,
            codec=config.coding,
            downlink=config.downlink,
            train=config.train,
            open_pool=lambda: self.pool,
            secret=partial(secret_of, folder.path / "private"),
            public=self.texts.public,
            ensemble=folder.ensemble,
            line=config.fleet.line,
        )
        server: object = method.server(config.method, self.context)
        if not isinstance(server, Server):
            name = f"server of method {config.method.name!r}"
            raise ConfigError(wrong_return(name, server, "a Server with all its functions"))

        for function in ("setup", "round", "measure", "export", "state", "restore"):
            name = f"{function} of method {config.method.name!r}"
            _, *taken = inspect.signature(getattr(Server, function)).parameters.values()
            by_place = [each.name for each in taken if each.kind != each.KEYWORD_ONLY]
            by_name = {each.name: each.name for each in taken if each.kind == each.KEYWORD_ONLY}
            check_call(name, getattr(server, function), *by_place, **by_name)

        self.server = server
        self.fleet = assemble(config, folder, pool, texts)
        self.trained: list[int] = []
        """Updates by round, with those that were dropped: they were sent too."""
        self.setup: dict[str, Any] = {}
        self.setup_bytes: dict[Kind, int] = {}
        self._wall_s, self._since = 0.0, time.perf_counter()

    def events(self) -> Iterator[Event]:
        """Run from where the folder stands to the result."""
        name = self.config.method.name
        finished = read_result(self.folder.path)

        if finished is not None:
            self.folder.verify_finished()
            yield Event(name, "result", finished)
            return

        try:
            yield from self._rounds()
        finally:
            self.fleet.close()

    def _rounds(self) -> Iterator[Event]:
        name = self.config.method.name
        done = self._restore()
        if done < 0:
            try:
                found = self._checked("setup", self.server.setup(self.fleet), dict)
                self.setup = self.choice | found
            except GateError as refusal:
                self.folder.write_json(REFUSED, {"why": str(refusal), "gate": refusal.report})
                raise

            (self.folder.path / REFUSED).unlink(missing_ok=True)
            if self.setup:
                self.folder.write_json(SETUP, self.setup)
            self.setup_bytes = dict(self.fleet.meter.totals)
            self.fleet.close_round()
            self._save(0)
            done = 0
            yield Event(name, "setup", self.setup)

        for number in range(done + 1, self.config.rounds + 1):
            record = self._round(number)
            yield Event(name, "round", record)

        result = self._finish()
        self.folder.finish(result)
        yield Event(name, "result", result)

    def _round(self, number: int) -> dict[str, Any]:
        started = time.perf_counter()
        known = len(self.fleet.failures)
        with profiled(self.folder.path, number, self.config.profile):
            metrics = self._checked("round", self.server.round(number, self.fleet), dict)
        place = f"round of method {self.config.method.name!r}: its metrics"
        check_metrics(place, metrics)
        self.trained.append(self.fleet.meter.num_answered(beside=(INSTALL, AUDIT)))

        if self.config.evaluate.every and number % self.config.evaluate.every == 0:
            metrics |= self._heldout_of_round(number)

        failures = self.fleet.failures[known:]
        by_site, times = self.fleet.close_round()
        record = {
            **metrics,
            "round": number,
            "seconds": time.perf_counter() - started,
            "times": times,
            "bytes_up": sum(directed(sizes, "up") for sizes in by_site.values()),
            "bytes_down": sum(directed(sizes, "down") for sizes in by_site.values()),
            "bytes": {
                site: {f"{way} {task}": n for (way, task), n in row.items()}
                for site, row in by_site.items()
            },
            "missing": [failure.record() for failure in failures if not failure.asked_again],
            "asked_again": [failure.record() for failure in failures if failure.asked_again],
        }
        try:
            self.folder.append_metrics(record)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{place} are not plain JSON values: {error}") from None
        if "stopped" in record:
            raise PrivacyError(str(record["stopped"]))
        self._save(number)
        return record

    def _heldout_of_round(self, number: int) -> dict[str, Any]:
        """Return measures of the model of round `number`, means and how unequal the sites are;
        empty where no site sends any."""
        measures = self.server.measure(self.fleet, self._reporting(), round=number, which="final")
        mean = measures.mean()
        pooled = measures.pooled()
        worst = measures.worst()

        if mean is None or pooled is None or worst is None:
            return {}

        return {
            "heldout_loss": mean["loss"],
            "heldout_accuracy": mean["accuracy"],
            "heldout_loss_pooled": pooled["loss"],
            "heldout_worst_site": worst[0],
            "heldout_worst_loss": worst[1],
            "heldout_spread": measures.spread(),
        }

    def _checked(self, function: str, value: object, kind: type[K]) -> K:
        """Return what a function of the server half returned; raises `ConfigError` for another
        type."""
        if not isinstance(value, kind):
            name = f"{function} of method {self.config.method.name!r}"
            raise ConfigError(wrong_return(name, value, f"a {kind.__name__}"))
        return value

    # -- checkpoints ------------------------------------------------------------------------------

    def _save(self, round: int) -> None:
        state = self._checked("state", self.server.state(), Payload)
        values: dict[str, Value] = {
            "server": state.values,
            "setup": self.setup,
            "trained": [*self.trained],
            "fleet": self.fleet.state(),
            "wall_s": self._elapsed(),
            "meter": _listed(self.fleet.meter.totals),
            "setup_meter": _listed(self.setup_bytes),
        }
        self.folder.save(round, Payload(state.tensors, values))

    def _restore(self) -> int:
        """Go on from the newest checkpoint; return its round, 0 after set-up, -1 without any."""
        found = self.folder.newest()
        if found is None:
            self.folder.go_back_to(-1)
            self.fleet.restore({}, -1)
            return -1

        round, checkpoint = found
        self.folder.go_back_to(round)
        self.fleet.restore(checkpoint.value("fleet", dict), round)
        self.server.restore(Payload(checkpoint.tensors, checkpoint.value("server", dict)))
        self.setup, self.trained = (
            checkpoint.value("setup", dict),
            checkpoint.value("trained", list),
        )
        self._wall_s = checkpoint.value("wall_s", float)
        self.fleet.meter.totals = _table(checkpoint.value("meter", list))
        self.setup_bytes = _table(checkpoint.value("setup_meter", list))

        return round

    def _elapsed(self) -> float:
        return self._wall_s + time.perf_counter() - self._since

    # -- result -----------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        reporting = self._reporting()
        base, of_base = measured(self.server, self.fleet, reporting, "base")
        final, of_final = measured(self.server, self.fleet, reporting, "final")
        export = self.server.export(self.fleet, reporting, final)
        size = self.pool.layout.raw_bytes if self.config.entry.traits.sends != "nothing" else 0
        result = result_of(
            self.config,
            self.folder.path,
            sites=len(self.fleet.sites),
            base=base,
            final=final,
            right_answers=answers_of(of_base, of_final),
            export=export,
            tasks=measure_tasks(self.config, self.pool, self.folder.path, export),
            traffic=traffic_of(self.fleet.meter.totals, self.setup_bytes, size, self.trained),
            setup=self.setup,
            wall_s=self._elapsed(),
            texts=self.texts,
            own_models=self.own_models and self.own_models(),
        )
        write_cards(self.folder.path, self.config, result)
        return result

    def _reporting(self) -> Reporting:
        config = self.config
        promise = config.promise
        return Reporting(
            settings=recorded(config, (), self.texts),
            rounds=config.rounds,
            evaluate=config.evaluate,
            data=config.data,
            heldout=promise is None or promise.measures,
            pool=self.pool,
            texts=self.texts,
            folder=self.folder.path,
            replace=self.folder.replace_folder,
        )


def _listed(sizes: Mapping[Kind, int]) -> list[Value]:
    return [[way, task, size] for (way, task), size in sizes.items()]


def _table(listed: list[Any]) -> dict[Kind, int]:
    """Return the inverse of `_listed`."""
    return {(way, task): size for way, task, size in listed}
