"""The threads of a small model's evaluation, as they are measured."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from fluvial.data import DataConfig
from fluvial.models import threads
from fluvial.models.pretrained import ModelConfig
from fluvial.training import assess


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Timed:
    """A pass that takes given seconds by the number of threads, and the clock that shows them."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.passes: list[int] = []

    def __call__(self) -> None:
        count = torch.get_num_threads()
        self.now += self.seconds[count] if count in self.passes else 100 / count  # a slow start
        self.passes.append(count)

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(("alone", "together", "expected"), [(1, 2, 1), (2, 1, 4)])
def test_the_faster_number_of_threads(alone: float, together: float, expected: int) -> None:
    timed = Timed({1: alone, 4: together})
    assert threads.measured_threads(timed, 4, timed.clock) == expected
    assert timed.passes == [1, 4] * (threads.PASSES + 1)


class Model(nn.Module):
    """A model that notes the threads of its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))
        self.passes: list[int] = []

    def forward(self, **given: object) -> None:
        self.passes.append(torch.get_num_threads())


def test_a_small_model_is_computed_on_the_threads_that_are_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A large one is not tried."""
    model = Model()

    def measured(one_pass: Callable[[], object], most: int) -> int:
        one_pass()
        return most - 3

    monkeypatch.setattr(threads, "measured_threads", measured)
    assert threads.faster_threads(model) == 1
    monkeypatch.setattr(threads, "SMALL", 7)
    assert threads.faster_threads(model) == 4
    assert model.passes == [4]


def test_the_threads_of_before_are_set_again() -> None:
    with threads.with_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4


def test_an_evaluation_computes_on_these_threads(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = tmp_path / "records.jsonl"
    records.write_text('{"prompt": "a", "completion": "b"}\n')
    seen: list[int] = []

    def measured(*given: object) -> dict[str, int]:
        seen.append(torch.get_num_threads())
        return {}

    monkeypatch.setattr(assess, "faster_threads", lambda _: 3)
    monkeypatch.setattr(assess, "record_result", measured)
    data = DataConfig(source=str(records))
    assess.evaluate_model(ModelConfig(name_or_path=str(tiny_model)), data=data)
    assert seen == [3]
    assert torch.get_num_threads() == 4
