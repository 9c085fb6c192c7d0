"""Time of a round over a line, from the bytes of its turns: each end sends while the other does."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from fluvial.federation.line import WIRE, Line, round_s
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.traffic import MEETING, Conversation, TurnSize
from fluvial.methods.interface import Given


def round_over_line_s(
    config: FlGlmConfig, given: Given, found: Mapping[str, Conversation], line: Line
) -> float:
    """Return the seconds of a round over `line`, without training: turns, and Flower's messages.

    A site sends a turn as soon as it has the answers that it needs for it, behind its earlier ones.
    The server answers at once, and where sites meet, when the turns of all of them have come. Where
    they work one after another, their times add up. Of a sampled cohort nobody knows the sites, so
    the slowest are assumed.
    """
    together = config.cohort(given.sites)
    alone = config.mode == "sequential"
    sharing = together if line.shared and not alone else 1
    messages_s = {
        site: round_s(each.first_down.most, each.last_up.most, sites=sharing, line=line)
        for site, each in found.items()
    }

    if alone:
        whole_s = sorted(
            messages_s[site] + _turns_s(config, [each], line, sharing)
            for site, each in found.items()
        )
        return sum(whole_s[-together:])

    return max(messages_s.values()) + _turns_s(config, list(found.values()), line, sharing)


class _Site:
    """A site on its line."""

    def __init__(self, line: Line, sharing: int) -> None:
        bits = 8 * WIRE / 1e6 * sharing
        self._up_s = bits / line.up_mbit_s
        """Seconds of a byte."""
        self._down_s = bits / line.down_mbit_s
        self._way_s = line.rtt_ms / 2e3
        self._up_free_s = 0.0
        self._down_free_s = 0.0
        self._step = 0
        self._answers_s = [0.0]
        """Times of the answers in the step, behind the last one of the step before."""

    def send(self, turn: TurnSize) -> float:
        """Return the time at which a turn has reached the server."""
        if turn.step != self._step:
            self._step = turn.step
            self._answers_s = self._answers_s[-1:]

        begin_s = max(self._answers_s[turn.answers], self._up_free_s)
        self._up_free_s = begin_s + turn.up * self._up_s
        return self._up_free_s + self._way_s

    def receive(self, turn: TurnSize, answered_s: float) -> None:
        """Note the answer to a turn, which leaves the server at a time."""
        self._down_free_s = max(answered_s, self._down_free_s) + turn.down * self._down_s
        self._answers_s.append(self._down_free_s + self._way_s)

    @property
    def end_s(self) -> float:
        """Time of the last answer."""
        return self._answers_s[-1]


def _turns_s(
    config: FlGlmConfig, conversations: Sequence[Conversation], line: Line, sharing: int
) -> float:
    """Return the seconds of conversations that are had at the same time."""
    sites = [_Site(line, sharing) for _ in conversations]
    turns = sorted(
        ((turn.step, turn.rank), number, turn)
        for number, each in enumerate(conversations)
        for turn in each.sizes
    )

    for (_, rank), group in groupby(turns, key=lambda turn: turn[0]):
        sent = [(number, turn, sites[number].send(turn)) for _, number, turn in group]
        last_s = max(arrived_s for *_, arrived_s in sent)
        meet = config.mode == "client-batch" or rank == MEETING
        for number, turn, arrived_s in sent:
            sites[number].receive(turn, last_s if meet else arrived_s)

    return max(site.end_s for site in sites)
