"""The time that a run still takes, from its measured rounds and the pace of its set-up."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from statistics import fmean

from fluvial.formatting import human_minutes

RECENT = 5
"""Rounds of a run that its next ones are predicted from: the newest."""
_PACE = re.compile(r"\b(round|iteration) %d of %d")


class Remaining:
    """The time left of a configuration's runs, one after the other: its baselines, then its
    method."""

    def __init__(
        self, runs: Sequence[tuple[str, int]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take the runs as method and number of rounds, in their order; `clock` gives seconds."""
        self._left = dict(runs)
        self._seconds: dict[str, list[float]] = {}
        self._clock = clock
        self._stage = ""
        self._first = (0, 0.0)
        self._stage_left_s: float | None = None

    def round(self, method: str, number: int, total: int, seconds: float) -> None:
        """Note that round `number` of `total` took `seconds`; a run that was resumed begins later
        than at 1."""
        self._left[method] = total - number
        self._seconds.setdefault(method, []).append(seconds)
        self._stage = ""
        self._stage_left_s = None

    def finished(self, method: str, left: int = 0) -> None:
        """Note that no round of `method` is left, or as many as the runs after it have."""
        self._left[method] = left

    def heard(self, record: logging.LogRecord) -> None:
        """Note the pace of a set-up from a message such as "TGAP round 3 of 10"."""
        found = _PACE.search(str(record.msg))
        if found is None or not isinstance(record.args, tuple) or len(record.args) < 2:
            return

        number, total = record.args[:2]
        if not (isinstance(number, int) and isinstance(total, int)):
            return
        if record.msg != self._stage or number <= self._first[0]:
            self._stage, self._first, self._stage_left_s = (
                str(record.msg),
                (number, self._clock()),
                None,
            )
            return

        pace = (self._clock() - self._first[1]) / (number - self._first[0])
        # A round is reported when it begins, an iteration when it is done.
        self._stage_left_s = pace * (total - number + (found[1] == "round"))

    def left_s(self) -> float | None:
        """Return the seconds of all rounds to come; None before the first was measured.

        A run without a measured round is taken to be as fast as those that have some.
        """
        means = {name: fmean(seconds[-RECENT:]) for name, seconds in self._seconds.items()}
        if not means:
            return None

        others = fmean(means.values())
        return sum(rounds * means.get(name, others) for name, rounds in self._left.items())

    def words(self) -> str:
        """Return the time left for people; empty while nothing is known."""
        rounds = self.left_s()
        if self._stage_left_s is None:
            return "" if rounds is None else f"about {_rough(rounds)} left"
        then = "then the rounds" if rounds is None else f"then about {_rough(rounds)}"
        return f"set-up about {_rough(self._stage_left_s)}, {then}"


def _rough(seconds: float) -> str:
    """Return `seconds` in steps of what such a guess can tell."""
    return f"{max(1, round(seconds))} s" if seconds < 60 else human_minutes(seconds)
