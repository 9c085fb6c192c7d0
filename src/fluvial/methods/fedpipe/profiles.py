"""Profiles of sites as the server reads them, with the rates of the configured line."""

from collections.abc import Collection
from dataclasses import replace

from fluvial.errors import WireError
from fluvial.federation.line import Line
from fluvial.federation.replies import fields
from fluvial.methods.fedpipe.planner.profile import KEY, Profile
from fluvial.methods.fedpipe.planner.settings import SiteBudget
from fluvial.wire.payload import Payload

MBIT = 10**6 / 8
"""Bytes of 10^6 bits."""


def read_profile(_site: str, reply: Payload, *, formats: Collection[str], layers: int) -> Profile:
    """Return the profile in a reply, which has errors of these `formats` for each of the `layers`;
    raises `WireError` for one that no honest site sends."""
    fields(reply, (KEY,))
    profile = Profile.from_values(reply.values)
    counts = {name: len(errors) for name, errors in profile.errors.items()}
    if counts != dict.fromkeys(formats, layers):
        raise WireError(
            f"{KEY}.errors: expected {layers} layers in each of the formats "
            f"{', '.join(formats) or 'none'}"
        )
    return profile


def over_line(profile: Profile, budget: SiteBudget, line: Line | None) -> Profile:
    """Return a profile with the rates of `fleet.line` where the site's budget has none."""
    if line is None:
        return profile

    if budget.up_mbit_s is None:
        profile = replace(profile, up_bytes_s=line.up_mbit_s * MBIT)
    if budget.down_mbit_s is None:
        profile = replace(profile, down_bytes_s=line.down_mbit_s * MBIT)
    if budget.rtt_ms is None:
        profile = replace(profile, latency_s=line.rtt_ms / 1000)
    return profile
