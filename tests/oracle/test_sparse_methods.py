"""FLASC and EcoLoRA equal FedAvg where nothing is left out."""

from pathlib import Path
from typing import Any

from fluvial.wire.tensors import relative_error
from tests.support.runs import adapter_of, run_table
from tests.unit.methods.test_ecolora import PLAIN as ECOLORA
from tests.unit.methods.test_flasc import PLAIN as FLASC


def test_all_values_in_fp32_without_adam_are_fedavg(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    plain = run_table(run_config, tmp_path / "fedavg")
    dense = run_table(run_config | {"method": FLASC}, tmp_path / "flasc")
    assert dense["adapter_sha256"] == plain["adapter_sha256"]


def test_all_changes_in_fp32_are_fedavg_up_to_rounding(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """The initial adapter is subtracted on one end and added on the other, and each rounds once."""
    plain = run_table(run_config, tmp_path / "fedavg")
    table = run_config | {"method": FLASC | {"download": "change"}}
    run_table(table, tmp_path / "flasc")
    assert (
        relative_error(adapter_of(plain), adapter_of({"folder": str(tmp_path / "flasc")})) < 1e-12
    )  # squared


def test_one_dense_segment_in_fp32_is_fedavg(run_config: dict[str, Any], tmp_path: Path) -> None:
    plain = run_table(run_config | {"rounds": 3}, tmp_path / "fedavg")
    dense = run_table(
        run_config | {"rounds": 3, "method": ECOLORA | {"values": "fp32"}}, tmp_path / "ecolora"
    )
    assert dense["adapter_sha256"] == plain["adapter_sha256"]
