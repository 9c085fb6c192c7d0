"""Bounds of a site on epsilon and delta over all its runs, independent of the server."""

import math
from collections.abc import Sequence
from pathlib import Path

from fluvial.errors import PrivacyError
from fluvial.federation.releases import count_releases
from fluvial.formatting import epsilon_words
from fluvial.runs.config import RunConfig


def check_budget(
    config: RunConfig,
    others: Sequence[RunConfig],
    *,
    max_epsilon: float,
    max_delta: float,
) -> None:
    """Raise `PrivacyError` unless `config` and `others` together stay within both bounds.

    `others` are the other runs of this site. Epsilons are added up, and deltas too; this basic
    composition holds for any mechanisms. A run is refused if it does not add its noise at the site,
    or releases measures that epsilon does not count.
    """
    promise = config.promise
    if promise is None or not promise.at_site:
        raise PrivacyError(
            "this site takes part only in runs that add noise at the site: method.name='cgfedllm' "
            "with method.privacy.placement='update' or 'latent'"
        )

    if promise.measures:
        raise PrivacyError(
            "this site sends no measures that epsilon does not count; remove "
            "method.privacy.heldout='exact'"
        )

    epsilon, delta = _spends(config)
    spent = [_spends(other) for other in others]
    if epsilon + sum(other for other, _ in spent) > max_epsilon:
        raise PrivacyError(
            f"this run would spend epsilon {epsilon_words(epsilon)}, which is more than this site "
            "has left"
        )

    if math.fsum([delta, *(other for _, other in spent)]) > max_delta:
        raise PrivacyError(
            f"this run would spend delta {delta:.3g} (method.privacy.delta), which is more than "
            "this site has left"
        )


def check_same_promise(config: RunConfig, begun: RunConfig | None, ledger: Path) -> None:
    """Raise `PrivacyError` if the run made releases under another promise than that of `config`.

    `begun` is the run's configuration so far, and `ledger` the folder of its releases. The budget
    counts a run by its configuration, so a smaller promise would hide what was spent.
    """
    if begun is None or count_releases(ledger) == 0:
        return

    before = _spends(begun)
    if before != _spends(config):
        raise PrivacyError(
            f"this run made releases under epsilon {epsilon_words(before[0])} and delta "
            f"{before[1]:.3g}, and another promise is asked for now; begin a new run"
        )


def _spends(config: RunConfig) -> tuple[float, float]:
    """Return epsilon and delta of a whole run; epsilon is infinite without noise at the site."""
    promise = config.promise
    if promise is None or not promise.at_site:
        return math.inf, 0.0
    report = promise.report(config.rounds, config.rounds)
    return report["epsilon"], report["delta"]
