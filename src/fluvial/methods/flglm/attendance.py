"""The sites of a client batch: which of them are late, and how long a step waits for them."""

import math
from collections.abc import Collection, Mapping

from fluvial.federation.fleet import Fleet


class Attendance:
    """Sites that have ended, sites that are late, and the deadline of a step.

    A step waits for every site that is not late, for `deadline_s` from the time at which the
    server's message to it has left. A late site is not waited for until its turn has come.
    """

    def __init__(self, fleet: Fleet, asked: int, deadline_s: float | None) -> None:
        """Begin a round of `asked` sites; without a deadline no site is late."""
        self.ended: set[str] = set()
        """Sites that have no step before them, whose reply may be on its way."""
        self.late: set[str] = set()
        self._fleet = fleet
        self._asked = asked
        self._deadline_s = deadline_s
        self._since_s = math.inf
        """Time of the server's last answer; of the quorum's first presence before."""

    def began(self, site: str) -> None:
        """Wait for a site whose conversation begins, or begins again after a failure."""
        self.ended.discard(site)
        self.late.discard(site)

    def came(self, site: str, waiting: int) -> None:
        """Wait for a site again, whose turn has come; `waiting` sites wait now."""
        self.late.discard(site)
        if self._since_s == math.inf and self._enough(waiting):
            self._since_s = self._fleet.clock()

    def answered(self) -> None:
        """Note that the server has answered a turn."""
        self._since_s = self._fleet.clock()

    def wake_s(self, working: Mapping[str, float], waiting: int) -> float:
        """Return the time at which `waiting` sites wait no longer for those at work, whose messages
        have left at the times `working`; see `Fleet.converse`."""
        if self._deadline_s is None or not self._enough(waiting):
            return math.inf

        awaited = {site: sent_s for site, sent_s in working.items() if site not in self.ended}
        if waiting:
            awaited = {site: sent_s for site, sent_s in awaited.items() if site not in self.late}
            if not awaited:
                return -math.inf
        elif self._fleet.config.on_failure == "stop":
            return math.inf  # the round's end waits for late sites, since none may be missing

        return max([self._since_s, *awaited.values()]) + self._deadline_s if awaited else math.inf

    def overdue(self, working: Collection[str]) -> list[str]:
        """Return the sites at work for whom nobody waits any more; they are late."""
        late = sorted(set(working) - self.ended)
        self.late.update(late)
        return late

    def require_quorum(self, round: int, step: int, waiting: int) -> None:
        """Raise `ClientError` where a step would be made by fewer sites than the fleet's quorum;
        those that have ended count."""
        answered = waiting + len(self.ended)
        where = f"train, step {step + 1}"
        self._fleet.require_quorum(where, round, answered=answered, asked=self._asked)

    def _enough(self, waiting: int) -> bool:
        return waiting + len(self.ended) >= self._fleet.config.quorum * self._asked
