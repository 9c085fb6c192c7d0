"""The measures of a site: its limits, its speed, and the memory of a pass."""

import gc
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.data import Example
from fluvial.federation.line import Line
from fluvial.federation.transfers import Transfers
from fluvial.methods.fedpipe import measure, step_times
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.planner.profile import Profile
from fluvial.methods.fedpipe.profiles import over_line
from fluvial.methods.fedpipe.step_times import StepTimer, spread_rows
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.runs.config import parse
from fluvial.site_process.process import JOIN, SiteProcess
from fluvial.training import train
from fluvial.training.config import TrainConfig
from fluvial.training.train import predictions
from fluvial.wire.payload import Payload
from tests.support.site_process import SITE, header, site_file


def profiled(table: dict[str, Any], tmp_path: Path, **settings: Any) -> Profile:
    """The profile that a site in a process of its own sends."""
    process = SiteProcess(site_file(tmp_path, **settings))
    process.answer(header(task=JOIN, round=0), Payload(values={"config": table}).to_bytes())
    answer = process.answer(header(task="profile", round=0, seq=2), Payload().to_bytes())
    return Profile.from_values(Payload.from_bytes(answer.data).values)


def test_the_lower_limit_of_site_and_run_holds(run_config: dict[str, Any], tmp_path: Path) -> None:
    def table(limit: float) -> dict[str, Any]:
        budgets = [{"site": SITE, "memory_mb": limit, "tokens_s": 100.0}]
        return run_config | {"method": {"name": "fedpipe", "budgets": budgets}}

    assert profiled(table(7.0), tmp_path / "a", memory_mb=5.0).memory_bytes == 5_000_000
    assert profiled(table(3.0), tmp_path / "b", memory_mb=5.0).memory_bytes == 3_000_000
    assert profiled(table(3.0), tmp_path / "c").memory_bytes == 3_000_000


def test_a_link_is_that_of_the_budget_then_of_long_transfers_then_of_the_line(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """A transfer that is short beside what it is timed with measures nothing."""
    speed = {"site": SITE, "tokens_s": 100.0}
    line = Line(up_mbit_s=1.0, down_mbit_s=2.0, rtt_ms=0.0)

    def rates(transfers: Transfers, **budget: float) -> tuple[float, float]:
        method = {"name": "fedpipe", "planner": {"batches": [1]}, "budgets": [speed | budget]}
        config = parse(run_config | {"method": method}, "test").method
        assert isinstance(config, FedPipeConfig)
        site = SiteProcess(site_file(tmp_path / f"{len(budget)}"))
        site.transfers = transfers
        joined = Payload(values={"config": run_config | {"method": method}})
        site.answer(header(task=JOIN, round=0), joined.to_bytes())
        answer = site.answer(header(task="profile", round=0, seq=2), Payload().to_bytes())
        profile = Profile.from_values(Payload.from_bytes(answer.data).values)
        profile = over_line({SITE: profile}, config, line)[SITE]
        return profile.up_bytes_s, profile.down_bytes_s

    def timed(down_s: float, up_s: float, size: int = 10**6) -> Transfers:
        seen = Transfers()
        for stall_s in (0.0, 5.0):  # one of both messages is held up
            seen.received(size, down_s + stall_s)
            seen.sent(size, up_s + stall_s)
        return seen

    for transfers in (Transfers(), timed(1.9, 5.9), timed(4.0, 10.0, size=10**4)):
        assert rates(transfers) == (125_000, 250_000)

    transfers = timed(4.0, 10.0, size=2 * 10**6)
    assert rates(transfers) == (200_000, 500_000)
    assert rates(transfers, up_mbit_s=0.08) == (10_000, 500_000)
    transfers.received(10**6, 0.1)
    assert rates(transfers) == (200_000, 250_000)


def test_a_site_without_a_budget_measures_everything(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    planner = {"batches": [1, 2]}
    profile = profiled(run_config | {"method": {"name": "fedpipe", "planner": planner}}, tmp_path)
    assert profile.memory_bytes == measure.memory_limit()
    assert [speed.batch for speed in profile.speeds["float32"]] == [1, 2]
    assert all(speed.tokens_s > 0 for speed in profile.speeds["float32"])
    assert profile.samples == 3 * 4  # of a round of 3 steps of 4 sequences

    peaks = {(peak.batch, peak.checkpointing): peak.bytes for peak in profile.peaks}
    assert len(peaks) == 4
    assert peaks[1, True] < peaks[1, False] < peaks[2, False]
    assert peaks[2, True] < peaks[2, False]


def test_batches_end_where_memory_does(run_config: dict[str, Any], tmp_path: Path) -> None:
    profile = profiled(run_config | {"method": {"name": "fedpipe"}}, tmp_path, memory_mb=0.4)
    assert [speed.batch for speed in profile.speeds["float32"]] == [1]


def watched_batches(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Return a set that grows by the batch of each pass that a site makes."""
    batches: set[int] = set()

    def watched(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
        batches.add(len(inputs["input_ids"]))
        return predictions(model, inputs)

    for module in (measure, train):
        monkeypatch.setattr(module, "predictions", watched)
    return batches


def test_no_pass_is_made_with_a_batch_that_does_not_fit(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a pass could end the process."""
    batches = watched_batches(monkeypatch)
    profile = profiled(run_config | {"method": {"name": "fedpipe"}}, tmp_path, memory_mb=1.2)
    timed = {speed.batch for speed in profile.speeds["float32"]}
    assert timed < {1, 2, 4, 8, 16}
    assert batches == timed | {1, 2}


def test_no_pass_with_large_batches_is_made_before_its_memory_is_known(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = watched_batches(monkeypatch)
    for choices in ([2**19, 2**20], [2**20], [4, 2**20]):
        method = {"name": "fedpipe", "planner": {"batches": choices}}
        profile = profiled(run_config | {"method": method}, tmp_path / str(choices), memory_mb=3.0)
        assert profile.speeds["float32"][0].batch == (4 if choices[0] == 4 else 1)
        assert max(batches) <= 8


@pytest.mark.parametrize("memory_mb", [0.02, 0.25, 0.3, 0.4, 0.6, 1.2, 100.0])
def test_no_pass_needs_more_than_the_limit(
    memory_mb: float, run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [0]

    def watched(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
        peaks = peak_bytes(model, inputs)
        sizes.append(peaks[0])
        return peaks

    peak_bytes = measure.peak_bytes
    monkeypatch.setattr(measure, "peak_bytes", watched)
    table = run_config | {"method": {"name": "fedpipe"}}
    profile = profiled(table, tmp_path, memory_mb=memory_mb)
    assert max(sizes) <= profile.memory_bytes
    assert profile.unmeasured == (len(sizes) == 1)
    if memory_mb == 100:
        assert {peak.batch for peak in profile.peaks} == {1, 2}
        assert profile.fixed_s > 0


def test_nothing_of_a_measured_pass_stays_in_memory(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """A hook that keeps a saved tensor itself keeps its graph, which no collection frees."""
    table = run_config | {"method": {"name": "fedpipe", "planner": {"batches": [1, 2]}}}

    def tensors() -> int:
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    profiled(table, tmp_path / "first")
    before = tensors()
    profiled(table, tmp_path / "second")
    assert tensors() <= before


def test_rows_of_a_timed_step_spread_over_the_lengths() -> None:
    examples = [Example(range(length), range(length)) for length in (9, 2, 5, 7, 3)]
    lengths = {
        batch: [len(row.input_ids) for row in spread_rows(examples, batch)] for batch in (1, 2, 5)
    }
    assert lengths == {1: [5], 2: [3, 7], 5: [2, 3, 5, 7, 9]}
    assert len(spread_rows(examples[:2], 7)) == 7


class Steps:
    """A clock by which the steps of a batch take the seconds that a test says."""

    def __init__(self, *seconds: float) -> None:
        self.now = 0.0
        self.made = 0
        self._seconds = iter(seconds)

    def perf_counter(self) -> float:
        self.made += 1
        self.now += next(self._seconds)
        return self.now


@pytest.fixture
def timed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[list[float], int]]]:
    """The seconds of steps of several batches by a clock, and how often it was read."""
    pool = ModelPool(ModelConfig(name_or_path=str(tiny_model)), LoraSettings(r=2))
    state = initial_state(pool.layout, 1)

    with pool.model(state, trainable="A and B") as model:

        def of(batches: list[int], *seconds: float) -> tuple[list[float], int]:
            clock = Steps(*seconds)
            monkeypatch.setattr(step_times, "time", clock)
            timer = StepTimer(model, TrainConfig(), 0)
            rows = [[Example(range(4), range(4))] * batch for batch in batches]
            return [timer.step_s(each) for each in rows], clock.made

        yield of


def test_a_stall_is_no_speed(timed: Callable[..., tuple[list[float], int]]) -> None:
    """The first reading of each batch ends the step that warms up."""
    four = [0.0, 0.0625, 0.0625, 0.0625]
    assert timed([8], 0.0, 0.125, 0.75, 0.125) == ([0.125], 4)
    assert timed([4, 8], *four, 9.0, 0.125) == ([0.0625, 0.125], 6)
    # A large batch is timed once, and again where it is slow beside the one before.
    assert timed([4, 8], 0.0, 0.0625, 0.75, 0.0625, 0.0, 0.75, 0.125) == ([0.0625, 0.125], 7)
    assert timed([1], 0.0, *[0.125] * 4, 5.0, *[0.125] * 3) == ([0.125], 9)


def test_a_batch_that_is_always_slow_is_slow(
    timed: Callable[..., tuple[list[float], int]],
) -> None:
    four = [0.0, 0.0625, 0.0625, 0.0625]
    assert timed([4, 8], *four, 0.0, 0.75, 0.75, 0.75) == ([0.0625, 0.75], 8)


def test_repeated_steps_have_a_bound_on_their_seconds(
    timed: Callable[..., tuple[list[float], int]],
) -> None:
    """A step of 20 s is repeated once in a profile, and one of 40 s never."""
    assert timed([8], 0.0, 40.0) == ([40.0], 2)
    assert timed([8], 0.0, 20.0, 20.0) == ([20.0], 3)


def test_coding_that_stalls_once_is_timed_again(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([5.0, 0.25])
    monkeypatch.setattr(step_times, "_beside_s", lambda *_: next(seconds))
    profile = profiled(run_config | {"method": {"name": "fedpipe"}}, tmp_path)
    assert profile.fixed_s == 0.25


def test_the_limit_of_a_process_is_the_least_of_its_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "CGROUP", tmp_path / "memory.max")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, 0))
    machine = measure.memory_limit()
    (tmp_path / "memory.max").write_text("max\n")
    assert measure.memory_limit() == machine
    (tmp_path / "memory.max").write_text("5000000\n")
    assert measure.memory_limit() == 5_000_000
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4_000_000, 0))
    assert measure.memory_limit() == 4_000_000


def test_a_full_load_is_that_of_the_run() -> None:
    steps = TrainConfig(max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert measure.full_load(steps, 100) == 24
    assert measure.full_load(TrainConfig(num_train_epochs=0.5), 101) == 50
