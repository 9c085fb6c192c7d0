"""The order of a site's turns, which the server holds it to."""

from dataclasses import dataclass

from fluvial.errors import WireError
from fluvial.methods.flglm.turns import Backward, Content, Forward, Meeting, of


@dataclass(frozen=True)
class Place:
    """A forward or backward turn in the order of a step."""

    micro: int
    forward: bool
    rank: tuple[int, int]
    """Place among the turns of all sites, of which some have fewer micro-batches."""
    answers: int
    """Answers to earlier turns of the step that a site has when it sends this one."""


def order_of_step(micro_batches: int, in_flight: int) -> list[Place]:
    """Return the turns of a step in the order in which a site sends them."""
    turns: list[Place] = []
    places: dict[tuple[bool, int], int] = {}
    answers = 0

    def send(micro: int, *, forward: bool) -> None:
        rank = (micro - in_flight, 1) if forward else (micro, 0)
        places[forward, micro] = len(turns) + 1
        turns.append(Place(micro, forward, rank, answers))

    for micro in range(min(in_flight, micro_batches)):
        send(micro, forward=True)

    for micro in range(micro_batches):
        answers = max(answers, places[True, micro])
        send(micro, forward=False)
        returned = micro - in_flight + 1
        if returned >= 0:
            answers = max(answers, places[False, returned])
        if micro + in_flight < micro_batches:
            send(micro + in_flight, forward=True)

    return turns


class Order:
    """The turns of one conversation so far."""

    def __init__(self, in_flight: int) -> None:
        """Begin; hidden states of up to `in_flight` micro-batches come before the first gradient,
        and each further one behind a gradient."""
        self.steps = 0
        """Steps that the site has announced."""
        self._in_flight = in_flight
        self._forwards = 0
        """Forward turns of the step."""
        self._backwards = 0
        """Backward turns of the step."""
        self._last: Content | None = None
        self._next = 0
        """Number of the step with which the site begins, or goes on after `rejoin`."""
        self._on_the_way = 0
        """Turns that the site may have sent before it hears of `rejoin`."""

    def take(self, turn: Content) -> None:
        """Note the next turn; raises `WireError` for one that cannot follow the last."""
        last = self._last
        if isinstance(turn, Forward):
            fits = self._fits(turn) and turn.steps == (self.steps or turn.steps)
        elif isinstance(turn, Backward):
            here = last is not None and turn.step == last.step
            fits = here and turn.micro == self._backwards < self._forwards
        else:
            fits = isinstance(last, Backward) and turn.step == last.step and self._is_complete

        if not fits:
            before = "nothing" if last is None else f"{of(last)} of step {last.step}"
            raise WireError(f"turn {of(turn)} of step {turn.step} cannot follow {before}")

        self._last = turn
        if isinstance(turn, Forward):
            self.steps = turn.steps
            self._forwards = turn.micro + 1
            self._backwards = 0 if turn.micro == 0 else self._backwards
        elif isinstance(turn, Backward):
            self._backwards += 1

    def rejoin(self, step: int, on_the_way: int) -> None:
        """Let the site go on with the first turn of `step`, or end where it has no such step, after
        up to `on_the_way` turns that it sent before."""
        self._last = None
        self._next = step
        self._on_the_way = on_the_way

    def was_sent_before(self, turn: Content) -> bool:
        """Note a turn that the site may have sent before it heard of `rejoin`; return whether it
        is one."""
        first = isinstance(turn, Forward) and (turn.step, turn.micro) == (self._next, 0)
        if self._last is not None or first or not self._on_the_way:
            return False

        self._on_the_way -= 1
        return True

    def end(self) -> None:
        """Raise `WireError` unless the last step is over."""
        last = self._last
        if last is None and 0 < self.steps <= self._next:
            return

        over = isinstance(last, Backward | Meeting) and self._is_complete
        if not over or last is None or last.step != self.steps - 1:
            raise WireError(f"the reply came before the end of {self.steps} steps")

    @property
    def _is_complete(self) -> bool:
        """True where the gradients of all forward turns of the step have come."""
        return self._forwards == self._backwards

    def _fits(self, turn: Forward) -> bool:
        """Return whether a forward turn may come next."""
        last = self._last
        if last is None:
            return (turn.step, turn.micro) == (self._next, 0)
        if (turn.step, turn.micro) == (last.step + 1, 0):
            return self._is_complete
        if (turn.step, turn.micro) != (last.step, self._forwards):
            return False

        # As early as they may come, so that all sites with as many micro-batches have one order.
        first = not self._backwards and self._forwards < self._in_flight
        open_ = self._forwards - self._backwards
        return first or (isinstance(last, Backward) and open_ == self._in_flight - 1)
