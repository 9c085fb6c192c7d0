"""The attacks that a meter runs, each with the settings that read most of public text.

The attacker tries every attack at several settings on public text that it sent through the public
front itself, with noise of its own of the site's kind, and keeps the best. The shifted decoder is
there for comparison with the published attack.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from fluvial.methods.flglm.leakage.causal import CausalSearch, CausalSettings, Scores
from fluvial.methods.flglm.leakage.decoder import DecoderSettings, TrainedDecoder
from fluvial.methods.flglm.leakage.gradients import GradientMatching, text_of_labels
from fluvial.methods.flglm.leakage.meter import Attack, Observation
from fluvial.methods.flglm.leakage.nearest import NearestToken, settings_to_try
from fluvial.methods.flglm.leakage.public_model import PublicModel

ON_HIDDEN = ("exact causal search", "nearest token", "trained decoder", "shifted decoder")
"""Names of the attacks on hidden states."""

Reader = TypeVar("Reader", bound=Callable[[Tensor], Tensor])


@dataclass(frozen=True)
class Effort:
    """The work of an attacker."""

    trials: int = 4
    """Public texts on which settings are compared; decoders are trained on all others."""
    decoders: tuple[DecoderSettings, ...] = (
        DecoderSettings(context=0),
        DecoderSettings(context=2),
        DecoderSettings(context=2, learning_rate=1e-2),
    )
    shifted: DecoderSettings = field(default_factory=lambda: DecoderSettings(shifted=True))
    """The published decoder."""
    searches: tuple[CausalSettings, ...] = (
        CausalSettings(),
        CausalSettings(beams=4, prior=0.5, shortlist=256),
        CausalSettings(beams=4, prior=1.0, shortlist=256),
    )
    """Searches; a shortlist has the first choices of nearest token and trained decoder."""
    seed: int = 0


def attacks(public: PublicModel, texts: Sequence[Tensor], effort: Effort) -> dict[str, Attack]:
    """Return the attacks on hidden states by name, after trials on public `texts`.

    `texts` are at least `effort.trials` + 1, each (tokens,).
    """
    assert len(texts) > effort.trials, "public text to train on and to compare settings on"
    draw = torch.Generator().manual_seed(effort.seed)
    trials = [(ids, _disturbed(public, ids, draw)) for ids in texts[: effort.trials]]
    rest = texts[effort.trials :]
    starts = {int(ids[0]) for ids in texts}
    first = starts.pop() if len(starts) == 1 else None

    nearest = _best((NearestToken(public, each) for each in settings_to_try(first)), trials)
    decoder = _best((TrainedDecoder(public, rest, each) for each in effort.decoders), trials)
    shifted = TrainedDecoder(public, rest, effort.shifted)
    search = _best((CausalSearch(public, each, decoder.scores) for each in effort.searches), trials)

    readers: tuple[Callable[[Tensor], Tensor], ...] = (search, nearest, decoder, shifted)
    return {name: _on_hidden(reader) for name, reader in zip(ON_HIDDEN, readers, strict=True)}


def on_gradients(matching: GradientMatching) -> Attack:
    """Return the attack on gradients, for observations that have them."""

    def attack(observation: Observation) -> Tensor:
        assert observation.middle is not None, "an observation of a training step"
        assert observation.gradient is not None, "an observation of a training step"
        return text_of_labels(matching(observation.middle, observation.gradient))

    return attack


def _disturbed(public: PublicModel, ids: Tensor, draw: torch.Generator) -> Tensor:
    """Return what a site might send of `ids` (tokens,), with noise that the attacker draws."""
    hidden = public.hidden(ids[None])[0]
    if public.noise is None:
        return hidden
    noise = torch.randn(hidden.shape, generator=draw, dtype=hidden.dtype)
    return hidden + public.noise.std * noise


def _first_of(*attacks: Scores) -> Scores:
    """Return scores by which a token stands as high as in the best of its places in `attacks`."""

    def scores(hidden: Tensor) -> Tensor:
        orders = [attack(hidden).argsort(-1, descending=True) for attack in attacks]
        places = torch.stack([order.argsort(-1) for order in orders])
        return -places.amin(0).double()

    return scores


def _best(readers: Iterable[Reader], trials: Sequence[tuple[Tensor, Tensor]]) -> Reader:
    """Return the first of the readers that name most tokens in `trials` (ids, hidden)."""
    return max(readers, key=lambda reader: sum(_right(reader(seen), ids) for ids, seen in trials))


def _right(read: Tensor, sent: Tensor) -> int:
    return int((read == sent).sum())


def _on_hidden(reader: Callable[[Tensor], Tensor]) -> Attack:
    return lambda observation: reader(observation.hidden)
