"""Frozen side paths: what a site receives of the weights that only other sites train.

Plans are made site by site, and this share of a round follows from all of them, so it is added to
the predictions afterwards. A plan leaves memory, and seconds before the deadline, for the largest
side path that the site may ever get (`Planner.memory_bytes`, `Room.most_seconds`).
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

from fluvial.methods.fedpipe.planner.decision import SIDE_BYTES, Models, processed
from fluvial.methods.fedpipe.planner.formats import layered
from fluvial.methods.fedpipe.planner.plan import SitePlan
from fluvial.methods.fedpipe.planner.time import HEADER_BYTES, VALUE_BYTES


def with_side_path(
    plan: SitePlan, models: Models, used: Collection[str], sizes: Mapping[str, int]
) -> SitePlan:
    """Return the plan with the download, the seconds and the memory of side paths for `used`
    modules that the site does not train.

    `sizes` are the parameters of a module's adapter at the rank of the global one, by module.
    """
    trained = dict(plan.ranks)
    modules = [module for module in used if module not in trained]
    parameters = sum(sizes[module] for module in modules)
    down = -(-VALUE_BYTES * parameters // models.time.down_rate) + HEADER_BYTES * len(modules)
    before = plan.prediction
    setting = plan.setting
    training_s, _ = models.time.side_path(
        models.profile,
        layered(setting.format, setting.layer_formats),
        batch=setting.batch,
        tokens=processed(models.profile, setting),
        checkpointing=setting.checkpointing,
    )
    prediction = replace(
        before,
        memory_bytes=before.memory_bytes + SIDE_BYTES * parameters,
        bytes_down=before.bytes_down + down,
        compute_s=before.compute_s + float(training_s * parameters),
        link_s=before.link_s + down / models.profile.down_bytes_s,
    )
    return replace(plan, prediction=prediction)
