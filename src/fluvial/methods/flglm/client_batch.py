"""Steps of all sites together: one forward and one backward pass of the server's layers for all.

The objective of a step is the loss per label token over the sequences of all sites, as if they
were one batch; the gradients of the whole model are clipped by one norm.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fluvial.errors import WireError
from fluvial.federation.fleet import Fleet
from fluvial.federation.replies import fields, loss_of, weight_of
from fluvial.federation.turns import Idle, Turn
from fluvial.methods.flglm.coding import Coding
from fluvial.methods.flglm.middle import Middle
from fluvial.methods.flglm.order import Order
from fluvial.methods.flglm.setting import Setting
from fluvial.methods.flglm.tuned_part import factor_of
from fluvial.methods.flglm.turns import (
    MOST_OWN_SQUARED_NORM,
    Backward,
    Forward,
    Meeting,
    answer,
    read_turn,
)
from fluvial.seeds import derive, generator
from fluvial.training.train import Stepper, check_finite
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Named, add, energy, subtract


@dataclass(frozen=True)
class Answered:
    """A site's reply at the end of a round."""

    site: str
    weight: int
    loss: float


@dataclass(frozen=True)
class _Heard:
    """A site's turn, decoded."""

    turn: Forward | Backward | Meeting
    rows: Tensor | None = None
    """Hidden states, or their gradient."""
    gradients: Named = field(default_factory=dict)
    """Gradients of the layers that the sites share."""


class _SharedEnds:
    """The layers that the sites share, at the server: it makes the steps that the sites make."""

    def __init__(self, setting: Setting, state: Named) -> None:
        self.start = {name: state[name] for name in setting.shared.names}
        self._parameters = {
            name: nn.Parameter(tensor.clone()) for name, tensor in self.start.items()
        }
        self.stepper = Stepper(self._parameters, setting.train, steps=1)

    def step(self, number: int, gradients: Named, factor: float) -> None:
        """Make step `number` with the sites' summed gradients."""
        for name, parameter in self._parameters.items():
            parameter.grad = gradients[name] * factor
        self.stepper.step(number)

    def weights(self) -> Named:
        """Return the present values."""
        return self.stepper.weights()


class ClientBatch:
    """The training of a cohort in one round."""

    def __init__(
        self, setting: Setting, fleet: Fleet, round: int, state: Named, message: Payload
    ) -> None:
        """Begin with `state`, that of the whole model, and every site with `message`."""
        self.update: Named = {}
        """Change of the server's layers and of those that the sites share; after the last reply."""
        self._setting = setting
        self._fleet = fleet
        self._round = round
        self._state = state
        self._message = message
        self._ends = _SharedEnds(setting, state)
        self._orders: dict[str, Order] = {}
        self._forwards: dict[str, Forward] = {}
        """Last forward turn of each site."""
        self._group: list[str] = []
        """Sites of the last forward pass, in order of its rows."""
        self._turns: dict[str, Turn[_Heard]] = {}
        """Turns that wait for an answer."""
        self._tokens = 0
        """Label tokens of the step."""
        self._steps = 1
        """Steps of the site that has most."""

    def replies(self, sites: Sequence[str]) -> Iterator[Answered]:
        """Yield the sites' replies as they come; the quorum is the caller's."""
        setting = self._setting
        names = setting.places.tuned_middle.names
        middle = {name: self._state[name] for name in setting.places.middle.names}
        start = setting.weights({name: middle[name] for name in names})
        checkpointing = setting.train.gradient_checkpointing

        with setting.parts.part(middle, trainable=True, checkpointing=checkpointing) as part:
            self._middle = Middle(part, names, setting.train, steps=1, start=start)
            seed = setting.context.seed
            rounding = generator(seed, "rounding at the server", self._round)
            self._coding = Coding.of(setting.config, part, rounding)

            for event in self._fleet.converse(
                "train",
                dict.fromkeys(sites, self._message),
                round=self._round,
                hear=self._hear,
                read=self._read,
                alone=False,
            ):
                if isinstance(event, Idle):
                    self._answer()
                elif isinstance(event, Turn):
                    self._turns[event.site] = event
                else:
                    yield event.content

            weights = self._ends.weights()
            self.update = subtract(self._middle.weights(), start)
            self.update |= subtract(weights, self._ends.start)

    # -- what a site sends: wrong content is its failure ------------------------------------------

    def _hear(self, site: str, payload: Payload) -> _Heard:
        turn = read_turn(payload, self._setting.limits)
        if isinstance(turn, Forward) and (turn.step, turn.micro) == (0, 0):
            if site in self._orders:
                raise WireError("the steps went on without this site, which began again")
            self._orders[site] = Order()

        self._order_of(site).take(turn)
        if isinstance(turn, Forward):
            self._forwards[site] = turn
            return _Heard(turn, self._coding.decode_hidden(turn.frame, sum(turn.lengths)))
        if isinstance(turn, Backward):
            tokens = sum(self._forwards[site].lengths)
            return _Heard(turn, self._coding.decode_gradient(turn.frame, tokens))

        if turn.of != "clip" or (turn.frame is None) != (not self._setting.shared.shapes):
            raise WireError("sites meet to clip the gradients of the layers that they share")

        if turn.frame is None:
            return _Heard(turn)

        gradients = self._setting.shared_codec.decode(turn.frame)
        if energy(gradients) > MOST_OWN_SQUARED_NORM:
            raise WireError("the gradients of the layers that sites share are too large")
        return _Heard(turn, gradients=gradients)

    def _read(self, site: str, payload: Payload) -> Answered:
        fields(payload, ("n", "loss", "factor"))
        self._order_of(site).end()
        return Answered(site, weight_of(payload), loss_of(payload))

    def _order_of(self, site: str) -> Order:
        """Return the order of a site's turns, an empty one where it has not begun."""
        return self._orders.get(site) or Order()

    # -- once all sites wait -----------------------------------------------------------------------

    def _answer(self) -> None:
        """Answer the turns that have the same place in the step, micro-batches first."""
        turns = dict(sorted(self._turns.items()))
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
                    del self._turns[site]
                make(waiting)
                return

    def _forward(self, turns: dict[str, Turn[_Heard]]) -> None:
        heard = [(turn.content, self._forwards[site]) for site, turn in turns.items()]
        step = max(turn.step for _, turn in heard)
        micro = min(turn.micro for _, turn in heard)
        if micro == 0:
            self._tokens = sum(turn.tokens for _, turn in heard)
        if step == 0:
            self._plan(max(turn.steps for _, turn in heard))

        seed = derive(self._setting.context.seed, "dropout", self._round, step, micro)
        rows = self._middle.forward(
            torch.cat([each.rows for each, _ in heard if each.rows is not None]),
            [length for _, turn in heard for length in turn.lengths],
            returns=any(turn.returns for _, turn in heard),
            dropout_seed=seed,
        )
        self._group = list(turns)

        for piece, turn in zip(self._pieces(rows), turns.values(), strict=True):
            frame = self._coding.encode_hidden(piece)
            turn.answer(answer(turn.content.turn, frame, tokens=self._tokens, steps=self._steps))

    def _backward(self, turns: dict[str, Turn[_Heard]]) -> None:
        gradients = []
        for site in self._group:
            rows = turns[site].content.rows if site in turns else None
            if rows is None:  # the site has failed since
                width = self._coding.width
                rows = torch.zeros(sum(self._forwards[site].lengths), width)
            gradients.append(rows.to(self._coding.device, self._coding.gradient.dtype))

        received, norm = self._middle.backward(torch.cat(gradients))
        pieces = [None] * len(self._group) if received is None else self._pieces(received)

        for site, piece in zip(self._group, pieces, strict=True):
            if site in turns:
                frame = None if piece is None else self._coding.encode_gradient(piece)
                turns[site].answer(answer(turns[site].content.turn, frame, norm=norm))

    def _clip(self, turns: dict[str, Turn[_Heard]]) -> None:
        squared = self._middle.squared_norm()
        meetings = [turn.content for turn in turns.values()]
        gradients: Named = {}

        for heard in meetings:
            assert isinstance(heard.turn, Meeting)
            squared += heard.turn.squared_norm
            gradients = add(gradients, heard.gradients) if gradients else heard.gradients

        squared += energy(gradients)
        train = self._setting.train
        step = meetings[0].turn.step
        check_finite(0.0, squared, step, self._steps, train)
        factor = factor_of(squared, train.max_grad_norm)
        self._middle.step(step, factor)
        frame = None
        if gradients:
            self._ends.step(step, gradients, factor)
            frame = self._setting.shared_codec.encode(gradients)

        for turn in turns.values():
            turn.answer(answer(turn.content.turn, frame, norm=squared))

    def _plan(self, steps: int) -> None:
        """Let all learning rates follow the site with most steps."""
        self._steps = steps
        self._middle.plan_steps(steps)
        self._ends.stepper.steps = steps

    def _pieces(self, rows: Tensor) -> list[Tensor]:
        """Return the rows of each site of the group."""
        sizes = [sum(self._forwards[site].lengths) for site in self._group]
        return list(torch.split(rows, sizes))
