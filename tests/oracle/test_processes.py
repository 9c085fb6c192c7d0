"""Several processes that train together: the result is that of one process."""

import os
import signal
import socket
import subprocess
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fluvial.data import Example
from fluvial.data.packing import pack
from fluvial.errors import DivergenceError, RefusalError
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.targets import LoraSettings
from fluvial.runs.config import parse
from fluvial.runs.run import execute
from fluvial.training.config import TrainConfig
from fluvial.training.processes import Job, Processes, refuse_alone, train_job
from fluvial.training.team import LostError
from fluvial.training.train import TrainReport
from fluvial.wire.tensors import Named, relative_error, subtract
from tests.oracle.test_train import EXAMPLES
from tests.support.flower_lab import launched, toml


def settings(**changes: Any) -> TrainConfig:
    usual = {"learning_rate": 0.05, "max_steps": 3, "optim": "sgd"}
    return TrainConfig.model_validate(usual | changes)


def pool_of(folder: Path, tuning: LoraSettings | None) -> ModelPool:
    return ModelPool(ModelConfig(name_or_path=str(folder), device="cpu"), tuning)


def start(pool: ModelPool) -> Named:
    draw = torch.Generator().manual_seed(4)
    return {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in pool.layout.shapes}


def trained(
    pool: ModelPool,
    config: TrainConfig,
    *,
    examples: list[Example] = EXAMPLES,
    factors: Literal["A and B", "B"] = "A and B",
    watch: Any = None,
) -> tuple[Named, TrainReport]:
    """The update of one job, and its report."""
    state = start(pool)
    assignment = pool.assignment(config.per_device_train_batch_size)
    job = Job(state, factors, examples, config, assignment, (0, "train", 1, "north"))
    before = pool.weights(state)
    report = train_job(pool, job, before, watch)
    return subtract(report.weights, before), report


@pytest.fixture
def agent() -> Iterator[dict[str, str]]:
    """The environment of two processes, with a store as torchrun's agent has it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    yield {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    del store


@pytest.fixture
def second(agent: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The id of the second process, a fork of this one, which is the first from here on."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(300)  # a test that fails leaves no process behind
            os.environ.update(agent | {"RANK": "1", "LOCAL_RANK": "1"})
            here = Processes.here()
            assert here is not None
            here.serve()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    for name, value in (agent | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    try:
        yield child
        here = Processes.here()
        assert here is not None
        here.end()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, -signal.SIGKILL)
    finally:
        monkeypatch.undo()


LORA = LoraSettings(r=4, lora_alpha=16, lora_dropout=0.0, target_modules="attention")


def alone(pool: ModelPool, config: TrainConfig, **how: Any) -> tuple[Named, TrainReport]:
    """The same job in this process, without the environment of torchrun."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WORLD_SIZE")
        return trained(pool, config, **how)


def same(left: tuple[Named, TrainReport], right: tuple[Named, TrainReport]) -> bool:
    assert relative_error(left[0], right[0]) < 1e-8  # squared; fp32 sums in another order
    assert left[1].loss == pytest.approx(right[1].loss, rel=1e-5)
    assert left[1].grad_norm == pytest.approx(right[1].grad_norm, rel=1e-4)
    return (left[1].steps, left[1].label_tokens) == (right[1].steps, right[1].label_tokens)


def test_two_processes_train_as_one(tiny_model: Path, second: int) -> None:
    pool = pool_of(tiny_model, LORA)
    cases: list[tuple[TrainConfig, dict[str, Any]]] = [
        (settings(), {}),
        (settings(per_device_train_batch_size=2, gradient_accumulation_steps=3), {}),
        (settings(gradient_checkpointing=True), {"examples": pack(EXAMPLES, 64)}),
        (settings(per_device_train_batch_size=1), {"factors": "B"}),  # no share for the second
        (settings(), {"watch": lambda _: False}),
    ]
    for config, how in cases:
        assert same(trained(pool, config, **how), alone(pool, config, **how)), config

    assert trained(pool, settings(), watch=lambda _: False)[1].steps == 1


def test_dropout_masks_are_those_of_one_process(tiny_model: Path, second: int) -> None:
    """Micro-batches are shared as they are where every process has one."""
    pool = pool_of(tiny_model, LORA.model_copy(update={"lora_dropout": 0.3}))
    config = settings(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    together = trained(pool, config)
    assert same(together, alone(pool, config))
    another = config.model_copy(update={"per_device_train_batch_size": 4})
    assert relative_error(alone(pool, another)[0], together[0]) > 1e-4


def test_all_weights_are_trained_together(tiny_gqa_model: Path, second: int) -> None:
    pool = pool_of(tiny_gqa_model, None)
    assert same(trained(pool, settings()), alone(pool, settings()))


def test_a_training_that_diverges_ends_in_all_processes(tiny_model: Path, second: int) -> None:
    pool = pool_of(tiny_model, LORA)
    loud = pool_of(tiny_model, LORA.model_copy(update={"lora_alpha": 1e6}))
    with pytest.raises(DivergenceError):
        trained(loud, settings(learning_rate=100.0, max_steps=40, max_grad_norm=0))
    assert same(trained(pool, settings()), alone(pool, settings()))


def test_a_process_that_ends_is_a_failure_of_the_site(tiny_model: Path, second: int) -> None:
    pool = pool_of(tiny_model, LORA)

    def kill(_: Any) -> bool:
        os.kill(second, signal.SIGKILL)
        return True

    with pytest.raises(LostError, match="another process of this site's training has ended"):
        trained(pool, settings(max_steps=20), watch=kill)


def test_methods_with_steps_of_their_own_are_refused(
    run_config: dict[str, Any], agent: dict[str, str], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (agent | {"RANK": "0"}).items():
            patch.setenv(name, value)
        for method in ("fedcybgd", "flglm"):
            table = {name: value for name, value in run_config.items() if name != "lora"}
            config = parse(table | {"method": {"name": method}}, "test")
            with pytest.raises(RefusalError, match="trains in one process"):
                list(execute(config, tmp_path / method))

        with pytest.raises(RefusalError, match="2 processes would share one GPU; set 'auto'"):
            refuse_alone("cuda:1", "fedavg", shares=True)
        refuse_alone("auto", "fedavg", shares=True)


def test_an_environment_of_no_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(Exception, match="torchrun did not start this process"):
        Processes.here()


@pytest.mark.slow
def test_torchrun_runs_the_command(run_config: dict[str, Any], tmp_path: Path) -> None:
    """The whole command with two processes, against the same run in one."""
    table = run_config | {"train": run_config["train"] | {"optim": "sgd", "learning_rate": 0.05}}
    table["lora"] = {"r": 4, "lora_dropout": 0.0}
    file = tmp_path / "run.toml"
    file.write_text(toml(table))
    for name, processes in (("two", 2), ("one", 1)):
        out = subprocess.run(
            [*launched(processes), "run", str(file), "--out", str(tmp_path / name)],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert out.returncode == 0, out.stderr
        # three sites, two rounds
        assert ("process 1 took part in 6 trainings" in out.stderr) == (processes == 2)
        assert out.stdout.count("\nPage ") == 1, "one process prints"

    one, two = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("one", "two")
    )
    assert relative_error(one, two) < 1e-8  # squared; fp32 sums in another order
