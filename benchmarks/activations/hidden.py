"""Hidden states of the embedded model and their gradients, while it is trained on public text."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fluvial.codecs.activations.samples import SampleBatch
from fluvial.data import stdlib
from fluvial.models.loading import load_base
from fluvial.models.pretrained import ModelConfig, source_of
from fluvial.training.train import shifted, summed_loss

MODEL = ModelConfig(dtype="float32", device="cpu")
BATCH = 4
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Step:
    """The tensors that cross the two ends of B in one step."""

    epoch: int
    batch: SampleBatch
    rows: dict[str, Tensor]
    """Rows (tokens, width) by tensor: "h_A", "h_B" and their gradients "g_A", "g_B"."""


def texts(count: int, tokens: int) -> Tensor:
    """Return the token ids (count, tokens) of public texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source_of(MODEL))
    documents = [text for each in stdlib.public_packages().values() for text in each]
    ids: list[Tensor] = []

    for document in documents:
        encoded = tokenizer(document.text, truncation=True, max_length=tokens)["input_ids"]
        if len(encoded) == tokens:
            ids.append(torch.tensor(encoded))
        if len(ids) == count:
            break

    assert len(ids) == count, "too few public texts"
    return torch.stack(ids)


def steps(*, count: int, tokens: int, epochs: int, front: int = 1, back: int = 1) -> Iterator[Step]:
    """Train all weights with AdamW, and yield what crosses the cut in each step."""
    torch.manual_seed(0)
    model = load_base(MODEL).requires_grad_(True)
    layers = int(model.config.num_hidden_layers)  # type: ignore[union-attr,arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    ids = texts(count, tokens)

    for epoch in range(epochs):
        for start in range(0, count, BATCH):
            numbers = range(start, min(start + BATCH, count))
            chosen = ids[start : start + BATCH]
            output = model(input_ids=chosen, output_hidden_states=True, use_cache=False)
            # The first is the embedding, so the one at `front` is behind as many layers.
            ends = {"A": output.hidden_states[front], "B": output.hidden_states[layers - back]}
            for hidden in ends.values():
                hidden.retain_grad()

            loss = summed_loss(*shifted(output.logits, chosen)) / chosen[:, 1:].numel()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            rows = {f"h_{end}": hidden.detach().flatten(0, 1) for end, hidden in ends.items()}
            rows |= {f"g_{end}": _gradient(hidden).flatten(0, 1) for end, hidden in ends.items()}
            yield Step(epoch, SampleBatch(tuple(numbers), (tokens,) * len(numbers)), rows)
            optimizer.step()


def _gradient(hidden: Tensor) -> Tensor:
    assert hidden.grad is not None
    return hidden.grad
