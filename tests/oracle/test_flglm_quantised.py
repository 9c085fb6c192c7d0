"""Split learning over a quantised base is the training of the whole quantised model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.models.base import Base
from fluvial.models.parts import PartPool
from fluvial.models.quantised import QuantisedLinear
from fluvial.models.split import Cut
from fluvial.models.states import base_state
from fluvial.models.weight_sources import Source
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from fluvial.wire.tensors import factor
from tests.oracle.test_flglm import assert_same, flglm, full_batches, start_of
from tests.support.models import UNMEASURED, four_layers
from tests.support.runs import adapter_of, run_table

pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")

MIDDLE = {"quantization": "nf4", "layer_quantization": {"none": [0, 3]}}
"""A server's layers in NF4 between ends that are not quantised."""
MIXED = {"quantization": "int8", "layer_quantization": {"nf4-double": [0]}}
"""All layers quantised, the front's in a format of its own."""


@pytest.fixture
def table(run_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run over three sites of unequal size, on a model of four layers."""
    return run_config | {"model": {"name_or_path": str(four_layers(tmp_path / "model"))}}


def quantised(table: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    return table | {"model": table["model"] | settings}


@pytest.mark.parametrize("settings", [MIDDLE, MIXED], ids=["middle", "mixed"])
def test_a_client_batch_is_one_batch_of_the_quantised_model(
    table: dict[str, Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Six steps of AdamW under one norm: those on the union of the sites' data."""
    together = quantised(full_batches(table), settings)
    split = flglm(together, tmp_path / "split")
    whole = run_table(together | {"method": {"name": "central"}}, tmp_path / "whole")
    one, other = adapter_of(split), adapter_of(whole)
    assert_same(one, other, start_of(together))
    assert max(float((one[name] - other[name]).abs().max()) for name in other) < 1e-5

    whole_float = run_table(
        full_batches(table) | {"method": {"name": "central"}}, tmp_path / "float"
    )
    moved = adapter_of(whole_float)
    assert max(float((one[name] - moved[name]).abs().max()) for name in one) > 1e-4


def test_each_end_reads_and_quantises_its_own_layers_only(
    table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes are in the middle alone, and no end asks for a weight of the other."""
    config = parse(quantised(table, MIDDLE), "test")
    cut = Cut(4, 1, 1)
    asked: list[str] = []
    read = vars(Base)["source"].fget

    class Watched:
        def __init__(self, source: Source) -> None:
            self.names = source.names
            self._source = source

        def get(self, name: str) -> torch.Tensor:
            asked.append(name)
            return self._source.get(name)

    monkeypatch.setattr(Base, "source", property(lambda base: Watched(read(base))))
    for server in (True, False):
        asked.clear()
        pool = PartPool(config.model, config.adapter, cut, server=server)
        with pool.part(base_state(pool.layout), trainable=True) as part:
            codes = {
                int(name.removeprefix(f"{part.path}.").partition(".")[0])
                for name, module in part.model.named_modules()
                if isinstance(module, QuantisedLinear)
            }
        assert codes == (set(cut.middle) if server else set())
        assert asked
        assert all(part.holds(name) for name in asked)


@pytest.mark.parametrize("settings", [MIDDLE, MIXED], ids=["middle", "mixed"])
def test_check_says_the_bytes_that_are_in_memory(
    table: dict[str, Any], settings: dict[str, Any]
) -> None:
    changed = quantised(table, settings) | {"method": UNMEASURED}
    config = parse(changed, "test")
    rows = {row["what"]: row["value"] for row in plan(config)["rows"]}

    for end in ("site", "server"):
        pool = PartPool(config.model, config.adapter, Cut(4, 1, 1), server=end == "server")
        with pool.part(base_state(pool.layout), trainable=False) as part:
            held = sum(
                weight.nbytes
                for name, weight in part.own_weights().items()
                if factor(name) is None and ".lora_" not in name
            )
        assert rows[f"base in memory, {end}"].startswith(f"{held:,} B")

    assert "not quantised" in rows["base in memory, server"]
