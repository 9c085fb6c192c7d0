"""The replies of one honest round of a method, to be played again with one of them changed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fluvial.data import SiteTexts
from fluvial.federation.config import FleetConfig
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import local_fleet
from fluvial.federation.sites import Site, Task
from fluvial.federation.store import StateStore
from fluvial.federation.talk import only_answer
from fluvial.methods.interface import Server
from fluvial.models.pool import ModelPool
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import site_of, tasks_of
from fluvial.runs.run import Run
from fluvial.wire.payload import Payload

Change = Callable[[str, str, int, bytes], bytes | None]
"""Task, site and number of the call to that site; the reply's bytes in, other bytes or None for
silence out."""


class Forged(Payload):
    """An answer whose bytes are whatever a test wants."""

    def to_bytes(self) -> bytes:
        """The bytes."""
        return bytes.fromhex(str(self.values["forged"]))


def forged(data: bytes) -> Payload:
    """An answer with these bytes."""
    return Forged(values={"forged": data.hex()})


def forging(tasks: Mapping[str, Task], change: Change) -> dict[str, Task]:
    """Tasks whose answers go through `change`."""
    calls: dict[tuple[str, str], int] = {}

    def one(name: str, task: Task) -> Task:
        def done(site: Site, message: Payload) -> Payload:
            number = calls[name, site.name] = calls.get((name, site.name), 0) + 1
            data = change(name, site.name, number, only_answer(task(site, message)).to_bytes())
            if data is None:
                raise RuntimeError("silent")
            return forged(data)

        return done

    return {name: one(name, task) for name, task in tasks.items()}


@dataclass
class Round:
    """The first round of a method, recorded."""

    config: RunConfig
    run: Run
    state: bytes
    """Of the server after its set-up."""
    replies: dict[tuple[str, str, int], bytes] = field(default_factory=dict)
    """By task, site and number of the call."""
    setup: dict[tuple[str, str, int], bytes] = field(default_factory=dict)
    """The same of the set-up."""

    def again(self, change: Change, **policy: Any) -> tuple[Server, Fleet, dict[str, Any]]:
        """Server, fleet and record after the round with changed replies."""
        return self._play(
            change, self.replies, lambda server, fleet: server.round(1, fleet), policy, setup=False
        )

    def set_up(self, change: Change, **policy: Any) -> tuple[Server, Fleet, dict[str, Any]]:
        """The same for the set-up."""
        return self._play(
            change, self.setup, lambda server, fleet: server.setup(fleet), policy, setup=True
        )

    def _play(
        self,
        change: Change,
        replies: Mapping[tuple[str, str, int], bytes],
        act: Callable[[Server, Fleet], dict[str, Any]],
        policy: dict[str, Any],
        *,
        setup: bool,
    ) -> tuple[Server, Fleet, dict[str, Any]]:
        calls: dict[tuple[str, str], int] = {}

        def task(name: str) -> Task:
            def answer(site: Site, message: Payload) -> Payload:
                number = calls[name, site.name] = calls.get((name, site.name), 0) + 1
                data = change(name, site.name, number, replies.get((name, site.name, number), b""))
                if data is None:
                    raise RuntimeError("silent")
                return forged(data)

            return answer

        texts = self.run.texts
        pool = self.run.pool
        assert isinstance(texts, SiteTexts)
        store = StateStore(None)
        settings = {"on_failure": "skip", "quorum": 0.3, "workers": 1} | policy
        fleet = local_fleet(
            self.run.fleet.sites,
            lambda name: site_of(self.config, name, pool, texts, store),
            {name: task(name) for name in tasks_of(self.config)},
            FleetConfig.model_validate(settings),
        )
        # Without the updates of TGAP that the recorded run has left on the disk.
        context = replace(self.run.context, ensemble=None)
        server = self.config.entry.server(self.config.method, context)

        if not setup:
            server.restore(Payload.from_bytes(self.state))

        return server, fleet, act(server, fleet)


def record(table: dict[str, Any], folder: Path) -> Round:
    """Run the set-up and the first round honestly, and keep every reply."""
    config = parse(table, "test")
    pool = ModelPool(config.model, config.adapter)
    seen: dict[tuple[str, str, int], bytes] = {}

    def note(task: str, site: str, number: int, data: bytes) -> bytes:
        seen[task, site, number] = data
        return data

    def assemble(each: RunConfig, run_folder: RunFolder, pool: ModelPool, texts: Any) -> Fleet:
        def open_site(name: str) -> Site:
            return site_of(each, name, pool, texts, run_folder.store)

        return local_fleet(texts.names, open_site, forging(tasks_of(each), note), each.fleet)

    with RunFolder(folder) as opened:
        texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
        run = Run(config, opened, pool, texts, assemble)
        run.server.setup(run.fleet)
        setup = dict(seen)
        state = run.server.state().to_bytes()
        run.server.round(1, run.fleet)

    rest = {key: data for key, data in seen.items() if key not in setup}
    counts: dict[tuple[str, str], int] = {}
    replies = {}

    for (task, site, _), data in sorted(rest.items()):
        counts[task, site] = counts.get((task, site), 0) + 1
        replies[task, site, counts[task, site]] = data

    return Round(config, run, state, replies, setup)
