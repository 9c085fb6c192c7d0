"""The time that a run or another command still takes, from measured rounds and from the pace of
messages such as "TGAP round 3 of 10"."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from statistics import fmean

from fluvial.formatting import human_minutes

RECENT = 5
"""Rounds of a run that its next ones are predicted from: the newest."""
_SET_UP = re.compile(r"\b(round|iteration|trials at) %d of %d")
"""Messages of a set-up; others of a run come from sites that work at the same time."""
_COUNTED = re.compile(r"(\w*):? ?\b(\d+) of (\d+)")
_BEGIN = ("round", "site", "trial")
"""Pieces that are reported when they begin, not when they are done."""


class Pace:
    """The time that a stage still takes, from the messages that count its pieces."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.left_s: float | None = None
        """Seconds of the stage to come; None before two of its pieces were counted."""
        self._clock = clock
        self._stage = ""
        self._first = (0, 0.0)

    def heard(self, record: logging.LogRecord) -> None:
        """Note a message that says how many pieces of how many are done or begin."""
        found = _COUNTED.search(record.getMessage())
        if found is None:
            self.left_s = None
            return

        number, total = int(found[2]), int(found[3])
        if record.msg != self._stage or number <= self._first[0]:
            self._stage = str(record.msg)
            self._first = (number, self._clock())
            self.left_s = None
            return

        pace = (self._clock() - self._first[1]) / (number - self._first[0])
        self.left_s = pace * (total - number + (found[1] in _BEGIN))

    def ended(self) -> None:
        """Note that the stage is over."""
        self._stage = ""
        self.left_s = None

    def words(self) -> str:
        """Return the time left for people; empty while nothing is known."""
        return "" if self.left_s is None else f"about {rough(self.left_s)} left"


class Remaining:
    """The time left of a configuration's runs, one after the other: its baselines, then its
    method."""

    def __init__(
        self, runs: Sequence[tuple[str, int]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take the runs as method and number of rounds, in their order; `clock` gives seconds."""
        self._left = dict(runs)
        self._seconds: dict[str, list[float]] = {}
        self._set_up = Pace(clock)

    def round(self, method: str, number: int, total: int, seconds: float) -> None:
        """Note that round `number` of `total` took `seconds`; a run that was resumed begins later
        than at 1."""
        self._left[method] = total - number
        self._seconds.setdefault(method, []).append(seconds)
        self._set_up.ended()

    def finished(self, method: str, left: int = 0) -> None:
        """Note that no round of `method` is left, or as many as the runs after it have."""
        self._left[method] = left

    def heard(self, record: logging.LogRecord) -> None:
        """Note the pace of a set-up from a message such as "TGAP round 3 of 10"."""
        if _SET_UP.search(str(record.msg)):
            self._set_up.heard(record)

    def left_s(self) -> float | None:
        """Return the seconds of all rounds to come; None before the first was measured.

        A run without a measured round is taken to be as fast as those that have some; its codec
        and its set-up are not in it.
        """
        means = {name: fmean(seconds[-RECENT:]) for name, seconds in self._seconds.items()}
        if not means:
            return None

        others = fmean(means.values())
        return sum(rounds * means.get(name, others) for name, rounds in self._left.items())

    def words(self) -> str:
        """Return the time left for people; empty while nothing is known."""
        rounds = self.left_s()
        set_up = self._set_up.left_s
        about = "the rounds" if rounds is None else f"about {rough(rounds)}{self._or_more()}"
        if set_up is None:
            return "" if rounds is None else f"{about} left"
        return f"set-up about {rough(set_up)}, then {about}"

    def _or_more(self) -> str:
        """Return " or more" where a run to come may have slower rounds than those measured."""
        unknown = [name for name, left in self._left.items() if left and name not in self._seconds]
        return " or more" if unknown else ""


def rough(seconds: float) -> str:
    """Return `seconds` in steps of what such a guess can tell."""
    return f"{max(1, round(seconds))} s" if seconds < 60 else human_minutes(seconds)
