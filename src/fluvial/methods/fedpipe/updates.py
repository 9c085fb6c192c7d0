"""The update of one site in a round, as its reply carries it."""

from dataclasses import dataclass

from fluvial.codecs import build
from fluvial.exchange import coder_of
from fluvial.federation.bounds import check_update
from fluvial.federation.context import Context
from fluvial.federation.replies import FRAME, fields, loss_of, weight_of
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.site_configuration import SiteConfiguration
from fluvial.methods.fedpipe.tasks import SECONDS, read_seconds, settings_of
from fluvial.wire.payload import Payload, payload_frame
from fluvial.wire.tensors import Named

MOST_ERROR = 1e4
"""Upper bound on the relative error of a codec that a site reports."""


@dataclass(frozen=True)
class SiteUpdate:
    """The reply of one site in a round."""

    site: str
    tensors: Named
    """Change of the factors that the site trains, fp32."""
    weight: int
    """Samples that it counts with."""
    loss: float
    """Mean training loss, nats per label token."""
    steps: int
    """Local steps that were made."""
    seconds: float
    """Seconds that they took, as the site says."""


def read_update(
    reply: Payload,
    configuration: SiteConfiguration,
    received: Named,
    *,
    site: str,
    round: int,
    config: FedPipeConfig,
    context: Context,
) -> SiteUpdate:
    """Return the update in a site's reply; raises `WireError` for one that breaks a rule.

    `received` is the adapter that the site began from.
    """
    feedback = context.codec.error_feedback
    fields(reply, ("n", "loss", "steps", SECONDS, *(("e",) if feedback else ())), FRAME)
    if feedback:
        reply.number("e", 0.0, MOST_ERROR)

    weight = weight_of(reply)
    steps = reply.whole("steps", 1, configuration.steps)
    coder = coder_of(build(context.codec, configuration.assignment.trained), received)
    update = coder.decode(payload_frame(reply), round=round)
    check_update(update, weight, settings_of(context.train, config, configuration))

    return SiteUpdate(site, update, weight, loss_of(reply), steps, read_seconds(reply))
