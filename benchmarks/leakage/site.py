"""A site and a server of `benchmarks.leakage`, and the site's model after tuning."""

import copy

import torch
from torch import Tensor, nn

from benchmarks.leakage.bed import base, tokenizer
from fluvial.data import Example, stdlib
from fluvial.methods.flglm.leakage.gradients import PublicBack
from fluvial.methods.flglm.leakage.meter import Observation
from fluvial.methods.flglm.leakage.noise import HiddenNoise
from fluvial.methods.flglm.leakage.public_model import PublicModel
from fluvial.models.split import Cut, Part, decoder_layers
from fluvial.training.config import TrainConfig
from fluvial.training.train import summed_loss, train

BACK = 1
"""Value of q."""


class Pair:
    """A site and a server that train together, cut behind `front` layers."""

    def __init__(self, public: nn.Module, front: int, site: nn.Module | None = None) -> None:
        """Take the public model, and the `site`'s own where it was tuned."""
        layers = len(decoder_layers(public)[1])
        self.trains = front + BACK < layers
        """True where layers are left for a server, so that gradients are exchanged."""
        self._front = PublicModel(site or public, front)

        if self.trains:
            cut = Cut(layers, front, BACK)
            self._site = Part(copy.deepcopy(site or public), cut, server=False)
            self._server = Part(copy.deepcopy(public), cut, server=True)
            self.public_back = PublicBack(Part(copy.deepcopy(public), cut, server=False))

    def front(self, ids: Tensor) -> Tensor:
        """Return h_A (tokens, width) of a text (tokens,), without noise."""
        return self._front.hidden(ids[None])[0].float()

    def step(self, ids: Tensor, noise: HiddenNoise | None, number: int) -> Observation:
        """Return what the server sees of a training step on one text, the `number`-th."""
        mask = torch.ones_like(ids)[None]
        hidden = self.front(ids)

        if noise is not None:
            hidden = noise.release(hidden, str(number).encode())
        if not self.trains:
            return Observation(ids, hidden)

        with torch.no_grad():
            middle = self._server.middle(hidden[None], mask)

        middle.requires_grad_()
        logits = self._site.logits(middle, mask)
        loss = summed_loss(logits[0, :-1].float(), ids[1:]) / (len(ids) - 1)
        (gradient,) = torch.autograd.grad(loss, middle)
        return Observation(ids, hidden, middle.detach()[0], gradient[0])


def tuned(steps: int) -> nn.Module:
    """Return the embedded model after `steps` of LoRA (rank 8, all projections) at one site."""
    from peft import LoraConfig, get_peft_model

    documents = stdlib.site_text(stdlib.site_names()[0]).train
    ids = [tokenizer()(document.text[:1500])["input_ids"][:128] for document in documents]
    examples = [Example(each, each) for each in ids]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base()), lora)
        config = TrainConfig(learning_rate=2e-3, max_steps=steps)
        draw = torch.Generator().manual_seed(0)
        train(model, examples, config, pad_token_id=0, generator=draw)

    merged: nn.Module = model.merge_and_unload()
    return merged.requires_grad_(False).eval()
