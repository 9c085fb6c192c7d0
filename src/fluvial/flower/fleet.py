"""`Fleet.ask` over a Flower grid: one message for each site, our own polling, deadline and quorum."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fluvial.config import RunConfig
from fluvial.errors import ClientError, WireError
from fluvial.fleet import Failure, Policy, Reply
from fluvial.flower.envelope import pack, unpack
from fluvial.models import Workbench
from fluvial.payload import Limits, Payload, Value
from fluvial.station import HELLO, UNKNOWN, Header, fingerprints

logger = logging.getLogger(__name__)
T = TypeVar("T")

_FINISHED = 12 * 3600.0
"""Seconds that Flower keeps a message for without a deadline."""
_SPARE_S = 5.0
"""That Flower keeps it longer than we wait, so that our deadline speaks first."""


@dataclass
class _Out:
    """A message that is under way."""

    site: str
    attempt: int
    wire: bytes
    seq: int
    started: float


class FlowerFleet(Policy):
    """The sites of a Flower run, by name."""

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        run: str,
        names: Sequence[str],
        bench: Workbench,
        *,
        start_timeout_s: float = 120.0,
        poll_s: float = 0.05,
        limits: Limits | None = None,
    ) -> None:
        """Wait for all sites of `names` and agree with each on the run; raises `ClientError` naming who is missing.

        `run` names the run of one method, the same when it is resumed.
        """
        super().__init__(config.fleet)
        self.sites = tuple(names)
        self._grid, self._run, self._limits, self._poll_s = grid, run, limits or Limits(), poll_s
        self._table = config.model_dump(mode="json", exclude_unset=True)
        self._prints = fingerprints(bench)
        self._session = secrets.token_hex(8)
        self._nodes: dict[str, int] = {}
        self._met: set[int] = set()
        self._refused: dict[int, str] = {}
        self._seq, self._base = 0, -1
        self._acks: dict[str, int] = {}
        self._start_timeout_s = start_timeout_s

    # -- who is there ---------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Wait until every site has joined; raises `ClientError` naming those that have not, and refusals."""
        until = time.monotonic() + self._start_timeout_s
        while not set(self.sites) <= self._nodes.keys():
            self._greet()
            if set(self.sites) <= self._nodes.keys():
                return
            if time.monotonic() > until:
                missing = ", ".join(sorted(set(self.sites) - self._nodes.keys()))
                why = "".join(f"; {reason}" for reason in self._refused.values())
                if self._config.on_failure == "stop":
                    raise ClientError(f"sites {missing} have not joined within {self._start_timeout_s:g} s{why}")
                logger.warning("sites %s have not joined within %g s%s", missing, self._start_timeout_s, why)
                return
            time.sleep(min(1.0, 20 * self._poll_s))

    def _greet(self) -> None:
        """Say hello to nodes that were not met yet."""
        present = set(self._grid.get_node_ids())
        self._nodes = {name: node for name, node in self._nodes.items() if node in present}
        self._met &= present
        fresh = sorted(present - self._met)
        if fresh:
            self._hello(fresh)

    def _hello(self, nodes: Sequence[int]) -> None:
        wire = Payload(values={"config": self._table}).to_bytes()
        waiting: dict[str, int] = {}
        for node in nodes:
            try:
                waiting[self._push(node, HELLO, wire, round=0, ack=0)] = node
            except ClientError as gone:
                logger.info("%s", gone)
        until = time.monotonic() + self._start_timeout_s
        while waiting and time.monotonic() < until:
            for reply in self._grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, 0)
                if node:  # else nobody waits for it
                    if not reply.has_error():  # else these are Flower's words, and the site is greeted again
                        self._met.add(node)
                    self._join(node, reply)
            if waiting:
                time.sleep(self._poll_s)

    def _join(self, node: int, reply: Message) -> None:
        try:
            answer, _ = self._open(reply, max_bytes=2**20)
            name, prints = answer.value("site", str), answer.value("prints", dict)
            for what, ours in self._prints.items():
                if prints.get(what) != ours:
                    theirs = f"{prints.get(what)!r:.40}"
                    raise ClientError(f"site {name!r} has another {what} ({theirs}, here {ours!r}); give both the same")
        except (ClientError, WireError) as problem:
            self._refused[node] = str(problem)
            logger.warning("node %d does not take part: %s", node, problem)
            return
        other = self._nodes.get(name, node)
        if other != node:
            self._refused[other] = f"two nodes say that they are site {name!r}; the one that came later counts"
            logger.warning("node %d: %s", other, self._refused[other])
        self._nodes[name] = node

    # -- asking ---------------------------------------------------------------------------------------------------

    def ask(
        self,
        task: str,
        messages: Mapping[str, Payload],
        *,
        round: int,
        read: Callable[[Payload], T],
        alone: bool = True,
    ) -> Iterator[Reply[T]]:
        """See `Fleet`."""
        wires: dict[int, bytes] = {}
        queue = [(name, 1) for name in messages]
        under_way: dict[str, _Out] = {}
        answered = 0
        while queue or under_way:
            if queue and not {self._nodes.get(name) for name, _ in queue} <= set(self._grid.get_node_ids()):
                self._greet()  # a site may have come back as another node
            for name, attempt in queue:
                wire = wires.setdefault(id(messages[name]), b"") or messages[name].to_bytes()
                wires[id(messages[name])] = wire
                node = self._nodes.get(name)
                out = _Out(name, attempt, wire, 0, time.monotonic())
                if node is None:
                    under_way[f"absent {name}"] = out
                    continue
                try:
                    message_id = self._push(node, task, wire, round=round, ack=self._acks.get(name, 0))
                except ClientError:
                    message_id = f"absent {name}"
                out.seq = self._seq
                under_way[message_id] = out
            queue = []
            for message_id, problem, reply in self._arrivals(under_way):
                if message_id not in under_way:
                    continue  # a reply that nobody waits for, or the second of two
                out = under_way.pop(message_id)
                content: Any = None
                size = 0
                if reply is not None:
                    try:
                        answer, size = self._open(reply, max_bytes=self._limits.max_bytes)
                        if answer.values == UNKNOWN.values:
                            self._hello([self._nodes[out.site]])
                            raise ClientError("did not know the run, and has been told")
                        content = read(answer)
                    except Exception as error:
                        problem = f"{type(error).__name__}: {error}"
                if problem:
                    if self.failed(Failure(out.site, round, task, problem, len(out.wire)), out.attempt):
                        queue.append((out.site, out.attempt + 1))
                    continue
                self._acks[out.site] = out.seq
                answered += 1
                logger.info("round %d, %s: %s answered (%d of %d)", round, task, out.site, answered, len(messages))
                yield Reply(out.site, content, len(out.wire), size, time.monotonic() - out.started)
        if alone:
            self.require_quorum(task, round, answered=answered, asked=len(messages))

    def _arrivals(self, under_way: Mapping[str, _Out]) -> Iterator[tuple[str, str, Message | None]]:
        """Message ids with a problem or a reply; waits for the first."""
        deadline = self._config.deadline_s
        while True:
            found = False
            sent = [message_id for message_id in under_way if not message_id.startswith("absent ")]
            replies = list(self._grid.pull_messages(sent)) if sent else []
            for reply in replies:
                found = True
                yield reply.metadata.reply_to_message_id, "", reply
            now = time.monotonic()
            for message_id, out in list(under_way.items()):
                if message_id.startswith("absent "):
                    found = True
                    yield message_id, "is not connected", None
                elif deadline is not None and now - out.started > deadline:
                    found = True
                    yield message_id, f"no answer within fleet.deadline_s={deadline:g}", None
            if found or not under_way:
                return
            time.sleep(self._poll_s)

    def _open(self, reply: Message, *, max_bytes: int) -> tuple[Payload, int]:
        """The answer in a reply, and its bytes; raises `ClientError` with the site's own words if it failed."""
        if reply.has_error():
            raise ClientError(f"Flower's error {reply.error.code}: {reply.error.reason}")
        data, header = unpack(reply, max_bytes=max_bytes)
        if header.get("error"):
            raise ClientError(str(header["error"])[:4000])
        return Payload.from_bytes(data, self._limits), len(data)

    def _push(self, node: int, task: str, wire: bytes, *, round: int, ack: int) -> str:
        self._seq += 1
        header = Header(self._run, task, round, self._session, self._seq, ack, self._base)
        message = Message(
            pack(wire, header.values()),
            dst_node_id=node,
            message_type="train",
            ttl=_SPARE_S + (self._start_timeout_s if task == HELLO else self._config.deadline_s or _FINISHED),
        )
        (message_id,) = self._grid.push_messages([message])
        if not message_id:
            raise ClientError(f"Flower did not take a message for node {node}")
        return str(message_id)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Value]:
        """Which answers count, so that sites keep what these wanted to keep."""
        return {"seq": self._seq, "acks": {**self._acks}}

    def restore(self, state: dict[str, Any], round: int) -> None:
        """See `state`."""
        self._seq, self._base = state.get("seq", 0), round
        self._acks = dict(state.get("acks", {}))
        self.meet()
