"""Equalities that prove the methods. Tolerance is zero unless a comment says why."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.codecs.quantise import IdentitySettings
from fluvial.data import SiteTexts
from fluvial.federation.fleet import Fleet
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.run import execute
from fluvial.seeds import generator
from fluvial.training.train import train
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Named, add, digest, norm, relative_error, scale, subtract
from tests.contract.test_methods import SETTINGS
from tests.support.runs import adapter_of, run_table, run_with_stops
from tests.support.weights import read_weights


def test_identity_codec_is_fedavg(run_config: dict[str, Any], tmp_path: Path) -> None:
    """CG-FedLLM with a codec that loses nothing is federated LoRA, over three rounds (spec g.3)."""
    plain = adapter_of(run_table(run_config | {"rounds": 3}, tmp_path / "a"))
    method = {"name": "cgfedllm", "tgap": {"source": "none"}}
    coded = run_table(
        run_config | {"rounds": 3, "method": method, "codec": {"name": "identity"}}, tmp_path / "b"
    )
    assert digest(adapter_of(coded)) == digest(plain)


def test_identity_codec_with_error_feedback_is_fedavg(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Nothing is lost, so every residual is zero; a configuration that asks for it is refused, so
    the codec is put into one that was read."""
    plain = adapter_of(run_table(run_config, tmp_path / "a"))
    method = {"name": "cgfedllm", "tgap": {"source": "none"}}
    config = parse(run_config | {"method": method, "codec": {"name": "identity"}}, "test")
    codec = IdentitySettings(error_feedback=True)
    *_, last = execute(config.model_copy(update={"codec": codec}), tmp_path / "b")
    assert digest(adapter_of(last.values | {"folder": str(tmp_path / "b")})) == digest(plain)
    assert list((tmp_path / "b" / "sites" / "north").glob("residual-*"))


def test_identity_codec_on_states_is_fedavg_up_to_rounding(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """received + update and the subtraction on the other end each round once, so the last bit may
    differ."""
    plain = adapter_of(run_table(run_config, tmp_path / "a"))
    method = {"name": "cgfedllm", "representation": "state", "tgap": {"source": "none"}}
    coded = run_table(
        run_config | {"method": method, "codec": {"name": "identity"}}, tmp_path / "b"
    )
    assert relative_error(plain, adapter_of(coded)) < 1e-12  # squared; fp32 rounding is 6e-8


def trained_by_first_site(
    config: RunConfig, pool: ModelPool, texts: SiteTexts, adapter: Named, number: int
) -> Named:
    """The adapter after the first site's training of round `number`, by the plain training loop."""
    site = texts.names[0]
    with pool.model(adapter, trainable="A and B") as model:
        train(
            model,
            texts.load(site).train,
            config.train,
            pad_token_id=pool.tokenizer.pad_token_id,
            generator=generator(config.seed, "train", number, site),
        )
        return read_weights(model)


def test_one_site_is_plain_local_training(one_site: dict[str, Any], tmp_path: Path) -> None:
    """Three rounds of FedAvg with one site are three calls of the training loop, whose difference
    travels in fp32."""
    config = parse(one_site | {"rounds": 3}, "test")
    pool = ModelPool(config.model, config.lora)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    adapter = initial_state(pool.layout, config.seed)

    for number in (1, 2, 3):
        trained = trained_by_first_site(config, pool, texts, adapter, number)

        adapter = add(
            adapter, subtract(trained, adapter)
        )  # what fp32 keeps of the difference, as on the wire

    assert digest(adapter_of(run_table(one_site | {"rounds": 3}, tmp_path / "fed"))) == digest(
        adapter
    )


@pytest.mark.parametrize(
    "method", [{"name": "fedavg"}, {"name": "cgfedllm", "tgap": {"source": "none"}}], ids=str
)
def test_server_momentum_is_nesterov_sgd_of_torch(
    method: dict[str, Any], one_site: dict[str, Any], tmp_path: Path
) -> None:
    """Three rounds of one site, with `torch.optim.SGD` as the server's optimizer, and resumed.

    The tolerance (squared, relative) is for fp32 sums in another order.
    """
    outer_settings = {"server_momentum": 0.9, "server_learning_rate": 0.7}
    codec = {"name": "identity"}
    table = one_site | {"rounds": 3, "method": method | outer_settings, "codec": codec}
    config = parse(table, "test")
    pool = ModelPool(config.model, config.lora)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    initial = initial_state(pool.layout, config.seed)
    adapter = {name: each.clone() for name, each in initial.items()}
    outer = torch.optim.SGD(adapter.values(), lr=0.7, momentum=0.9, nesterov=True)

    for number in (1, 2, 3):
        trained = trained_by_first_site(config, pool, texts, adapter, number)
        for name, value in adapter.items():
            value.grad = value - trained[name]
        outer.step()

    run = adapter_of(run_table(table, tmp_path / "straight"))
    assert relative_error(subtract(adapter, initial), subtract(run, initial)) < 1e-10
    stopped = run_with_stops(table, tmp_path / "stopped", [3, 99])
    assert digest(adapter_of(stopped | {"folder": str(tmp_path / "stopped")})) == digest(run)


@pytest.mark.parametrize(
    "method", [{"name": "fedavg"}, {"name": "cgfedllm", "tgap": {"source": "none"}}], ids=str
)
def test_a_moving_average_is_that_of_the_adapters_of_all_rounds(
    method: dict[str, Any], one_site: dict[str, Any], tmp_path: Path
) -> None:
    """Training is that without an average, whose adapters are those of runs of one, two and three
    rounds; what is exported and measured is their average, also resumed."""
    table = one_site | {"method": method, "codec": {"name": "identity"}}
    first, second, third = (
        adapter_of(run_table(table | {"rounds": rounds}, tmp_path / str(rounds)))
        for rounds in (1, 2, 3)
    )
    early = add(scale(first, 0.75), scale(second, 0.25))
    expected = add(scale(early, 0.75), scale(third, 0.25))

    averaged = table | {"rounds": 3, "method": method | {"ema_decay": 0.75}}
    run = run_table(averaged, tmp_path / "straight")
    assert digest(adapter_of(run)) == digest(expected)
    stopped = run_with_stops(averaged, tmp_path / "stopped", [3, 99])
    assert digest(adapter_of(stopped | {"folder": str(tmp_path / "stopped")})) == digest(expected)
    assert stopped["heldout"] == run["heldout"]


def test_one_site_is_the_local_baseline(one_site: dict[str, Any], tmp_path: Path) -> None:
    """FedAvg with one site and the method `local` measure the same."""
    fed = run_table(one_site, tmp_path / "a")
    alone = run_table(one_site | {"method": {"name": "local"}, "evaluate": {}}, tmp_path / "b")
    assert fed["heldout"]["final"] == alone["heldout"]["final"]


def test_one_sgd_step_is_one_central_step(run_config: dict[str, Any], tmp_path: Path) -> None:
    """One round of one full-batch SGD step on every site is one step on the union.

    Sites weigh by their examples and the loss by label tokens, so the records here have equal
    lengths. The tolerance (1e-5 of the update's norm) is for fp32 sums in another order.
    """
    path = tmp_path / "equal.jsonl"
    lines = [f'{{"client": "{"abc"[n % 3]}", "text": "{"XQZJKV"[n % 6] * 4}"}}' for n in range(30)]
    path.write_text("\n".join(lines))
    data = run_config["data"] | {"source": str(path), "max_length": 8, "heldout_share": 0.2}
    optimizer = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    lora = {"r": 4, "lora_dropout": 0.0}  # its masks are drawn for each site
    once = run_config | {
        "rounds": 1,
        "lora": lora,
        "data": data,
        "train": optimizer | {"per_device_train_batch_size": 64},
    }
    fed = run_table(once | {"train": once["train"] | {"num_train_epochs": 1}}, tmp_path / "fed")
    central = run_table(once | {"method": {"name": "central"}}, tmp_path / "central")
    start = initial_state(
        ModelPool(parse(once, "t").model, parse(once, "t").lora).layout, run_config["seed"]
    )
    step = subtract(adapter_of(central), start)
    assert norm(step) > 0
    assert norm(subtract(adapter_of(fed), adapter_of(central))) < 1e-5 * norm(step)


METHODS_AND_CODECS = [
    {
        "method": {"name": "fedavg"},
        "codec": {"name": "ternary", "rate": 16, "error_feedback": True},
    },
    {"method": {"name": "fedavg", "factors": "B"}},
    {
        "method": {
            "name": "cgfedllm",
            "tgap": {"source": "public", "rounds": 3, "simulated_sites": 2},
        },
        "codec": {"name": "klt", "rate": 8, "error_feedback": True},
    },
    SETTINGS["fedpipe"],
]


@pytest.mark.parametrize("choice", METHODS_AND_CODECS)
def test_serial_is_parallel(
    choice: dict[str, Any], run_config: dict[str, Any], tmp_path: Path
) -> None:
    serial = run_table(run_config | choice | {"fleet": {"workers": 1}}, tmp_path / "1")
    parallel = run_table(run_config | choice | {"fleet": {"workers": 3}}, tmp_path / "3")
    assert serial["adapter_sha256"] == parallel["adapter_sha256"]
    assert serial["heldout"] == parallel["heldout"]


def test_the_order_of_arrival_does_not_matter(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [run_table(run_config, tmp_path / "sorted")]
    ask = Fleet.ask

    def reversed_ask(
        self: Fleet, task: str, messages: Mapping[str, Payload], **rest: Any
    ) -> Iterator[Any]:
        return iter(list(ask(self, task, messages, **rest))[::-1])

    monkeypatch.setattr(Fleet, "ask", reversed_ask)
    results.append(run_table(run_config, tmp_path / "reversed"))
    assert results[0]["adapter_sha256"] == results[1]["adapter_sha256"]


def test_same_seed_same_weights_other_seed_other_weights(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    found = [
        run_table(run_config | {"seed": seed}, tmp_path / str(number))["adapter_sha256"]
        for number, seed in enumerate((3, 3, 4))
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("choice", METHODS_AND_CODECS)
def test_resume_is_a_straight_run(
    choice: dict[str, Any], run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Stop after every event in turn, throw all objects away, and go on."""
    table = run_config | choice | {"rounds": 3}
    straight = run_table(table, tmp_path / "straight")
    result = run_with_stops(table, tmp_path / "stopped", (1, 2, 2, 99))
    assert result["adapter_sha256"] == straight["adapter_sha256"]
    assert result["bytes"] == straight["bytes"]


def test_ffa_keeps_a_frozen_and_sends_less(run_config: dict[str, Any], tmp_path: Path) -> None:
    both = run_table(run_config, tmp_path / "both")
    ffa = run_table(run_config | {"method": {"name": "fedavg", "factors": "B"}}, tmp_path / "b")
    config = RunConfig.model_validate(run_config)
    start = initial_state(ModelPool(config.model, config.lora).layout, config.seed)
    tuned: Named = adapter_of(ffa)
    assert all(torch.equal(tuned[name], start[name]) for name in tuned if ".lora_A." in name)
    assert any(not torch.equal(tuned[name], start[name]) for name in tuned if ".lora_B." in name)
    assert ffa["bytes"]["up"] < 0.6 * both["bytes"]["up"]
