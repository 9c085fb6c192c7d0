"""Readers of the numbers in a site's reply, checked, for every method."""

from fluvial.codecs.base import Codec
from fluvial.errors import WireError
from fluvial.evaluate import Heldout
from fluvial.payload import Payload, payload_frame
from fluvial.tensors import Named, WeightedMean


def heldout_of(reply: Payload) -> Heldout:
    """The sums in a reply of `evaluate`."""
    sums = Heldout(reply.value("loss_sum", float), reply.value("hits", int), reply.value("tokens", int))
    if sums.label_tokens < 1:
        raise WireError("evaluate: a site measured nothing")
    return sums


def weight_of(reply: Payload) -> int:
    """The sample count in a reply, a whole number from 1 to 2^31."""
    samples: int = reply.value("n", int)
    if not 1 <= samples <= 2**31:
        raise WireError(f"sample count n={samples} is out of range")
    return samples


def read_update(reply: Payload, codec: Codec, round: int) -> tuple[Named, int]:
    """The decoded update of `round` in a reply and its weight, checked for the mean; raises `WireError`."""
    update, weight = codec.decode(payload_frame(reply), round=round), weight_of(reply)
    WeightedMean.check(update, weight)
    return update, weight
