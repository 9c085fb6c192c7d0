"""A run: set-up, rounds, checkpoints, evaluation, result. Ordinary Python from top to bottom."""

import hashlib
import json
import logging
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fluvial import __version__
from fluvial.data import POOLED, Example, SiteData, SiteTexts, with_template
from fluvial.data.config import STDLIB
from fluvial.errors import CheckpointError, GateError
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import local_fleet
from fluvial.federation.meter import Kind
from fluvial.federation.releases import secret_of
from fluvial.federation.replies import measured
from fluvial.federation.sites import COMMON_TASKS, Site, Task, state_message
from fluvial.federation.store import StateStore
from fluvial.formatting import privacy_words
from fluvial.methods.interface import Context, Given, Plan
from fluvial.models.base_weights import check_constant
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import check_length, context_length, dtype_of
from fluvial.models.states import changed
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, difference
from fluvial.runs.verdict import judge
from fluvial.storage import exported
from fluvial.storage.files import private
from fluvial.training.evaluate import Heldout, check_effect, on_public_text
from fluvial.training.train import TrainConfig
from fluvial.wire.payload import Payload, Value
from fluvial.wire.tensors import Layout, Named, norm

logger = logging.getLogger(__name__)

BASELINES = ("local", "fedavg", "central")
"""Runs whose held-out measures stand beside this one's."""
PUBLIC_SEQUENCES = 256
"""Public sequences that the server measures on, where `data.max_heldout` says nothing else."""
MEASURING = "evaluate"
"""The task whose bytes are counted apart: they measure the method and are no part of it."""


@dataclass(frozen=True)
class Event:
    """Something that a person watching a run wants to know."""

    method: str
    kind: str
    """"setup", "round", "heldout" or "result"."""
    values: dict[str, Any]


class Texts(Protocol):
    """What a server knows of the sites' data."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the sites."""
        ...

    def public(self) -> dict[str, list[Example]]:
        """Text that belongs to no site; raises `ConfigError` if there is none."""
        ...

    def sample(self) -> SiteData:
        """Held-out text to show the model on."""
        ...


Assemble = Callable[[RunConfig, RunFolder, ModelPool, Texts], Fleet]
"""Brings the sites together: called once for each method of a run."""


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


def texts_of(config: RunConfig, bench: ModelPool, owner: str | None = None) -> SiteTexts:
    """Return the data of all sites, or of the one site `owner`, for the model of `bench`."""
    return SiteTexts(
        config.data,
        bench.tokenizer,
        seed=config.seed,
        owner=owner,
        num_embeddings=bench.outline.num_embeddings,
    )


def site_of(
    config: RunConfig, name: str, bench: ModelPool, texts: Records, store: StateStore
) -> Site:
    """The site `name` for one message, with the data that `texts` has for it."""
    return Site(
        name=name,
        seed=config.seed,
        pool=bench,
        load=texts.pooled if config.entry.traits.pooled else partial(texts.load, name),
        train=_train_config(config, len(texts.names)),
        codec=config.coding,
        method=config.method,
        downlink=config.downlink,
        store=store,
        rounds=config.rounds,
    )


def _train_config(config: RunConfig, sites: int) -> TrainConfig:
    """The centralised baseline takes as many steps as all sites together."""
    if not config.entry.traits.pooled or config.train.max_steps is None:
        return config.train
    return config.train.model_copy(update={"max_steps": config.train.max_steps * sites})


def tasks_of(config: RunConfig) -> dict[str, Task]:
    """Everything that a site can be asked for in this run; nothing beside a promise of privacy."""
    tasks = {**COMMON_TASKS, **config.entry.tasks}
    promise = config.promise

    if promise is None:
        return tasks
    return {name: task for name, task in tasks.items() if name in promise.tasks}


def in_process(config: RunConfig, folder: RunFolder, bench: ModelPool, texts: Texts) -> Fleet:
    """All sites in this process."""
    assert isinstance(texts, SiteTexts), "the data of all sites is here"
    names = (POOLED,) if config.entry.traits.pooled else texts.names
    open_site = partial(site_of, config, bench=bench, texts=texts, store=folder.store)
    return local_fleet(names, open_site, tasks_of(config), config.fleet)


def execute(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    assemble: Assemble = in_process,
    texts: Callable[[RunConfig, ModelPool], Texts] | None = None,
) -> Iterator[Event]:
    """The baselines of `config`, each in a folder of its own, then its method; the last event is
    the result.

    Raises `CheckpointError` when `folder` holds a run and `resume` is not set, or holds another
    run's configuration.
    """
    runs = [(config.baseline(name), folder / "compare" / name) for name in config.compare] + [
        (config, folder)
    ]
    with private(), RunFolder(folder) as main:
        _check_folder(main, config, resume)
        torch.set_num_threads(config.fleet.threads)
        bench = ModelPool(config.model, config.adapter)  # one for all of them
        if texts is None or bench.full:  # else the sites are elsewhere, and check what they load
            bench.check_behaviour()
        known = texts(config, bench) if texts else texts_of(config, bench)

        for each, _ in runs:
            check_settings(each, bench.layout, bench.outline.base, known)
        if isinstance(known, SiteTexts):
            for remark in known.check():
                logger.warning("%s", remark)

        main.write_json("config.json", {"fluvial": __version__, **config.resolved()})
        for number, (each, path) in enumerate(runs):
            logger.info("%s: run %d of %d", each.method.name, number + 1, len(runs))
            if path == folder:
                yield from Run(each, main, bench, known, assemble).events()
                continue

            with RunFolder(path) as baseline:
                yield from Run(each, baseline, bench, known, assemble).events()


def check_settings(config: RunConfig, layout: Layout, base: nn.Module, texts: Texts) -> Plan:
    """Return the method's plan, once everything is known to fit together.

    `base` may be without weights. Raises `ConfigError` for settings that cannot work together, and
    for a method that lacks public text.
    """
    planned = config.entry.plan(config.method, given(config, layout, base, len(texts.names)))
    if config.promise is not None:
        config.promise.report(config.rounds, config.rounds)  # raises where no noise is enough

    check_constant(base)
    check_length(context_length(base), config.data.max_length)
    if planned.reads_public:
        texts.public()

    return planned


def given(config: RunConfig, layout: Layout, base: nn.Module, sites: int) -> Given:
    """Return the facts about a run of `config` with `sites` that a plan is made from."""
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
    )


def _check_folder(folder: RunFolder, config: RunConfig, resume: bool) -> None:
    if not folder.started:
        if resume:
            raise CheckpointError(
                f"{folder.path} holds no run to resume; start it without --resume"
            )
        return

    if not resume:
        raise CheckpointError(
            f"{folder.path} already holds a run; use --resume to go on with it, --out for another folder, or remove it"
        )

    stored = folder.read_json("config.json")
    if stored is None:
        raise CheckpointError(
            f"{folder.path / 'config.json'} is missing, and the folder holds a run; restore it from a copy, or start "
            "again in another folder with --out"
        )

    stored.pop("fluvial", None)
    # How many sites work at a time changes nothing in the result. And as long as the method itself
    # has not got through its set-up, another method or codec only keeps the baselines, which do not
    # depend on them.
    free = ("fleet.workers",) if folder.newest() else ("fleet.workers", "method.", "codec.")
    other = [key for key in difference(config.resolved(), stored) if not key.startswith(free)]

    if other:
        raise CheckpointError(
            f"{folder.path} was started with another configuration (differs in {', '.join(other[:5])}); "
            "resume with the same one, or choose another --out"
        )


class Run:
    """One method on one configuration in one folder."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        bench: ModelPool,
        texts: Texts,
        assemble: Assemble = in_process,
    ) -> None:
        self.config = config
        self.folder = folder
        self.bench = bench
        self.texts = texts
        method = config.entry
        self.context = Context(
            seed=config.seed,
            rounds=config.rounds,
            layout=self.bench.layout,
            codec=config.coding,
            downlink=config.downlink,
            train=config.train,
            open_bench=lambda: self.bench,
            secret=partial(secret_of, folder.path / "private"),
            public=self.texts.public,
        )
        self.server = method.server(config.method, self.context)
        self.fleet = assemble(config, folder, bench, texts)
        self.trained = 0
        self.setup: dict[str, Any] = {}
        self.setup_bytes: dict[Kind, int] = {}
        self._wall_s, self._since = 0.0, time.perf_counter()

    @property
    def measures(self) -> bool:
        """Return whether the sites measure models on their held-out text and send the sums."""
        promise = self.config.promise
        return promise is None or promise.measures

    def events(self) -> Iterator[Event]:
        """Run from where the folder stands to the result."""
        name = self.config.method.name
        finished = self.folder.read_json("result.json")

        if finished is not None:
            self.folder.verify_finished()
            yield Event(name, "result", finished)
            return

        done = self._restore()
        if done < 0:
            try:
                self.setup = self.server.setup(self.fleet)
            except GateError as refusal:
                self.folder.write_json(
                    "refused.json", {"why": str(refusal), "gate": refusal.report}
                )
                raise

            (self.folder.path / "refused.json").unlink(missing_ok=True)
            self.setup_bytes = dict(self.fleet.meter.totals)
            self.fleet.meter.close_round()
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
        metrics = self.server.round(number, self.fleet)
        self.trained += int(metrics["sites"])

        if self.config.evaluate.every and number % self.config.evaluate.every == 0:
            metrics |= self._heldout_of_round(number)

        by_site = self.fleet.meter.close_round()
        record = {
            "round": number,
            **metrics,
            "seconds": time.perf_counter() - started,
            "bytes_up": _bytes(by_site, "up"),
            "bytes_down": _bytes(by_site, "down"),
            "bytes": {
                site: {f"{way} {task}": n for (way, task), n in row.items()}
                for site, row in by_site.items()
            },
            "missing": [
                {
                    "site": failure.site,
                    "task": failure.task,
                    "reason": failure.reason.strip().splitlines()[-1],
                }
                for failure in self.fleet.failures[known:]
            ],
        }
        self.folder.append_metrics(record)
        self._save(number)

        return record

    def _heldout_of_round(self, number: int) -> dict[str, float]:
        """Measures of the model of round `number`; empty where no site sends any."""
        total, rows = self._measure(self.server.model(), number)
        mean = _mean(rows)

        if total is None or mean is None:
            return {}

        return {
            "heldout_loss": mean["loss"],
            "heldout_accuracy": mean["accuracy"],
            "heldout_loss_pooled": total.loss,
        }

    # -- checkpoints ------------------------------------------------------------------------------

    def _save(self, round: int) -> None:
        state = self.server.state()
        values: dict[str, Value] = {
            "server": state.values,
            "setup": self.setup,
            "trained": self.trained,
            "fleet": self.fleet.state(),
            "wall_s": self._elapsed(),
            "meter": _listed(self.fleet.meter.totals),
            "setup_meter": _listed(self.setup_bytes),
        }
        self.folder.save(round, Payload(state.tensors, values))

    def _restore(self) -> int:
        """The last finished round, 0 after set-up, -1 before."""
        found = self.folder.newest()
        if found is None:
            self.folder.go_back_to(-1)
            self.fleet.restore({}, -1)
            return -1

        round, checkpoint = found
        self.folder.go_back_to(round)
        self.fleet.restore(checkpoint.value("fleet", dict), round)
        self.server.restore(Payload(checkpoint.tensors, checkpoint.value("server", dict)))
        self.setup, self.trained = checkpoint.value("setup", dict), checkpoint.value("trained", int)
        self._wall_s = checkpoint.value("wall_s", float)
        self.fleet.meter.totals = _table(checkpoint.value("meter", list))
        self.setup_bytes = _table(checkpoint.value("setup_meter", list))

        return round

    def _elapsed(self) -> float:
        return self._wall_s + time.perf_counter() - self._since

    # -- result -----------------------------------------------------------------------------------

    def _measure(
        self, adapter: Named | None, round: int, which: str = ""
    ) -> tuple[Heldout | None, dict[str, Any]]:
        """Return held-out sums over all sites, None without any, and the values of each site."""
        if not self.measures:
            return None, {}

        values: dict[str, Value] = {
            "which": which or ("own" if adapter is None else "sent"),
            "generate": self.config.evaluate.max_new_tokens,
        }
        message = (
            Payload(values=values)
            if adapter is None
            else state_message(changed(adapter), self.bench.layout, **values)
        )
        read = partial(measured, answers=self.config.evaluate.max_new_tokens > 0)
        sums = []
        table = {}

        for reply in self.fleet.ask(
            "evaluate", dict.fromkeys(self.fleet.sites, message), round=round, read=read
        ):
            found, right, questions = reply.content
            sums.append(found)
            row: dict[str, Any] = {"loss": found.loss, "accuracy": found.accuracy}
            table[reply.site] = row | ({"exact_match": right / questions} if questions else {})

        return Heldout.sum(sums) if sums else None, dict(sorted(table.items()))

    def _finish(self) -> dict[str, Any]:
        rounds = self.config.rounds
        found = self.server.model()
        adapter = None if found is None else changed(found)
        base_total, base = self._measure(None, rounds, which="base")
        final_total, final = self._measure(adapter, rounds)
        samples: list[dict[str, str]] = []
        sha256: dict[str, str] = {}

        if adapter is not None:
            samples = self._samples(adapter)
            if self.bench.full and norm(adapter) == 0:
                logger.warning("no step was taken in any round: the model is the base")
            else:
                check_effect(self.bench, adapter, self._probe())

            sha256 = self._export(adapter, final)

        result = {
            "fluvial": __version__,
            "method": self.config.method.name,
            "codec": self.config.coding.name if self.config.entry.traits.sends == "codec" else None,
            "rounds": rounds,
            "sites": len(self.fleet.sites),
            "heldout": {
                "base": _mean(base),
                **{name: self._baseline(name, "heldout") for name in BASELINES},
                "final": _mean(final),
            },
            "heldout_pooled": {
                "base": _pooled(base_total),
                **{name: self._baseline(name, "heldout_pooled") for name in BASELINES},
                "final": _pooled(final_total),
            },
            "heldout_by_site": {
                site: {"base": base[site], "final": final[site]} for site in final if site in base
            },
            **self._traffic(),
            "wall_s": self._elapsed(),
            "peak_rss_bytes": peak_rss_bytes(),
            "adapter_sha256": sha256.get("adapter"),
            "model_sha256": sha256.get("model"),
            "samples": samples,
            "public": self._public(adapter),
            "privacy": self._privacy(),
            "compare": {name: self._compared(name) for name in self.config.compare},
            "setup": self.setup,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            "python": platform.python_version(),
        }
        name = self.config.method.name
        if name in ("local", "central") or (
            name == "fedavg" and self.config.coding.name == "identity"
        ):
            for means in ("heldout", "heldout_pooled"):
                result[means][name] = result[means]["final"]

        compared: dict[str, Any] = {name: self._result_of(name) for name in self.config.compare}
        result["verdict"] = judge(result, compared).to_json()
        return result

    def _traffic(self) -> dict[str, Any]:
        """Bytes as sent, and their ratios to an uncompressed run of the same rounds and cohorts."""
        totals = self.fleet.meter.totals
        raw = self.bench.layout.raw_bytes * self.trained
        setup_up, setup_down = (_directed(self.setup_bytes, way) for way in ("up", "down"))
        up = _directed(totals, "up") - setup_up
        down = _directed(totals, "down") - setup_down
        sends = self.config.entry.traits.sends != "nothing"

        return {
            "bytes": {
                "up": up,
                "down": down,
                "setup": setup_up + setup_down,
                "setup_up": setup_up,
                "up_raw": raw if sends else 0,
                "evaluate": sum(size for (_, task), size in totals.items() if task == MEASURING),
                "by_kind": {f"{way} {task}": size for (way, task), size in sorted(totals.items())},
            },
            "round_ratio": up / raw if sends else None,
            "amortised_ratio": (up + down + setup_up + setup_down) / (2 * raw) if sends else None,
            "amortised_uplink_ratio": (up + setup_up) / raw if sends else None,
        }

    def _public(self, adapter: Named | None) -> dict[str, Any] | None:
        """Return what the server measures on public text, where no site measures and there is
        some."""
        data = self.config.data
        known = data.public_source is not None or data.source == STDLIB

        if self.measures or adapter is None or not known:
            return None

        examples = [example for part in self.texts.public().values() for example in part]
        return on_public_text(self.bench, adapter, examples[: data.max_heldout or PUBLIC_SEQUENCES])

    def _privacy(self) -> dict[str, Any] | None:
        """Return the promise and its cost; None without a promise."""
        promise = self.config.promise
        return None if promise is None else promise.report(self.config.rounds, self.config.rounds)

    def _result_of(self, name: str) -> dict[str, Any] | None:
        """Return the result of the baseline `name`, None where it was not run."""
        found = RunFolder(self.folder.path / "compare" / name).read_json("result.json")
        return found if isinstance(found, dict) else None

    def _baseline(self, name: str, means: str) -> dict[str, Any] | None:
        found = self._result_of(name)
        return None if found is None else found.get(means, {}).get("final")

    def _compared(self, name: str) -> dict[str, Any]:
        found = self._result_of(name) or {}
        return {
            key: found[key]
            for key in ("sites", "bytes", "round_ratio", "amortised_ratio", "wall_s")
        }

    def _probe(self) -> list[int]:
        return list(self.texts.sample().heldout[0].input_ids)

    def _samples(self, adapter: Named) -> list[dict[str, str]]:
        config = self.config.evaluate
        texts = self.texts.sample()
        if config.sample_prompt is None and not self.measures:
            return []  # a prompt would be a site's own text
        if config.sample_prompt is not None:
            prompt = config.sample_prompt
        elif texts.questions:
            prompt = texts.questions[0].prompt
        else:
            ids = texts.heldout[0].input_ids
            prompt = self.bench.tokenizer.decode(
                ids[: max(1, len(ids) // 4)], skip_special_tokens=True
            )

        before, after = (
            self.bench.generate(each, [prompt], max_new_tokens=config.sample_tokens)[0]
            for each in (self.bench.base_state(), adapter)
        )
        return [{"prompt": prompt, "base": before, "final": after}]

    def _export(self, adapter: Named, final: dict[str, Any]) -> dict[str, str]:
        """Write the folder of PEFT, or of the model; returns its name and the SHA-256 over its
        weight files."""
        name = "model" if self.bench.full else "adapter"
        draft = self.folder.path / f".{name}.partial"
        shutil.rmtree(draft, ignore_errors=True)
        self.bench.save(adapter, draft)
        chosen = self.config.data.chat_template

        if chosen is not None and self.bench.exports_tokenizer():
            with_template(self.bench.tokenizer, chosen).save_pretrained(str(draft))

        exported.write(draft, __version__, self.config.resolved())
        (draft / "README.md").write_text(_card(self.config, final, len(self.fleet.sites)))
        digest = hashlib.sha256()

        for path in sorted(draft.glob("*.safetensors")):
            with path.open("rb") as file:
                while piece := file.read(1 << 22):
                    digest.update(piece)

        self.folder.replace_folder(name, draft)
        return {name: digest.hexdigest()}


def _pooled(total: Heldout | None) -> dict[str, float] | None:
    """Means over the label tokens of all sites together."""
    return None if total is None else {"loss": total.loss, "accuracy": total.accuracy}


def _mean(table: dict[str, Any]) -> dict[str, float] | None:
    """Return the mean over the measured sites, each counting the same; None where there is none."""
    rows = [row for row in table.values() if row and row.get("loss") is not None]
    if not rows:
        return None
    keys = sorted(set.intersection(*(set(row) for row in rows)))
    return {key: sum(row[key] for row in rows) / len(rows) for key in keys}


def _listed(table: dict[Kind, int]) -> list[Value]:
    return [[way, task, size] for (way, task), size in table.items()]


def _table(listed: list[Any]) -> dict[Kind, int]:
    """Inverse of `_listed`."""
    return {(way, task): size for way, task, size in listed}


def _bytes(by_site: dict[str, dict[Kind, int]], direction: str) -> int:
    return sum(_directed(row, direction) for row in by_site.values())


def _directed(table: dict[Kind, int], direction: str) -> int:
    """Bytes of one direction, without those of measuring."""
    return sum(
        size for (way, task), size in table.items() if way == direction and task != MEASURING
    )


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _card(config: RunConfig, final: dict[str, Any], sites: int) -> str:
    settings = json.dumps(config.resolved(), indent=2)
    mean = _mean(final)
    measured = (
        f"Held-out loss {mean['loss']:.4f} nats per token, next-token accuracy "
        f"{mean['accuracy']:.4f} (means over the sites)."
        if mean
        else "Held-out measures were not taken."
    )
    promise = config.promise

    if promise is not None:
        report = promise.report(config.rounds, config.rounds)
        measured += f" Differential privacy: {privacy_words(report)}."

    base = config.model.name_or_path
    what = "LoRA adapter" if config.adapter else "Model, all weights tuned,"
    library, tag = ("peft", "lora") if config.adapter else ("transformers", "full-parameter-tuning")

    return (
        f"---\nbase_model: {base}\nlibrary_name: {library}\ntags: [federated-learning, {tag}]\n---\n\n"
        f"# {what} made by Fluvial {__version__}\n\n"
        f"Method `{config.method.name}` ({config.entry.paper}), {config.rounds} rounds over {sites} sites. "
        f"{measured}\n\nThe sites' data is not in this folder. Settings:\n\n```json\n{settings}\n```\n"
    )
