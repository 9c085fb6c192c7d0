"""Micro-batches in flight change no bit: the weights are those of one micro-batch at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import SiteTexts
from fluvial.errors import ConfigError
from fluvial.federation import releases
from fluvial.federation.meter import Kind
from fluvial.federation.store import Digests
from fluvial.methods.flglm.client_batch import ClientBatch
from fluvial.methods.flglm.middle import Middle
from fluvial.methods.flglm.server import FlGlmServer
from fluvial.models.pool import ModelPool
from fluvial.models.states import changed
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.run import Run, execute
from fluvial.wire.tensors import digest
from tests.oracle.test_flglm_rejoin import LATE, Round, assert_close, table, without
from tests.support.models import shared_four_layers
from tests.support.runs import run_table

rejoin_table = table  # the fixture of a client batch with a deadline
MODES = ("sequential", "client-batch", "hierarchical")
LORA = {"lora": {"r": 4, "lora_dropout": 0.2, "target_modules": "attention"}}
FULL = {"tune": "full"}
CASES: dict[str, dict[str, Any]] = {
    "LoRA with dropout": LORA,
    "LoRA, recomputed": LORA | {"train": {"gradient_checkpointing": True}},
    "LoRA, own ends": LORA | {"method": {"ends": "own"}},
    "LoRA, int4": LORA | {"method": {"hidden": {"name": "int4"}, "gradient": {"name": "int4"}}},
    "LoRA, changes": LORA | {"method": {"hidden": {"name": "int8"}, "recurring": "changes"}},
    "LoRA with noise": LORA | {"method": {"noise": {"clip": 1.0, "multiplier": 0.1}}},
    "frozen front": LORA | {"method": {"parts": {"front": "frozen"}}},
    "all weights, tied": FULL,
    "all weights, not tied": FULL | {"model": {"tie_word_embeddings": False}},
}


@dataclass(frozen=True)
class Trained:
    """All that a change of one bit changes in a round."""

    model: str
    """Digest of the model that the server has."""
    kept: Digests
    """Those of what the sites keep: their own layers, and hidden states."""
    bytes: dict[Kind, int]
    loss: float


@pytest.fixture
def train(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Trained]:
    """Train a case for one round with so many micro-batches in flight."""
    monkeypatch.setattr(releases, "_secret", lambda _: b"s" * 32)  # noise is that of the site
    base = {key: value for key, value in run_config.items() if key != "lora"}
    pools: dict[str, ModelPool] = {}

    def of(case: dict[str, Any], mode: str, in_flight: int) -> Trained:
        ends = {"ends": "own"} if case.get("tune") and mode == "client-batch" else {}
        settings = {"leakage": {"sites": "none"}, **ends, **case.get("method", {})}
        steps = {"learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 2}
        steps |= {"gradient_accumulation_steps": 4, "max_grad_norm": 0.05, "weight_decay": 0.1}
        table = base | {key: case[key] for key in ("lora", "tune") if key in case}
        table |= {
            "rounds": 1,
            "model": {"name_or_path": str(shared_four_layers(**case.get("model", {})))},
            "train": steps | case.get("train", {}),
            "method": {"name": "flglm", "mode": mode, "in_flight": in_flight} | settings,
        }
        config = parse(table, "test")
        key = f"{config.model!r} {config.tuned!r}"
        pool = pools.setdefault(key, ModelPool(config.model, config.adapter))
        return first_round(config, tmp_path / str(len(list(tmp_path.iterdir()))), pool)

    return of


def first_round(config: RunConfig, folder: Path, pool: ModelPool) -> Trained:
    """Train for one round; nothing is measured or written."""
    with RunFolder(folder) as opened:
        texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
        run = Run(config, opened, pool, texts)
        assert isinstance(run.server, FlGlmServer)
        method = run.server.config
        run.server.setup(run.fleet)
        record = run.server.round(1, run.fleet)
        kept = opened.store.digests(1)
        assert bool(kept) == (method.ends == "own" or method.remembers)
        model = digest(changed(run.server.model()))
        return Trained(model, kept, run.fleet.meter.totals, record["loss"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_one_at_a_time(
    train: Callable[..., Trained], case: str, mode: str
) -> None:
    """Sites have one to four micro-batches in a step."""
    one = train(CASES[case], mode, 1)
    assert train(CASES[case], mode, 2) == one
    if case == "LoRA with dropout":
        assert train(CASES[case], mode, 3) == one


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_the_server_holds_as_many_graphs(
    train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, in_flight: int
) -> None:
    forward = Middle.forward
    most = 0

    def watched(self: Any, *given: Any, **settings: Any) -> Any:
        nonlocal most
        sent = forward(self, *given, **settings)
        most = max(most, len(self._graphs))
        return sent

    monkeypatch.setattr(Middle, "forward", watched)
    train(LORA, "hierarchical", in_flight)
    assert most == in_flight


def test_recomputed_layers_have_the_dropout_of_their_pass(train: Callable[..., Trained]) -> None:
    """The loss of the second step has what the first one made."""
    plain = train(LORA, "hierarchical", 2)
    recomputed = train(CASES["LoRA, recomputed"], "hierarchical", 2)
    assert recomputed.loss == pytest.approx(plain.loss, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_run_resumes_to_the_same_bits(
    run_config: dict[str, Any], tmp_path: Path, mode: str
) -> None:
    """All objects are thrown away after a round, and in the middle of one."""
    table = run_config | {
        "model": {"name_or_path": str(shared_four_layers())},
        "train": run_config["train"] | {"gradient_accumulation_steps": 3},
        "method": {"name": "flglm", "mode": mode, "leakage": {"sites": "none"}},
    }
    straight = run_table(table, tmp_path / "straight")
    config = parse(table, "test")
    events = execute(config, tmp_path / "stopped")
    next(events)
    next(events)
    events.close()  # type: ignore[attr-defined]
    *_, last = execute(config, tmp_path / "stopped", resume=True)
    assert last.values["adapter_sha256"] == straight["adapter_sha256"]


# -- a client batch with late sites ----------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [2, 3])
@pytest.mark.parametrize("kind", ["forward", "backward", "clip"])
def test_a_late_site_rejoins_with_turns_on_their_way(
    rejoin_table: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    in_flight: int,
) -> None:
    """Turns of the old step that come after it was let rejoin are answered, and not used."""
    method = rejoin_table["method"] | {"in_flight": in_flight}
    opened = Round(rejoin_table | {"method": method}, tmp_path / "run")
    stale = 0
    hear = ClientBatch._hear

    def watched(self: Any, *given: Any) -> Any:
        nonlocal stale
        heard = hear(self, *given)
        stale += heard.stale
        return heard

    monkeypatch.setattr(ClientBatch, "_hear", watched)
    waits = iter([14.0, 16.0])

    def delay(*turn: Any) -> float:
        return next(waits, 1.0) if turn == (LATE, kind, 2) else 1.0

    adapter, record, fleet, _ = opened.play(delay)
    missed = record["missed_steps"]
    assert missed >= 2
    assert fleet.failures == []
    assert (stale > 0) == (kind != "clip")
    assert_close(adapter, opened.simulated(without(opened, range(2, 2 + missed))), opened.start)


def test_in_flight_is_refused_where_a_step_is_one_micro_batch(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    table = run_config | {
        "model": {"name_or_path": str(shared_four_layers())},
        "method": {"name": "flglm", "in_flight": 3},
    }
    with pytest.raises(ConfigError, match="method.in_flight"):
        run_table(table, tmp_path / "run")
