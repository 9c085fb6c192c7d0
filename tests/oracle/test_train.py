"""The one training loop: what it computes does not depend on how it is cut, repeated or who runs
beside it."""

import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fluvial.data import IGNORE_INDEX, Example
from fluvial.errors import DivergenceError
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.models.tuning import tuned_parameters
from fluvial.seeds import generator
from fluvial.training.config import TrainConfig
from fluvial.training.stepper import Stepper, learning_rate_share
from fluvial.training.train import (
    TrainReport,
    collate,
    predictions,
    shuffled_batches,
    summed_loss,
    train,
)
from fluvial.wire.tensors import Named, cosine, energy, norm, relative_error, scale, subtract
from tests.support.weights import read_weights

LORA = LoraSettings(r=4, lora_dropout=0.0, target_modules=("q_proj", "v_proj"))
DROPOUT = LORA.model_copy(update={"lora_dropout": 0.3})


def example(length: int, answer: int, seed: int) -> Example:
    """A random sequence whose last `answer` tokens are labels."""
    ids = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [IGNORE_INDEX] * (length - answer) + ids[length - answer :])


# label counts from 1 to 30, so that averaging by sequence or by micro-batch differs from averaging
# by token
EXAMPLES = [
    example(answer + 8 + 3 * number, answer, seed=number)
    for number, answer in enumerate([1, 2, 30, 3, 1, 20, 2, 45])
]


def settings(**changes: Any) -> TrainConfig:
    usual = {"learning_rate": 0.01, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0}
    return TrainConfig.model_validate(usual | changes)


@pytest.fixture(scope="module")
def pool(tiny_model: Path) -> ModelPool:
    return ModelPool(ModelConfig(name_or_path=str(tiny_model), device="cpu"), LORA)


@pytest.fixture(scope="module")
def dropout_pool(tiny_model: Path) -> ModelPool:
    return ModelPool(ModelConfig(name_or_path=str(tiny_model), device="cpu"), DROPOUT)


def start(pool: ModelPool) -> Named:
    """A random adapter with both factors away from zero, so that both have gradients."""
    draw = torch.Generator().manual_seed(4)
    return {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in pool.layout.shapes}


def tuned(
    pool: ModelPool,
    config: TrainConfig,
    *,
    seed: int = 0,
    steps: int | None = None,
    examples: list[Example] = EXAMPLES,
) -> tuple[Named, TrainReport]:
    """The adapter after one call of `train`, and its report."""
    with pool.model(
        start(pool), trainable="A and B", checkpointing=config.gradient_checkpointing
    ) as model:
        report = train(
            model, examples, config, pad_token_id=0, generator=generator(seed, "test"), steps=steps
        )
        return read_weights(model), report


def test_a_watcher_sees_every_gradient_and_ends_the_training(pool: ModelPool) -> None:
    config = settings(max_steps=4, lr_scheduler_type="constant")
    norms: list[float] = []

    def watch(parameters: Mapping[str, nn.Parameter]) -> bool:
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        norms.append(norm(gradients))
        return len(norms) < 2

    with pool.model(start(pool), trainable="A and B") as model:
        report = train(
            model, EXAMPLES, config, pad_token_id=0, generator=generator(0, "test"), watch=watch
        )
        watched = read_weights(model)

    two, expected = tuned(pool, config, steps=2)
    assert equal(watched, two)
    assert report == expected
    assert report.steps == 2
    assert sum(norms) / 2 == pytest.approx(report.grad_norm)


def equal(left: Named, right: Named) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def gradient(pool: ModelPool, config: TrainConfig) -> Named:
    """What one SGD step at learning rate 0.01 without clipping moved, divided by -0.01: the
    gradient."""
    return scale(subtract(tuned(pool, config)[0], start(pool)), -100)


def reference(pool: ModelPool) -> Named:
    """The gradient of summed loss / label tokens over all examples at once, straight from
    autograd."""
    with pool.model(start(pool), trainable="A and B") as model:
        loss = summed_loss(*predictions(model, collate(EXAMPLES, 0)))
        (loss / sum(item.label_tokens for item in EXAMPLES)).backward()  # type: ignore[no-untyped-call]
        return {
            name: p.grad.clone()
            for name, p in tuned_parameters(model).items()
            if p.grad is not None
        }


CUTS = [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)]


@pytest.mark.parametrize(("size", "accumulated"), CUTS)
def test_gradient_does_not_depend_on_the_micro_batches(
    pool: ModelPool, size: int, accumulated: int
) -> None:
    config = settings(per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
    found = gradient(pool, config)
    true = reference(pool)
    assert found.keys() == true.keys()
    # Relative squared error: the step is read from fp32 weights of size 0.1, which leaves (6e-9 *
    # 100)^2 a value.
    assert relative_error(true, found) < 1e-6
    assert cosine(true, found) > 1 - 1e-6


def test_loss_does_not_depend_on_the_micro_batches(pool: ModelPool) -> None:
    reports = [
        tuned(
            pool,
            settings(per_device_train_batch_size=size, gradient_accumulation_steps=accumulated),
        )[1]
        for size, accumulated in CUTS
    ]
    assert {report.label_tokens for report in reports} == {
        sum(item.label_tokens for item in EXAMPLES)
    }
    for report in reports:
        assert report.loss == pytest.approx(reports[0].loss, rel=1e-6)  # fp32 sums in another order
        assert report.grad_norm == pytest.approx(reports[0].grad_norm, rel=1e-5)


def test_averaging_each_micro_batch_would_give_another_gradient(pool: ModelPool) -> None:
    with pool.model(start(pool), trainable="A and B") as model:
        for item in EXAMPLES:
            loss = summed_loss(*predictions(model, collate([item], 0)))
            (loss / item.label_tokens / len(EXAMPLES)).backward()  # type: ignore[no-untyped-call]

        averaged = {
            name: p.grad.clone()
            for name, p in tuned_parameters(model).items()
            if p.grad is not None
        }

    assert cosine(reference(pool), averaged) < 0.95
    assert relative_error(reference(pool), averaged) > 0.1


def test_the_loss_is_the_cross_entropy_of_the_labels(pool: ModelPool) -> None:
    with pool.model(start(pool)) as model, torch.no_grad():
        found, labels = predictions(model, collate(EXAMPLES, 0))
        loss = summed_loss(found, labels)
        expected = 0.0

        for item in EXAMPLES:
            logits = model(input_ids=torch.tensor([item.input_ids])).logits[0].double()
            for position in range(1, len(item.labels)):
                if item.labels[position] != IGNORE_INDEX:
                    expected -= float(logits[position - 1].log_softmax(-1)[item.labels[position]])

    assert float(loss) == pytest.approx(expected, rel=1e-5)  # fp32


def test_collate_pads_on_the_right_and_keeps_padding_out_of_the_loss() -> None:
    batch = collate([Example([5, 6, 7], [IGNORE_INDEX, 6, 7]), Example([8], [8])], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_every_epoch_is_a_fresh_permutation() -> None:
    def epochs(seed: int) -> Iterator[list[int]]:
        batches = shuffled_batches(EXAMPLES, 3, generator(seed, "order"))
        while True:
            epoch = [next(batches) for _ in range(3)]
            assert [len(batch) for batch in epoch] == [3, 3, 2]
            yield [EXAMPLES.index(item) for batch in epoch for item in batch]

    first, second = (order for order, _ in zip(epochs(0), range(2), strict=False))
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert next(epochs(0)) == first
    assert next(epochs(1)) != first


@pytest.mark.parametrize(
    ("changes", "examples", "expected"),
    [
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 100, 13),
        ({"per_device_train_batch_size": 8}, 96, 12),
        ({"per_device_train_batch_size": 8, "num_train_epochs": 2.5}, 96, 30),
        ({"per_device_train_batch_size": 8, "num_train_epochs": 0.01}, 96, 1),
        ({"per_device_train_batch_size": 8}, 3, 1),
        ({"max_steps": 5}, 96, 5),
    ],
)
def test_steps_of_a_round(changes: dict[str, Any], examples: int, expected: int) -> None:
    assert TrainConfig(**changes).steps(examples) == expected


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [1.0, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.5 * (1 - math.sqrt(0.5))]),
        ("constant", 0.0, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.5, [0.5, 1.0, 1.0, 0.5]),
        ("cosine", 0.5, [0.5, 1.0, 1.0, 0.5]),
        ("constant", 0.25, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.9, [0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_learning_rate_schedule(kind: Any, warmup: float, expected: list[float]) -> None:
    config = TrainConfig(lr_scheduler_type=kind, warmup_ratio=warmup)
    assert [learning_rate_share(step, 4, config) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decays_over_rounds_are_those_of_transformers(kind: Any) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    share = get_scheduler(kind, optimizer, num_warmup_steps=0, num_training_steps=5).lr_lambdas[0]
    config = TrainConfig(learning_rate=1.0, round_scheduler_type=kind)
    rates = [config.in_round(round, 5).learning_rate for round in range(1, 6)]
    assert rates == pytest.approx([share(done) for done in range(5)])
    assert TrainConfig().in_round(3, 5) == TrainConfig()


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt"])
def test_schedules_are_those_of_transformers(kind: Any, warmup: int) -> None:
    """The warm-up is theirs one step earlier, so that no step is made at a learning rate of 0."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=8)
    share = theirs.lr_lambdas[0]
    config = TrainConfig(lr_scheduler_type=kind, warmup_steps=warmup)
    expected = [share(step + 1 if step < warmup else step) for step in range(8)]
    assert [learning_rate_share(step, 8, config) for step in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_optimizers_are_those_of_transformers(optim: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    numbers: dict[str, Any] = {
        "learning_rate": 0.02,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.1,
    }
    ours = {name: value for name, value in numbers.items() if "adam" in optim or "adam" not in name}
    config = TrainConfig.model_validate({"optim": optim, "lr_scheduler_type": "constant", **ours})
    arguments = TrainingArguments(str(tmp_path), optim=optim, use_cpu=True, **numbers)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    draw = torch.Generator().manual_seed(0)
    value = torch.randn(5, 7, generator=draw)
    mine, other = nn.Parameter(value.clone()), nn.Parameter(value.clone())
    stepper = Stepper({"weight": mine}, config, steps=4)
    optimizer = kind([other], weight_decay=config.weight_decay, **options)

    for step in range(4):
        gradient = torch.randn(5, 7, generator=draw)
        mine.grad, other.grad = gradient.clone(), gradient.clone()
        stepper.step(step)
        optimizer.step()

    # AdamW of all tensors at once and one by one round alike; a fused kernel may not.
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert float((mine - value).detach().abs().min()) > 0


def test_gradient_checkpointing_holds_less_for_the_backward_pass(pool: ModelPool) -> None:
    """Bytes that autograd saves, apart from weights."""
    held = {}
    for checkpointing in (False, True):
        with pool.model(start(pool), trainable="A and B", checkpointing=checkpointing) as model:
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            saved: dict[int, int] = {}

            def pack(tensor: Tensor, weights: set[int] = weights, saved: Any = saved) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    saved[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                logits, labels = predictions(model, collate(EXAMPLES, 0))
            held[checkpointing] = sum(saved.values())
            assert summed_loss(logits, labels).requires_grad

    assert held[True] < 0.6 * held[False]


def test_the_schedule_reaches_the_optimizer(pool: ModelPool) -> None:
    full = subtract(tuned(pool, settings())[0], start(pool))
    warming = subtract(tuned(pool, settings(warmup_ratio=0.99), steps=2)[0], start(pool))
    assert norm(warming) > norm(full)  # steps at 1/2 and 1
    once = subtract(
        tuned(pool, settings(max_steps=1, warmup_ratio=0.0, lr_scheduler_type="constant"))[0],
        start(pool),
    )
    assert equal(once, full)


def test_sgd_is_a_step_along_the_gradient_with_decay(pool: ModelPool) -> None:
    before = start(pool)
    true = reference(pool)
    after = tuned(pool, settings(weight_decay=0.5))[0]

    for name in before:
        expected = before[name] - 0.01 * (true[name] + 0.5 * before[name])
        torch.testing.assert_close(
            after[name], expected, rtol=0, atol=2e-8
        )  # two roundings of values near 0.3


def test_adamw_first_step_has_the_size_of_the_learning_rate(pool: ModelPool) -> None:
    moved = subtract(tuned(pool, settings(optim="adamw_torch", adam_epsilon=1e-12))[0], start(pool))
    sizes = torch.cat([tensor.flatten().abs() for tensor in moved.values()])
    torch.testing.assert_close(sizes, torch.full_like(sizes, 0.01), rtol=1e-4, atol=1e-7)


def test_the_gradient_is_clipped_to_the_norm(pool: ModelPool) -> None:
    free, report = tuned(pool, settings())
    threshold = report.grad_norm / 4
    clipped, same = tuned(pool, settings(max_grad_norm=threshold))
    moved = subtract(free, start(pool))
    less = subtract(clipped, start(pool))
    assert same.grad_norm == report.grad_norm, "the norm before clipping is reported"
    assert norm(moved) == pytest.approx(0.01 * report.grad_norm, rel=1e-3)
    assert norm(less) == pytest.approx(0.01 * threshold, rel=1e-3)
    assert cosine(moved, less) > 0.9999
    assert equal(tuned(pool, settings(max_grad_norm=report.grad_norm * 2))[0], free)


def test_training_learns_and_reports(pool: ModelPool) -> None:
    config = settings(
        optim="adamw_torch", learning_rate=0.02, per_device_train_batch_size=8, max_steps=30
    )
    _, report = tuned(pool, config)
    _, first = tuned(pool, config, steps=1)
    assert (report.steps, first.steps) == (30, 1)
    assert report.label_tokens == 30 * first.label_tokens
    assert first.loss == pytest.approx(math.log(300), rel=0.05)
    assert report.loss < first.loss - 0.05


def test_only_what_is_trainable_moves(pool: ModelPool) -> None:
    before = start(pool)
    with pool.model(before, trainable="B") as model:
        base = {name: p.clone() for name, p in model.named_parameters() if ".lora_" not in name}
        train(model, EXAMPLES, settings(), pad_token_id=0, generator=generator(0))
        after = read_weights(model)
        assert not model.training
        assert all(
            torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base
        )

    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        n for n in before if "lora_B" in n
    }


def test_the_same_seed_gives_the_same_weights_bit_for_bit(dropout_pool: ModelPool) -> None:
    config = settings(
        optim="adamw_torch",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
    )
    first, report = tuned(dropout_pool, config, seed=1)
    torch.manual_seed(99)
    again, same = tuned(dropout_pool, config, seed=1)
    assert equal(first, again)
    assert report == same
    assert not equal(first, tuned(dropout_pool, config, seed=2)[0])


def test_all_tensors_at_once_step_as_one_by_one(
    pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(optim="adamw_torch", weight_decay=0.1, max_steps=4)
    at_once, report = tuned(pool, config)
    plain = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *args, **named: plain(*args, **named | {"foreach": False})
    )
    one_by_one, same = tuned(pool, config)
    assert equal(at_once, one_by_one)
    assert report == same


def test_gradient_checkpointing_changes_nothing(dropout_pool: ModelPool) -> None:
    """The repeated forward pass must draw the very same dropout masks."""
    config = settings(optim="adamw_torch", per_device_train_batch_size=4, max_steps=3)
    plain = tuned(dropout_pool, config)
    saving = tuned(dropout_pool, config.model_copy(update={"gradient_checkpointing": True}))
    assert equal(plain[0], saving[0])
    assert plain[1] == saving[1]


def test_gradient_checkpointing_repeats_forward_passes(dropout_pool: ModelPool) -> None:
    """Otherwise the test above would compare a thing with itself."""
    calls = {True: 0, False: 0}
    for checkpointing in calls:
        with dropout_pool.model(
            start(dropout_pool), trainable="A and B", checkpointing=checkpointing
        ) as model:
            hooks = [
                module.register_forward_hook(
                    lambda *_, on=checkpointing: calls.update({on: calls[on] + 1})
                )
                for name, module in model.named_modules()
                if name.endswith("q_proj.lora_A.default")
            ]
            train(model, EXAMPLES, settings(), pad_token_id=0, generator=generator(0))
            for hook in hooks:
                hook.remove()

    assert calls == {True: 4, False: 2}


def test_dropout_and_its_masks_change_from_step_to_step(
    dropout_pool: ModelPool, pool: ModelPool
) -> None:
    same = EXAMPLES[:1]
    config = settings(learning_rate=1e-30, max_steps=1)
    _, one = tuned(dropout_pool, config, examples=same)
    _, three = tuned(dropout_pool, config, examples=same, steps=3)
    _, without = tuned(pool, config, examples=same)
    assert one.loss != without.loss
    assert one.loss != three.loss, "three steps with one mask would have one loss"


def test_training_does_not_depend_on_what_other_threads_do(dropout_pool: ModelPool) -> None:
    config = settings(optim="adamw_torch", per_device_train_batch_size=2, max_steps=4)
    alone = {seed: tuned(dropout_pool, config, seed=seed)[0] for seed in range(3)}
    beside: dict[int, Named] = {}
    ready = threading.Barrier(3)

    def site(seed: int) -> None:
        ready.wait()
        torch.rand(1000)
        beside[seed] = tuned(dropout_pool, config, seed=seed)[0]

    threads = [threading.Thread(target=site, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal(beside[seed], alone[seed]) for seed in alone)


def test_bf16_runs_near_fp32_with_fp32_weights(pool: ModelPool) -> None:
    config = settings(optim="adamw_torch", learning_rate=0.02, max_steps=5)
    seen: list[torch.dtype] = []
    with pool.model(start(pool), trainable="A and B") as model:
        hook = model.get_submodule(
            "base_model.model.model.layers.0.mlp.up_proj"
        ).register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
        half = train(
            model,
            EXAMPLES,
            config.model_copy(update={"bf16": True}),
            pad_token_id=0,
            generator=generator(0, "test"),
        )
        hook.remove()
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    full = tuned(pool, config)[1]
    assert set(seen) == {torch.bfloat16}
    assert half.loss != full.loss
    assert half.loss == pytest.approx(full.loss, rel=0.02)  # bf16 has 8 bits


def test_divergence_is_an_error_that_names_the_settings(pool: ModelPool) -> None:
    config = settings(lr_scheduler_type="constant", max_steps=20)
    config = config.model_copy(
        update={"learning_rate": 1e30}
    )  # more than a file may say, to diverge at once
    with pytest.raises(
        DivergenceError,
        match=r"step \d+ of 20: the loss .*lower train.learning_rate \(now 1e\+30\)",
    ):
        tuned(pool, config)


def test_a_step_that_is_not_finite_is_not_taken(pool: ModelPool) -> None:
    broken = {name: torch.full_like(tensor, 3e38) for name, tensor in start(pool).items()}
    with pool.model(broken, trainable="A and B") as model:
        with pytest.raises(DivergenceError, match="step 1 of 1"):
            train(model, EXAMPLES, settings(), pad_token_id=0, generator=generator(0))
        assert equal(read_weights(model), broken)


def test_training_needs_labels_examples_and_parameters(pool: ModelPool) -> None:
    mute = Example([5, 6, 7], [5, IGNORE_INDEX, IGNORE_INDEX])
    assert mute.label_tokens == 0
    for trainable, examples, message in (
        ("B", [mute], "without label tokens"),
        ("B", [], "no examples"),
        ("none", EXAMPLES, "nothing to train"),
    ):
        with (
            pytest.raises(AssertionError, match=message),
            pool.model(start(pool), trainable=trainable) as model,
        ):
            train(model, examples, settings(), pad_token_id=0, generator=generator(0))


def test_the_initial_adapter_moves_only_b_at_first(pool: ModelPool) -> None:
    """B is zero, so the gradient of A is too."""
    with pool.model(initial_state(pool.layout, 0), trainable="A and B") as model:
        before = read_weights(model)
        train(model, EXAMPLES, settings(), pad_token_id=0, generator=generator(0))
        moved = subtract(read_weights(model), before)

    assert energy({name: tensor for name, tensor in moved.items() if "lora_A" in name}) == 0
    assert all(tensor.count_nonzero() for name, tensor in moved.items() if "lora_B" in name)


class Fixed(nn.Module):
    """A model whose logits are one parameter, whatever it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(5))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 5))


def test_the_loop_fits_a_known_distribution() -> None:
    """Without any transformer: labels 1, 1, 1, 2 give the distribution (3/4, 1/4)."""
    model = Fixed()
    data = [Example([0, 1, 1], [0, 1, 1]), Example([0, 1, 2], [0, 1, 2])]
    config = settings(learning_rate=1.0, max_steps=300, lr_scheduler_type="cosine")
    train(model, data, config, pad_token_id=0, generator=generator(0))
    shares = model.logits.detach().softmax(-1)
    assert shares.tolist() == pytest.approx([0, 0.75, 0.25, 0, 0], abs=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0},
        {"gradient_accumulation_steps": 0},
        {"warmup_ratio": 1.0},
        {"optim": "lion"},
        {"warmup_steps": 2, "warmup_ratio": 0.1},
        {"epochs": 1},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainConfig(**wrong)
