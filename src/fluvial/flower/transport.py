"""Transport over a Flower grid: one message for each request, and our own polling.

A deployment and a simulation by Ray use the same; the grid is Flower's.
"""

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fluvial import caller
from fluvial.errors import ClientError, ConfigError
from fluvial.federation.failures import reason_of, unreadable
from fluvial.federation.fleet import Fleet
from fluvial.federation.transport import Arrival, Request
from fluvial.flower.envelope import flower_error, open_reply, pack
from fluvial.flower.inbox import Inbox
from fluvial.flower.letter import Letter
from fluvial.flower.nodes import Nodes
from fluvial.flower.stream.conversations import Conversations
from fluvial.flower.stream.listener import StreamListener
from fluvial.models.fingerprints import fingerprints
from fluvial.models.pool import ModelPool
from fluvial.runs.config import RunConfig
from fluvial.site_process.journal import Header
from fluvial.site_process.process import JOIN, UNKNOWN_RUN
from fluvial.site_process.sent_config import for_site
from fluvial.wire.payload import Limits, Payload, Value

logger = logging.getLogger(__name__)

_FINISHED_S = 12 * 3600.0
"""Seconds for which Flower keeps a message where there is no deadline."""
_SPARE_S = 5.0
"""Seconds that Flower keeps a message longer than the fleet waits, so that the fleet's deadline
passes first."""
_PATIENCE_S = 60.0
"""Seconds for which a site that converses goes on without a connection where there is no
deadline."""
_LOOK_POLLS = 20
"""Polls between two looks at which nodes are connected."""


def flower_fleet(
    grid: Grid,
    config: RunConfig,
    label: str,
    names: Sequence[str],
    pool: ModelPool,
    *,
    simulated: bool = False,
    registered: Callable[[], Mapping[int, str]] = dict,
    join_timeout_s: float | None = None,
    poll_s: float = 0.05,
    limits: Limits | None = None,
    listener: StreamListener | None = None,
    keys: Path | None = None,
) -> Fleet:
    """Return the fleet of the sites of a Flower run; see `FlowerTransport`."""
    transport = FlowerTransport(
        grid,
        config,
        label,
        names,
        pool,
        simulated=simulated,
        registered=registered,
        join_timeout_s=join_timeout_s,
        poll_s=poll_s,
        limits=limits or Limits(),
        listener=listener or StreamListener(),
        keys=keys,
    )

    return Fleet(transport, config.fleet, limits=limits)


class FlowerTransport:
    """The sites of a Flower run, by name; see `Transport`."""

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        label: str,
        names: Sequence[str],
        pool: ModelPool,
        *,
        simulated: bool,
        registered: Callable[[], Mapping[int, str]],
        join_timeout_s: float | None,
        poll_s: float,
        limits: Limits,
        listener: StreamListener,
        keys: Path | None,
    ) -> None:
        """Send nothing to any site before `restore`.

        `label` names the run in the sites' logs, beside its method.

        A run that was begun with sites on this machine, `simulated`, does not go on with others,
        nor the reverse.

        `registered` gives, by number of a Flower node, the name that its key was registered under:
        under another name a node is refused. `join_timeout_s` replaces the configuration's.
        `listener` has the port of the live stream, which is opened when a task first converses;
        `keys` is the server's folder with the keys that seal its turns, None where there are none.
        """
        self.sites = tuple(names)
        self.slots = max(len(self.sites), 1)
        self._config = config.fleet
        self._join_timeout_s = join_timeout_s or config.fleet.join_timeout_s
        self._grid = grid
        self._limits = limits
        self._poll_s = poll_s
        self._inbox = Inbox(grid, poll_s=poll_s)
        self._settings = config.model_dump(mode="json", exclude_unset=True)
        self._nodes = Nodes(
            grid,
            self.sites,
            fingerprints(pool),
            greet=self._greet,
            forget=self._inbox.forget,
            registered=registered,
            join_timeout_s=self._join_timeout_s,
            look_s=_LOOK_POLLS * poll_s,
            limits=limits,
        )
        self._registered = registered
        self._simulated = simulated
        self._run = f"{label[-150:]} {config.method.name} {secrets.token_hex(8)}"
        self._session = secrets.token_hex(8)
        self._seq = 0
        self._base = -1
        self._acks: dict[str, int] = {}
        """Numbers of the sites' last answers that count."""
        self._letters: dict[int, Letter] = {}
        """Open exchanges, by number."""
        self._held: list[Letter] = []
        """Letters that wait for their site to be connected."""
        self._sent: dict[str, Letter] = {}
        """Letters that were sent, by Flower's number of the message."""
        self._ready: deque[Arrival] = deque()
        self._conversations = Conversations(
            listener,
            run=lambda: self._run,
            num_sites=len(self.sites),
            patience_s=config.fleet.deadline_s or _PATIENCE_S,
            keys=keys,
        )

    def send(self, request: Request) -> None:
        """See `Transport`.

        A site that is not connected is waited for under on_failure="retry", and else has failed.
        """
        if request.turn > 0:
            self._conversations.answer(request)
            return

        if not self._letters:
            self._nodes.look_soon()  # a site may have gone, or come back as another node

        letter = Letter(request, time.monotonic())
        self._letters[request.number] = letter
        self._hold(letter)

    def next(self, timeout_s: float | None) -> Arrival | None:
        """See `Transport`."""
        until_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if self._nodes.missing:
                self._nodes.look()  # only one that was seen to leave is asked again
            left = self._send_held()
            if self._ready:
                return self._ready.popleft()
            if left:
                return None

            wait_s = min(self._poll_s, until_s - time.monotonic())
            live = self._conversations.any
            reply = self._inbox.next(0 if live else max(wait_s, 0))
            arrival = None if reply is None else self._hear(reply)
            if live and reply is None:
                arrival = self._conversations.next(max(wait_s, 0))

            if arrival is not None:
                return arrival
            if reply is None and wait_s <= 0:
                return None

    def accept(self, arrival: Arrival) -> None:
        """See `Transport`; the site learns it with its next message."""
        self._conversations.end(arrival.number)
        letter = self._letters.pop(arrival.number)
        self._acks[letter.request.site] = letter.seq
        if letter.kept:
            self._nodes.keepers.add(letter.request.site)

    def drop(self, request: Request) -> None:
        """See `Transport`."""
        self._conversations.end(request.number)
        letter = self._letters.pop(request.number, None)
        if letter is not None:
            self._held = [other for other in self._held if other is not letter]
            if self._sent.pop(letter.number, None) is not None:
                self._inbox.forget(letter.number)

    def error_log(self, site: str) -> Path | None:  # noqa: ARG002
        """Return None: a site's errors are in its own folder."""
        return None

    def close(self) -> None:
        """Do nothing: sites are other processes, which end when the run of Flower does."""

    def meet(self) -> None:
        """Wait until every site has joined.

        Raises `ClientError` naming those that have not, and refusals, under on_failure="stop".
        """
        until_s = time.monotonic() + self._join_timeout_s
        while missing := self._nodes.missing:
            if time.monotonic() > until_s:
                text = (
                    f"sites {', '.join(missing)} have not joined within {self._join_timeout_s:g} s"
                    f"{self._nodes.reasons}"
                )
                if self._config.on_failure == "stop":
                    raise ClientError(f"{text}. fleet.join_timeout_s sets how long a run waits")
                logger.warning("%s", text)
                return

            self._nodes.look()
            reply = self._inbox.next(self._poll_s)
            while reply is not None:
                self._nodes.hear(reply)
                reply = self._inbox.next(0)

    def _hold(self, letter: Letter) -> None:
        """Keep a letter until its site is there; its deadline does not count before."""
        letter.request.sent_s = float("inf")
        self._held.append(letter)

    def _send_held(self) -> bool:
        """Send the letters whose sites are connected; return whether there were any."""
        if not self._held:
            return False

        self._nodes.look()
        letters = self._held
        self._held = []

        for letter in letters:
            request = letter.request
            node = self._nodes.node(request.site)
            letter.number = self._push(node, request) if node else ""

            if letter.number:
                letter.seq = self._seq
                letter.since_s = request.sent_s = time.monotonic()
                self._sent[letter.number] = letter
            elif self._may_come(letter):
                self._held.append(letter)
            else:
                reason = f"is not connected{self._nodes.reasons}"
                self._ready.append(Arrival(request.number, b"", reason))

        return len(self._held) < len(letters)

    def _may_come(self, letter: Letter) -> bool:
        """Return whether to wait for a site that is not connected.

        It was greeted, or would be asked again anyway.
        """
        patience_s = min(self._join_timeout_s, self._config.deadline_s or self._join_timeout_s)
        waits = self._nodes.answers_are_due or self._config.on_failure == "retry"
        return waits and time.monotonic() - letter.since_s < patience_s

    def _hear(self, reply: Message) -> Arrival | None:
        """Return what a reply brings.

        None is for a greeting, for the second of two replies, and for one that came too late.
        """
        letter = self._sent.pop(reply.metadata.reply_to_message_id, None)
        if letter is None:
            self._nodes.hear(reply)
            return None

        number = letter.request.number
        if reply.has_error():  # Flower's own text, of which no byte left the site
            return Arrival(number, b"", flower_error(reply))

        try:
            opened = open_reply(reply, max_bytes=self._limits.max_bytes)
        except ClientError as words:
            text = str(words)
            reason = reason_of(text) or "it gave no reason"
            return Arrival(number, text.encode(errors="replace"), reason)
        except Exception as problem:
            return Arrival(number, b"", unreadable(problem))

        letter.kept = opened.kept
        if opened.data == UNKNOWN_RUN.to_bytes() and not letter.greeted_again:
            letter.greeted_again = True
            self._nodes.greet_again(letter.request.site)
            self._hold(letter)
            return None

        return Arrival(number, opened.data, times=opened.times)

    def _greet(self, node: int) -> str:
        name = self._registered().get(node)  # None where nodes have no keys
        settings = self._settings if name is None else for_site(self._settings, name)
        data = Payload(values={"config": settings}).to_bytes()
        ttl_s = _SPARE_S + self._join_timeout_s
        return self._push_message(node, JOIN, data, {}, round=0, ack=0, ttl_s=ttl_s)

    def _push(self, node: int, request: Request) -> str:
        ack = self._acks.get(request.site, 0)
        ttl_s = _SPARE_S + (self._config.deadline_s or _FINISHED_S)
        invitation = self._conversations.invite(request)
        if invitation:
            ttl_s = _FINISHED_S  # the deadline is that of each turn
        return self._push_message(
            node, request.task, request.data, invitation, round=request.round, ack=ack, ttl_s=ttl_s
        )

    def _push_message(
        self,
        node: int,
        task: str,
        data: bytes,
        invitation: dict[str, Any],
        *,
        round: int,
        ack: int,
        ttl_s: float,
    ) -> str:
        """Return Flower's number of the message, "" where Flower did not take it."""
        self._seq += 1
        header = Header(self._run, task, round, self._session, self._seq, ack, self._base)
        message = Message(
            pack(data, {**header.values(), **invitation}),
            dst_node_id=node,
            message_type="train",
            ttl=ttl_s,
        )
        (number,) = self._grid.push_messages([message])

        if number:
            self._inbox.watch(str(number))

        return str(number or "")

    def state(self) -> dict[str, Value]:
        """Return the name of the run, the answers that count, and the sites that keep state."""
        return {
            "run": self._run,
            "simulated": self._simulated,
            "seq": self._seq,
            "acks": {**self._acks},
            "keepers": [*sorted(self._nodes.keepers)],
        }

    def restore(self, state: dict[str, Any], round: int) -> None:
        """See `Transport`; raise `ConfigError` for a run that was begun with other sites."""
        if round >= 0 and "run" not in state:
            raise ConfigError(
                "this run was begun in one process, and its sites keep in its folder what they "
                f"need to go on; resume it with {caller.argument('fleet', 'process')}"
            )

        if round >= 0 and state.get("simulated") != self._simulated:
            simulation = caller.argument("fleet", "flower")
            how = simulation if state.get("simulated") else "submit --resume"
            raise ConfigError(
                "this run was begun with other sites, which keep what they need to go on; resume "
                f"it by {how}"
            )

        self._base = round
        self._run = state.get("run", self._run)
        self._seq = state.get("seq", 0)
        self._acks = dict(state.get("acks", {}))
        self._nodes.keepers = set(state.get("keepers", []))
        self.meet()
