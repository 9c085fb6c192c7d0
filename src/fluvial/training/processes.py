"""Several processes of one site, as torchrun starts them: the first runs the command, and alone
talks to a server; the others take part in its trainings.

A training is a `Job`, which holds all that a process needs for it, so the others keep nothing but
the model between two trainings. Every process draws the same batches, takes its share of each, and
makes the same step with the sum of all gradients. The logical batch is that of the configuration,
whatever the number of processes, so the result is that of one process up to rounding.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from fluvial.data import Example
from fluvial.errors import ConfigError, DivergenceError, RefusalError
from fluvial.models.assignment import Assignment
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.targets import LoraSettings
from fluvial.seeds import generator
from fluvial.training.config import TrainConfig
from fluvial.training.team import ALONE, LostError, Team, Together
from fluvial.training.train import TrainReport, train
from fluvial.wire.payload import OWN_FILES, Payload, join_tensors, tensors_of
from fluvial.wire.tensors import Named

logger = logging.getLogger(__name__)

Watch = Callable[[Mapping[str, nn.Parameter]], bool]

WAIT = timedelta(seconds=30)
"""Time after which a process that waits for a training asks again."""
PATIENCE = timedelta(minutes=10)
"""Time for which a process waits for another one in a training."""
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Job:
    """One training of one site."""

    state: Named
    """State of the model at the beginning; see `ModelPool.model`."""
    factors: Literal["A and B", "B"]
    examples: Sequence[Example]
    config: TrainConfig
    assignment: Assignment
    stream: tuple[int, str, int, str]
    """Seed and names of the random stream of batches and dropout."""

    def run(
        self,
        pool: ModelPool,
        *,
        start: Named | None = None,
        team: Team = ALONE,
        watch: Watch | None = None,
    ) -> TrainReport:
        """Train as one of `team`; `start` has the trained parameters at the beginning, where they
        are known."""
        start = pool.weights(self.state, self.assignment) if start is None else start
        with pool.model(
            self.state,
            trainable=self.factors,
            checkpointing=self.config.gradient_checkpointing,
            assignment=self.assignment,
        ) as model:
            return train(
                model,
                self.examples,
                self.config,
                pad_token_id=pool.tokenizer.pad_token_id,
                generator=generator(*self.stream),
                start=start,
                watch=watch,
                team=team,
            )

    def to_bytes(self, pool: ModelPool, *, watched: bool) -> bytes:
        """Return the job for another process, with the model that `pool` has."""
        tuning = pool.tuning
        assert tuning is None or isinstance(tuning, LoraSettings), "trained by other code"
        rows: dict[str, list[Sequence[int]]] = {
            "ids": [each.input_ids for each in self.examples],
            "labels": [each.labels for each in self.examples],
            "lengths": [each.lengths for each in self.examples],
        }
        tensors = {
            f"{name}{suffix}": torch.tensor(values, dtype=torch.int64)
            for name, lists in rows.items()
            for suffix, values in (
                ("", [number for each in lists for number in each]),
                ("_sizes", [len(each) for each in lists]),
            )
        }
        run = pool.assignment(self.assignment.batch)
        values: dict[str, Any] = {
            "model": pool.config.model_dump_json(),
            "tuning": None if tuning is None else tuning.model_dump_json(),
            "train": self.config.model_dump_json(),
            "factors": self.factors,
            "stream": list(self.stream),
            "watched": watched,
            **self.assignment.to_values(run),
        }
        return Payload(join_tensors({"state": self.state, "rows": tensors}), values).to_bytes()


def _read(data: bytes, pools: dict[str, ModelPool]) -> tuple[ModelPool, Job, bool]:
    """Return the inverse of `Job.to_bytes`; the model of the last job is kept in `pools`."""
    payload = Payload.from_bytes(data, OWN_FILES)
    values: dict[str, Any] = payload.values
    key = f"{values['model']} {values['tuning']}"

    if key not in pools:
        pools.clear()  # one base at a time
        tuning = values["tuning"]
        pools[key] = ModelPool(
            ModelConfig.model_validate_json(values["model"]),
            None if tuning is None else LoraSettings.model_validate_json(tuning),
        )

    rows = tensors_of("rows", payload.tensors)
    lists = [_lists(rows[name], rows[f"{name}_sizes"]) for name in ("ids", "labels", "lengths")]
    config = TrainConfig.model_validate_json(values["train"])
    run = pools[key].assignment(config.per_device_train_batch_size)
    job = Job(
        tensors_of("state", payload.tensors),
        values["factors"],
        [Example(ids, labels, tuple(own)) for ids, labels, own in zip(*lists, strict=True)],
        config,
        Assignment.from_values(values, run),
        tuple(values["stream"]),
    )
    return pools[key], job, values["watched"]


def _lists(numbers: Tensor, sizes: Tensor) -> list[list[int]]:
    """Return lists of these sizes."""
    flat = numbers.tolist()
    ends = list(accumulate(sizes.tolist()))
    return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started, by the names of its environment."""

    rank: int
    size: int
    local_rank: int
    host: str
    port: int
    attempt: int

    @classmethod
    def here(cls) -> Self | None:
        """Return this process; None where it is the only one."""
        get = os.environ.get
        if int(get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return None
        if get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise ConfigError(
                "WORLD_SIZE is above 1, but torchrun did not start this process; use torchrun or "
                "accelerate launch, or unset WORLD_SIZE"
            )

        return cls(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            int(get("LOCAL_RANK", "0")),
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            int(get("TORCHELASTIC_RESTART_COUNT", "0")),
        )

    def _store(self) -> Store:
        """Return a connection to the store of torchrun, with names of our own."""
        store = TCPStore(self.host, self.port, is_master=False, timeout=PATIENCE)
        return PrefixStore(f"fluvial/{self.attempt}", store)

    @contextmanager
    def _team(self, store: Store, number: int) -> Iterator[Together]:
        """Meet the other processes for the training of this number."""
        cuda = torch.cuda.is_available()
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=PrefixStore(f"training/{number}", store),
                rank=self.rank,
                world_size=self.size,
                timeout=PATIENCE,
            )
        except RuntimeError as error:
            raise LostError from error

        try:
            yield Together()
        finally:
            dist.destroy_process_group()

    def train(self, pool: ModelPool, job: Job, start: Named, watch: Watch | None) -> TrainReport:
        """Run a job in all processes, as the first of them."""
        with _one_at_a_time:
            store = self._store()
            number = store.add("announced", 1)
            store.set(f"training/{number}", "begins")
            with self._team(store, number) as team:
                team.send(job.to_bytes(pool, watched=watch is not None))
                followed = None if watch is None else lambda seen: team.decide(watch(seen))
                return job.run(pool, start=start, team=team, watch=followed)

    def end(self) -> None:
        """Let the other processes end."""
        store = self._store()
        store.set(f"training/{store.add('announced', 1)}", "none")

    def serve(self) -> int:
        """Take part in trainings until the first process ends them; return how many there were."""
        self._take_device()
        store = self._store()
        pools: dict[str, ModelPool] = {}
        number = 1

        while (word := _next(store, f"training/{number}")) != b"none":
            assert word == b"begins"
            try:
                with self._team(store, number) as team:
                    pool, job, watched = _read(team.receive(), pools)
                    job.run(pool, team=team, watch=_follow(team) if watched else None)
            except (DivergenceError, LostError) as error:  # which the first process reports
                logger.info("process %d: %s", self.rank, error)
            number += 1

        return number - 1

    def _take_device(self) -> None:
        """Let "cuda" be this process's own GPU."""
        if not torch.cuda.is_available():
            return
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"torchrun started {self.local_rank + 1} processes or more, and this machine has "
                f"{torch.cuda.device_count()} GPUs; set --nproc-per-node to that"
            )
        torch.cuda.set_device(self.local_rank)


def _follow(team: Together) -> Watch:
    """Return a watch that decides as the first process."""
    return lambda _: team.decide(True)


def _next(store: Store, key: str) -> bytes:
    """Return the value of `key` once the first process has set it."""
    while True:
        try:
            store.wait([key], WAIT)
        except dist.DistStoreError:  # not set within this time
            continue
        return bytes(store.get(key))


def train_job(pool: ModelPool, job: Job, start: Named, watch: Watch | None = None) -> TrainReport:
    """Run a job in this process, or together with those that torchrun started beside it; `start` is
    what the trained parameters are before it.

    Raises `LostError` where one of them has ended.
    """
    here = Processes.here()
    if here is None:
        return job.run(pool, start=start, watch=watch)
    return here.train(pool, job, start, watch)


def refuse_alone(device: str, method: str, *, shares: bool) -> None:
    """Raise `RefusalError` beside other processes for a method that does not share its steps, or
    for a device that all of them would have."""
    here = Processes.here()
    if here is None:
        return
    if not shares:
        raise RefusalError(
            f"method.name={method!r} trains in one process; start the command without torchrun"
        )
    if device.startswith("cuda:"):
        raise RefusalError(
            f"model.device={device!r}: {here.size} processes would share one GPU; set 'auto'"
        )
