"""End tokens that a model cannot tell from others."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from fluvial.models.end_token import LEAST_ALIKE, alike_rows, end_remarks
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.targets import LoraSettings


class Headed(nn.Module):
    def __init__(self, alike: int, *, near: float = 1e-3) -> None:
        super().__init__()
        self.head = nn.Linear(8, 40, bias=False).requires_grad_(False)
        draw = torch.Generator().manual_seed(0)
        self.head.weight.copy_(torch.randn(40, 8, generator=draw))
        noise = near * torch.randn(alike, 8, generator=draw)
        self.head.weight[3 : 3 + alike] = self.head.weight[2] + noise

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_rows_that_are_nearly_equal_are_counted_in_any_precision() -> None:
    assert alike_rows(Headed(7).head.weight, 2) == 8
    assert alike_rows(Headed(7).head.weight.bfloat16(), 2) == 8
    assert alike_rows(Headed(7, near=1.0).head.weight, 2) == 1
    assert alike_rows(Headed(7).head.weight, 30) == 1


def test_the_remark_names_the_token_and_the_remedy() -> None:
    (remark,) = end_remarks(Headed(LEAST_ALIKE), 2, "</s>")
    assert f"its end token '</s>' is nearly equal to those of {LEAST_ALIKE} of 40 tokens" in remark
    assert 'tune = "full"' in remark
    assert not end_remarks(Headed(LEAST_ALIKE - 1), 2, "</s>")
    assert not end_remarks(Headed(20), None, "None")
    tuned = Headed(20)
    tuned.head.weight.requires_grad_(True)
    assert not end_remarks(tuned, 2, "</s>")


def test_a_run_remarks_on_it_where_the_weights_are_loaded(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = ModelConfig(name_or_path=str(tiny_model))
    pool = ModelPool(config, LoraSettings(r=2))
    assert not pool.end_remarks()
    monkeypatch.setattr("fluvial.models.end_token.NEAR", 100.0)  # as if all rows were alike
    with caplog.at_level(logging.WARNING):
        pool.check_behaviour({1})  # as that of a chat template
    assert "the end of an answer was never trained in this model" in caplog.text
    assert "its end token '<s>'" in caplog.text
    assert "its end token '</s>'" in pool.end_remarks()[0]
    assert not pool.end_remarks(ends=())
    assert not ModelPool(config, None).end_remarks()
