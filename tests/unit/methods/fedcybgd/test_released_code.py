"""FedCyBGD avoids faults of the released code: optimizer, decay, rounding, schedules, writers."""

import math
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn

from fluvial.data import Example
from fluvial.errors import ConfigError
from fluvial.runs.config import parse
from fluvial.seeds import generator
from fluvial.training import stepper
from fluvial.training.config import TrainConfig
from fluvial.training.stepper import learning_rate_share
from fluvial.training.train import train
from fluvial.wire.tensors import Named, add, cosine, moved, norm
from tests.support.fedcybgd import FORMS, LAYERS, Seen, Stage, differ


def test_the_optimizer_lives_as_long_as_the_visit_and_no_longer(
    stage: Stage, watch: list[Seen]
) -> None:
    """`switch_block_every = -1` and `x % -1 == 0` cleared Adam's state at every step of the
    released code."""
    stage.play(stage.table(2, train={"max_steps": 7}))
    assert len(watch) == 4

    for seen in watch:
        assert seen.steps == 7
        (optimizer,) = seen.optimizers
        assert [float(state["step"]) for state in optimizer.state.values()] == [7.0] * len(
            seen.trained
        )

    assert len({id(seen.optimizers[0]) for seen in watch}) == len(watch)


def test_adam_is_more_than_the_sign_of_the_gradient(stage: Stage) -> None:
    """Without moments a step is +-lr, so after five the way is an odd multiple of lr; with them it
    hardly ever is."""
    rate = 1e-3
    settings = {"learning_rate": rate, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    table = stage.table(1, rounds=1, train={**settings, "max_steps": 5})
    oracle = stage.oracle(table)

    def on_the_grid(update: Named) -> float:
        """The share of values that are an odd multiple of the rate, within 2 %; fp32 keeps the way
        to 1e-4 of it."""
        values = torch.cat([tensor.flatten() for tensor in update.values()]) / rate
        return float((((values - 1) / 2 - ((values - 1) / 2).round()).abs() < 0.01).float().mean())

    state = oracle.start
    for _ in range(5):  # the trap: a fresh optimizer for every step
        table["train"]["max_steps"] = 1
        state = moved(state, stage.oracle(table).update(state, 0, 1, oracle.sites[0]))

    assert on_the_grid({name: state[name] for name in oracle.names(0)}) > 0.98
    table["train"]["max_steps"] = 5
    played = stage.play(table).state
    assert on_the_grid({name: played[name] for name in oracle.names(0)}) < 0.1


def test_nothing_decays_unless_asked(stage: Stage, watch: list[Seen]) -> None:
    """torch's AdamW takes 0.01 by itself, norms and biases included."""
    stage.play(stage.table(1, rounds=1))
    stage.play(stage.table(1, rounds=1, train={"weight_decay": 0.03}))
    decays = [
        {group["weight_decay"] for group in seen.optimizers[0].param_groups} for seen in watch
    ]
    assert decays == [{0.0}, {0.03}]


class Tilted(nn.Module):
    """One weight, whose gradient is -1 wherever it is: the label's logit lies 30 below the other
    one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.02], dtype=dtype))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        logits = torch.cat([self.weight - 30, torch.zeros_like(self.weight)])
        return SimpleNamespace(logits=logits.expand(*input_ids.shape, 2))


def small_steps(
    dtype: torch.dtype, optim: str, *, steps: int, start: Named | None = None
) -> tuple[float, float]:
    """The way of the master and of the weight in so many steps of 1e-6."""
    model = Tilted(dtype)
    before = model.weight.item() if start is None else start["weight"].item()
    settings: dict[str, Any] = {
        "optim": optim,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
    }
    report = train(
        model,
        [Example([0, 0], [0, 0])],
        TrainConfig(**settings, max_grad_norm=0),
        pad_token_id=0,
        generator=generator(0),
        steps=steps,
        start=start,
    )

    return report.weights["weight"].item() - before, model.weight.item() - before


@pytest.mark.parametrize(
    ("dtype", "optim"),
    [(torch.float16, "sgd"), (torch.float16, "adamw_torch"), (torch.bfloat16, "adamw_torch")],
    ids=str,
)
def test_a_thousand_small_steps_move_a_half_precision_weight(
    dtype: torch.dtype, optim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 1e-6 is under half of what fp16 (1.5e-5) and bf16 (1.2e-4) resolve at 0.02; the sum
    of 1e-3 is not.

    fp32 resolves 1.9e-9 there, which 1,000 times is up to 0.1 % of the way.
    """
    master, weight = small_steps(dtype, optim, steps=1000, start={"weight": torch.tensor([0.02])})
    assert master == pytest.approx(1e-3, rel=2e-3)
    assert weight == pytest.approx(1e-3, abs=torch.finfo(dtype).eps * 0.02)
    assert small_steps(dtype, optim, steps=20)[0] == pytest.approx(2e-5, rel=2e-3), (
        "from the weight as it is"
    )
    monkeypatch.setattr(stepper, "_masters", lambda trained, _start: dict(trained))  # the trap
    assert small_steps(dtype, optim, steps=50)[1] == 0


def test_a_visit_to_a_half_precision_model_sends_what_fp32_knows(stage: Stage) -> None:
    """Steps of 1e-6, the released rate: nearly all weights move at the server, and in bf16 nearly
    none would."""
    table = stage.table(
        rounds=1, model={"dtype": "bfloat16"}, train={"learning_rate": 1e-6, "max_steps": 10}
    )
    played = stage.play(table)
    pool = played.run.pool
    names = [name for block in played.parts.blocks for name in block.layout.names]
    change = torch.cat([played.state[name].flatten() for name in names])
    weights = pool.weights({name: played.state[name] for name in names})
    base = pool.weights({name: torch.zeros_like(played.state[name]) for name in names})
    absolute = torch.cat([(weights[n].bfloat16() != base[n].bfloat16()).flatten() for n in names])
    assert float((change != 0).float().mean()) > 0.99
    assert float(absolute.float().mean()) < 0.05


@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 0.99),
    kind=st.sampled_from(["linear", "cosine", "constant"]),
)
@examples(max_examples=50, deadline=None)
def test_the_rate_rises_in_the_warm_up_only(
    steps: int, warmup: float, kind: Literal["linear", "cosine", "constant"]
) -> None:
    config = TrainConfig(warmup_ratio=warmup, lr_scheduler_type=kind)
    shares = [learning_rate_share(step, steps, config) for step in range(steps)]
    top = math.ceil(warmup * steps)
    assert all(0 < share <= 1 for share in shares)
    assert shares[:top] == sorted(shares[:top])
    assert shares[top:] == sorted(shares[top:], reverse=True)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_every_visit_has_a_schedule_of_its_own(kind: str, stage: Stage, watch: list[Seen]) -> None:
    """The released code handed the scheduler on, and beyond its end a cosine rises again."""
    settings = {"max_steps": 8, "warmup_ratio": 0.25, "lr_scheduler_type": kind}
    table = stage.table(2, train=settings)
    stage.play(table)
    config = parse(table, "test").train

    for seen in watch:
        assert seen.rates == [
            config.learning_rate * learning_rate_share(step, 8, config) for step in range(8)
        ]
        assert seen.rates[1] == max(seen.rates)
        assert seen.rates[2:] == sorted(seen.rates[2:], reverse=True)
        assert seen.rates[-1] > 0

    assert learning_rate_share(14, 8, config) == pytest.approx(0)  # the trap: a cosine rises again


def test_the_rate_may_fall_over_the_cycles(stage: Stage, watch: list[Seen]) -> None:
    table = stage.table(2, rounds=3, train={"round_scheduler_type": "cosine"})
    played = stage.play(table)
    first = [seen.rates[0] / 3e-3 for seen in watch]
    assert first == pytest.approx([1, 1, 0.75, 0.75, 0.25, 0.25])
    oracle = stage.oracle(table)
    state = oracle.start

    for cycle in range(3):
        for client, site in enumerate(oracle.sites):
            state = moved(state, oracle.update(state, client, cycle + 1, site))

    assert not differ(played.state, state)


def test_the_last_writer_does_not_win(stage: Stage) -> None:
    """Sites k and D + k both train block k; it ends with what both found, and the log says how far
    they agreed."""
    table = stage.table(2 * LAYERS, rounds=1)
    oracle = stage.oracle(table)
    played = stage.play(table)
    state = oracle.start
    updates = list[Named]()

    for client, site in enumerate(oracle.sites):
        updates.append(oracle.update(state, client % LAYERS, 1, site))
        state = moved(state, updates[-1])

    for block in range(LAYERS):
        first = updates[block]
        second = updates[block + LAYERS]
        assert min(norm(first), norm(second)) > 0
        assert not differ({name: played.state[name] for name in first}, add(first, second))

    assert played.rounds[0]["conflicts"] == [
        {
            "block": f"layer {block}",
            "sites": [oracle.sites[block], oracle.sites[block + LAYERS]],
            "cosine": pytest.approx(
                cosine(updates[block], updates[block + LAYERS]), rel=1e-12
            ),  # another order
            "resolved": "one after the other",
        }
        for block in range(LAYERS)
    ]


@pytest.mark.parametrize(
    ("method", "named"),
    [
        *[({"layers_per_block": wrong}, "layers_per_block") for wrong in (-1, 0)],
        *[({"parallel": wrong}, "parallel") for wrong in (-1, 0)],
        *[({"damping": wrong}, "damping") for wrong in (-1, 0, 1.5)],
        *[
            ({"download": {"form": "stale-subset", "share": wrong}}, "share")
            for wrong in (-1, 0, 1.01, 2)
        ],
        *[
            ({"download": {"form": "proxy", "kept": wrong, "drop": 0}}, "kept")
            for wrong in (-1, 0, 1.5)
        ],
        *[
            ({"download": {"form": "proxy", "kept": 0.1, "drop": wrong}}, "drop")
            for wrong in (-1, 1)
        ],
        *[({"download": {"form": "proxy", "multiple": wrong}}, "multiple") for wrong in (-1, 0)],
        *[({"accept": {"on": "public loss", "halvings": wrong}}, "halvings") for wrong in (-1, 9)],
        *[({"accept": {"on": "public loss", "examples": wrong}}, "examples") for wrong in (-1, 0)],
        *[
            ({"download": {"form": "low-bit"}, "gate": {"threshold": wrong}}, "threshold")
            for wrong in (-1, 1)
        ],
        *[
            ({"download": {"form": "low-bit"}, "gate": {"examples": wrong}}, "examples")
            for wrong in (-1, 0)
        ],
    ],
    ids=str,
)
def test_no_number_means_switched_off(method: dict[str, Any], named: str, stage: Stage) -> None:
    """The released code's -1 was meant to say "never", and x % -1 == 0 said "always"; a share of -1
    crashed."""
    with pytest.raises(ConfigError, match=rf"method\.\S*{named} = "):
        parse(stage.table(method=method), "test")


@pytest.mark.parametrize(
    "method",
    [
        {"order": "full", "parallel": 2},
        {"order": "full", **FORMS["proxy"]},
        {"hold": "disk", "download": {"form": "full"}},
        {"hold": "disk", **FORMS["proxy"]},
        {"order": "pairs", "merge": "sequential"},
        {"weighting": "equal"},
        {"gate": {"threshold": 0.5}},
        {"accept": {"slack": 0.1}},
    ],
    ids=str,
)
def test_settings_without_effect_are_refused(method: dict[str, Any], stage: Stage) -> None:
    with pytest.raises(ConfigError, match="without effect|nothing|use order|form="):
        parse(stage.table(method=method), "test")
