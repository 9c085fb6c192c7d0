"""Flower nodes by the names of their sites: invitations, answers and reasons of refusals."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fluvial.errors import ClientError, UnfitSiteError, WireError
from fluvial.federation.failures import reason_of
from fluvial.flower.envelope import open_reply
from fluvial.wire.payload import Limits, Payload

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
"""Seconds between two looks at which nodes are connected, while a site is missing."""
_AGAIN_S = 10.0
"""Seconds after which a node that failed or stayed silent is invited again."""
_REFERENCE = " (reference "
"""Mark before the number of an error in a site's own log, which differs each time."""
_MAX_BYTES = 2**20
"""Largest answer to an invitation, in bytes."""


class Nodes:
    """Nodes of a Flower run by the names of their sites."""

    def __init__(
        self,
        grid: Grid,
        names: Sequence[str],
        fingerprints: Mapping[str, str],
        *,
        greet: Callable[[int], str],
        forget: Callable[[str], None],
        registered: Callable[[], Mapping[int, str]],
        join_timeout_s: float,
        look_s: float,
        limits: Limits,
    ) -> None:
        """Begin without nodes.

        `greet` sends an invitation to a node and returns the message's number; `forget` stops
        waiting for the reply to a message. `fingerprints` are the server's, which sites must share.
        `registered` returns the name under which the key of a node was registered.
        """
        self.keepers: set[str] = set()
        """Sites that keep state without which the run cannot continue."""
        self._grid = grid
        self._names = names
        self._fingerprints = fingerprints
        self._greet = greet
        self._forget = forget
        self._registered = registered
        self._join_timeout_s = join_timeout_s
        self._look_s = min(_LOOK_S, look_s)
        self._limits = limits
        self._nodes: dict[str, int] = {}
        self._greeted: dict[str, tuple[int, float]] = {}
        """Node and time of each invitation without an answer, by number of the message."""
        self._refused: dict[int, tuple[str, float]] = {}
        """Reason of each refusal and time of the next invitation, by node."""
        self._looked_s = float("-inf")

    @property
    def missing(self) -> list[str]:
        """Return the names of sites that have not joined, sorted."""
        return sorted(set(self._names) - self._nodes.keys())

    @property
    def answers_are_due(self) -> bool:
        """True if a node was invited and has not answered yet."""
        return bool(self._greeted)

    @property
    def reasons(self) -> str:
        """Reasons why connected nodes do not take part, each after a semicolon."""
        lines = []
        for node, (reason, _) in self._refused.items():
            name = self._registered().get(node)
            unnamed = name is None or repr(name) in reason
            lines.append(reason if unnamed else f"site {name!r}: {reason}")
        return "".join(f"; {line}" for line in lines)

    def node(self, site: str) -> int | None:
        """Return the node of a site, None where it is not connected."""
        return self._nodes.get(site)

    def look_soon(self) -> None:
        """Make the next `look` ask Flower for its nodes, even shortly after the last."""
        self._looked_s = float("-inf")

    def look(self) -> None:
        """Invite new nodes, forget those that have left, and refuse those that stay silent.

        A node that left and came back is new: its site was started again, perhaps with another
        file.
        """
        now = time.monotonic()
        if now - self._looked_s >= self._look_s:
            self._looked_s = now
            present = set(self._grid.get_node_ids())
            self._forget_absent(present)
            busy = {*self._nodes.values(), *(node for node, _ in self._greeted.values())}
            busy |= {node for node, (_, again_s) in self._refused.items() if now < again_s}

            for node in sorted(present - busy):
                if number := self._greet(node):
                    self._greeted[number] = node, now

        for number, (node, since_s) in list(self._greeted.items()):
            if now - since_s > self._join_timeout_s:
                del self._greeted[number]
                self._forget(number)
                self._refuse(
                    node, f"a site did not say who it is within {self._join_timeout_s:g} s"
                )

    def hear(self, reply: Message) -> None:
        """Handle the reply to an invitation, and ignore others.

        After an error of Flower's own, the node is invited again.
        """
        number = reply.metadata.reply_to_message_id
        if number in self._greeted:
            node, _ = self._greeted.pop(number)
            if not reply.has_error():
                self._join(node, reply)

    def greet_again(self, site: str) -> None:
        """Invite a site again that has not joined the run."""
        self._nodes.pop(site, None)
        self.look_soon()

    def _forget_absent(self, present: set[int]) -> None:
        self._nodes = {name: node for name, node in self._nodes.items() if node in present}
        self._greeted = {
            number: entry for number, entry in self._greeted.items() if entry[0] in present
        }
        self._refused = {node: entry for node, entry in self._refused.items() if node in present}

    def _join(self, node: int, reply: Message) -> None:
        try:
            name = self._name(node, reply)
        except (ClientError, WireError) as problem:
            fails = isinstance(problem, ClientError) and not isinstance(problem, UnfitSiteError)
            self._refuse(node, reason_of(str(problem)), for_good=not fails)
            return

        other = self._nodes.get(name, node)
        if other != node:
            reason = f"two nodes say that they are site {name!r}; the one that came later counts"
            self._refuse(other, reason, for_good=True)

        self._nodes[name] = node
        self._refused.pop(node, None)

    def _name(self, node: int, reply: Message) -> str:
        """Return the name of a node's site; raise `ClientError` where it failed, and
        `UnfitSiteError` or `WireError` if it may not take part."""
        data = open_reply(reply, max_bytes=_MAX_BYTES).data
        answer = Payload.from_bytes(data, self._limits)
        name: str = answer.value("site", str)
        prints = answer.value("prints", dict)
        key = self._registered().get(node, name)

        if key != name and name in self._names:
            raise UnfitSiteError(
                f"a site says that it is {name!r:.70}, and its key was registered for {key!r}"
            )

        for kind, own in self._fingerprints.items():
            if prints.get(kind) != own:
                raise UnfitSiteError(
                    f"site {name!r} has another {kind} ({prints.get(kind)!r:.40}, here {own!r}); "
                    "give both the same"
                )

        if name in self.keepers and not answer.value("known", bool):
            raise UnfitSiteError(
                f"site {name!r} has lost what it kept for this run; restore its folder, or begin a "
                "new run"
            )

        return name

    def _refuse(self, node: int, reason: str, *, for_good: bool = False) -> None:
        name = self._registered().get(node)
        who = f"node {node}" if name is None else f"site {name!r}"
        before = self._refused.get(node, ("",))[0]
        if before.partition(_REFERENCE)[0] != reason.partition(_REFERENCE)[0]:
            when = "when it has been started again" if for_good else f"every {_AGAIN_S:g} s"
            again = f"it is asked again {when}"
            logger.warning("%s does not take part: %s; %s", who, reason, again)
        self._refused[node] = reason, float("inf") if for_good else time.monotonic() + _AGAIN_S
