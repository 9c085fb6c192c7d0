"""How much epsilon a site's own file lets runs spend, whatever a server asks."""

import json
from collections.abc import Sequence
from pathlib import Path

from fluvial.config import RunConfig, parse
from fluvial.errors import PrivacyError


def check_budget(config: RunConfig, others: Sequence[RunConfig], most: float) -> None:
    """Raise `PrivacyError` unless `config` and `others` together spend at most epsilon `most`.

    `others` are the runs that this site took part in before. Epsilons are added up, which holds for
    any mechanisms; so are their deltas. A run that does not add its noise at the site, or lets
    something leave outside epsilon, is refused.
    """
    promise = config.promise
    if promise is None or not promise.at_site:
        raise PrivacyError(
            "this site takes part only in runs that add noise at the site: method.name='cgfedllm' "
            "with method.privacy.placement='update' or 'latent'"
        )
    if promise.measures:
        raise PrivacyError("this site lets nothing leave outside epsilon; remove method.privacy.heldout='exact'")
    asked = _epsilon(config)
    spent = sum(_epsilon(each) for each in others)
    if asked + spent > most:
        raise PrivacyError(f"this run would spend epsilon {asked:.3g}, which is more than this site has left")


def runs_before(folder: Path, but: Path) -> list[RunConfig]:
    """Return the configurations of the runs in `folder`, except the one in `but`."""
    paths = sorted(path for path in folder.glob("*/config.json") if path.parent != but)
    return [parse(json.loads(path.read_text(encoding="utf-8")), str(path)) for path in paths]


def _epsilon(config: RunConfig) -> float:
    """Return what a whole run spends; infinite without noise at the site."""
    promise = config.promise
    if promise is None or not promise.at_site:
        return float("inf")
    epsilon: float = promise.report(config.rounds, config.rounds)["epsilon"]
    return epsilon
