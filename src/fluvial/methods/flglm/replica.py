"""A replica of the server's layers in conversation with one site, in all modes but one."""

from contextlib import ExitStack
from dataclasses import dataclass

from fluvial.errors import WireError
from fluvial.federation.bounds import check_update
from fluvial.federation.replies import fields, loss_of, weight_of
from fluvial.methods.flglm.coding import Coding
from fluvial.methods.flglm.draws import draws_of_round
from fluvial.methods.flglm.hidden import HiddenStates
from fluvial.methods.flglm.memories import Memories
from fluvial.methods.flglm.middle import Middle
from fluvial.methods.flglm.order import Order
from fluvial.methods.flglm.setting import Setting
from fluvial.methods.flglm.turns import Backward, Forward, Meeting, answer, read_turn
from fluvial.seeds import derive, generator
from fluvial.wire.payload import FRAME, Payload, payload_frame
from fluvial.wire.tensors import Named, subtract


@dataclass(frozen=True)
class SiteUpdate:
    """The change of the whole model by one site's steps."""

    site: str
    tensors: Named
    weight: int
    loss: float
    hidden: HiddenStates
    """Hidden states of the conversation, whose memory the next one begins with."""


@dataclass(frozen=True)
class Waiting:
    """A site that waits for an average, with its update of the whole model so far."""

    turn: Meeting
    update: Named


@dataclass
class _Visit:
    """A replica that has begun."""

    middle: Middle
    coding: Coding
    start: Named
    """Values of its tuned tensors at the beginning, fp32."""
    dropout_seed: int
    hidden: HiddenStates
    taken: int = 0
    """Steps that it has made."""


class Replica:
    """Answers the turns of one site in one round, by the two readers of `Fleet.converse`.

    What a site sends wrongly raises in `hear` or `read`, and is that site's failure.
    """

    def __init__(
        self, setting: Setting, site: str, round: int, state: Named, memories: Memories
    ) -> None:
        """Begin from `state`, that of the server's layers, at the site's first turn."""
        self._setting = setting
        self._site = site
        self._round = round
        self._state = state
        self._memories = memories
        self._borrowed = ExitStack()
        self._order = Order(setting.config.in_flight)
        self._visit: _Visit | None = None

    def hear(self, payload: Payload) -> Payload | Waiting:
        """Return the answer to a turn, or that the site waits for the others."""
        turn = read_turn(payload, self._setting.limits)
        if isinstance(turn, Forward) and (turn.step, turn.micro) == (0, 0):
            self._begin(turn)

        self._order.take(turn)
        visit = self._begun()
        if isinstance(turn, Forward):
            return self._forward(visit, turn)
        if isinstance(turn, Backward):
            return self._backward(visit, turn)

        if turn.of != "average" or self._setting.config.sync_steps is None:
            raise WireError(f"turn {turn.of!r}: sites do not meet so under this method.mode")

        self._step(visit, turn.step + 1, turn.factor)
        return Waiting(turn, self._update(visit, turn.frame, turn.weight))

    def read(self, payload: Payload) -> SiteUpdate:
        """Return the update that a site's reply completes."""
        carries = bool(self._setting.shared.shapes)
        fields(payload, ("n", "loss", "factor"), (FRAME,) if carries else ())
        self._order.end()
        visit = self._begun()
        self._step(visit, self._order.steps, payload.number("factor", 0.0, 1.0))
        weight = weight_of(payload)
        update = self._update(visit, payload_frame(payload) if carries else None, weight)

        return SiteUpdate(self._site, update, weight, loss_of(payload), visit.hidden)

    def replace_update(self, update: Named) -> None:
        """Go on from the beginning plus `update`, the average of a meeting."""
        visit = self._begun()
        visit.middle.replace({name: tensor + update[name] for name, tensor in visit.start.items()})

    def close(self) -> None:
        """Give the borrowed part back."""
        self._borrowed.close()
        self._order = Order(self._setting.config.in_flight)
        self._visit = None

    def _begin(self, turn: Forward) -> None:
        """Borrow a part; a site that begins again gets a fresh one, and the round's memory."""
        self.close()
        setting = self._setting
        seed = setting.context.seed
        checkpointing = setting.train.gradient_checkpointing
        part = self._borrowed.enter_context(
            setting.parts.part(self._state, trainable=True, checkpointing=checkpointing)
        )
        names = setting.places.middle.names
        start = setting.weights({name: self._state[name] for name in names})
        rounding = generator(seed, "rounding at the server", self._round, self._site)
        dropout_seed, _ = draws_of_round(seed, self._round, self._site)
        coding = Coding.of(setting.config, part, rounding)

        self._visit = _Visit(
            Middle(part, names, setting.train_in(self._round), steps=turn.steps, start=start),
            coding,
            start,
            dropout_seed,
            self._memories.begin(self._site, turn, coding),
        )

    def _forward(self, visit: _Visit, turn: Forward) -> Payload:
        if turn.micro == 0:
            self._step(visit, turn.step, turn.factor)

        rows = visit.middle.forward(
            visit.hidden.decode("up", turn.batch, turn.frame),
            turn.lengths,
            micro=turn.micro,
            returns=turn.returns,
            dropout_seed=derive(derive(visit.dropout_seed, turn.step), turn.micro),
        )
        return answer(turn, visit.hidden.encode("down", turn.batch, rows))

    def _backward(self, visit: _Visit, turn: Backward) -> Payload:
        received = visit.coding.decode_gradient(turn.frame, visit.middle.tokens(turn.micro))
        gradient, norm = visit.middle.backward(received, micro=turn.micro)
        frame = None if gradient is None else visit.coding.encode_gradient(gradient)
        return answer(turn, frame, norm=norm)

    def _update(self, visit: _Visit, frame: bytes | None, weight: int) -> Named:
        """Return the change of the whole model since the beginning, by a `frame` of the site's."""
        if (frame is None) != (not self._setting.shared.shapes):
            raise WireError("the layers that sites share come with each update, and others never")

        update = subtract(visit.middle.weights(), visit.start)
        if frame is not None:
            update |= self._setting.shared_codec.decode(frame)

        if update:
            check_update(update, weight, self._setting.train)
        return update

    def _step(self, visit: _Visit, steps: int, factor: float) -> None:
        """Make the last step, unless all `steps` that the site has made are made here too."""
        if visit.taken < steps:
            visit.middle.step(visit.taken, factor)
            visit.taken = steps

    def _begun(self) -> _Visit:
        assert self._visit is not None, "the order of turns refuses one before the first"
        return self._visit
