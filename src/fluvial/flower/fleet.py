"""`Fleet.ask` over a Flower grid: one message for each site, our own polling, deadline and
quorum."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fluvial.errors import ClientError, ConfigError, WireError
from fluvial.federation.fleet import Failure, Policy, Reply, Wires, printable, unreadable
from fluvial.flower.envelope import pack, unpack
from fluvial.flower.inbox import Inbox
from fluvial.models.pool import ModelPool
from fluvial.runs.config import RunConfig
from fluvial.site_process.fingerprints import fingerprints
from fluvial.site_process.journal import Header
from fluvial.site_process.process import JOIN, UNKNOWN_RUN
from fluvial.wire.payload import Limits, Payload, Value

logger = logging.getLogger(__name__)
T = TypeVar("T")

_FINISHED = 12 * 3600.0
"""Seconds that Flower keeps a message for without a deadline."""
_SPARE_S = 5.0
"""That Flower keeps it longer than we wait, so that our deadline speaks first."""
_LOOK_S = 1.0
"""Between two looks at who is connected, while somebody is missing."""
_AGAIN_S = 10.0
"""After which a site that was refused is asked again who it is."""


@dataclass
class _Turn:
    """What one site is asked in one call of `ask`."""

    site: str
    attempt: int = 1
    since: float = field(default_factory=time.monotonic)
    """When it was sent, and until then when it was to be."""
    seq: int = 0
    told: bool = False
    """Whether it was told of the run again in this call."""


class FlowerFleet(Policy):
    """The sites of a Flower run, by name."""

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        label: str,
        names: Sequence[str],
        bench: ModelPool,
        *,
        simulated: bool = False,
        registered: Callable[[], Mapping[int, str]] = dict,
        join_timeout_s: float | None = None,
        poll_s: float = 0.05,
        limits: Limits | None = None,
    ) -> None:
        """`label` names the run in the sites' logs, beside its method; nobody is asked anything
        before `restore`.

        A run that was begun with sites on this machine, `simulated`, does not go on with others,
        nor the reverse.

        `registered` gives, by number of a Flower node, the name that its key was registered under:
        under another name a node is refused. `join_timeout_s` is in place of the configuration's.
        """
        super().__init__(config.fleet)
        self.sites = tuple(names)
        self._grid, self._limits, self._poll_s = grid, limits or Limits(), poll_s
        self._registered, self._inbox = registered, Inbox(grid, poll_s=poll_s)
        self._join_timeout_s = join_timeout_s or config.fleet.join_timeout_s
        self._hello = Payload(
            values={"config": config.model_dump(mode="json", exclude_unset=True)}
        ).to_bytes()
        self._prints = fingerprints(bench)
        self._simulated = simulated
        self._run = f"{label[-150:]} {config.method.name} {secrets.token_hex(8)}"
        self._session = secrets.token_hex(8)
        self._seq = 0
        self._base = -1
        self._acks: dict[str, int] = {}
        self._keepers: set[str] = set()
        """Sites that keep something which the run cannot do without."""
        self._nodes: dict[str, int] = {}
        self._greeted: dict[str, tuple[int, float]] = {}
        """By message: nodes that have not answered yet, and since when."""
        self._refused: dict[int, tuple[str, float]] = {}
        """Why nodes do not take part, and when they are greeted again: somebody may have mended
        it."""
        self._looked = float("-inf")

    # -- who is there -----------------------------------------------------------------------------

    def meet(self) -> None:
        """Wait until every site has joined; raises `ClientError` naming those that have not, and
        refusals."""
        until = time.monotonic() + self._join_timeout_s
        while missing := sorted(set(self.sites) - self._nodes.keys()):
            if time.monotonic() > until:
                text = f"sites {', '.join(missing)} have not joined within {self._join_timeout_s:g} s{self._reasons()}"
                if self.config.on_failure == "stop":
                    raise ClientError(f"{text}. fleet.join_timeout_s sets how long a run waits")
                logger.warning("%s", text)
                return

            self._look()
            for _ in self._arrivals({}, wait=False):
                pass  # nobody is asked anything yet, and greetings are heard on the way

    def _look(self) -> None:
        """Say hello to nodes that were not met yet."""
        now = time.monotonic()
        if now - self._looked >= min(_LOOK_S, 20 * self._poll_s):
            self._looked = now
            present = set(self._grid.get_node_ids())
            self._nodes = {name: node for name, node in self._nodes.items() if node in present}
            self._greeted = {
                number: entry for number, entry in self._greeted.items() if entry[0] in present
            }
            self._refused = {
                node: entry for node, entry in self._refused.items() if node in present
            }
            known = {*self._nodes.values(), *(node for node, _ in self._greeted.values())}
            known |= {node for node, (_, again) in self._refused.items() if now < again}

            for node in sorted(present - known):
                if number := self._push(node, JOIN, self._hello, round=0, ack=0):
                    self._greeted[number] = node, now

        for number, (node, since) in list(self._greeted.items()):
            if now - since > self._join_timeout_s:
                del self._greeted[number]
                self._inbox.forget(number)
                self._refuse(
                    node, f"a site did not say who it is within {self._join_timeout_s:g} s"
                )

    def _greeting(self, number: str, reply: Message) -> None:
        """Hear what a site says that was greeted; Flower's own words mean that it is to be greeted
        again."""
        if number in self._greeted:
            node, _ = self._greeted.pop(number)
            if not reply.has_error():
                self._join(node, reply)

    def _join(self, node: int, reply: Message) -> None:
        try:
            answer, *_ = self._open(reply, max_bytes=2**20)
            name = answer.value("site", str)
            prints = answer.value("prints", dict)
            key = self._registered().get(node, name)

            if key != name and name in self.sites:
                raise ClientError(
                    f"a site says that it is {name!r:.70}, and its key was registered for {key!r}"
                )

            for what, ours in self._prints.items():
                if prints.get(what) != ours:
                    theirs = f"{prints.get(what)!r:.40}"
                    raise ClientError(
                        f"site {name!r} has another {what} ({theirs}, here {ours!r}); give both the same"
                    )

            if name in self._keepers and not answer.value("known", bool):
                raise ClientError(
                    f"site {name!r} has lost what it kept for this run; restore its folder, or begin a new run"
                )
        except (ClientError, WireError) as problem:
            self._refuse(node, printable(str(problem)))
            return

        other = self._nodes.get(name, node)
        if other != node:
            text = f"two nodes say that they are site {name!r}; the one that came later counts"
            self._refuse(other, text, for_good=True)

        self._nodes[name] = node
        self._refused.pop(node, None)

    def _refuse(self, node: int, reason: str, *, for_good: bool = False) -> None:
        if self._refused.get(node, ("",))[0] != reason:
            logger.warning("node %d does not take part: %s", node, reason)
        self._refused[node] = reason, float("inf") if for_good else time.monotonic() + _AGAIN_S

    def _reasons(self) -> str:
        """Why nodes that are there do not take part."""
        return "".join(f"; {reason}" for reason, _ in self._refused.values())

    def _tell_again(self, turn: _Turn) -> None:
        """Greet a site again that does not know the run."""
        self._nodes.pop(turn.site, None)
        self._looked = float("-inf")
        turn.told = True

    def _may_come(self, turn: _Turn) -> bool:
        """Whether a site that is not connected is worth waiting for: it was greeted, or will be
        asked again anyway."""
        patience = min(self._join_timeout_s, self.config.deadline_s or self._join_timeout_s)
        waits = bool(self._greeted) or self.config.on_failure == "retry"
        return waits and time.monotonic() - turn.since < patience

    # -- asking -----------------------------------------------------------------------------------

    def ask(
        self,
        task: str,
        messages: Mapping[str, Payload],
        *,
        round: int,
        read: Callable[[str, Payload], T],
        alone: bool = True,
    ) -> Iterator[Reply[T]]:
        """See `Fleet`. A site that is not connected is waited for under on_failure="retry", and
        else has failed."""
        wires = Wires(messages)
        waiting = [_Turn(name) for name in messages]
        out = dict[str, _Turn]()
        answered = 0
        self._looked = float("-inf")

        while waiting or out:
            turns = waiting
            waiting = []
            absent = list[_Turn]()

            if turns:
                self._look()  # a site may have gone, or come back as another node

            for turn in turns:
                node = self._nodes.get(turn.site)
                ack = self._acks.get(turn.site, 0)
                number = (
                    self._push(node, task, wires[turn.site], round=round, ack=ack) if node else ""
                )

                if number:
                    turn.seq, turn.since = self._seq, time.monotonic()
                    out[number] = turn
                elif self._may_come(turn):
                    waiting.append(turn)
                else:
                    absent.append(turn)

            for turn, problem, reply in chain(
                ((turn, f"is not connected{self._reasons()}", None) for turn in absent),
                self._arrivals(out, wait=not absent and not waiting),
            ):
                content: Any = None
                size = 0
                kept = False

                if reply is not None:
                    try:
                        answer, size, kept = self._open(reply, max_bytes=self._limits.max_bytes)
                        if answer.values == UNKNOWN_RUN.values and not turn.told:
                            self._tell_again(turn)
                            waiting.append(turn)
                            continue

                        content = read(turn.site, answer)
                    except ClientError as words:
                        problem = printable(str(words))
                        size = len(str(words).encode(errors="replace"))
                    except Exception as error:
                        problem = unreadable(error)

                if problem:
                    failure = Failure(turn.site, round, task, problem, len(wires[turn.site]), size)
                    if self.failed(failure, turn.attempt):
                        waiting.append(_Turn(turn.site, turn.attempt + 1))
                    continue

                self._acks[turn.site] = turn.seq
                if kept:
                    self._keepers.add(turn.site)

                answered += 1
                logger.info(
                    "round %d, %s: %s answered (%d of %d)",
                    round,
                    task,
                    turn.site,
                    answered,
                    len(messages),
                )
                yield Reply(
                    turn.site, content, len(wires[turn.site]), size, time.monotonic() - turn.since
                )

        if alone:
            self.require_quorum(task, round, answered=answered, asked=len(messages))

    def _arrivals(
        self, out: dict[str, _Turn], *, wait: bool
    ) -> Iterator[tuple[_Turn, str, Message | None]]:
        """Take from `out` the turns that have a reply or a problem, waiting for the first of them
        if told to."""
        deadline = self.config.deadline_s
        while out or not wait:
            found = False
            reply = self._inbox.next(self._poll_s)
            while reply is not None:
                number = reply.metadata.reply_to_message_id
                turn = out.pop(number, None)
                if turn is not None:
                    found = True
                    yield turn, "", reply
                else:  # a greeting, or nobody waits for it, or it is the second of two
                    self._greeting(number, reply)

                reply = self._inbox.next(0)

            for number, turn in list(out.items()):
                if deadline is not None and time.monotonic() - turn.since > deadline:
                    found = True
                    self._inbox.forget(number)
                    yield out.pop(number), f"no answer within fleet.deadline_s={deadline:g}", None

            if found or not wait:
                return

    def _open(self, reply: Message, *, max_bytes: int) -> tuple[Payload, int, bool]:
        """The answer in a reply, its bytes, and whether the site keeps something for the next.

        Raises `ClientError` with the site's own words if it failed.
        """
        if reply.has_error():
            raise ClientError(f"Flower's error {reply.error.code}: {reply.error.reason}")

        data, header = unpack(reply, max_bytes=max_bytes)
        error = header.get("error")
        if not isinstance(error, str):
            raise WireError(f"header: error={error!r:.40}, expected text")
        if error:
            raise ClientError(error[:4000])

        return Payload.from_bytes(data, self._limits), len(data), header.get("kept") is True

    def _push(self, node: int, task: str, wire: bytes, *, round: int, ack: int) -> str:
        """The number of the message, "" where Flower did not take it."""
        self._seq += 1
        header = Header(self._run, task, round, self._session, self._seq, ack, self._base)
        message = Message(
            pack(wire, header.values()),
            dst_node_id=node,
            message_type="train",
            ttl=_SPARE_S
            + (self._join_timeout_s if task == JOIN else self.config.deadline_s or _FINISHED),
        )
        (number,) = self._grid.push_messages([message])

        if number:
            self._inbox.watch(str(number))

        return str(number or "")

    # -- checkpoints ------------------------------------------------------------------------------

    def state(self) -> dict[str, Value]:
        """The run's name for the sites, which answers count, so that they keep what these wanted to
        keep, and whose."""
        return {
            "run": self._run,
            "simulated": self._simulated,
            "seq": self._seq,
            "acks": {**self._acks},
            "keepers": [*sorted(self._keepers)],
        }

    def restore(self, state: dict[str, Any], round: int) -> None:
        """See `state`; raises `ConfigError` where a run was begun with other sites than
        Flower's."""
        if round >= 0 and "run" not in state:
            raise ConfigError(
                "this run was begun in one process, and its sites keep in its folder what they need to go on; resume "
                "it with --fleet process"
            )

        if round >= 0 and state.get("simulated") != self._simulated:
            how = "--fleet flower" if state.get("simulated") else "submit --resume"
            raise ConfigError(
                f"this run was begun with other sites, which keep what they need to go on; resume it by {how}"
            )

        self._base = round
        self._run, self._seq = state.get("run", self._run), state.get("seq", 0)
        self._acks, self._keepers = dict(state.get("acks", {})), set(state.get("keepers", []))
        self.meet()
