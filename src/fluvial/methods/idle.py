"""Settings that cannot change a run, which a method's plan names with the reason.

Each function returns reasons by the place of a setting, for `Plan.idle`. A reason completes the
sentence "without effect, because ...".
"""

from fluvial.codecs import must_learn
from fluvial.federation.bounds import FEWEST_COMPARED
from fluvial.methods.interface import Given, MethodSettings, SampledSettings


def idle_bounds(updates: int) -> dict[str, str]:
    """Return the bounds that change no mean of this many `updates`."""
    held = f"a round has {updates} update{'s' if updates > 1 else ''}"
    idle = {}
    if updates < FEWEST_COMPARED:
        idle["fleet.max_update_growth"] = f"{held}, and {FEWEST_COMPARED} or more are compared"
    if updates < 2:
        idle["fleet.max_weight_share"] = f"{held}, whose weight is the whole"

    return idle


def idle_feedback(given: Given, *, steady: bool, period: int = 1) -> dict[str, str]:
    """Return the settings of error feedback that change nothing.

    A site codes the same tensors again after `period` rounds; `steady` says that it never misses a
    round in which it should. A codec that learns is fitted for error feedback, so it changes even a
    single round.
    """
    idle = {}
    rounds = f"{given.rounds} round{'s' if given.rounds > 1 else ''}"
    if given.rounds <= period:
        never = f"no site codes the same tensors twice in {rounds}"
        idle["codec.feedback_decay"] = never
        if not must_learn(given.codec):
            idle["codec.error_feedback"] = never
    elif steady and period == 1:
        idle["codec.feedback_decay"] = (
            "every site answers in every round under fleet.on_failure='stop'"
        )

    return idle


def idle_targets(given: Given, updates: int) -> dict[str, str]:
    """Return the targets of the codec's noise that no round follows, for rounds of `updates`."""
    if given.rounds == 1:
        why = "the run has 1 round, and the rate follows from the second on"
        return dict.fromkeys(("codec.snr_db", "codec.noise_ratio"), why)
    if updates == 1:
        return {"codec.noise_ratio": "a round has 1 update, so there is no variance between sites"}
    return {}


def idle_fraction(config: MethodSettings, sites: int) -> dict[str, str]:
    """Return the share of a cohort where there is one site to draw."""
    if not isinstance(config, SampledSettings) or sites > 1:
        return {}
    return {"method.fraction": "there is one site"}
