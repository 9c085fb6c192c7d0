"""Steps of all sites together: one forward and one backward pass of the server's layers for all.

The objective of a step is the loss per label token over the sequences of all sites, as if they
were one batch; the gradients of the whole model are clipped by one norm.

The number of a step is the version of the layers that sites share: they have made as many steps. A
turn of another step than the server's is never used. Its site is answered with the server's step,
weights and moments, and goes on from there. A step whose site has failed or is late after its first
pass is made again without it, so that it is that of its sites' batches exactly.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fluvial.errors import WireError
from fluvial.federation.fleet import Fleet
from fluvial.federation.replies import fields, loss_of, weight_of
from fluvial.federation.turns import Idle, Turn
from fluvial.methods.flglm.attendance import Attendance
from fluvial.methods.flglm.batch_site import Answered, Heard, Visit
from fluvial.methods.flglm.coding import Coding
from fluvial.methods.flglm.memories import Memories
from fluvial.methods.flglm.middle import Middle
from fluvial.methods.flglm.order import Order
from fluvial.methods.flglm.setting import Setting
from fluvial.methods.flglm.shared_ends import SharedEnds
from fluvial.methods.flglm.tuned_part import factor_of
from fluvial.methods.flglm.turns import (
    MOST_OWN_SQUARED_NORM,
    Backward,
    Forward,
    Meeting,
    answer,
    read_turn,
    rejoin,
)
from fluvial.seeds import derive, generator
from fluvial.training.train import check_finite
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Named, add, energy, subtract


class ClientBatch:
    """The training of a cohort in one round."""

    def __init__(
        self,
        setting: Setting,
        fleet: Fleet,
        round: int,
        state: Named,
        message: Payload,
        memories: Memories,
    ) -> None:
        """Begin with `state`, that of the whole model, and every site with `message`."""
        self.update: Named = {}
        """Change of the server's layers and of those that the sites share; after the last reply."""
        self.missed = 0
        """Steps of single sites in which these were missing."""
        self._setting = setting
        self._fleet = fleet
        self._round = round
        self._state = state
        self._message = message
        self._memories = memories
        self._ends = SharedEnds(setting, state, round=round)
        self._visits: dict[str, Visit] = {}
        self._turns: dict[str, deque[Turn[Heard]]] = {}
        """Turns that wait for an answer, of each site that has any."""
        self._group: dict[str, Visit] = {}
        """Sites of the present step; none before its first pass."""
        self._held: set[str] = set()
        """Sites that were late in the middle of the present step, whose turns wait for its end."""
        self._rows: dict[int, list[str]] = {}
        """Sites of the step's forward passes, in order of their rows, by micro-batch."""
        self._step = 0
        """Number of the present step."""
        self._tokens = 0
        """Label tokens of the step."""
        self._steps = 1
        """Steps of the site that has most."""

    def replies(self, sites: Sequence[str]) -> Iterator[Answered]:
        """Yield the sites' replies as they come; the quorum at the end is the caller's.

        Raises `ClientError` where too few sites are left for a step.
        """
        setting = self._setting
        names = setting.places.middle.names
        middle = {name: self._state[name] for name in setting.places.middle.names}
        start = setting.weights({name: middle[name] for name in names})
        checkpointing = setting.train.gradient_checkpointing
        self._attendance = Attendance(self._fleet, len(sites), setting.config.step_deadline_s)

        with setting.parts.part(middle, trainable=True, checkpointing=checkpointing) as part:
            train = setting.train_in(self._round)
            self._middle = Middle(part, names, train, steps=1, start=start)
            seed = setting.context.seed
            rounding = generator(seed, "rounding at the server", self._round)
            self._coding = Coding.of(setting.config, part, rounding)

            for event in self._fleet.converse(
                "train",
                self._memories.messages(sites, self._message),
                round=self._round,
                hear=self._hear,
                read=self._read,
                alone=False,
                window=setting.config.window,
                began=self._began,
                wake_s=self._wake_s,
            ):
                if isinstance(event, Idle):
                    self._go_on(event)
                elif isinstance(event, Turn):
                    if event.content.stale:
                        event.answer(rejoin(event.content.turn.step, None))
                        continue

                    self._turns.setdefault(event.site, deque()).append(event)
                    self._attendance.came(event.site, len(self._waiting()))
                else:
                    self._attendance.ended.add(event.site)
                    hidden = self._visits[event.site].hidden
                    self._memories.save(event.site, self._round, hidden)
                    yield event.content

            weights = self._ends.weights()
            self.update = subtract(self._middle.weights(), start)
            self.update |= subtract(weights, self._ends.start)

    def _began(self, site: str) -> None:
        """Forget what a site has said before it failed."""
        self._visits[site] = Visit(Order(self._setting.config.in_flight))
        self._held.discard(site)
        self._attendance.began(site)

    def _wake_s(self, working: Mapping[str, float]) -> float:
        waiting = self._waiting()
        if not self._group and any(self._stale(turn) for turn in waiting.values()):
            return -math.inf
        return self._attendance.wake_s(working, len(waiting))

    def _waiting(self) -> dict[str, Turn[Heard]]:
        """Return the oldest turns of the sites that may take part in the present step, in order of
        their sites."""
        return {site: self._turns[site][0] for site in sorted(self._turns.keys() - self._held)}

    # -- what a site sends: wrong content is its failure ------------------------------------------

    def _hear(self, site: str, payload: Payload) -> Heard:
        turn = read_turn(payload, self._setting.limits)
        visit = self._visits[site]
        if visit.order.was_sent_before(turn):
            if isinstance(turn, Forward):  # what both ends remember of a sample
                visit.hidden.decode("up", turn.batch, turn.frame)
            return Heard(turn, stale=True)

        visit.order.take(turn)
        if turn.step > self._step:
            raise WireError(f"a turn of step {turn.step}, and the server is at {self._step}")

        if isinstance(turn, Forward):
            if turn.micro == 0:
                visit.forwards = {}
            visit.forwards[turn.micro] = turn
            if visit.own_hidden is None:
                visit.own_hidden = self._memories.begin(site, turn, self._coding)
            return Heard(turn, visit.hidden.decode("up", turn.batch, turn.frame))
        if isinstance(turn, Backward):
            needed = self._setting.places.needs_gradient
            tokens = visit.forwards[turn.micro].batch.tokens if needed else 0
            return Heard(turn, self._coding.decode_gradient(turn.frame, tokens))

        if turn.of != "clip" or (turn.frame is None) != (not self._setting.shared.shapes):
            raise WireError("sites meet to clip the gradients of the layers that they share")

        if turn.frame is None:
            return Heard(turn)

        gradients = self._setting.shared_codec.decode(turn.frame)
        if energy(gradients) > MOST_OWN_SQUARED_NORM:
            raise WireError("the gradients of the layers that sites share are too large")
        return Heard(turn, gradients=gradients)

    def _read(self, site: str, payload: Payload) -> Answered:
        fields(payload, ("n", "loss", "factor"))
        self._visits[site].order.end()
        return Answered(site, weight_of(payload), loss_of(payload))

    # -- once a step waits for no site any more ----------------------------------------------------

    def _go_on(self, idle: Idle) -> None:
        """Let sites rejoin, or make the next pass of the step with the sites that wait."""
        if not self._waiting():
            self._held = set()
        if not self._group and self._rejoin(idle):
            return

        late = self._attendance.overdue(idle.working)
        if not self._turns:
            for site in late:
                idle.leave_out(site, "it was late when the others had made the round's steps")
            return

        self._attendance.require_quorum(self._round, self._step, len(self._waiting()))
        incomplete = not all(
            self._visits[site] is visit and site in self._turns
            for site, visit in self._group.items()
        )
        if not incomplete or not (self._begin_again() or self._rejoin(idle)):
            self._pass()

    def _stale(self, turn: Turn[Heard]) -> bool:
        """Return True for a turn with which no step can begin now."""
        content = turn.content.turn
        return not isinstance(content, Forward) or (content.step, content.micro) != (self._step, 0)

    def _rejoin(self, idle: Idle) -> bool:
        """Let the sites whose turn is stale go on with the present step; return True if there are
        any."""
        stale = [turn for turn in self._waiting().values() if self._stale(turn)]
        for turn in stale:
            visit = self._visits[turn.site]
            steps = visit.order.steps
            frame = None

            if self._step < steps:
                frame = self._ends.frame() if turn.content.turn.step < self._step else None
            elif visit.taken:
                self._attendance.ended.add(turn.site)
            else:
                del self._turns[turn.site]
                reason = f"its {steps} steps were over before it took part in one"
                idle.leave_out(turn.site, reason)
                continue

            self._send_to(turn.site, frame)

        return bool(stale)

    def _begin_again(self) -> bool:
        """Begin the step again without the sites that are late; return True if a site that waits
        was answered.

        A late site does not come back into the step, or it could keep it from its end.
        """
        self._middle.drop_gradients()
        same = {site for site, visit in self._group.items() if self._visits[site] is visit}
        present = sorted(same & self._turns.keys())
        self._held |= same - self._turns.keys()
        self._group = {}
        for site in present:
            self._send_to(site, None)
        return bool(present)

    def _send_to(self, site: str, frame: bytes | None) -> None:
        """Let a site that waits go on with the present step."""
        first, *later = self._turns.pop(site)
        on_the_way = self._setting.config.window - 1 - len(later)
        self._visits[site].order.rejoin(self._step, on_the_way)
        first.answer(rejoin(self._step, frame))
        for turn in later:
            turn.answer(rejoin(self._step, None))

        self._attendance.answered()

    def _pass(self) -> None:
        """Answer the turns that have the same place in the step, micro-batches first."""
        if not self._group:
            self._group = {site: self._visits[site] for site in self._waiting()}

        turns = {site: self._turns[site][0] for site in self._group}
        for kind, make in (
            (Forward, self._forward),
            (Backward, self._backward),
            (Meeting, self._clip),
        ):
            waiting = {
                site: turn for site, turn in turns.items() if isinstance(turn.content.turn, kind)
            }
            if waiting:
                for site in waiting:
                    self._turns[site].popleft()
                    if not self._turns[site]:
                        del self._turns[site]

                make(waiting)
                self._attendance.answered()
                return

    def _forward(self, turns: dict[str, Turn[Heard]]) -> None:
        micro = self._micro(turns)
        heard = [(turn.content, self._visits[site].forwards[micro]) for site, turn in turns.items()]
        if micro == 0:
            self._tokens = sum(turn.tokens for _, turn in heard)
            self._plan(max(turn.steps for _, turn in heard))

        seed = derive(self._setting.context.seed, "dropout", self._round, self._step, micro)
        rows = self._middle.forward(
            torch.cat([each.rows for each, _ in heard if each.rows is not None]),
            [length for _, turn in heard for length in turn.lengths],
            micro=micro,
            returns=any(turn.returns for _, turn in heard),
            dropout_seed=seed,
            grouped=True,
        )
        self._rows[micro] = list(turns)

        for piece, turn in zip(self._pieces(rows, micro), turns.values(), strict=True):
            visit = self._visits[turn.site]
            frame = visit.hidden.encode("down", visit.forwards[micro].batch, piece)
            turn.answer(answer(turn.content.turn, frame, tokens=self._tokens, steps=self._steps))

    def _backward(self, turns: dict[str, Turn[Heard]]) -> None:
        micro = self._micro(turns)
        assert list(turns) == self._rows[micro], "a step with a site that is missing begins again"
        gradients = [
            turn.content.rows.to(self._coding.device, self._coding.gradient.dtype)
            for turn in turns.values()
            if turn.content.rows is not None
        ]
        received, norm = self._middle.backward(torch.cat(gradients), micro=micro)
        pieces = [None] * len(turns) if received is None else self._pieces(received, micro)

        for turn, piece in zip(turns.values(), pieces, strict=True):
            frame = None if piece is None else self._coding.encode_gradient(piece)
            turn.answer(answer(turn.content.turn, frame, norm=norm))

    def _clip(self, turns: dict[str, Turn[Heard]]) -> None:
        squared = self._middle.squared_norm()
        meetings = [turn.content for turn in turns.values()]
        gradients: Named = {}

        for heard in meetings:
            assert isinstance(heard.turn, Meeting)
            squared += heard.turn.squared_norm
            gradients = add(gradients, heard.gradients) if gradients else heard.gradients

        squared += energy(gradients)
        train = self._setting.train
        step = self._step
        check_finite(0.0, squared, step, self._steps, train)
        factor = factor_of(squared, train.max_grad_norm)
        self._middle.step(step, factor)
        frame = None
        if gradients:
            self._ends.step(step, gradients, factor)
            frame = self._setting.shared_codec.encode(gradients)

        for turn in turns.values():
            turn.answer(answer(turn.content.turn, frame, norm=squared))

        self._end_step()

    def _end_step(self) -> None:
        """Count who took part, and begin the next step."""
        self.missed += len(self._visits) - len(self._attendance.ended | self._group.keys())
        for site, visit in self._group.items():
            visit.taken += 1
            if self._step + 1 == visit.order.steps:
                self._attendance.ended.add(site)

        self._step += 1
        self._group = {}
        self._held = set()

    def _plan(self, steps: int) -> None:
        """Let all learning rates follow the site with most steps."""
        self._steps = max(steps, self._steps)
        self._middle.plan_steps(self._steps)
        self._ends.plan_steps(self._steps)

    def _micro(self, turns: Mapping[str, Turn[Heard]]) -> int:
        """Return the micro-batch of turns that have the same place in the step."""
        micros = {
            turn.content.turn.micro
            for turn in turns.values()
            if not isinstance(turn.content.turn, Meeting)
        }
        (micro,) = micros  # the order of turns refuses another
        return micro

    def _pieces(self, rows: Tensor, micro: int) -> list[Tensor]:
        """Return the rows of each site with this micro-batch."""
        sizes = [sum(self._visits[site].forwards[micro].lengths) for site in self._rows[micro]]
        return list(torch.split(rows, sizes))
