"""The public front with the expectation of text that an attacker without the whole model has.

A site holds no layer of the middle, so that its meter cannot ask the public model for the next
token. It counts pairs of tokens in its own text instead.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fluvial.methods.flglm.leakage.noise import NoiseConfig
from fluvial.methods.flglm.leakage.public_model import PublicModel


class FrontWithBigrams(PublicModel):
    """A front whose `prior` comes from counts of pairs of tokens."""

    def __init__(
        self,
        model: nn.Module,
        front: int,
        texts: Sequence[Sequence[int]],
        noise: NoiseConfig | None = None,
    ) -> None:
        """Take a site's part, of which `front` layers are run, and count the pairs in `texts`."""
        super().__init__(model, front, noise)
        counts = torch.ones(self.vocabulary, dtype=torch.float64)
        self._after: dict[int, Counter[int]] = {}

        for ids in texts:
            counts += torch.bincount(torch.tensor(ids), minlength=self.vocabulary)
            for token, following in pairwise(ids):
                self._after.setdefault(token, Counter())[following] += 1

        self._alone = counts / counts.sum()

    def prior(self, prefixes: Tensor) -> Tensor:
        """Return log-probabilities (batch, vocabulary) of the token after `prefixes`, fp64.

        Those of pairs are mixed with those of single tokens, the more pairs were seen the less, as
        Witten and Bell do (1991).
        """
        if prefixes.shape[1] == 0:
            return self._alone.log().expand(len(prefixes), -1)

        return torch.stack([self._following(int(token)) for token in prefixes[:, -1]]).log()

    def _following(self, token: int) -> Tensor:
        """Return probabilities (vocabulary,) of the token after `token`, fp64."""
        after = self._after.get(token)
        if after is None:
            return self._alone

        kinds = len(after)
        total = after.total()
        mixed = kinds / (total + kinds) * self._alone
        following = torch.tensor(list(after))
        mixed[following] += torch.tensor(list(after.values())) / (total + kinds)
        return mixed
