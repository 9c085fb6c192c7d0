"""A quantised base equals its own definition, the dequantised base, and that of transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import norm
from torch import Tensor, nn

from fluvial.models import quantised
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.quantisation import Format, Quantisation, stored_bytes
from fluvial.models.quantised import (
    QuantisedLinear,
    decode,
    encode,
    formats,
    low_rank,
    quantised_bytes,
)
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.models.tuning import tuned_parameters
from fluvial.wire.tensors import Named
from tests.conftest import saved_model
from tests.support.models import four_layers

pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")

pytestmark = pytest.mark.oracle

FORMATS: tuple[Format, ...] = ("nf4", "nf4-double", "int8")
LORA = LoraSettings(r=4, lora_dropout=0.0, target_modules="all-linear")


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return (0.02 * torch.randn(shape, generator=draw)).to(dtype)


def normal_levels() -> Tensor:
    """The 16 levels of QLoRA's NF4, from quantiles of the normal distribution: 8 below zero, zero,
    and 7 above would be symmetric; the paper has 7 below, zero and 8 above."""
    # The outermost quantile is the mean of those that 15 and 16 levels would have.
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    above = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0.0], below]))
    return torch.from_numpy(levels / np.abs(levels).max())


def round_trip(weight: Tensor, kind: Format) -> Tensor:
    rows, columns = weight.shape
    return decode(encode(weight, kind), kind, (rows, columns), weight.dtype)


@pytest.mark.parametrize("shape", [(48, 128), (7, 96), (3, 40)])
def test_nf4_is_the_nearest_normal_quantile(shape: tuple[int, int]) -> None:
    weight = weights(*shape)
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True).double()
    levels = normal_levels()
    nearest = levels[(blocks.double() / scales).unsqueeze(-1).sub(levels).abs().argmin(-1)]
    expected = (nearest * scales).flatten()[: weight.numel()].view(shape)

    # The library's levels are printed with seven digits.
    torch.testing.assert_close(round_trip(weight, "nf4").double(), expected, rtol=1e-5, atol=0)


def test_int8_is_the_nearest_of_255_levels_of_a_row() -> None:
    weight = weights(16, 128)
    half = weight.half().float()  # the library quantises fp16
    scale = half.abs().amax(1, keepdim=True)
    steps = half * (127 / scale)
    decoded = round_trip(weight, "int8")
    assert float((decoded - half).abs().max()) <= float(scale.max()) / 127 * 0.51
    off = (decoded / scale * 127 - steps.round()).abs() > 0.01
    assert float(off.float().mean()) < 0.01, "only ties may round to the other neighbour"


@pytest.mark.parametrize("kind", FORMATS)
def test_an_exact_zero_stays_zero(kind: Format) -> None:
    weight = weights(32, 128)
    weight[0] = 0
    weight[1:, ::5] = 0
    # With quantised scales a block of zeros has a scale of nearly zero, and level 0 is still exact.
    assert not round_trip(weight, kind)[weight == 0].any()


def test_int8_loses_less_than_nf4_and_double_quantisation_adds_little() -> None:
    weight = weights(256, 512)
    lost = {kind: float((round_trip(weight, kind) - weight).norm()) for kind in FORMATS}
    assert lost["int8"] < 0.2 * lost["nf4"]
    assert lost["nf4"] < lost["nf4-double"] < 1.01 * lost["nf4"]


def test_double_quantisation_errs_by_its_scales_at_most() -> None:
    """A weight moves by no more than its scale, which moves by half a gap of the scales' levels."""
    from bitsandbytes.functional import create_dynamic_map

    weight = weights(256, 512)
    scales = weight.flatten().view(-1, 64).abs().amax(1)
    centred = (scales - scales.mean()).view(-1, 256)
    levels = create_dynamic_map()
    reach = max(0.5 * float(levels.diff().max()), 1 + float(levels.min()))
    bound = (reach * centred.abs().amax(1)).repeat_interleave(256).repeat_interleave(64)
    moved = (round_trip(weight, "nf4-double") - round_trip(weight, "nf4")).abs().flatten()
    assert float(moved.max()) > 0
    # The search for a level on a CPU is the nearest but for a hair.
    assert bool((moved <= 1.01 * bound).all())


@pytest.mark.parametrize(
    ("kind", "bits"), [("nf4", 4.5), ("nf4-double", 4.127), ("int8", 8 + 32 / 4096)]
)
def test_bits_of_a_value_are_those_that_are_stored(kind: Format, bits: float) -> None:
    layer = QuantisedLinear(weights(1024, 4096), None, kind)
    stored = sum(parameter.nbytes for parameter in layer.parameters())
    assert stored == stored_bytes(kind, 1024, 4096)
    assert 8 * stored / (1024 * 4096) == pytest.approx(bits, abs=2e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_weight_in_pieces_has_the_codes_of_the_whole(
    kind: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weights(80, 96)
    whole = encode(weight, kind)
    monkeypatch.setattr(quantised, "_PIECE", 512)
    pieces = encode(weight, kind)
    assert pieces.keys() == whole.keys()
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_gradients_are_those_of_the_dequantised_weight(
    kind: Format, dtype: torch.dtype, tolerance: float
) -> None:
    layer = QuantisedLinear(weights(48, 128, dtype=dtype), None, kind)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_()
    upstream = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    layer(x).backward(upstream)
    assert x.grad is not None

    dense = round_trip(weights(48, 128, dtype=dtype), kind).double()
    inputs = x.detach().double()
    product = layer(x).detach().double()
    assert float((product - inputs @ dense.t()).norm() / product.norm()) < tolerance
    expected = upstream.double() @ dense
    assert float((x.grad.double() - expected).norm() / expected.norm()) < tolerance


def quantised_pool(folder: Path, lora: LoraSettings = LORA, **settings: Any) -> ModelPool:
    config = ModelConfig(name_or_path=str(folder), device="cpu", **settings)
    return ModelPool(config, lora)


def dequantised(pool: ModelPool, folder: Path, target: Path) -> Path:
    """Write the folder of a float model that has the dequantised weights of the pool's base."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    with pool.model(initial_state(pool.layout, 0)) as model:
        for name, module in model.named_modules():
            if isinstance(module, QuantisedLinear):
                place = name.removeprefix("base_model.model.").removesuffix(".base_layer")
                weight = module.dense()
                stored = f"{place}.weight"
                if stored not in tensors:
                    stored = stored.removeprefix("transformer.")
                conv1d = tensors[stored].shape != weight.shape or "c_" in place
                tensors[stored] = weight.t().contiguous() if conv1d else weight

    target.mkdir()
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / "model.safetensors", {"format": "pt"})

    return target


def trained(pool: ModelPool, steps: int = 4) -> tuple[Named, list[float]]:
    """Return the adapter after some steps of SGD, and the losses."""
    state = initial_state(pool.layout, 0)
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(3))
    losses = []
    with pool.model(state, trainable="A and B") as model:
        parameters = tuned_parameters(model)
        optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
        for _ in range(steps):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))

        return {name: p.detach().clone() for name, p in parameters.items()}, losses


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("model", ["tiny_gqa_model", "tiny_gpt2_model"])
def test_training_is_that_over_the_dequantised_base(
    kind: Format, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(model)
    pool = quantised_pool(folder, quantization=kind, dtype="float32")
    dense = quantised_pool(dequantised(pool, folder, tmp_path / "dense"), dtype="float32")
    adapter, losses = trained(pool)
    expected, expected_losses = trained(dense)

    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert losses[-1] < losses[0]
    assert losses != pytest.approx(trained(quantised_pool(folder, dtype="float32"))[1], rel=1e-6)
    for name, tensor in expected.items():
        # The kernels of a product may sum in another order.
        torch.testing.assert_close(adapter[name], tensor, rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_nothing(tiny_gqa_model: Path) -> None:
    pool = quantised_pool(tiny_gqa_model, quantization="nf4", dtype="float32")
    gradients = []
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(3))
    for checkpointing in (False, True):
        with pool.model(
            initial_state(pool.layout, 0), trainable="A and B", checkpointing=checkpointing
        ) as model:
            model(input_ids=ids, labels=ids).loss.backward()
            parameters = tuned_parameters(model)
            assert all(p.grad is not None for p in parameters.values())
            gradients.append({name: cast(Tensor, p.grad).clone() for name, p in parameters.items()})

    assert gradients[0].keys() == gradients[1].keys() == set(pool.layout.names)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def wide_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model whose widths are multiples of 64: elsewhere the library's own layer
    dequantises wrongly on a CPU, with blocks that begin in each row."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("wide")
    if request.param == "llama":
        return four_layers(folder, hidden_size=64, intermediate_size=128)

    config = GPT2Config(
        vocab_size=300,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return saved_model(GPT2LMHeadModel, config, folder)


@pytest.mark.parametrize("kind", FORMATS)
def test_plain_peft_over_a_base_of_transformers_gives_the_same_logits(
    kind: Format, wide_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    pool = quantised_pool(wide_model, quantization=kind, dtype="float32")
    adapter, _ = trained(pool)
    pool.save(adapter, tmp_path / "adapter")
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(4))
    with pool.model(adapter) as ours, torch.no_grad():
        expected = ours(input_ids=ids).logits

    options: dict[str, Any] = (
        {"load_in_8bit": True}
        if kind == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": kind == "nf4-double",
        }
    )
    base = AutoModelForCausalLM.from_pretrained(
        wide_model, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options)
    )
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    for module in plain.modules():
        # In evaluation the library's layers round what they multiply.
        if type(module).__module__.startswith("bitsandbytes"):
            module.train()

    with torch.no_grad():
        logits = plain(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_layers_have_formats_of_their_own(tiny_gqa_model: Path) -> None:
    pool = quantised_pool(
        tiny_gqa_model,
        quantization="nf4",
        layer_quantization={"int8": (1,)},
        dtype="float32",
    )
    with pool.model(initial_state(pool.layout, 0)) as model:
        kinds = {
            name.split(".layers.")[1][0]: module.kind
            for name, module in model.named_modules()
            if isinstance(module, QuantisedLinear)
        }
        size = sum(p.nbytes for name, p in model.named_parameters() if ".lora_" not in name)

    assert kinds == {"0": "nf4", "1": "int8"}
    assert size == quantised_bytes(pool.outline.base, pool.outline.assignment.quantisation)


def test_sites_of_one_pool_have_bases_of_their_own(tiny_gqa_model: Path) -> None:
    """Each base is in memory once, and every model of it shares its codes and scales."""
    pool = quantised_pool(tiny_gqa_model, dtype="float32")
    run = pool.assignment(1)
    state = initial_state(pool.layout, 0)
    losses = {}
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(4))

    for kind in (None, *FORMATS):
        assignment = replace(run, quantisation=Quantisation(kind))
        with (
            torch.no_grad(),
            pool.model(state, assignment=assignment) as one,
            pool.model(state, assignment=assignment) as two,
        ):
            losses[kind] = float(one(input_ids=ids, labels=ids).loss)
            frozen = [dict(model.named_parameters()) for model in (one, two)]
            assert all(
                frozen[0][name] is frozen[1][name] for name in frozen[0] if ".lora_" not in name
            )

    assert len(set(losses.values())) == 4
    alone = quantised_pool(tiny_gqa_model, dtype="float32", quantization="int8")
    with torch.no_grad(), alone.model(state) as model:
        assert float(model(input_ids=ids, labels=ids).loss) == losses["int8"]


def test_heads_embeddings_and_norms_keep_their_type(tiny_gqa_model: Path) -> None:
    pool = quantised_pool(tiny_gqa_model, quantization="nf4")
    base = pool.outline.base
    names = formats(base, Quantisation("nf4"))
    linear = [name for name, m in base.named_modules() if isinstance(m, nn.Linear)]
    assert set(linear) - set(names) == {"lm_head"}
    with pool.model(initial_state(pool.layout, 0)) as model:
        kinds = {
            p.dtype for name, p in model.named_parameters() if "embed" in name or "norm" in name
        }
    assert kinds == {getattr(torch, pool.outline.precision)}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_correction_is_the_best_of_its_rank(kind: Format) -> None:
    weight = weights(64, 96)
    layer = QuantisedLinear(weight, None, kind, correction_rank=8)
    lost = weight - layer.dense()
    left = lost - layer.correction_B @ layer.correction_A
    values = torch.linalg.svdvals(lost)
    best = float(values[8:].norm())
    assert best <= float(left.norm()) * (1 + 1e-5) <= 1.02 * best * (1 + 1e-5)

    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    expected = x @ (layer.dense() + layer.correction_B @ layer.correction_A).t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(layer(x), x @ layer.dense().t(), rtol=1e-4, atol=1e-5)


def test_a_low_rank_matrix_is_found_exactly() -> None:
    matrix = weights(40, 4) @ weights(4, 30)
    out, into = low_rank(matrix, 4)
    torch.testing.assert_close(out @ into, matrix, rtol=1e-4, atol=1e-7)


def test_a_correction_stays_at_the_site(tiny_gqa_model: Path, tmp_path: Path) -> None:
    """What is shared and written is the adapter alone, and the correction brings the base nearer to
    the float one."""
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(4))
    logits = {}
    for rank, kind in ((0, None), (0, "nf4"), (8, "nf4")):
        pool = quantised_pool(
            tiny_gqa_model, dtype="float32", quantization=kind, quantization_correction=rank
        )
        state = initial_state(pool.layout, 0)
        with torch.no_grad(), pool.model(state) as model:
            logits[rank, kind] = model(input_ids=ids).logits

        assert not any("correction" in name for name in pool.layout.names)

    base = pool.outline.base
    with pool.model(state) as model:
        size = sum(p.nbytes for name, p in model.named_parameters() if ".lora_" not in name)
    assert size == quantised_bytes(base, Quantisation("nf4"), 8)

    errors = [float((logits[rank, "nf4"] - logits[0, None]).norm()) for rank in (0, 8)]
    assert errors[1] < 0.8 * errors[0]
    pool.save(state, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["r"] == 4
