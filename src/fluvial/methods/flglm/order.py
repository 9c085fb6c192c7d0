"""The order of a site's turns, which the server holds it to."""

from fluvial.errors import WireError
from fluvial.methods.flglm.turns import Backward, Content, Forward, Meeting, of


class Order:
    """The turns of one conversation so far."""

    def __init__(self) -> None:
        self.steps = 0
        """Steps that the site has announced."""
        self._last: Content | None = None
        self._next = 0
        """Number of the step with which the site begins, or goes on after `rejoin`."""

    def take(self, turn: Content) -> None:
        """Note the next turn; raises `WireError` for one that cannot follow the last."""
        last = self._last
        if isinstance(turn, Forward):
            fits = (turn.step, turn.micro) in self._forwards() and turn.steps == (
                self.steps or turn.steps
            )
            self.steps = turn.steps
        elif isinstance(turn, Backward):
            fits = isinstance(last, Forward) and (turn.step, turn.micro) == (last.step, last.micro)
        else:
            fits = isinstance(last, Backward) and turn.step == last.step

        if not fits:
            before = "nothing" if last is None else f"{of(last)} of step {last.step}"
            raise WireError(f"turn {of(turn)} of step {turn.step} cannot follow {before}")

        self._last = turn

    def rejoin(self, step: int) -> None:
        """Let the site go on with the first turn of `step`, or end where it has no such step."""
        self._last = None
        self._next = step

    def end(self) -> None:
        """Raise `WireError` unless the last step is over."""
        last = self._last
        if last is None and 0 < self.steps <= self._next:
            return

        if not isinstance(last, Backward | Meeting) or last.step != self.steps - 1:
            raise WireError(f"the reply came before the end of {self.steps} steps")

    @property
    def last_step(self) -> int:
        """The number of the step of the last turn."""
        assert self._last is not None, "no turn yet"
        return self._last.step

    def _forwards(self) -> set[tuple[int, int]]:
        """Return the steps and micro-batches of a forward turn that may come next."""
        last = self._last
        if last is None:
            return {(self._next, 0)}
        if isinstance(last, Backward):
            return {(last.step, last.micro + 1), (last.step + 1, 0)}
        return {(last.step + 1, 0)} if isinstance(last, Meeting) else set()
