"""The paper's autoencoder: its sizes, its wire, and what it refuses."""

from typing import Any

import pytest
import torch

from fluvial.codecs.learned.canvas import Canvas
from fluvial.codecs.learned.resnet import ResNet, ResNetSettings, frame_bytes
from fluvial.codecs.learned.resnet_networks import (
    build_decoder,
    build_encoder,
    multiply_accumulates,
)
from fluvial.codecs.learned.resnet_training import cut, share_of_rate
from fluvial.errors import ConfigError, WireError
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, relative_error
from tests.support.updates import attention_layout, count_refused_mutations

QUICK: dict[str, Any] = {"iterations": 2, "batch_size": 2}
ATTENTION: dict[str, Any] = {"rank": 4, "modules": ("q_proj", "k_proj")}


def updates_of(layout: Layout, count: int, seed: int = 0) -> list[Named]:
    draw = torch.Generator().manual_seed(seed)
    return [
        layout.unflatten(1e-3 * torch.randn(layout.numel, generator=draw)) for _ in range(count)
    ]


LAYOUT = attention_layout(128, 128, layers=8, **ATTENTION)


@pytest.fixture(scope="module")
def fitted() -> ResNet:
    return ResNet.fit(ResNetSettings(**QUICK), LAYOUT, updates_of(LAYOUT, 3), seed=1)


def test_parameter_counts_are_the_papers() -> None:
    assert sum(weight.numel() for weight in build_encoder(6).parameters()) == 246_785
    assert sum(weight.numel() for weight in build_decoder(6).parameters()) == 246_698


@pytest.mark.parametrize("stages", [2, 4, 6])
def test_shapes_of_latent_and_output(stages: int) -> None:
    image = torch.randn(2, 1, 128, 256)
    latent = build_encoder(stages).eval()(image)
    assert latent.shape == (2, 2**stages, 128 >> stages, 256 >> stages)
    assert latent.numel() * 2**stages == image.numel()
    assert build_decoder(stages).eval()(latent).shape == image.shape


def test_multiply_accumulates_of_the_paper() -> None:
    macs = multiply_accumulates(4096, 2048)
    assert macs.encoder == 754_974_720  # the paper prints 0.81 G
    assert macs.decoder == 1_769_996_288  # the paper prints 1.80 G


def test_multiply_accumulates_are_those_of_the_network() -> None:
    counted = 0

    def count(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal counted
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        counted += weight[0, 0].numel() * weight.shape[0] * weight.shape[1] * output[0, 0].numel()

    for network, image, found in (
        (
            build_encoder(4),
            torch.zeros(1, 1, 64, 32),
            multiply_accumulates(64, 32, stages=4).encoder,
        ),
        (
            build_decoder(4),
            torch.zeros(1, 16, 4, 2),
            multiply_accumulates(64, 32, stages=4).decoder,
        ),
    ):
        counted = 0
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                module.register_forward_hook(count)

        network.eval()(image)
        assert counted == found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("normalise", ["none", "global_rms", "factor_rms", "maxabs"])
def test_frame_size_is_exact(fitted: ResNet, dtype: Any, normalise: Any) -> None:
    settings = ResNetSettings(latent_dtype=dtype, normalise=normalise)
    codec = ResNet.from_published(settings, LAYOUT, fitted.published(decoder=True))
    for update in (updates_of(LAYOUT, 1, seed=5)[0], LAYOUT.unflatten(torch.zeros(LAYOUT.numel))):
        wire = codec.encode(update)
        assert len(wire) == frame_bytes(settings, LAYOUT).total
        assert Layout.of(codec.decode(wire)) == LAYOUT


def test_narrow_latents_stay_near_float32(fitted: ResNet) -> None:
    update = updates_of(LAYOUT, 1, seed=5)[0]
    exact = fitted.decode(fitted.encode(update))
    for dtype in ("bfloat16", "float16", "int8"):
        settings = ResNetSettings.model_validate({"latent_dtype": dtype})
        codec = ResNet.from_published(settings, LAYOUT, fitted.published(decoder=True))
        assert relative_error(exact, codec.decode(codec.encode(update))) < 0.01


def test_one_autoencoder_for_canvases_of_several_sizes() -> None:
    layout = attention_layout(128, 64, layers=4, **ATTENTION)
    settings = ResNetSettings(canvas="grouped", stages=4, **QUICK)
    codec = ResNet.fit(settings, layout, updates_of(layout, 2), seed=0)
    assert len(codec.canvas.shapes) == 2
    update = updates_of(layout, 1, seed=3)[0]
    assert len(codec.encode(update)) == frame_bytes(settings, layout).total
    assert codec.analyse(layout.flatten(update)).numel() == Canvas(layout, "grouped", 4).numel // 16


def test_fit_learns_and_depends_on_the_seed_alone() -> None:
    layout = attention_layout(32, 32, layers=2, **ATTENTION)
    settings = ResNetSettings(stages=2, iterations=60, batch_size=2, learning_rate=1e-2)
    updates = updates_of(layout, 1)
    torch.manual_seed(1)
    first = ResNet.fit(settings, layout, updates, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = ResNet.fit(settings, layout, updates, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.published(decoder=True).to_bytes() == second.published(decoder=True).to_bytes()
    other = ResNet.fit(settings, layout, updates, seed=4)
    assert first.published(decoder=True).to_bytes() != other.published(decoder=True).to_bytes()
    assert [iteration for iteration, _ in first.loss_curve] == list(range(1, 61))
    assert first.loss_curve[-1][1] < 0.8 * first.loss_curve[0][1]


def test_squares_lie_on_the_grid_of_the_latent_and_reach_every_cell() -> None:
    canvas = torch.arange(128 * 192).reshape(128, 192)
    draw = torch.Generator().manual_seed(0)
    seen = torch.zeros(canvas.numel(), dtype=torch.bool)
    for _ in range(1000):
        square = cut(canvas, 50, 4, draw)  # 50 is 4 cells of 16
        assert square.shape == (64, 64)
        row, col = divmod(int(square[0, 0]), 192)
        assert row % 16 == col % 16 == 0
        assert torch.equal(square, canvas[row : row + 64, col : col + 64])
        seen[square.reshape(-1)] = True

    assert bool(seen.all())
    assert cut(canvas, 16, 5, draw).shape == (64, 64)  # two cells, which reflection needs
    assert cut(canvas, 150, 4, draw).shape == (128, 160)
    assert cut(canvas, "whole", 4, draw) is canvas


def test_the_learning_rate_is_that_of_torchs_cosine() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    for step in range(7):
        assert theirs.get_last_lr()[0] == pytest.approx(0.3 * share_of_rate(step, 7, "cosine"))
        assert share_of_rate(step, 7, "constant") == 1
        optimizer.step()
        theirs.step()


def test_the_course_of_the_training_counts() -> None:
    layout = attention_layout(128, 128, layers=2, **ATTENTION)
    updates = updates_of(layout, 2)
    changes: tuple[dict[str, Any], ...] = ({}, {"crop": "whole"}, {"schedule": "constant"})
    found = {
        ResNet.fit(ResNetSettings(stages=2, **QUICK, **change), layout, updates, seed=0)
        .published(decoder=True)
        .to_bytes()
        for change in changes
    }
    assert len(found) == len(changes)


def test_published_gives_the_same_codec(fitted: ResNet) -> None:
    payload = Payload.from_bytes(fitted.published(decoder=True).to_bytes())
    again = ResNet.from_published(fitted.settings, LAYOUT, payload)
    update = updates_of(LAYOUT, 1, seed=9)[0]
    wire = fitted.encode(update)
    assert again.encode(update) == wire
    assert relative_error(fitted.decode(wire), again.decode(wire)) == 0
    assert again.published(decoder=True).to_bytes() == fitted.published(decoder=True).to_bytes()


def test_encoder_alone_encodes_but_does_not_decode(fitted: ResNet) -> None:
    payload = fitted.published(decoder=False)
    assert not any(name.startswith("decoder") for name in payload.tensors)
    assert 4 * 246_785 < len(payload.to_bytes()) < 1.02 * 4 * 246_785  # 0.94 MiB
    site = ResNet.from_published(fitted.settings, LAYOUT, payload)
    wire = site.encode(updates_of(LAYOUT, 1)[0])

    with pytest.raises(ConfigError, match="holds only the encoder"):
        site.decode(wire)
    assert Layout.of(fitted.decode(wire)) == LAYOUT


def test_malformed_publications_are_refused(fitted: ResNet) -> None:
    good = fitted.published(decoder=True).tensors
    name = "encoder.1.weight"
    variance = next(key for key in good if key.endswith("running_var"))

    for tensors in (
        {},
        {key: tensor for key, tensor in good.items() if key != name},
        {**good, name: good[name].double()},
        {**good, name: good[name][:, :, :2]},
        {**good, name: good[name] * float("nan")},
        {**good, variance: -torch.ones_like(good[variance])},
        {**good, "encoder.extra": torch.zeros(1)},
    ):
        with pytest.raises(WireError, match="resnet"):
            ResNet.from_published(fitted.settings, LAYOUT, Payload(tensors))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_mutated_bodies_decode_or_are_refused(dtype: Any) -> None:
    layout = attention_layout(16, 16, layers=1, **ATTENTION)
    settings = ResNetSettings(stages=2, latent_dtype=dtype, **QUICK)
    codec = ResNet.fit(settings, layout, updates_of(layout, 2), seed=0)
    count_refused_mutations(codec, updates_of(layout, 1)[0], 334)


def test_nothing_to_learn_from() -> None:
    with pytest.raises(ConfigError, match="no updates"):
        ResNet.fit(ResNetSettings(), LAYOUT, [], seed=0)
