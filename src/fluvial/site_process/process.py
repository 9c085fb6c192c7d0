"""The site's end of a deployment: one message in, one answer out, and no state lost in between.

The process may be new for every message. State that an answer changes lies in pending files until
the next message says that the server accepted the answer. So the state of a site is that of its
last accepted answer, even if either process is killed. When a site joins a run, both ends compare
what must be equal, and the site's own file decides whether it takes part.
"""

import fnmatch
import hashlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from fluvial.codecs import must_learn, read_settings
from fluvial.codecs.auto import AutoSettings, Use, candidates
from fluvial.codecs.coding_time import loaded
from fluvial.codecs.compiled import all_cores
from fluvial.data import POOLED, SiteTexts
from fluvial.data.site_remarks import end_ids
from fluvial.errors import ConfigError, RefusalError, WireError
from fluvial.federation.boundary import ERRORS, kind, outward
from fluvial.federation.sites import Site
from fluvial.federation.talk import conversed, only_answer
from fluvial.federation.transfers import Transfers
from fluvial.models.assignment import Assignment
from fluvial.models.fingerprints import fingerprints
from fluvial.models.pool import ModelPool
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import Records, check_processes, site_of, tasks_of, texts_of
from fluvial.site_process.budget import check_budget, check_same_promise
from fluvial.site_process.journal import Header, Journal
from fluvial.site_process.local_config import at_site, refusal
from fluvial.site_process.outgoing import OutgoingLog, labels_of
from fluvial.site_process.run_configs import NAME, other_runs, read_config, write_config
from fluvial.site_process.site_file import SiteFile
from fluvial.wire.payload import Limits, Payload

logger = logging.getLogger(__name__)

JOIN = "join"
"""Task that brings the configuration of a run to a site."""
UNKNOWN_RUN = Payload(values={"unknown": True})
"""Answer of a site that has not joined the run; the server sends `JOIN` again."""


@dataclass(frozen=True)
class Answer:
    """An answer that leaves a site."""

    data: bytes
    """Bytes of the answer's payload."""
    kept: bool
    """True if the site keeps state that a later message of the run needs."""
    times: Mapping[str, float] | None = field(default=None, compare=False)
    """Seconds of parts of the work; None where epsilon counts all that the site sends."""


class Stream(Protocol):
    """The way of turns to the server, and of its answers back, in their order."""

    within_s: float
    """Seconds for which an answer is waited for."""

    def send(self, data: bytes) -> None:
        """Begin to send a turn."""
        ...

    def receive(self) -> bytes:
        """Return the next answer."""
        ...


class SiteProcess:
    """Process that answers the messages for one site; its attributes are a cache only."""

    def __init__(self, site: SiteFile, *, limits: Limits | None = None) -> None:
        self.site = site
        self.limits = limits or Limits()
        self.transfers = Transfers()
        self._outgoing = OutgoingLog(site.folder)
        self._pools: dict[str, ModelPool] = {}
        self._texts: dict[str, SiteTexts] = {}
        self._codecs: set[str] = set()
        """Names of the codecs that are loaded."""

    def prepare(self) -> None:
        """Load base model and codecs of the newest run, so that forks of this process have them."""
        paths = sorted(
            self.site.folder.glob(f"runs/*/{NAME}"), key=lambda path: path.stat().st_mtime
        )
        sent = read_config(paths[-1].parent) if paths else None

        if sent is not None:
            config = at_site(sent, self.site)
            pool = self._pool(config)
            self._records(config, pool)
            self._load_codecs(config, pool)

    def answer(self, header: Header, wire: bytes, stream: Stream | None = None) -> Answer:
        """Return the answer to one message; raise what the task raises.

        `stream` carries the turns of the task; without it, a task that converses is refused.
        """
        message = Payload.from_bytes(wire, self.limits)
        if header.task == JOIN:
            return self._release(header, self._join(header, message))

        config = self._config(header.run)
        if config is None:
            return self._release(header, UNKNOWN_RUN)

        tasks = tasks_of(config)
        if header.task not in tasks:
            raise WireError(f"unknown task {header.task!r:.40}")

        torch.set_num_threads(config.fleet.threads)
        journal = Journal(self._run_folder(header.run), self._name(config))
        journal.settle(header)
        pool = self._pool(config)
        site = site_of(config, self._name(config), pool, self._records(config, pool), journal.store)
        site.round = header.round
        site.memory_mb = self.site.memory_mb
        site.transfers = self.transfers
        site.accept_assignment(message)
        task = partial(tasks[header.task], site)
        name = site.of_method(f"task {header.task!r}")
        if stream is None:
            with all_cores():  # the server waits, and a machine has one site as a rule
                reply = only_answer(task(message), name)
        else:
            turns = config.method.turns_waited(config.train)
            stream.within_s = config.fleet.answer_within_s(turns)
            send = partial(self._send, header, config, stream)
            receive = partial(self._receive, stream, site)
            reply = conversed(task, message, send, receive, name)

        times = None if _is_private_at_site(config) else site.stopwatch.seconds
        answer = self._release(header, reply, config, kept=bool(site.kept), times=times)
        journal.post(header, site.kept)

        return answer

    def refusal(self, header: Header | None, problem: Exception) -> str:
        """Log a problem and return the text of it that may leave the site (see `boundary`)."""
        errors = self.site.folder / ERRORS
        text = outward(problem, errors, site=self.site.name, **labels_of(header))

        try:
            self._outgoing.write_error(header, text)
        except OSError as full:
            return f"the site cannot write its log ({kind(full)})"

        return text

    # -- a run ------------------------------------------------------------------------------------

    def _join(self, header: Header, message: Payload) -> Payload:
        """Join a run and return the site's fingerprints, or raise `ConfigError` with the reason."""
        config = parse(message.value("config", dict), "the run's configuration")
        local = at_site(config, self.site)
        folder = self._run_folder(header.run)
        self._check_allowed(config, folder)
        check_processes(local)

        try:
            pool = self._pool(local)
        except ConfigError:
            if self.site.model is not None:
                raise
            raise refusal("model.name_or_path", self.site) from None

        patterns = self.site.allow.tensors
        refused = [name for name in pool.layout.names if not _matches(name, patterns)]
        if refused:
            raise RefusalError(
                f"site {self.site.name!r} does not let {refused[0]!r} leave "
                f"(nor {len(refused) - 1} more)"
            )

        name = self._name(config)
        texts = self._records(local, pool)
        ends: Collection[int] | None = None
        if not _is_private_at_site(config):
            data = texts.pooled() if config.entry.traits.pooled else texts.load(name)
            ends = end_ids(data.questions, pool.tokenizer.eos_token_id)
        for note in (*texts.notes, *pool.end_remarks(self._held(local, pool), ends)):
            logger.warning("%s", note)

        known = Journal(folder, name).begun
        write_config(folder, message.values["config"])
        return Payload(values={"site": name, "prints": {**fingerprints(pool)}, "known": known})

    def _check_allowed(self, config: RunConfig, folder: Path) -> None:
        """Raise `RefusalError` or `PrivacyError` unless the site's file allows the run."""
        allowed = self.site.allow
        name = config.method.name
        if allowed.methods and name not in allowed.methods:
            why = f"allow.methods leaves out {name!r}; the baselines of compare are methods too"
            raise self._no_part("method.name", why)

        if allowed.models and config.model.name_or_path not in allowed.models:
            raise self._no_part("model.name_or_path", "allow.models leaves it out")

        if allowed.max_epsilon is not None:
            check_budget(
                config,
                other_runs(folder),
                max_epsilon=allowed.max_epsilon,
                max_delta=allowed.max_delta,
            )
            ledger = Journal(folder, self._name(config)).store.private(self._name(config))
            check_same_promise(config, read_config(folder), ledger)

    def _no_part(self, setting: str, why: str) -> RefusalError:
        """Return the refusal of a run for a setting, with what the site's operator can do."""
        return RefusalError(
            f"site {self.site.name!r} takes no part in runs with this {setting}: {why}; its "
            "operator can change site.toml and then start the site again"
        )

    def _config(self, run: str) -> RunConfig | None:
        """Return the configuration of `run` as it holds at this site, None before it has joined.

        Raises `RefusalError` if the run names a path that the site's file does not allow.
        """
        sent = read_config(self._run_folder(run))
        return None if sent is None else at_site(sent, self.site)

    def _name(self, config: RunConfig) -> str:
        return POOLED if config.entry.traits.pooled else self.site.name

    def _pool(self, config: RunConfig) -> ModelPool:
        key = f"{config.model!r} {config.adapter!r} {config.data.packing}"
        if key not in self._pools:
            self._pools = {}  # one base at a time
            pool = ModelPool(config.model, config.adapter)
            held = self._held(config, pool)
            pool.load(held)
            if config.data.packing and not pool.full:  # else the server checks the whole model
                pool.check_packing(held)
            self._pools[key] = pool
        return self._pools[key]

    def _held(self, config: RunConfig, pool: ModelPool) -> Assignment | None:
        """Return what the method has this site hold; None for the run's own assignment."""
        return config.entry.held(config.method, pool, self._name(config), self.site.memory_mb)

    def _load_codecs(self, config: RunConfig, pool: ModelPool) -> None:
        """Load what codes both ways, once, so that processes forked from this one have it."""
        for settings in (config.coding, config.downlink):
            if isinstance(settings, AutoSettings):
                use = Use(config.rounds)
                settings = read_settings(candidates(settings, pool.layout, use)[0])
            if settings is None or must_learn(settings) or settings.name in self._codecs:
                continue
            self._codecs.add(settings.name)
            try:
                loaded(settings, pool.layout)
            except ConfigError as error:  # a rate that suits the whole layout only
                logger.debug("codec %s is loaded with the first update: %s", settings.name, error)

    def _records(self, config: RunConfig, pool: ModelPool) -> Records:
        """Return the site's records.

        Under privacy at the site, a fault of the records is raised when they are loaded.
        """
        try:
            return self._data(config, pool)
        except Exception as problem:
            if not _is_private_at_site(config):
                raise
            return _UnreadableRecords(self._name(config), problem)

    def _data(self, config: RunConfig, pool: ModelPool) -> SiteTexts:
        key = f"{config.data!r} {config.seed} {config.model.name_or_path}"
        if key not in self._texts:
            owner = None if self.site.data is None else self.site.name
            texts = texts_of(config, pool, owner)
            if not config.entry.traits.pooled and self.site.name not in texts.names:
                raise RefusalError(
                    f"site {self.site.name!r}: the run's [data] has no site of this name; set "
                    "[data] in its own file, or add a table data.by_site to the run"
                )
            self._texts = {key: texts}

        return self._texts[key]

    def _run_folder(self, run: str) -> Path:
        return self.site.folder / "runs" / hashlib.sha256(run.encode()).hexdigest()[:24]

    # -- answers ----------------------------------------------------------------------------------

    def _send(self, header: Header, config: RunConfig, stream: Stream, turn: Payload) -> None:
        """Send a turn, which is logged before it leaves."""
        stream.send(self._release(header, turn, config).data)

    def _receive(self, stream: Stream, site: Site) -> Payload:
        """Return the server's next answer."""
        with site.stopwatch.time("waiting"):
            return Payload.from_bytes(stream.receive(), self.limits)

    def _release(
        self,
        header: Header,
        answer: Payload,
        config: RunConfig | None = None,
        *,
        kept: bool = False,
        times: Mapping[str, float] | None = None,
    ) -> Answer:
        """Log an answer before it leaves; raise `RefusalError` if it exceeds the site's bound."""
        data = answer.to_bytes()
        bound = self.site.allow.max_bytes_up_per_round

        if bound is not None:
            whole = self._outgoing.bytes_of_round(header, data)
            if whole > bound:
                before = f" after {whole - len(data)} of round {header.round}"
                raise RefusalError(
                    f"site {self.site.name!r} lets {bound} bytes leave in a round; this answer of "
                    f"{len(data)}{before * (whole > len(data))} exceeds it"
                )

        labels: dict[str, Any] = {}
        if config is not None:
            labels = {"method": config.method.name, "codec": config.coding.name}
        if times is not None:
            labels["seconds"] = {part: round(seconds, 3) for part, seconds in times.items()}
        self._outgoing.write_answer(header, answer, data, labels)

        return Answer(data, kept, times)


class _UnreadableRecords:
    """Records that cannot be read, in a run whose refusal must disclose nothing of them."""

    def __init__(self, name: str, problem: Exception) -> None:
        self.names = (name,)
        self.notes = [f"its records cannot be read: {problem}"]
        self._problem = problem

    def load(self, name: str) -> NoReturn:  # noqa: ARG002
        """Raise the error of reading the records."""
        raise self._problem

    def pooled(self) -> NoReturn:
        """Raise the error of reading the records."""
        raise self._problem


def _is_private_at_site(config: RunConfig) -> bool:
    """Return True if epsilon counts all that the site sends, so refusals may not depend on data."""
    return config.promise is not None and config.promise.at_site


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
