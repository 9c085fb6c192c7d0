"""Plans made again: a new one takes the place of the present one only where it is clearly better.

Ranks that change back and forth would cost the optimizer its state and the mean its meaning.
"""

from fluvial.methods.fedpipe.planner.decision import Models, Planner
from fluvial.methods.fedpipe.planner.plan import SitePlan


def replanned(
    planner: Planner, models: Models, present: SitePlan, deadline_s: float | None = None
) -> SitePlan | None:
    """Return the plan of a site whose profile or whose scores have changed.

    The present plan stays, with its figures as they are now, unless it no longer fits or another
    one has a score that is better by the settings' `hysteresis`; None where nothing fits.
    """
    best = planner.plan(models, deadline_s)
    kept = planner.evaluated(models, present, deadline_s)
    if best is None or kept is None:
        return best if best is not None else kept

    margin = planner.settings.hysteresis * abs(kept.score)
    return best if best.score > kept.score + margin else kept
