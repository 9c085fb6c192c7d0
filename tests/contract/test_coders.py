"""Contract of every coder of `fluvial.exchange`, over every codec of `CODECS`."""

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import pytest
import torch

from fluvial.codecs import CODECS, Codec, build, read_settings
from fluvial.codecs.base import LearnedCodec, RatedCodec
from fluvial.codecs.klt.moments import MomentCodec
from fluvial.errors import WireError
from fluvial.exchange.coding import Coder, Plain
from fluvial.exchange.difference import REFERENCE, Difference
from fluvial.exchange.feedback import RESIDUAL, Feedback
from fluvial.exchange.weighting import Weighted
from fluvial.models.states import initial_state
from fluvial.seeds import generator
from fluvial.wire.frame import OVERHEAD
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, add, digest, norm, scale, subtract, zeros_like

LAYOUT = Layout(
    tuple(
        (f"layers.{layer}.q_proj.lora_{which}.weight", (4, 32) if which == "A" else (32, 4))
        for layer in range(2)
        for which in ("A", "B")
    )
)


def update_of(number: int) -> Named:
    """Return an update whose tensors differ in size."""
    random = generator(0, "coders", number)
    return {
        name: 1e-3 * (1 + index) * torch.randn(shape, generator=random)
        for index, (name, shape) in enumerate(LAYOUT.shapes)
    }


@cache
def received() -> Named:
    """Return the adapter that both ends hold."""
    return add(initial_state(LAYOUT, 0), scale(update_of(99), 10))


RATES = {"klt_trellis": 16}
"""Rates of codecs that refuse 4."""


def at_rate(codec: Codec) -> Codec:
    """Return a codec at another rate than its own."""
    assert isinstance(codec, RatedCodec)
    return codec.at_rate(17.5)


CHAINS: dict[str, Callable[[Codec], Coder]] = {
    "plain": Plain,
    "weighted": lambda codec: Weighted(Plain(codec), received()),
    "feedback": lambda codec: Feedback(Plain(codec), decay=0.9),
    "feedback over weighted": lambda codec: Feedback(Weighted(Plain(codec), received()), decay=0.9),
    "difference": lambda codec: Difference(Plain(codec)),
    "difference over weighted": lambda codec: Difference(Weighted(Plain(codec), received())),
    "at a rate": lambda codec: Plain(at_rate(codec)),
    "feedback at a rate": lambda codec: Feedback(Plain(at_rate(codec)), decay=0.9),
}
"""Ways to chain the wrappers. `Feedback` is not put over `Difference`: each repeats what a frame
lost, so together they would send it twice."""
TRAINED = [
    name
    for name, kind in CODECS.items()
    if issubclass(kind, LearnedCodec) and not issubclass(kind, MomentCodec)
]
"""Codecs fitted by gradient descent, which takes too long here; their own tests fit them."""
NAMES = [name for name in CODECS if name not in TRAINED]
CASES = [
    (chain, name)
    for chain in CHAINS
    for name in NAMES
    if "rate" not in chain or issubclass(CODECS[name], RatedCodec)
]


@cache
def codec_of(name: str) -> Codec:
    """Return the codec `name`, at a rate that leaves room in small frames."""
    fields = type(read_settings({"name": name})).model_fields
    rate = RATES.get(name, 4)
    settings = read_settings({"name": name} | ({"rate": rate} if "rate" in fields else {}))
    kind = CODECS[name]
    if not issubclass(kind, LearnedCodec):
        return build(settings, LAYOUT)
    return kind.fit(settings, LAYOUT, [update_of(number) for number in range(10, 18)], seed=0)


def coder_of(chain: str, name: str) -> Coder:
    return CHAINS[chain](codec_of(name))


def start_of(coder: Coder) -> dict[str, Payload]:
    """Return the state of an end that has sent nothing yet."""
    return {REFERENCE: Payload(received())} if REFERENCE in coder.slots else {}


def next_input(coder: Coder, state: Mapping[str, Payload], number: int) -> Named:
    """Return an update, or for a coder of states, a state near the reference."""
    update = update_of(number)
    return add(state[REFERENCE].tensors, update) if REFERENCE in coder.slots else update


def over_the_wire(state: Mapping[str, Payload]) -> dict[str, Payload]:
    return {slot: Payload.from_bytes(payload.to_bytes()) for slot, payload in state.items()}


def bytes_of(state: Mapping[str, Payload]) -> dict[str, bytes]:
    return {slot: payload.to_bytes() for slot, payload in state.items()}


@pytest.mark.parametrize(("chain", "name"), CASES)
def test_the_layout_is_decoded_and_slots_name_the_state(chain: str, name: str) -> None:
    coder = coder_of(chain, name)
    state = start_of(coder)
    for round in (1, 2):
        update = next_input(coder, state, round)
        frame, after = coder.encode(update, state, seed=round, round=round)
        LAYOUT.check(coder.decode(frame, state, round=round), name)
        assert set(after) == set(coder.slots)
        for slot, payload in after.items():
            LAYOUT.check(payload.tensors, slot)
        state = after


@pytest.mark.parametrize(("chain", "name"), CASES)
def test_the_same_arguments_give_the_same_frame_and_are_not_changed(chain: str, name: str) -> None:
    coder = coder_of(chain, name)
    _, state = coder.encode(next_input(coder, start_of(coder), 1), start_of(coder), round=1)
    update = next_input(coder, state, 2)
    before = digest(update), bytes_of(state)
    frame, after = coder.encode(update, state, seed=7, round=3)
    assert (digest(update), bytes_of(state)) == before

    again, after_again = coder_of(chain, name).encode(update, state, seed=7, round=3)
    assert frame == again
    assert bytes_of(after) == bytes_of(after_again)
    decoded = coder.decode(frame, state, round=3)
    assert bytes_of(state) == before[1]
    assert digest(decoded) == digest(coder.decode(frame, state))


@pytest.mark.parametrize(("chain", "name"), CASES)
def test_state_that_was_stored_gives_the_same_next_frame(chain: str, name: str) -> None:
    coder = coder_of(chain, name)
    state = start_of(coder)
    for round in (1, 2):
        _, state = coder.encode(next_input(coder, state, round), state, seed=round, round=round)

    stored = over_the_wire(state)
    update = next_input(coder, state, 3)
    frame, after = coder.encode(update, state, seed=3, round=3)
    frame_of_stored, after_stored = coder.encode(update, stored, seed=3, round=3)
    assert frame == frame_of_stored
    assert bytes_of(after) == bytes_of(after_stored)
    assert digest(coder.decode(frame, state)) == digest(coder.decode(frame, stored))


@pytest.mark.parametrize(("chain", "name"), CASES)
def test_nothing_new_decodes_to_nothing_new(chain: str, name: str) -> None:
    """A zero update decodes to zero; a state that is the reference decodes to the reference."""
    coder = coder_of(chain, name)
    state = start_of(coder)
    unchanged = received() if REFERENCE in coder.slots else zeros_like(received())
    frame, _ = coder.encode(unchanged, state, seed=1, round=1)
    assert norm(subtract(coder.decode(frame, state), unchanged)) == 0


@pytest.mark.parametrize(("chain", "name"), CASES)
def test_foreign_truncated_and_damaged_frames_are_refused(chain: str, name: str) -> None:
    coder = coder_of(chain, name)
    state = start_of(coder)
    frame, _ = coder.encode(next_input(coder, state, 1), state, seed=1, round=1)
    other = coder_of(chain if "rate" not in chain else "plain", "bf16")
    if name == "bf16":
        other = coder_of(chain, "int8")
    foreign, _ = other.encode(next_input(other, state, 1), state, seed=1, round=1)

    bad = [foreign, b"", frame[:-1], frame[: OVERHEAD - 1], frame + b"\0"]
    for bit in np.random.default_rng(0).integers(0, 8 * len(frame), 10):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        bad.append(bytes(damaged))

    for wire in bad:
        with pytest.raises(WireError):
            coder.decode(wire, state, round=1)

    with pytest.raises(WireError, match="of round 1, expected round 2"):
        coder.decode(frame, state, round=2)


@pytest.mark.parametrize("chain", [chain for chain in CHAINS if "rate" not in chain])
@pytest.mark.parametrize("change", ["names", "shapes", "dtype", "values"])
def test_a_foreign_state_is_refused(chain: str, change: str) -> None:
    coder = coder_of(chain, "int8")
    foreign = dict(update_of(1))
    name = LAYOUT.names[0]
    tensor = foreign.pop(name)
    if change == "names":
        foreign["other.lora_A.weight"] = tensor
    elif change == "shapes":
        foreign[name] = tensor[:, :-1]
    elif change == "dtype":
        foreign[name] = tensor.half()
    else:
        foreign[name] = torch.full_like(tensor, torch.nan)

    state = {slot: Payload(foreign, {"round": 1, "error": 0.1}) for slot in coder.slots}
    if not state:
        assert chain in ("plain", "weighted")
        return

    with pytest.raises(WireError, match=coder.slots[-1]):
        coder.encode(update_of(2), state, round=2)
    if REFERENCE in coder.slots:
        frame, _ = coder.encode(received(), start_of(coder), round=2)
        with pytest.raises(WireError, match=REFERENCE):
            coder.decode(frame, state, round=2)


@pytest.mark.parametrize(
    ("chain", "name"), [case for case in CASES if case[0].startswith("feedback")]
)
def test_what_was_decoded_and_the_residual_are_all_updates(chain: str, name: str) -> None:
    """Error feedback loses nothing: sum of decoded + residual = sum of updates.

    The sums are equal but for fp32 rounding: each of 6 rounds rounds three times, by at most 2^-24
    of the largest value in it.
    """
    rounds = 6
    coder = coder_of(chain, name)
    state: dict[str, Payload] = {}
    sent = total = {key: tensor.double() for key, tensor in zeros_like(received()).items()}
    largest = 0.0

    for round in range(1, rounds + 1):
        update = update_of(round)
        frame, state = coder.encode(update, state, seed=round, round=round)
        decoded = coder.decode(frame, round=round)
        sent = {key: tensor + decoded[key].double() for key, tensor in sent.items()}
        total = {key: tensor + update[key].double() for key, tensor in total.items()}
        values = (*update.values(), *decoded.values(), *state[RESIDUAL].tensors.values())
        largest = max(largest, *(float(tensor.abs().max()) for tensor in values))

    allowed = 3 * rounds * 2.0**-24 * 2 * largest
    for key, tensor in state[RESIDUAL].tensors.items():
        gap = sent[key] + tensor.double() - total[key]
        assert float(gap.abs().max()) <= allowed


def test_feedback_is_exact_where_arithmetic_is() -> None:
    """With an identity codec nothing is left over, and missed rounds let a residual decay."""
    exact = Feedback(Plain(codec_of("identity")), decay=0.9)
    _, state = exact.encode(update_of(1), round=1)
    assert norm(state[RESIDUAL].tensors) == 0
    assert state[RESIDUAL].values == {"round": 1, "error": 0.0}

    coder = Feedback(Plain(codec_of("int4")), decay=0.5)
    _, state = coder.encode(update_of(1), round=1)
    residual = state[RESIDUAL].tensors
    for round, factor in ((2, 1.0), (3, 0.5), (5, 0.125)):
        frame, _ = coder.encode(update_of(2), state, round=round)
        plain, _ = coder.encode(add(update_of(2), scale(residual, factor)), round=round)
        assert frame == plain


@pytest.mark.parametrize(
    ("chain", "name"), [case for case in CASES if case[0].startswith("difference")]
)
def test_sender_and_receiver_hold_the_same_state(chain: str, name: str) -> None:
    """The reference of the sender is what the receiver decoded, bit for bit, in every round."""
    sender = coder_of(chain, name)
    receiver = coder_of(chain, name)
    state = start_of(sender)
    held = received()
    target = received()

    for round in range(1, 7):
        target = add(target, update_of(round))
        frame, state = sender.encode(target, state, seed=round, round=round)
        held = receiver.decode(frame, {REFERENCE: Payload(held)}, round=round)
        assert digest(held) == digest(state[REFERENCE].tensors)


def test_what_a_difference_lost_is_sent_later() -> None:
    coder = Difference(Plain(codec_of("top_k")))
    state = start_of(coder)
    target = add(received(), update_of(1))
    gaps = []
    for round in range(1, 9):
        _, state = coder.encode(target, state, round=round)
        gaps.append(norm(subtract(target, state[REFERENCE].tensors)))

    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.02 * norm(update_of(1))
