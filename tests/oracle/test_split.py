"""A model in three parts is the whole model: logits, gradients, and weights after 20 steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fluvial.errors import ConfigError
from fluvial.models.loading import load_base
from fluvial.models.parts import PartPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.split import Cut, Part, check_part, decoder_layers
from fluvial.models.states import base_state
from fluvial.training.train import summed_loss
from tests.support.model_kinds import KINDS, save_kind

LAYERS = 5
CHANGES: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
            "full_attention",
        ],
        "sliding_window": 4,
    },
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 128},
    "llama": {"tie_word_embeddings": True},
}
WHOLE = [*KINDS, "gpt2", "qwen2", "gemma2", "bloom", "phi"]


def config_of(kind: str, tmp_path: Path) -> ModelConfig:
    changes = CHANGES.get(kind, {})
    folder = save_kind(kind, tmp_path / kind, num_hidden_layers=LAYERS, **changes)
    return ModelConfig(name_or_path=str(folder), device="cpu")


def parts_of(config: ModelConfig, cut: Cut) -> tuple[Part, Part]:
    """Return the site's part and the server's, each made by itself; all weights can be trained."""
    made = []
    for server in (False, True):
        pool = PartPool(config, None, cut, server=server)
        with pool.part(base_state(pool.layout), trainable=True) as part:
            made.append(part)

    return made[0], made[1]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and labels of three sequences of unequal lengths."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 300, (3, 9), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, 4:] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


def split_logits(site: Part, server: Part, ids: Tensor, mask: Tensor) -> Tensor:
    return site.logits(server.middle(site.embed(ids, mask), mask), mask)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize(("front", "back"), [(1, 1), (2, 1), (1, 3), (0, 1), (0, 0)])
@torch.no_grad()
def test_the_logits_are_those_of_the_whole_model(
    kind: str, front: int, back: int, tmp_path: Path
) -> None:
    config = config_of(kind, tmp_path)
    site, server = parts_of(config, Cut(LAYERS, front, back))
    ids, mask, _ = batch()
    whole = load_base(config)(input_ids=ids, attention_mask=mask, use_cache=False).logits

    got = split_logits(site, server, ids, mask)

    real = mask.bool()
    assert float((got[real] - whole[real]).abs().max()) <= 1e-5


def test_the_parts_are_the_model_once(tmp_path: Path) -> None:
    config = config_of("llama", tmp_path)
    site, server = parts_of(config, Cut(LAYERS, 2, 1))
    theirs = server.own_weights()
    ours = site.own_weights()
    whole = dict(load_base(config).named_parameters())

    assert not theirs.keys() & ours.keys()
    assert theirs.keys() | ours.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in (theirs | ours).items())
    assert all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in theirs)


def test_weights_of_another_part_take_no_memory(tmp_path: Path) -> None:
    site, server = parts_of(config_of("llama", tmp_path), Cut(LAYERS, 1, 1))
    for part in (site, server):
        own = part.own_weights()
        held = sum(p.untyped_storage().nbytes() for p in part.model.parameters())
        absent = sum(1 for _ in part.model.parameters()) - len(own)
        assert held <= sum(t.numel() * t.element_size() for t in own.values()) + 4 * absent


def gradients(site: Part, server: Part, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Run the four messages of a step; return the loss."""
    front = site.embed(ids, mask)
    sent = front.detach().requires_grad_()
    middle = server.middle(sent, mask)
    received = middle.detach().requires_grad_()
    logits = site.logits(received, mask)
    loss = summed_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) / 12
    loss.backward()  # type: ignore[no-untyped-call]
    assert received.grad is not None
    middle.backward(received.grad)  # type: ignore[no-untyped-call]
    assert sent.grad is not None
    front.backward(sent.grad)  # type: ignore[no-untyped-call]
    return loss.detach()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
def test_weights_after_20_steps_of_adamw_with_one_clip_are_those_of_the_whole_model(
    kind: str, tmp_path: Path
) -> None:
    config = config_of(kind, tmp_path)
    site, server = parts_of(config, Cut(LAYERS, 2, 1))
    whole = load_base(config).requires_grad_(True)
    ids, mask, labels = batch()
    trained = site.tuned() | server.tuned()
    ours = torch.optim.AdamW(trained.values(), lr=1e-3)
    plain = torch.optim.AdamW(whole.parameters(), lr=1e-3)

    for _ in range(20):
        loss = gradients(site, server, ids, mask, labels)
        logits = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits
        expected = summed_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) / 12
        expected.backward()  # type: ignore[no-untyped-call]
        assert float(loss) == pytest.approx(float(expected.detach()), abs=1e-5)

        nn.utils.clip_grad_norm_(trained.values(), 0.5)
        nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
        for optimizer in (ours, plain):
            optimizer.step()
            optimizer.zero_grad()

    for name, parameter in whole.named_parameters():
        assert float((trained[name] - parameter).detach().abs().max()) <= 3e-5, name


def test_a_layer_that_uses_weights_of_another_part_is_refused(tmp_path: Path) -> None:
    _, server = parts_of(config_of("llama", tmp_path), Cut(LAYERS, 1, 1))
    _, layers = decoder_layers(server.model)
    layers[2].mlp = layers[0].mlp

    with pytest.raises(ConfigError, match="layers of one part use weights of another"):
        check_part(server)


def test_a_model_that_computes_between_its_layers_is_refused(tmp_path: Path) -> None:
    site, server = parts_of(config_of("llama", tmp_path), Cut(LAYERS, 2, 1))

    for part, index in ((site, 2), (site, 4), (server, 2), (server, 3)):
        _, layers = decoder_layers(part.model)
        # A hook runs outside the layer's forward pass, as code of the model would.
        hook = layers[index].register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
        with pytest.raises(ConfigError, match="does not run its 5 layers once each, in order"):
            check_part(part)
        hook.remove()
        check_part(part)


def test_a_model_that_runs_a_layer_twice_is_refused(tmp_path: Path) -> None:
    _, server = parts_of(config_of("llama", tmp_path), Cut(LAYERS, 2, 1))
    _, layers = decoder_layers(server.model)
    layers.insert(3, layers[2])

    with pytest.raises(ConfigError, match="does not run its 5 layers once each, in order"):
        check_part(server)


def test_a_later_layer_that_uses_embeddings_is_refused(tmp_path: Path) -> None:
    _, server = parts_of(config_of("llama", tmp_path), Cut(LAYERS, 2, 1))
    embeddings: list[Tensor] = []
    inner = server.model.get_submodule("model")
    inner.register_forward_pre_hook(
        lambda _, _args, options: embeddings.append(options["inputs_embeds"]), with_kwargs=True
    )
    server.model.get_submodule("model.layers.2.mlp").register_forward_hook(
        lambda _, _args, output: output + embeddings[-1]
    )

    with pytest.raises(ConfigError, match="weights of another, or the embeddings"):
        check_part(server)


@pytest.mark.parametrize(("front", "back"), [(-1, 1), (1, -1), (2, 3), (5, 1)])
def test_a_cut_that_leaves_no_middle_is_refused(front: int, back: int) -> None:
    with pytest.raises(ConfigError, match="one layer at least"):
        Cut(LAYERS, front, back)
