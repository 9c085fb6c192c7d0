"""FLASC: equal to FedAvg where nothing is left out, sparse both ways, FedAdam, resume, damaged
messages."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fluvial.errors import WireError
from fluvial.methods import Context
from fluvial.methods.flasc import METHOD, FlascConfig, FlascServer, received
from fluvial.runs.config import RunConfig
from fluvial.training.config import TrainConfig
from fluvial.wire.payload import Payload, frame_payload, payload_frame
from fluvial.wire.tensors import Layout
from tests.support.runs import run_table, run_with_stops

LAYOUT = Layout.of({"m.lora_A.weight": torch.zeros(4, 40), "m.lora_B.weight": torch.zeros(30, 4)})
PLAIN = {
    "name": "flasc",
    "download": "weights",
    "density_down": 1.0,
    "density_up": 1.0,
    "values": "fp32",
    "server_optimizer": "fedavg",
}


def _context(**changes: Any) -> Context:
    def refuse() -> Any:
        raise AssertionError("not needed")

    settings: dict[str, Any] = {
        "seed": 1,
        "rounds": 2,
        "layout": LAYOUT,
        "codec": METHOD.traits.codec,
        "downlink": None,
    }
    return Context(
        **settings | changes,
        train=TrainConfig(learning_rate=0.1),
        open_pool=refuse,
        secret=refuse,
        public=refuse,
    )


def test_a_quarter_is_sent_both_ways(run_config: dict[str, Any], tmp_path: Path) -> None:
    dense = run_table(run_config | {"method": PLAIN}, tmp_path / "dense")["bytes"]
    sparse = run_table(run_config | {"method": {"name": "flasc"}}, tmp_path / "sparse")["bytes"]
    for way in ("up train", "down train"):
        assert (
            sparse["by_kind"][way] < 0.2 * dense["by_kind"][way]
        )  # 16 of 32 bits, 1/4, positions, envelope


def test_it_learns(run_config: dict[str, Any], tmp_path: Path) -> None:
    heldout = run_table(run_config | {"method": {"name": "flasc"}}, tmp_path / "run")["heldout"]
    assert heldout["final"]["loss"] < heldout["base"]["loss"]


def test_resume_is_a_straight_run(run_config: dict[str, Any], tmp_path: Path) -> None:
    table = run_config | {"rounds": 3, "method": {"name": "flasc", "fraction": 0.7}}
    straight = run_table(table, tmp_path / "straight")
    result = run_with_stops(table, tmp_path / "stopped", (1, 2, 1, 99))
    assert result["adapter_sha256"] == straight["adapter_sha256"]
    assert result["bytes"] == straight["bytes"]


def test_the_step_is_adam_of_the_negative_mean_change() -> None:
    """As PyTorch's Adam steps; the tolerance is for fp32 operations in another order."""
    server = FlascServer(FlascConfig(server_learning_rate=0.1), _context())
    weights = torch.nn.Parameter(LAYOUT.flatten(server.adapter))
    adam = torch.optim.Adam([weights], lr=0.1)

    for seed in range(3):
        change = torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(seed)) * (
            torch.arange(280) % 3 > 0
        )
        weights.grad = -change
        before = weights.detach().clone()
        adam.step()
        step = LAYOUT.flatten(server._step(LAYOUT.unflatten(change)))
        assert torch.allclose(step, weights.detach() - before, rtol=1e-4, atol=1e-6)


def test_the_state_is_all() -> None:
    server = FlascServer(FlascConfig(), _context())
    server._step(LAYOUT.unflatten(torch.ones(LAYOUT.numel)))
    again = FlascServer(FlascConfig(), _context(seed=2))
    again.restore(Payload.from_bytes(server.state().to_bytes()))
    assert again.state().to_bytes() == server.state().to_bytes()
    assert again.steps == 1


def test_a_site_receives_the_largest_weights() -> None:
    server = FlascServer(FlascConfig(density_down=0.1, download="weights"), _context())
    found = received(server.frames, server.base, server._download(1), 1).numpy()
    weights = LAYOUT.flatten(server.adapter).numpy()
    assert np.count_nonzero(found) == LAYOUT.numel // 10
    assert np.allclose(found, np.where(found != 0, weights, 0), rtol=1e-3)
    assert abs(weights[found == 0]).max() <= abs(weights[found != 0]).min()


def test_a_site_receives_the_largest_changes_on_top_of_the_initial_adapter() -> None:
    server = FlascServer(FlascConfig(density_down=0.1), _context())
    assert torch.equal(received(server.frames, server.base, server._download(1), 1), server.base)
    change = torch.zeros(LAYOUT.numel)
    change[::7] = 1
    server.adapter = LAYOUT.unflatten(server.base + change)
    found = received(server.frames, server.base, server._download(1), 1) - server.base
    assert int(torch.count_nonzero(found)) == LAYOUT.numel // 10
    assert torch.equal(LAYOUT.flatten(server.model()), found + server.base)


def test_damaged_replies_are_refused() -> None:
    server = FlascServer(FlascConfig(), _context())
    change = np.random.default_rng(0).standard_normal(LAYOUT.numel).astype(np.float32)
    reply = frame_payload(server.frames.encode(change, np.arange(9), round=1), n=3, loss=1.0)
    server._read(1, "a", reply)
    frame = payload_frame(reply)
    damaged = frame[:20] + bytes([frame[20] ^ 1]) + frame[21:]

    for wrong in (
        Payload(reply.tensors, {"n": 0, "loss": 1.0}),
        Payload(reply.tensors, {"n": 3}),
        Payload(reply.tensors, {"n": 3, "loss": 1e30}),
        frame_payload(damaged, n=3, loss=1.0),
    ):
        with pytest.raises(WireError):
            server._read(1, "a", wrong)

    with pytest.raises(WireError, match="round"):
        server._read(2, "a", reply)


@pytest.mark.parametrize("key", ["server_learning_rate", "beta_1", "beta_2", "epsilon"])
def test_settings_of_adam_need_adam(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: without effect"):
        FlascConfig.model_validate({"server_optimizer": "fedavg", key: 0.5})


def test_a_codec_is_an_error(run_config: dict[str, Any]) -> None:
    table = run_config | {"method": {"name": "flasc"}, "codec": {"name": "bf16"}}
    with pytest.raises(ValueError, match="codec"):
        RunConfig.model_validate(table)
