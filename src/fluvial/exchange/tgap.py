"""TGAP: settings of the pre-training of a codec on early updates, and its splits of data.

The paper (CG-FedLLM, section C4) says that the encoder is pre-trained on gradients of D1, a share
of every site's data; version 1 describes training without federation, version 3 a pre-training of
the federated model. Both readings are here, and two further sources. One costs the sites neither
bytes nor privacy: the server trains simulated sites on public text. In the other they train on D1
and keep their updates: only sums of second moments go up, once, and later what a codec does to
their held-out updates, in a few numbers.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from fluvial.codecs.base import Snapshot
from fluvial.data import Example
from fluvial.errors import ConfigError
from fluvial.settings import Settings


class TgapConfig(Settings):
    """Pre-training of a codec that learns."""

    source: Literal["sites", "sites-covariance", "public", "none"] = "sites"
    """Origin of the updates. "sites": each site sends raw updates of D1 once (the paper).
    "sites-covariance": sites keep them and send sums of their second moments, for klt and
    klt_trellis (ours). "public": simulated sites on public text, at no byte from the sites (ours).
    "none": no pre-training and no gate, for codecs that do not learn."""
    reading: Literal["federated", "local"] = "federated"
    """Reading of the paper. "federated": sites share an averaged adapter between rounds (v3).
    "local": each goes its own way (v1); source "sites-covariance" needs that."""
    rounds: int = Field(10, ge=2, le=10**6)
    """Rounds of the pre-training (ours: the paper gives no value)."""
    share: float = Field(0.3, gt=0, lt=1)
    """Share of D1 in every site's training data (3 : 7), with source "sites"; FAF then trains on D2
    only."""
    holdout: float = Field(0.2, gt=0, lt=1)
    """Share of the rounds, the last ones, that the fit never sees (a random split leaks
    neighbours)."""
    simulated_sites: int = Field(8, ge=2, le=8)
    """Sites that the server simulates with source "public"; public text is dealt into at most 8
    parts."""
    refit: Literal["no", "decoded", "broadcast"] = "no"
    """Refit of a klt to the updates of FAF (ours). "decoded": the server refits from the
    updates of a round and sends the transform again. "broadcast": server and sites refit alike from
    the adapters they saw, at no byte."""
    refit_every: int = Field(5, ge=1, le=10**6)
    """Rounds between refits."""
    refit_weight: float = Field(0.5, gt=0, lt=1)
    """Share of the new updates in the refitted covariance."""

    def conflicts(self) -> Iterator[str]:
        """See `Settings`."""
        if self.refit == "no" and any(map(self.differs, ("refit_every", "refit_weight"))):
            yield "refit_every, refit_weight: without effect under refit='no'; set refit='decoded'"

        yield from self._idle_under_the_source()
        if self.source == "sites-covariance" and self.reading == "federated":
            yield (
                "reading='federated' averages updates, which source='sites-covariance' keeps at "
                "the sites; set reading='local'"
            )

    def _idle_under_the_source(self) -> Iterator[str]:
        """Yield a line for each setting that nothing reads under `source`."""
        whys = {
            "share": "which takes no records of the sites",
            "simulated_sites": "which simulates none",
        }
        idle = {
            "sites": ["simulated_sites"],
            "sites-covariance": ["simulated_sites"],
            "public": ["share"],
            "none": ["share", "simulated_sites", "reading", "rounds", "holdout"],
        }
        for name in idle[self.source]:
            if self.differs(name):
                why = whys.get(name, "which has no pre-training")
                yield f"{name}: without effect under source={self.source!r}, {why}; remove it"

    @property
    def from_sites(self) -> bool:
        """True where sites train and answer before round 1."""
        return self.source in ("sites", "sites-covariance")

    @property
    def training_rounds(self) -> int:
        """Return the number of rounds that the fit sees.

        Those after them are held out, at least one and not all.
        """
        return self.rounds - _num_heldout(self.rounds, self.holdout)


NO_TGAP = TgapConfig(source="none")
"""No pre-training and no gate."""
PUBLIC_TGAP = TgapConfig(source="public")
"""Pre-training at no byte from the sites; the default of methods that do not need it."""


def d1_of(examples: Sequence[Example], share: float) -> Sequence[Example]:
    """Return D1: the first `share` of a site's examples, at least one."""
    return examples[: max(1, round(share * len(examples)))]


def d2_of(examples: Sequence[Example], share: float) -> Sequence[Example]:
    """Return D2: the examples after D1; raises `ConfigError` if none is left."""
    rest = examples[max(1, round(share * len(examples))) :]
    if not rest:
        raise ConfigError(
            f"method.tgap.share={share}: {len(examples)} examples of a site cannot be split in two"
        )

    return rest


def after_tgap(examples: Sequence[Example], config: TgapConfig) -> Sequence[Example]:
    """Return what the rounds train on: D2 where TGAP takes D1 from the sites, else everything."""
    return examples if config.source in ("public", "none") else d2_of(examples, config.share)


def split_by_time(
    snapshots: Sequence[Snapshot], holdout: float
) -> tuple[list[Snapshot], list[Snapshot]]:
    """Return training and held-out snapshots.

    The last rounds are held out, at least one and not all.
    """
    rounds = sorted({snapshot.round for snapshot in snapshots})
    first_heldout = rounds[-_num_heldout(len(rounds), holdout)]

    return (
        [snapshot for snapshot in snapshots if snapshot.round < first_heldout],
        [snapshot for snapshot in snapshots if snapshot.round >= first_heldout],
    )


def _num_heldout(rounds: int, holdout: float) -> int:
    return min(rounds - 1, max(1, round(holdout * rounds)))
