"""The task in which a site attacks its own hidden states and gradients, as the server could.

The attacker has the public base, and the site's own training text in place of public text, which
makes it stronger than a server without text of that kind. It has no layer of the server's, so that
its search weighs tokens by pairs in that text and not by the public model, and may read less under
noise than a server could; the benchmark `leakage` has the public model.
Only counts and ROUGE leave the site, and hidden states of the attacked texts as in training.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluvial.data import IGNORE_INDEX, Example
from fluvial.errors import WireError
from fluvial.federation.meter import AUDIT
from fluvial.federation.sites import Site, round_of
from fluvial.federation.talk import Talk
from fluvial.methods.flglm.coding import Coding
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.leakage.attacks import Effort, attacks, on_gradients
from fluvial.methods.flglm.leakage.bigrams import FrontWithBigrams
from fluvial.methods.flglm.leakage.causal import CausalSettings
from fluvial.methods.flglm.leakage.decoder import DecoderSettings
from fluvial.methods.flglm.leakage.gradients import GradientMatching, PublicBack
from fluvial.methods.flglm.leakage.meter import GRADIENTS, Attack, Observation, measure
from fluvial.methods.flglm.leakage.replies import values_of
from fluvial.methods.flglm.release import Release
from fluvial.methods.flglm.state import places_of
from fluvial.methods.flglm.use import WholeModel, whole_model
from fluvial.models.split import Part
from fluvial.models.states import base_state
from fluvial.seeds import generator
from fluvial.training.train import shifted, summed_loss
from fluvial.wire.payload import Payload

PUBLIC_TEXTS = 192
"""Texts that the attacker trains on, at most."""
TRIALS = 2
"""Texts on which it compares settings."""


def leakage(site: Site, message: Payload) -> Talk:
    """Attack held-out texts of the site, in a conversation with the server's layers; a task.

    Values in: those of `evaluate` but `generate`. Values out: see `leakage.replies`.
    """
    config: FlGlmConfig = site.method
    settings = config.leakage
    if settings.sites == "none":
        raise WireError("method.leakage.sites='none': this run does not measure what leaks")

    round_of(site, message)
    data = site.load()
    texts = [attacked(each, settings.tokens) for each in data.heldout[: settings.texts]]

    release = Release.in_audit(site, message, task=AUDIT)
    with whole_model(site, message, release) as model:
        observations = yield from _Audit(model, config).observations(texts)

    places = places_of(site)
    with site.pool.parts(places.cut, server=False).part(
        base_state(places.ends), trainable=False
    ) as base:
        labelled = any(observation.gradient is not None for observation in observations)
        found = measure(
            observations,
            _attacks(base, config, data.train, gradients=labelled),
            site.pool.tokenizer.decode,
        )

    return Payload(values=values_of(found))


@dataclass(frozen=True)
class _Audit:
    """The server's view of a training step on some texts, at the site."""

    model: WholeModel
    config: FlGlmConfig

    def observations(
        self, texts: Sequence[Example]
    ) -> Generator[Payload, Payload, list[Observation]]:
        """Return what the server would see of `texts`, each a batch of its own."""
        site = self.model.site
        coding = Coding.of(self.config, self.model.part, generator(site.seed, AUDIT, site.name))
        if self.config.sends_changes:  # the first pass, which is exact
            coding = replace(coding, hidden=coding.first)
        sends_gradient = places_of(site).needs_gradient
        seen = []

        for text in texts:
            ids = torch.tensor(text.input_ids, device=self.model.part.device)[None]
            mask = torch.ones_like(ids)
            rows = self.model.release(self.model.part.embed(ids, mask)[0])
            rows = coding.decode_hidden(coding.encode_hidden(rows), len(rows))
            middle = yield from self.model.middle(rows, mask.sum(1))
            gradient = self._gradient(middle, text) if sends_gradient else None
            if gradient is not None:
                gradient = coding.decode_gradient(coding.encode_gradient(gradient), len(rows))

            seen.append(Observation(ids[0].cpu(), rows, middle, gradient))

        return seen

    def _gradient(self, middle: Tensor, text: Example) -> Tensor | None:
        """Return dL/dh_B (tokens, width) for B's hidden states; None for a text without labels."""
        labels = torch.tensor(text.labels, device=middle.device)[None]
        count = int((labels[:, 1:] != IGNORE_INDEX).sum())
        if not count:
            return None

        with torch.enable_grad():
            states = middle.detach().requires_grad_()
            mask = torch.ones_like(labels)
            logits = self.model.part.logits(states[None], mask)
            loss = summed_loss(*shifted(logits, labels)) / count

        (gradient,) = torch.autograd.grad(loss, states)
        return gradient


def _attacks(
    base: Part, config: FlGlmConfig, known: Sequence[Example], *, gradients: bool
) -> Mapping[str, Attack]:
    """Return the attacks of a server that has the public base and the texts `known`.

    `gradients` says that it saw them too.
    """
    window = config.leakage.tokens
    step = max(1, len(known) // PUBLIC_TEXTS)
    texts = [torch.tensor(each.input_ids[:window]) for each in known[::step][:PUBLIC_TEXTS]]
    trials = min(TRIALS, len(texts) - 1)
    effort = Effort(
        trials=trials,
        decoders=tuple(
            DecoderSettings(context=context, steps=100, batch=12, window=window, learning_rate=5e-3)
            for context in (0, 2)
        ),
        shifted=DecoderSettings(
            shifted=True, steps=50, batch=12, window=window, learning_rate=5e-3
        ),
        searches=tuple(
            CausalSettings(beams=beams, prior=prior, shortlist=128)
            for beams, prior in ((1, 0.0), (4, 0.5), (4, 1.0))
        ),
    )
    pairs = [each.input_ids for each in known]
    model = FrontWithBigrams(base.model, base.cut.front, pairs, config.noise)
    readers = dict(attacks(model, texts, effort))
    if gradients:
        readers[GRADIENTS] = on_gradients(GradientMatching(PublicBack(base)))

    return readers


def attacked(text: Example, tokens: int) -> Example:
    """Return the first `tokens` tokens of a text, or, where they have no label and so no gradient,
    as many around the first token that has one."""
    beginning = text.cut(0, tokens)
    labelled = (n for n, label in enumerate(text.labels) if n and label != IGNORE_INDEX)
    first = next(labelled, None)
    if beginning.learns or first is None:
        return beginning

    start = first - tokens // 2
    return text.cut(start, start + tokens)
