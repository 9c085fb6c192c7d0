"""The state of a site's layers: what the server sent, or what the site keeps."""

from fluvial.errors import WireError
from fluvial.federation.sites import Site, read_state_message
from fluvial.methods.flglm.places import Places
from fluvial.models.states import base_state, initial_state
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Named


def places_of(site: Site) -> Places:
    """Return the layouts of the parts of the site's model."""
    return Places.of(site.method, site.pool.outline.base, site.layout)


def state_of(site: Site, message: Payload, places: Places) -> Named:
    """Return the state of the site's layers: the initial one, with what was sent or kept."""
    state = initial_state(places.ends, site.seed)
    if places.shared.shapes:
        return state | read_state_message(message, places.shared)
    return state | site.recall("ends").tensors


def state_in_use(site: Site, message: Payload, places: Places) -> Named:
    """Return the state of `state_of` for a message with `which` = "final", that of the base for
    "base"; raises `WireError`."""
    which = message.value("which", str)
    if which == "base":
        return base_state(places.ends)
    if which == "final":
        return state_of(site, message, places)
    raise WireError(f"which={which!r:.40}, expected 'base' or 'final'")
