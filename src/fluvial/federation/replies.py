"""Readers of a site's reply: the one place where its numbers are bounded, for every method.

A reader raises `WireError` for what no honest site can send, and then the site has failed as if it
had not answered.
"""

import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from fluvial.codecs.base import Codec
from fluvial.errors import WireError
from fluvial.federation.bounds import check_update
from fluvial.training.answer_scores import MILLION, AnswerSums
from fluvial.training.config import TrainConfig
from fluvial.training.evaluate import Heldout
from fluvial.wire import payload
from fluvial.wire.payload import Payload, payload_frame
from fluvial.wire.tensors import Named, WeightedMean

MOST_LOSS = 1e4
"""Upper bound on a loss, nats per label token; a model that is sure of a wrong token is far
below."""
MOST_SAMPLES = 2**31
"""Upper bound on the records of one site."""
MOST_TOKENS = 2**53
"""Upper bound on the label tokens of one site: the whole numbers that a float can hold."""


def fields(
    reply: Payload,
    values: Collection[str],
    tensors: Collection[str] = (),
    optional: Collection[str] = (),
) -> None:
    """Raise `WireError` unless a reply has exactly these values and tensors, and `optional` values
    at most."""
    expected: tuple[tuple[str, Any, Any, Collection[str]], ...] = (
        ("values", reply.values, values, optional),
        ("tensors", reply.tensors, tensors, ()),
    )
    for kind, present, wanted, more in expected:
        missing = sorted(set(wanted) - set(present))
        extra = sorted(set(present) - set(wanted) - set(more))
        if missing or extra:
            raise WireError(f"message {kind}: missing {missing!r:.80}, not expected {extra!r:.80}")


FRAME = (payload.FRAME,)
"""Tensors of a reply that carries a frame."""


def nothing(_site: str, reply: Payload) -> None:
    """Raise `WireError` unless a reply is empty."""
    fields(reply, ())


def loss_of(reply: Payload) -> float:
    """Return the mean training loss in a reply, nats per label token."""
    return reply.number("loss", 0.0, MOST_LOSS)


def weight_of(reply: Payload) -> int:
    """Return the sample count in a reply, a whole number from 1 to 2^31."""
    return reply.whole("n", 1, MOST_SAMPLES)


def heldout_of(reply: Payload) -> Heldout:
    """Return the sums in a reply of `sites.evaluate`."""
    tokens = reply.whole("tokens", 1, MOST_TOKENS)
    hits = reply.whole("hits", 0, tokens)
    return Heldout(reply.number("loss_sum", 0.0, MOST_LOSS * tokens), hits, tokens)


def measured(_site: str, reply: Payload, *, answers: bool) -> tuple[Heldout, AnswerSums]:
    """Return the sums in a reply of `sites.evaluate`, those of answers empty unless asked for.

    A right answer has F1 1, and no score is above 1.
    """
    counts = tuple(field.name for field in dataclasses.fields(AnswerSums))
    asked = answers and any(name in reply.values for name in counts)
    fields(reply, ("loss_sum", "hits", "tokens", *(counts if asked else ())))

    if not asked:
        return heldout_of(reply), AnswerSums()

    questions = reply.whole("questions", 1, MOST_SAMPLES)
    right = reply.whole("right", 0, questions)
    most = questions * MILLION
    scores = AnswerSums(
        questions=questions,
        right=right,
        f1=reply.whole("f1", right * MILLION, most),
        rouge_1=reply.whole("rouge_1", 0, most),
        rouge_2=reply.whole("rouge_2", 0, most),
        rouge_l=reply.whole("rouge_l", 0, most),
        too_long=reply.whole("too_long", 0, questions),
        without_end=reply.whole("without_end", 0, questions),
    )

    return heldout_of(reply), scores


def read_counted(
    reply: Payload,
    decode: Callable[[bytes], Named],
    train: TrainConfig | None,
    *,
    extra: Collection[str] = (),
) -> tuple[Named, int, float]:
    """Return the update in a reply, its weight, and the loss; raise `WireError` beyond a bound.

    `extra` names the values beside sample count and loss, which the caller reads. Without `train`
    the update is not held to what training can reach.
    """
    fields(reply, ("n", "loss", *extra), FRAME)
    loss = loss_of(reply)
    weight = weight_of(reply)
    update = decode(payload_frame(reply))

    if train is None:
        WeightedMean.check(update, weight)
    else:
        check_update(update, weight, train)

    return update, weight, loss


def read_update(_site: str, reply: Payload, codec: Codec, round: int) -> tuple[Named, int]:
    """Return the decoded update of `round` in a reply and its weight, checked for the mean; raises
    `WireError`."""
    update, weight, _ = read_counted(reply, partial(codec.decode, round=round), None)
    return update, weight
