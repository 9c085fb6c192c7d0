"""A site as a process of its own: one message in, one answer out, and nothing lost between two.

The process may be new for every message. What an answer wants to keep lies in pending files until
the next message says that the server accepted the answer; so a site's state is that of its last
accepted answer, whoever was killed when. Before a run begins the two sides compare what must be
equal; the site's own file decides what it takes part in.
"""

import fnmatch
import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from fluvial.data import POOLED, SiteTexts
from fluvial.errors import ConfigError, RefusalError, WireError
from fluvial.federation.boundary import ERRORS, kind, outward
from fluvial.models.pool import ModelPool
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.run import Records, site_of, tasks_of, texts_of
from fluvial.site_process.budget import check_budget, check_same_promise
from fluvial.site_process.fingerprints import fingerprints
from fluvial.site_process.journal import Header, Journal
from fluvial.site_process.local_config import at_site, refusal
from fluvial.site_process.run_configs import NAME, other_runs, read_config, write_config
from fluvial.site_process.site_file import SiteFile
from fluvial.storage.files import append
from fluvial.wire.payload import Limits, Payload

logger = logging.getLogger(__name__)

HELLO = "hello"
"""The task that brings a run's configuration to a site."""
UNKNOWN = Payload(values={"unknown": True})
"""A site's answer when it has not met the run: the server says hello again."""


@dataclass(frozen=True)
class Answer:
    """What leaves a site."""

    data: bytes
    """Of a payload."""
    kept: bool
    """Whether the site keeps something that a later message of the run needs."""


class Station:
    """Answers messages for one site; what it remembers between two is a cache."""

    def __init__(self, site: SiteFile, *, limits: Limits | None = None) -> None:
        self.site, self.limits = site, limits or Limits()
        self._benches: dict[str, ModelPool] = {}
        self._texts: dict[str, SiteTexts] = {}

    def prepare(self) -> None:
        """Load the base model of the newest run, so that processes forked from this one have it."""
        paths = sorted(
            self.site.folder.glob(f"runs/*/{NAME}"), key=lambda path: path.stat().st_mtime
        )
        agreed = read_config(paths[-1].parent) if paths else None

        if agreed is not None:
            config = at_site(agreed, self.site)
            self._records(config, self._bench(config))

    def answer(self, header: Header, wire: bytes) -> Answer:
        """Return the answer to one message; raise what the task raises."""
        message = Payload.from_bytes(wire, self.limits)
        if header.task == HELLO:
            return self._let_out(header, self._hello(header, message))

        config = self._config(header.run)
        if config is None:
            return self._let_out(header, UNKNOWN)

        tasks = tasks_of(config)
        if header.task not in tasks:
            raise WireError(f"unknown task {header.task!r:.40}")

        torch.set_num_threads(config.fleet.threads)
        journal = Journal(self._run_folder(header.run), self._name(config))
        journal.settle(header)
        bench = self._bench(config)
        site = site_of(
            config, self._name(config), bench, self._records(config, bench), journal.store
        )
        site.accept_assignment(message)
        answer = self._let_out(
            header, tasks[header.task](site, message), config, kept=bool(site.kept)
        )
        journal.post(header, site.kept)

        return answer

    def refusal(self, header: Header | None, problem: Exception) -> str:
        """Return what the server is told of a problem (see `boundary`), once it stands in the log
        of what leaves."""
        about = (
            {}
            if header is None
            else {"run": header.run, "round": header.round, "task": header.task}
        )
        text = outward(problem, self.site.folder / ERRORS, site=self.site.name, **about)

        try:
            self._log(header, {"bytes": len(text.encode()), "error": text})
        except OSError as full:
            return f"the site cannot write its log ({kind(full)})"

        return text

    # -- a run ------------------------------------------------------------------------------------

    def _hello(self, header: Header, message: Payload) -> Payload:
        """Take part in a run, or raise `ConfigError` with the reason."""
        config = parse(message.value("config", dict), "the run's configuration")
        local = at_site(config, self.site)
        allowed = self.site.allow

        for what, found, wanted in (
            ("method.name", config.method.name, allowed.methods),
            ("model.name_or_path", config.model.name_or_path, allowed.models),
        ):
            if wanted and found not in wanted:
                raise RefusalError(
                    f"site {self.site.name!r} takes no part in runs with this {what}"
                )

        folder = self._run_folder(header.run)
        if allowed.max_epsilon is not None:
            check_budget(
                config,
                other_runs(folder),
                max_epsilon=allowed.max_epsilon,
                max_delta=allowed.max_delta,
            )
            ledger = Journal(folder, self._name(config)).store.private(self._name(config))
            check_same_promise(config, read_config(folder), ledger)

        try:
            bench = self._bench(local)
        except ConfigError:
            if self.site.model is not None:
                raise
            raise refusal("model.name_or_path", self.site) from None

        strange = [name for name in bench.layout.names if not _matches(name, allowed.tensors)]
        if strange:
            raise RefusalError(
                f"site {self.site.name!r} does not let {strange[0]!r} leave "
                f"(nor {len(strange) - 1} more)"
            )

        name = self._name(config)
        texts = self._records(local, bench)
        if not _in_private(config):
            _ = texts.pooled() if config.entry.pooled else texts.load(name)

        for note in texts.notes:
            logger.warning("%s", note)
        known = Journal(folder, name).begun
        write_config(folder, message.values["config"])
        return Payload(values={"site": name, "prints": {**fingerprints(bench)}, "known": known})

    def _config(self, run: str) -> RunConfig | None:
        """Return what was agreed on for `run`, with the site's own model and data, or None.

        Raises `RefusalError` for what a run may not name.
        """
        agreed = read_config(self._run_folder(run))
        return None if agreed is None else at_site(agreed, self.site)

    def _name(self, config: RunConfig) -> str:
        return POOLED if config.entry.pooled else self.site.name

    def _bench(self, config: RunConfig) -> ModelPool:
        key = f"{config.model!r} {config.adapter!r}"
        if key not in self._benches:
            bench = ModelPool(config.model, config.adapter)
            bench.load()
            self._benches = {key: bench}  # one base at a time
        return self._benches[key]

    def _records(self, config: RunConfig, bench: ModelPool) -> Records:
        """Return the site's records; under privacy at the site a fault of theirs is raised where
        they are loaded."""
        try:
            return self._data(config, bench)
        except Exception as problem:
            if not _in_private(config):
                raise
            return _Unreadable(self._name(config), problem)

    def _data(self, config: RunConfig, bench: ModelPool) -> SiteTexts:
        key = f"{config.data!r} {config.seed} {config.model.name_or_path}"
        if key not in self._texts:
            owner = None if self.site.data is None else self.site.name
            self._texts = {key: texts_of(config, bench, owner)}

        return self._texts[key]

    def _run_folder(self, run: str) -> Path:
        return self.site.folder / "runs" / hashlib.sha256(run.encode()).hexdigest()[:24]

    # -- what leaves ------------------------------------------------------------------------------

    def _let_out(
        self,
        header: Header,
        answer: Payload,
        config: RunConfig | None = None,
        *,
        kept: bool = False,
    ) -> Answer:
        """Log an answer before it leaves; raises `ConfigError` where the site's file does not let
        it."""
        data = answer.to_bytes()
        most = self.site.allow.max_bytes_up_per_round

        if most is not None and len(data) + _sent(self._outgoing, header) > most:
            raise RefusalError(
                f"site {self.site.name!r} lets {most} bytes leave in a round; this answer of "
                f"{len(data)} exceeds it"
            )

        of_run = (
            {} if config is None else {"method": config.method.name, "codec": config.coding.name}
        )
        self._log(
            header,
            {
                **of_run,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "tensors": {name: list(tensor.shape) for name, tensor in answer.tensors.items()},
                "values": sorted(answer.values),
            },
        )
        return Answer(data, kept)

    @property
    def _outgoing(self) -> Path:
        return self.site.folder / "outgoing.jsonl"

    def _log(self, header: Header | None, entry: dict[str, Any]) -> None:
        """One line of what leaves the site."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        said = (
            {}
            if header is None
            else {"run": header.run, "round": header.round, "task": header.task}
        )
        append(self._outgoing, json.dumps({"time": now, **said, **entry}) + "\n")


class _Unreadable:
    """Records that cannot be read, where to say so would tell of them."""

    def __init__(self, name: str, problem: Exception) -> None:
        self.names = (name,)
        self.notes = [f"its records cannot be read: {problem}"]
        self._problem = problem

    def load(self, name: str) -> NoReturn:  # noqa: ARG002
        """Raise what reading raised."""
        raise self._problem

    def pooled(self) -> NoReturn:
        """Raise what reading raised."""
        raise self._problem


def _in_private(config: RunConfig) -> bool:
    """Return whether epsilon counts all that the site lets out, so that a refusal must not depend
    on its records."""
    return config.promise is not None and config.promise.at_site


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _sent(log: Path, header: Header) -> int:
    """Bytes that left in this round so far."""
    total = 0
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off by a kill or a full disk: what it would have told of has not left

        if entry.get("run") == header.run and entry["round"] == header.round:
            total += entry["bytes"]

    return total
