"""Attack: a small decoder, trained on public text, from (noisy) hidden states to tokens.

The attacker sends public text through the public front, adds noise of the known kind, and trains a
network to name the token at each position. Afterwards, reading costs one pass. The published attack
on FedSEA-LLaMA is the `shifted` variant: its labels are one position late, so that it learns to
predict the *next* token from a hidden state, and underrates what leaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fluvial.methods.flglm.leakage.public_model import PublicModel

_NO_LABEL = -100


@dataclass(frozen=True)
class DecoderSettings:
    """Size and training of the decoder."""

    shifted: bool = False
    """Predict the token after each position, as published, instead of the token at it."""
    context: int = 2
    """Neighbours on either side whose hidden states are read; 0 for the position alone. The shifted
    decoder reads twice as many before it and none after it, or it would see what it predicts."""
    steps: int = 300
    batch: int = 16
    """Windows of one step."""
    window: int = 32
    """Tokens of a window."""
    learning_rate: float = 3e-3
    seed: int = 0


class _Network(nn.Module):
    """A residual convolution over positions, in front of the public embedding as a head."""

    def __init__(self, width: int, embedding: Tensor, before: int, after: int) -> None:
        super().__init__()
        inner = 2 * width
        self.margin = (before, after)
        self.mix = nn.Conv1d(width, inner, before + 1 + after)
        self.narrow = nn.Conv1d(inner, width, 1)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embedding.shape[1])
        self.head = nn.Parameter(nn.functional.normalize(embedding, dim=-1) * 3)
        self.bias = nn.Parameter(torch.zeros(len(embedding)))

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits (batch, tokens, vocabulary) of `rows` (batch, tokens, width)."""
        padded = nn.functional.pad(rows.mT, self.margin)
        mixed = self.narrow(nn.functional.gelu(self.mix(padded))).mT
        logits: Tensor = self.project(self.norm(rows + mixed)) @ self.head.T + self.bias
        return logits


class TrainedDecoder:
    """A decoder for one public front and one mechanism."""

    def __init__(
        self, public: PublicModel, texts: Sequence[Tensor], settings: DecoderSettings
    ) -> None:
        """Train on public `texts`, each (tokens,)."""
        self.settings = settings
        self._std = 0.0 if public.noise is None else public.noise.std
        self._first = int(torch.stack([ids[0] for ids in texts]).mode().values)
        hidden, labels = self._windows(public, texts)
        real = hidden[labels != _NO_LABEL]
        # One scale for all values, so that distances keep their meaning.
        self._centre = real.mean(0)
        self._scale = float((real - self._centre).square().mean().add(self._std**2).sqrt())

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            embeddings = public.model.get_input_embeddings()  # type: ignore[operator]
            embedding = embeddings.weight.detach().cpu().float()[: public.vocabulary]
            context = settings.context
            margin = (2 * context, 0) if settings.shifted else (context, context)
            self._network = _Network(hidden.shape[-1], embedding, *margin)

        self._train(hidden, labels)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return token ids (tokens,) for what the server observed, `hidden` (tokens, width).

        What the shifted decoder predicts stands where it belongs, one position later.
        """
        ids = self.scores(hidden).argmax(-1)

        if self.settings.shifted:
            ids = torch.cat([torch.tensor([self._first]), ids[:-1]])

        return ids

    @torch.no_grad()
    def scores(self, hidden: Tensor) -> Tensor:
        """Return logits (tokens, vocabulary) for `hidden` (tokens, width)."""
        rows = self._normalised(hidden.detach().cpu().float())
        logits: Tensor = self._network(rows[None])[0]
        return logits

    def _windows(self, public: PublicModel, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return hidden states (windows, window, width) and labels (windows, window)."""
        size = self.settings.window
        states = []
        labels = []

        for ids in texts:
            hidden = public.hidden(ids[None])[0].float()
            wanted = ids

            if self.settings.shifted:
                wanted = torch.cat([ids[1:], torch.tensor([_NO_LABEL])])

            windows = zip(torch.split(hidden, size), torch.split(wanted, size), strict=True)
            for rows, names in windows:
                missing = size - len(rows)
                states.append(nn.functional.pad(rows, (0, 0, 0, missing)))
                labels.append(nn.functional.pad(names, (0, missing), value=_NO_LABEL))

        return torch.stack(states), torch.stack(labels)

    def _normalised(self, hidden: Tensor) -> Tensor:
        return (hidden - self._centre) / self._scale

    def _train(self, hidden: Tensor, labels: Tensor) -> None:
        settings = self.settings
        draw = torch.Generator().manual_seed(settings.seed)
        optimizer = torch.optim.AdamW(self._network.parameters(), lr=settings.learning_rate)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, settings.steps)

        for _ in range(settings.steps):
            chosen = torch.randint(len(hidden), (settings.batch,), generator=draw)
            rows = hidden[chosen]
            rows = rows + self._std * torch.randn(rows.shape, generator=draw)
            logits = self._network(self._normalised(rows))
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[chosen].flatten(), ignore_index=_NO_LABEL
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
            optimizer.step()
            decay.step()
