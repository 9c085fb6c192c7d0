"""The examples run, and the plain loop ends with the weights of the package."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fluvial
from examples.fedavg import fedavg
from examples.own_codec import OneScale, OneScaleSettings
from examples.own_method import MOMENTUM
from fluvial.wire.tensors import digest, norm, subtract
from tests.support.runs import adapter_of


def final_adapter(folder: Path) -> str:
    return digest(adapter_of({"folder": str(folder)}))


def test_the_plain_loop_is_fedavg(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Three sites of unequal size, also with a codec."""
    for number, codec in enumerate(({"name": "identity"}, {"name": "int8"})):
        table = run_config | {"codec": codec}
        fluvial.run(table, tmp_path / str(number), progress=False)
        plain = digest(fedavg(fluvial.load_config(table)))
        assert final_adapter(tmp_path / str(number)) == plain


def test_the_plain_loop_is_about_sixty_lines() -> None:
    path = Path(__file__).parents[2] / "examples" / "fedavg.py"
    assert len(path.read_text().splitlines()) <= 65


def test_a_method_of_ones_own(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Without momentum it is FedAvg up to rounding; with it, it is another method."""
    plain = fluvial.run(run_config, tmp_path / "fedavg", progress=False)
    for momentum in (0.0, 0.5):
        table = run_config | {"method": {"name": "momentum", "momentum": momentum}}
        folder = tmp_path / str(momentum)
        result = fluvial.run(table, folder, progress=False, methods=[MOMENTUM])
        assert result.values["method"] == "momentum"

    fed, none, half = (
        adapter_of({"folder": str(tmp_path / name)}) for name in ("fedavg", "0.0", "0.5")
    )
    assert norm(subtract(fed, none)) < 1e-6 * norm(fed)  # a sum and a difference more
    assert norm(subtract(fed, half)) > 0.01 * norm(fed)
    assert plain.values["method"] == "fedavg"


def test_a_method_of_ones_own_is_resumed(run_config: dict[str, Any], tmp_path: Path) -> None:
    table = run_config | {"method": {"name": "momentum"}}
    fluvial.run(table, tmp_path / "straight", progress=False, methods=[MOMENTUM])

    def stop(event: Any) -> None:
        if event.kind == "round":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fluvial.run(table, tmp_path / "stopped", progress=stop, methods=[MOMENTUM])

    fluvial.run(table, tmp_path / "stopped", resume=True, progress=False, methods=[MOMENTUM])
    assert final_adapter(tmp_path / "stopped") == final_adapter(tmp_path / "straight")


def test_a_codec_of_ones_own(run_config: dict[str, Any], tmp_path: Path) -> None:
    """It sends a bit for each value, and never loses more than the update."""
    table = run_config | {"codec": {"name": "one_scale", "error_feedback": True}}
    result = fluvial.run(table, tmp_path, progress=False, codecs=[OneScale])
    assert result.values["round_ratio"] < 1 / 25
    assert result.values["heldout"]["final"]["loss"] < result.values["heldout"]["base"]["loss"]

    for update in (torch.randn(1001), torch.zeros(9), torch.tensor([3.0e38, -1e-45, 0.0])):
        codec = OneScale(OneScaleSettings(), fluvial.Layout.of({"w": update}))
        decoded = codec.decode(codec.encode({"w": update}))
        assert norm(subtract({"w": update}, decoded)) <= norm({"w": update})
