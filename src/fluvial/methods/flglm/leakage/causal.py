"""Attack: read tokens from left to right, each by trying the whole vocabulary (exact search).

The hidden state of token t depends on tokens up to t only. So, with the tokens before it read, all
candidates for token t go through the public front, and the nearest to what was observed is the
token: exact without noise. Under noise of known standard deviation the attacker keeps several
prefixes (a beam) and weighs distance against the public model's own expectation of the text:

    score(x) = sum_t |h_t - f_t(x)|^2 / (2 sigma^2) - prior * log p(x),

whose minimum, with `prior` = 1, is the most probable text if p is right.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fluvial.methods.flglm.leakage.nearest import NearestSettings, NearestToken
from fluvial.methods.flglm.leakage.public_model import Prefixes, PublicModel


@dataclass(frozen=True)
class CausalSettings:
    """Width of the search."""

    beams: int = 1
    """Prefixes that are continued."""
    prior: float = 0.0
    """Weight of the public model's expectation; without effect where there is no noise."""
    shortlist: int | None = None
    """Candidates at a position, those of the best scores by a faster attack; None for all. Where
    none of them is as near as noise allows, all are tried."""
    batch: int = 1024
    """Candidates of one pass."""
    reuse: bool = True
    """Keep keys and values of prefixes; off, each candidate is computed with its whole prefix."""


Scores = Callable[[Tensor], Tensor]
"""Scores (tokens, vocabulary) of hidden states (tokens, width)."""


class CausalSearch:
    """The search with one public front."""

    def __init__(
        self, public: PublicModel, settings: CausalSettings, scores: Scores | None = None
    ) -> None:
        """Take the `scores` that choose a shortlist; None for those of the nearest token."""
        self.public = public
        self.settings = settings

        if settings.shortlist is not None and scores is None:
            scores = NearestToken(public, NearestSettings()).scores

        self._scores = scores

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return token ids (tokens,) for what the server observed, `hidden` (tokens, width)."""
        observed = hidden.cpu().double()
        std = 0.0 if self.public.noise is None else self.public.noise.std
        weight = 1 / (2 * std**2) if std else 1.0
        prior = self.settings.prior if std else 0.0
        prefixes = torch.zeros(1, 0, dtype=torch.int64)
        scores = torch.zeros(1, dtype=torch.float64)
        cache = Prefixes() if self.settings.reuse and self.public.continues else None

        for state, shortlist in zip(observed, self._candidates(observed), strict=True):
            candidates = shortlist
            distances = self._distances(state, candidates, prefixes, cache)

            if len(candidates) < self.public.vocabulary and distances.min() > _near(state, std):
                candidates = torch.arange(self.public.vocabulary)
                distances = self._distances(state, candidates, prefixes, cache)

            new = weight * distances
            if prior:
                new -= prior * self.public.prior(prefixes)[:, candidates]

            totals = (scores[:, None] + new).flatten()
            scores, best = totals.topk(min(self.settings.beams, len(totals)), largest=False)
            parents = best // len(candidates)
            tokens = candidates[best % len(candidates)][:, None]
            prefixes = torch.cat([prefixes[parents], tokens], 1)

            if cache is not None:
                cache.select(parents)
                self.public.hidden(tokens, cache)

        return prefixes[0]

    def _candidates(self, observed: Tensor) -> list[Tensor]:
        """Return the candidates' ids (candidates,) of each position."""
        vocabulary = self.public.vocabulary
        if self.settings.shortlist is None or self._scores is None:
            return [torch.arange(vocabulary)] * len(observed)

        count = min(self.settings.shortlist, vocabulary)
        return list(self._scores(observed).topk(count).indices)

    def _distances(
        self, state: Tensor, candidates: Tensor, prefixes: Tensor, cache: Prefixes | None
    ) -> Tensor:
        """Return squared distances (prefixes, candidates) to the observed `state` (width,)."""
        parts = []
        for batch in torch.split(candidates, max(1, self.settings.batch // len(prefixes))):
            tokens = batch.repeat(len(prefixes))[:, None]

            if cache is None:
                whole = torch.cat([prefixes.repeat_interleave(len(batch), 0), tokens], 1)
                hidden = self.public.hidden(whole)[:, -1]
            else:
                hidden = self.public.hidden(tokens, cache.repeated(len(batch)))[:, -1]

            parts.append((hidden - state).square().sum(-1).view(len(prefixes), len(batch)))

        return torch.cat(parts, 1)


def _near(state: Tensor, std: float) -> float:
    """Return the squared distance that the right token's state exceeds with probability 1e-9 or so.

    That is mean and six deviations of the noise's squared length, and 1 % for the rounding of
    hidden states on the wire.
    """
    noise = std**2 * (len(state) + 6 * math.sqrt(2 * len(state)))
    return noise + 1e-4 * float(state.square().sum())
