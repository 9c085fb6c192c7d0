"""klt by compiled loops and by NumPy: the same frames, and the same values of them."""

import numpy as np
import pytest
import torch

from fluvial.codecs import compiled
from fluvial.codecs.klt.codec import Klt
from fluvial.codecs.klt.settings import KltSettings
from fluvial.wire.tensors import Layout, Named

SHAPES = {
    f"model.layers.{layer}.self_attn.{module}.lora_{factor}.weight": shape
    for layer in range(2)
    for module, out in (("q_proj", 48), ("v_proj", 24))
    for factor, shape in (("A", (4, 48)), ("B", (out, 4)))
}


def updates(count: int) -> list[Named]:
    """Updates whose leading features are louder."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        update = {}
        for name, shape in SHAPES.items():
            loud = 1e-3 / (1 + np.arange(max(shape)))
            values = random.normal(size=shape) * (loud if shape[1] > shape[0] else loud[:, None])
            update[name] = torch.from_numpy(values.astype(np.float32))
        made.append(update)

    return made


def outliers(update: Named) -> Named:
    """Return it with values that are clipped, and a tensor of zeros."""
    changed = {name: tensor.clone() for name, tensor in update.items()}
    first, *_, last = changed
    changed[first].view(-1)[::50] = 5.0
    changed[last].zero_()
    return changed


@pytest.mark.parametrize(
    "changes",
    [{}, {"rate": 6}, {"error_feedback": True}, {"mode": "dithered"}],
    ids=["biased", "many bits", "feedback", "dithered"],
)
def test_compiled_loops_code_as_numpy_does(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    *training, held_out = updates(6)
    settings = KltSettings.model_validate({"rate": 16, **changes})
    codec = Klt.fit(settings, Layout.of(held_out), training, seed=0)
    samples = [held_out, outliers(held_out), {k: 1e30 * v for k, v in held_out.items()}]
    frames = [codec.encode(sample, seed=3) for sample in samples]
    decoded = [codec.decode(frame) for frame in frames]
    assert decoded[0][next(iter(SHAPES))].any()

    monkeypatch.setattr(compiled, "available", lambda: False)
    for sample, frame, values in zip(samples, frames, decoded, strict=True):
        assert codec.encode(sample, seed=3) == frame
        again = codec.decode(frame)
        assert all(torch.equal(again[name], values[name]) for name in values)
