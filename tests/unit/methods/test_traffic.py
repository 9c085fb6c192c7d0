"""Predicted bytes of a coded update, against frames of updates of several distributions."""

import pytest
import torch

from fluvial.codecs import build, read_settings
from fluvial.methods.traffic import coded_frame
from fluvial.wire.tensors import Layout

LAYOUT = Layout(
    tuple((f"{module}.lora_A.weight", (8, 64)) for module in "qkvo")
    + tuple((f"{module}.lora_B.weight", (64, 8)) for module in "qkvo")
)


@pytest.mark.parametrize("name", ["ternary", "trellis", "top_k", "hadamard", "int8"])
@pytest.mark.parametrize("kind", ["normal", "laplace", "zero A"])
def test_a_frame_is_within_its_prediction(name: str, kind: str) -> None:
    settings = read_settings({"name": name} | ({} if name == "int8" else {"rate": 16}))
    random = torch.Generator().manual_seed(0)
    update = {}
    for tensor, shape in LAYOUT.shapes:
        values = torch.randn(shape, generator=random)
        if kind == "laplace":
            values = values.sign() * torch.empty(shape).exponential_(generator=random)
        update[tensor] = 1e-3 * values * (kind != "zero A" or "lora_B" in tensor)

    predicted = coded_frame(settings, LAYOUT)
    assert predicted.least <= len(build(settings, LAYOUT).encode(update, round=1)) <= predicted.most
    assert ("at most" in predicted.words) == (name == "ternary")
