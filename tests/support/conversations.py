"""Rounds of FL-GLM in which one end of the conversations says something else."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fluvial.data import SiteTexts
from fluvial.federation.config import FleetConfig
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import local_fleet
from fluvial.federation.sites import Site, Task
from fluvial.federation.store import StateStore
from fluvial.federation.talk import Ahead, Next, Talk
from fluvial.methods.flglm.server import FlGlmServer
from fluvial.models.pool import ModelPool
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import site_of, tasks_of
from fluvial.runs.run import Run
from fluvial.wire.payload import Payload
from tests.support.remembered import remembered
from tests.support.replay import forged

Lie = Callable[[str, str, int, bytes], bytes | None]
"""Site, kind of what it says ("forward", "reply", ...), its number of this kind, and its bytes;
other bytes out, or None for silence."""
Answer = Callable[[str, str, int, Payload], Payload]
"""The same of what the server answers to a turn."""


class EarlyReplyError(Exception):
    """A site's reply in the place of a turn."""

    def __init__(self, data: bytes) -> None:
        """Reply with these bytes."""
        super().__init__("early")
        self.data = data


def honest(_site: str, _kind: str, _number: int, data: bytes) -> bytes:
    """Say what a site says."""
    return data


def true(_site: str, _kind: str, _number: int, answer: Payload) -> Payload:
    """Take what the server answers."""
    return answer


class Conversed:
    """The first round of a configuration, which can be made again and again."""

    def __init__(self, config: RunConfig, run: Run, pool: ModelPool, texts: SiteTexts) -> None:
        """Make rounds of `run`."""
        self.config = config
        self.run = run
        self._pool = pool
        self._texts = texts
        self._tasks = remembered(tasks_of(config))
        self.store = StateStore(None)

    def site(self, name: str) -> Site:
        """Return a site of the run."""
        return site_of(self.config, name, self._pool, self._texts, self.store)

    def again(
        self, lie: Lie = honest, answer: Answer = true, **policy: Any
    ) -> tuple[FlGlmServer, Fleet, dict[str, Any]]:
        """Return server, fleet and record of the round."""
        self.store = StateStore(None)
        settings = {"on_failure": "skip", "quorum": 0.3, "workers": 1} | policy
        fleet = local_fleet(
            self._texts.names,
            self.site,
            lying(self._tasks, lie, answer),
            FleetConfig.model_validate(settings),
        )
        server = self.config.entry.server(self.config.method, self.run.context)
        assert isinstance(server, FlGlmServer)
        server.setup(fleet)
        return server, fleet, server.round(1, fleet)


def lying(tasks: Mapping[str, Task], lie: Lie, answer: Answer) -> dict[str, Task]:
    """Return tasks whose turns and replies go through `lie`, and what they receive by `answer`."""

    def one(name: str, task: Task) -> Task:
        def begin(site: Site, message: Payload) -> Talk:
            talk = task(site, message)
            assert not isinstance(talk, Payload), f"{name} does not converse"
            return _conversation(site.name, talk, lie, answer)

        return begin

    return {name: one(name, task) for name, task in tasks.items()}


def _conversation(site: str, talk: Talk, lie: Lie, answer: Answer) -> Talk:
    counts: dict[str, int] = {}
    open_: deque[tuple[str, int]] = deque()

    def says(kind: str, payload: Payload) -> Payload:
        counts[kind] = counts.get(kind, 0) + 1
        data = lie(site, kind, counts[kind], payload.to_bytes())
        if data is None:
            raise RuntimeError("silent")
        return forged(data)

    def turn(payload: Payload) -> Payload:
        kind = str(payload.values["of"])
        said = says(kind, payload)
        open_.append((kind, counts[kind]))
        return said

    def taken(payload: Payload) -> Payload:
        return answer(site, *open_.popleft(), payload)

    try:
        reply = yield from relayed(talk, turn, taken)
    except EarlyReplyError as early:
        return forged(early.data)
    return says("reply", reply)


def relayed(
    talk: Talk,
    says: Callable[[Payload], Payload],
    hears: Callable[[Payload], Payload] = lambda answer: answer,
) -> Talk:
    """Return a conversation with the turns of `talk` as `says` has them, and the answers as `hears`
    has them."""
    received: Payload | None = None
    while True:
        try:
            said = next(talk) if received is None else talk.send(received)
        except StopIteration as end:
            reply: Payload = end.value
            return reply

        if isinstance(said, Next):
            received = hears((yield said))
        elif isinstance(said, Ahead):
            received = yield Ahead(says(said.turn))
        else:
            received = hears((yield says(said)))


@contextmanager
def conversed(table: dict[str, Any], folder: Path) -> Iterator[Conversed]:
    """Open a run whose first round can be made again and again."""
    config = parse(table, "test")
    pool = ModelPool(config.model, config.adapter)
    with RunFolder(folder) as opened:
        texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
        yield Conversed(config, Run(config, opened, pool, texts), pool, texts)


class SharedRounds:
    """First rounds by name, which are opened once for many tests."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        """Open runs under `folder`, which the end of `stack` closes."""
        self._folder = folder
        self._stack = stack
        self._by_name: dict[str, Conversed] = {}

    def of(self, name: str, table: dict[str, Any]) -> Conversed:
        """Return the rounds of this name, of the configuration `table`."""
        if name not in self._by_name:
            folder = self._folder / str(len(self._by_name))
            self._by_name[name] = self._stack.enter_context(conversed(table, folder))
        return self._by_name[name]


@contextmanager
def shared_rounds(folder: Path) -> Iterator[SharedRounds]:
    """Open rounds under `folder` when they are asked for, and close them at the end."""
    with ExitStack() as stack:
        yield SharedRounds(folder, stack)
