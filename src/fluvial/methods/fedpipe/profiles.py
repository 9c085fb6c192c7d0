"""Profiles of sites as the server reads them, with the rates of the configured line."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from fluvial.errors import WireError
from fluvial.federation.fleet import Fleet
from fluvial.federation.line import Line
from fluvial.federation.replies import fields
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.planner.profile import KEY, MOST_RATE, Profile
from fluvial.methods.fedpipe.planner.settings import SiteBudget
from fluvial.wire.payload import Payload

MBIT = 10**6 / 8
"""Bytes of 10^6 bits."""


def read_profile(
    _site: str,
    reply: Payload,
    *,
    held: Collection[str],
    formats: Collection[str],
    layers: int,
) -> Profile:
    """Return the profile in a reply: measured in one of the formats `held` of the base, with errors
    of these `formats` for each of the `layers`; raises `WireError` for one that no honest site
    sends."""
    fields(reply, (KEY,))
    profile = Profile.from_values(reply.values)
    measured = sorted(profile.speeds)
    if len(measured) > 1 or measured[0] not in held:
        raise WireError(
            f"{KEY}.speeds: expected one of the formats {', '.join(sorted(held))}, found "
            f"{', '.join(measured)}"
        )
    counts = {name: len(errors) for name, errors in profile.errors.items()}
    if counts != dict.fromkeys(formats, layers):
        raise WireError(
            f"{KEY}.errors: expected {layers} layers in each of the formats "
            f"{', '.join(formats) or 'none'}"
        )
    return profile


def ask_profiles(
    fleet: Fleet,
    sites: Sequence[str],
    *,
    round: int,
    read: Callable[[str, Payload], Profile],
    alone: bool,
) -> dict[str, Profile]:
    """Return what `sites` measure, in order of their names; see `Fleet.ask`."""
    messages = dict.fromkeys(sites, Payload())
    replies = fleet.ask("profile", messages, round=round, read=read, alone=alone)
    profiles = {reply.site: reply.content for reply in replies}
    return {site: profiles[site] for site in sorted(profiles)}


def over_line(
    profiles: Mapping[str, Profile], config: FedPipeConfig, line: Line | None
) -> dict[str, Profile]:
    """Return profiles with the rates of `fleet.line` where a site's budget has none, and none was
    measured."""
    if line is None:
        return dict(profiles)
    return {
        site: _over_line(profile, config.budget(site), line) for site, profile in profiles.items()
    }


def _over_line(profile: Profile, budget: SiteBudget, line: Line) -> Profile:
    if budget.up_mbit_s is None and profile.up_bytes_s >= MOST_RATE:
        profile = replace(profile, up_bytes_s=min(line.up_mbit_s * MBIT, MOST_RATE))
    if budget.down_mbit_s is None and profile.down_bytes_s >= MOST_RATE:
        profile = replace(profile, down_bytes_s=min(line.down_mbit_s * MBIT, MOST_RATE))
    if budget.rtt_ms is None:
        profile = replace(profile, latency_s=line.rtt_ms / 1000)
    return profile
