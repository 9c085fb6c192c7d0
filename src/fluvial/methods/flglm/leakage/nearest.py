"""Attack: the token whose hidden state, computed alone, is nearest to the one observed.

It ignores all other tokens of the text, so it is exact only where attention adds little, and it
costs one pass over the vocabulary for all texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluvial.methods.flglm.leakage.public_model import PublicModel

_BATCH = 1024


@dataclass(frozen=True)
class NearestSettings:
    """How tokens are compared."""

    context: tuple[int, ...] = ()
    """Tokens before each candidate. One token, such as BOS, takes the attention that models give to
    the first position."""
    cosine: bool = False
    """Compare directions instead of distances."""


class NearestToken:
    """The hidden states of all tokens, (vocabulary, width), to compare with."""

    def __init__(self, public: PublicModel, settings: NearestSettings) -> None:
        self.settings = settings
        context = torch.tensor(settings.context, dtype=torch.int64)
        rows = []

        for batch in torch.split(torch.arange(public.vocabulary), _BATCH):
            ids = torch.cat([context.expand(len(batch), -1), batch[:, None]], 1)
            rows.append(public.hidden(ids)[:, -1])

        self.states = torch.cat(rows)

    def scores(self, hidden: Tensor) -> Tensor:
        """Return distances below 0 (tokens, vocabulary) of `hidden` (tokens, width), fp64."""
        observed = hidden.cpu().double()
        states = self.states

        if self.settings.cosine:
            observed = torch.nn.functional.normalize(observed, dim=-1)
            states = torch.nn.functional.normalize(states, dim=-1)

        return -torch.cdist(observed, states)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return token ids (tokens,) for what the server observed, `hidden` (tokens, width)."""
        return self.scores(hidden).argmax(-1)


def settings_to_try(first_token: int | None) -> Sequence[NearestSettings]:
    """Return the settings among which an attacker chooses on public text.

    `first_token` is the token with which texts begin, if there is one.
    """
    contexts = [()] if first_token is None else [(), (first_token,)]
    return [NearestSettings(context, cosine) for context in contexts for cosine in (False, True)]
