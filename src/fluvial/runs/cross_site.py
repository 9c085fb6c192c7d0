"""Cross-site measures: the own model of every site on the held-out data of all sites."""

import logging
from collections.abc import Callable

from fluvial.federation.fleet import Fleet
from fluvial.federation.sites import state_message
from fluvial.methods.measuring import SiteMeasures, ask_heldout
from fluvial.models.states import changed, initial_state
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig
from fluvial.wire.tensors import Layout

OwnModels = Callable[[], dict[str, dict[str, SiteMeasures]]]
"""Measures the own model of every site on all sites."""
logger = logging.getLogger(__name__)


def own_models_everywhere(
    config: RunConfig, folder: RunFolder, fleet: Fleet, layout: Layout
) -> dict[str, dict[str, SiteMeasures]]:
    """Return the measures of each site's own model by that site, then by the site of the data.

    `config` is the run of the baseline `local`, and `folder` holds it. `fleet` is one apart,
    whose bytes count nowhere: that models are handed on is no part of the run.
    """
    measures = {}
    try:
        for number, site in enumerate(fleet.sites, start=1):
            logger.info("model of site %s on all sites, %d of %d", site, number, len(fleet.sites))
            own = folder.store.read(site, "adapter").tensors or initial_state(layout, config.seed)
            message = state_message(
                changed(own), layout, which="sent", generate=config.evaluate.max_new_tokens
            )
            measures[site] = ask_heldout(fleet, message, round=config.rounds).by_site
    finally:
        fleet.close()

    return measures
