"""The benchmark of FedPipe: its clock, its curves, and its parts in their quick form."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks.codecs.cache import Cache
from benchmarks.fedpipe import fedadapter
from benchmarks.fedpipe.bed import Bed, parsed
from benchmarks.fedpipe.clock import SiteClock
from benchmarks.fedpipe.contenders import (
    CONTENDERS,
    FEDPIPE,
    RATES,
    UNIFORM,
    Contender,
    configured,
)
from benchmarks.fedpipe.fedadapter import Size, dealt, fastest
from benchmarks.fedpipe.hetlora import DECAY, SelfPruning
from benchmarks.fedpipe.losses import Losses, at, over, times_sooner, until
from benchmarks.report import Row
from fluvial.methods import METHODS
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.run import execute
from fluvial.wire.tensors import Named
from tests.support.benchmarks import quick_report

CURVE = [4.0, 3.0, 2.0]


@pytest.fixture(autouse=True)
def _no_method_stays() -> Iterator[None]:
    """Forget FedAdapter after each test: other tests go through all methods."""
    with mock.patch.dict(METHODS):
        yield


def test_clock_moves_by_waits() -> None:
    """A wait moves the clock on by itself and takes no time of its own."""
    clock = SiteClock()
    before = clock.monotonic()
    clock.sleep(1000.0)
    assert 1000.0 <= clock.monotonic() - before < 1010.0


def test_curves_are_interpolated() -> None:
    """Between two rounds a loss lies on a straight line; a loss that is not reached has none."""
    assert at(15.0, [0.0, 10.0, 20.0], CURVE) == 2.5
    assert at(99.0, [0.0, 10.0, 20.0], CURVE) == 2.0
    assert until(2.5, [0.0, 10.0, 20.0], CURVE) == 15.0
    assert until(1.0, [0.0, 10.0, 20.0], CURVE) is None


def test_runs_are_compared_at_common_bytes() -> None:
    """The run that has sent less sets the bytes; the target is the last loss of uniform LoRA."""
    uniform = {"losses": CURVE, "bytes": [0, 10, 20], "seconds": [0.0, 30.0, 60.0]}
    fedpipe = {"losses": [4.0, 2.0, 1.0], "bytes": [0, 20, 40], "seconds": [0.0, 20.0, 40.0]}
    assert over(uniform, fedpipe) == 0.0
    assert times_sooner(fedpipe, uniform) == 3.0
    assert times_sooner(uniform | {"losses": [4.0, 3.5, 3.0]}, uniform) is None


def test_runs_are_compared_at_common_seconds() -> None:
    """The shorter run sets the seconds; without set-up its clock begins with its first round."""
    uniform = {"losses": CURVE, "bytes": [0, 10, 20], "seconds": [0.0, 30.0, 60.0]}
    planned = {"losses": [4.0, 2.0, 1.0], "seconds": [0.0, 30.0, 40.0], "setup_s": 10.0}
    assert over(planned, uniform, "seconds") == 1.0 - at(40.0, [0.0, 30.0, 60.0], CURVE)
    assert times_sooner(planned, uniform) == 2.0
    assert times_sooner(planned, uniform, setup=False) == 3.0


def test_runs_of_an_earlier_report_are_known() -> None:
    """A run of the present cache is newer than one of a report."""
    cache = Cache(None)
    cache.add("a", {"losses": [1.0]})
    cache.take([{"key": "a", "losses": [2.0]}, {"key": "b", "losses": [3.0]}])
    assert [cache.find(key)["losses"] for key in "ab"] == [[1.0], [3.0]]  # type: ignore[index]


def test_hetlora_gives_up_components_whose_norm_falls() -> None:
    """A site whose last components shrink loses them, and sends their end as zero."""
    shapes = {"m.lora_A.weight": (4, 3), "m.lora_B.weight": (5, 4)}
    received = {name: torch.ones(shape) for name, shape in shapes.items()}

    def shrinking(site: Any, start: Named, round: int, **named: Any) -> tuple[Named, None]:
        parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        assert named["watch"](parameters)
        for parameter in parameters.values():
            assert parameter.grad is not None
            assert bool((parameter.grad >= 0).all())
            assert bool(parameter.grad.any())
        return {name: -0.5 * value for name, value in start.items()}, None

    pruning = SelfPruning()
    train = pruning.training(shrinking)
    site = SimpleNamespace(name="north")
    whole, _ = train(site, received, 1)
    assert pruning.share == {"north": DECAY}
    assert all(torch.equal(change, torch.full(change.shape, -0.5)) for change in whole.values())

    pruning.share["north"] = 0.5
    half, _ = train(site, received, 2)
    assert torch.equal(half["m.lora_A.weight"][2:], -torch.ones(2, 3))
    assert torch.equal(half["m.lora_B.weight"][:, :2], torch.full((5, 2), -0.5))


def test_fedadapter_takes_the_size_whose_loss_falls_fastest() -> None:
    """A trial has one layer more and twice the width, within the model; a large size that takes
    long for its gain does not win, and neither does one whose loss rose."""
    small = Size(1, 2)
    assert small.candidates(layers=2, rank=4) == [small, Size(2, 2), Size(1, 4)]
    assert Size(2, 4).candidates(layers=2, rank=4) == [Size(2, 4)]
    seconds = {small: 1.0, Size(2, 2): 3.0}
    assert fastest(5.0, {small: 4.0, Size(2, 2): 3.0}, seconds) == small
    assert fastest(5.0, {small: 4.0, Size(2, 2): 1.0}, seconds) == Size(2, 2)
    assert fastest(5.0, {small: 5.2, Size(2, 2): 5.1}, seconds) == Size(2, 2)


def test_fedadapter_deals_every_site_to_one_trial_group() -> None:
    """Groups change from trial to trial, and none is empty."""
    sizes = [Size(1, 2), Size(2, 2), Size(1, 4)]
    rounds = [dealt("abcde", sizes, seed=0, round=number) for number in range(8)]
    assert all(sorted(chain(*groups.values())) == list("abcde") for groups in rounds)
    assert len({tuple(groups[sizes[0]]) for groups in rounds}) > 1
    assert list(dealt("a", sizes, seed=0, round=1).values()) == [["a"]]


def test_fedadapter_grows_and_trains_only_the_upper_layers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only modules of the size have a gradient, bytes are those of its factors, and depth and width
    grow to the whole model where larger sizes always win."""
    trained = []
    whole = vars(fedadapter)["train_locally"]

    def watched(site: Any, received: Named, round: int, **named: Any) -> Any:
        names: set[str] = set()

        def watch(parameters: Any) -> bool:
            names.update(n for n, p in parameters.items() if p.grad is not None and p.requires_grad)
            return True

        result = whole(site, received, round, watch=watch, **named)
        trained.append((round, site.name, names, received))
        return result

    monkeypatch.setattr(fedadapter, "train_locally", watched)
    monkeypatch.setattr(
        fedadapter, "fastest", lambda _, losses, __: max(losses, key=lambda s: (s.width, s.depth))
    )
    source = tmp_path / "text.jsonl"
    lines = [f'{{"text": "a river and {n} streams", "client": "{n % 4}"}}\n' for n in range(24)]
    source.write_text("".join(lines))
    table = {
        "rounds": 4,
        "model": {"name_or_path": str(tiny_model)},
        "lora": {"r": 4, "target_modules": "all-linear"},
        "data": {
            "source": str(source),
            "form": "text",
            "max_length": 16,
            "partition": {"by": "column", "column": "client"},
        },
        "train": {"max_steps": 1},
        "method": {"name": "fedadapter", "depth": 1, "width": 2, "interval": 1},
    }
    folder = tmp_path / "run"
    list(execute(parsed(table), folder))
    records = list(RunFolder(folder).metrics())
    assert [(r["depth"], r["width"]) for r in records] == [(1, 4), (2, 4), (2, 4), (2, 4)]

    for round, site, names, received in trained:
        values = sum(tensor.numel() for tensor in received.values())
        assert names == set(received)
        sent = records[round - 1]["bytes"][site]
        for direction in ("up train", "down train"):
            assert 4 * values <= sent[direction] <= 4 * values + 2000

    by_round: dict[int, set[tuple[int, ...]]] = {}
    for round, _, names, received in trained:
        layers = len({name.split(".layers.")[1][0] for name in names})
        assert any(".layers.1." in name for name in names)
        ranks = {tensor.shape[0] for name, tensor in received.items() if ".lora_A." in name}
        by_round.setdefault(round, set()).add((layers, *ranks))
    assert by_round[1] == {(1, 2), (2, 2), (1, 4)}
    assert by_round[2] == {(1, 4), (2, 4)}
    assert by_round[3] == by_round[4] == {(2, 4)}


@pytest.mark.parametrize(("losses", "tried"), [((3.0, 2.0), 2), ((2.0, 3.0), 3)])
def test_third_learning_rate_is_tried_where_it_may_win(
    losses: tuple[float, float], tried: int
) -> None:
    """Where the larger rate is better than the middle one, the smaller one is not run."""
    smaller, middle, larger = RATES
    loss_at = {smaller: 9.0, middle: losses[0], larger: losses[1]}
    asked = []

    class Known(Losses):
        """Losses that are given."""

        def _run(self, task: str, contender: Contender, seed: int, rate: float) -> Row | None:
            asked.append(rate)
            return {"losses": [loss_at[rate]]}

    Known(Bed(Cache(None)), quick=True).search("task", UNIFORM)
    assert len(asked) == tried


@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_are_valid(name: str) -> None:
    """Every contender's settings are accepted."""
    task: dict[str, Any] = {
        "rounds": 2,
        "lora": {"lora_dropout": 0.0},
        "train": {"per_device_train_batch_size": 8, "max_steps": 4},
        "method": {"probe_steps": 4, "budgets": [{"site": "web", "speed": 0.5}]},
    }
    table = configured(task, CONTENDERS[name], seed=0, learning_rate=1e-2, deadline_s=1.0)
    assert parsed(table).seed == 0


@pytest.mark.slow
def test_losses(tmp_path: Path) -> None:
    """FedPipe and uniform LoRA have a row; a second call takes both from the file."""
    options = ("--part", "losses", "--cache", str(tmp_path / "runs.jsonl"))
    content = quick_report("fedpipe", tmp_path / "losses.json", *options)
    rows = {row["contender"]: row for row in content["rows"]}
    assert set(rows) == {UNIFORM, FEDPIPE}
    assert len(set(map(str, rows[FEDPIPE]["plan"].values()))) > 1
    assert rows[UNIFORM]["setup_s"] == 0 < rows[FEDPIPE]["setup_s"]
    lines = (tmp_path / "runs.jsonl").read_text()
    again = quick_report("fedpipe", tmp_path / "again.json", *options, "--minutes", "0")
    assert again["rows"] == content["rows"]
    assert (tmp_path / "runs.jsonl").read_text() == lines
    known = ("--part", "losses", "--known", str(tmp_path / "losses.json"), "--minutes", "0")
    third = quick_report("fedpipe", tmp_path / "third.json", *known)
    assert [row["loss"] for row in third["rows"]] == [row["loss"] for row in content["rows"]]


@pytest.mark.slow
def test_value(tmp_path: Path) -> None:
    """A correlation lies between -1 and 1, for adapters of both kinds."""
    content = quick_report("fedpipe", tmp_path / "value.json", "--part", "value")
    assert [row["draw"] for row in content["rows"]] == ["all sizes", "one size"]
    assert all(-1 <= row["invariant"] <= 1 for row in content["rows"])
    assert all(row["invariant_by_seed"] == [row["invariant"]] for row in content["rows"])


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
)
def test_predictions(tmp_path: Path) -> None:
    """The plan's memory and time are of the order of what is measured."""
    (row,) = quick_report("fedpipe", tmp_path / "predictions.json", "--part", "predictions")["rows"]
    assert 0.5 < row["memory_mb"] / row["peak_mb"] < 2
    assert 0.3 < row["predicted_s"] / row["measured_s"] < 3


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="limits and peaks are those of Linux"
)
def test_enforced(tmp_path: Path) -> None:
    """A site with little memory trains by its plan, and has no memory for uniform LoRA, which the
    site without a limit has."""
    content = quick_report("fedpipe", tmp_path / "enforced.json", "--part", "enforced")
    unlimited, limited = content["rows"]
    assert unlimited["outcome"] == unlimited["uniform_outcome"] == "trained"
    assert limited["outcome"] == "trained"
    assert limited["uniform_outcome"] == "no memory"
    assert limited["uniform_why"].startswith("train: ")
    assert limited["peak_mb"] < unlimited["uniform_peak_mb"]
