"""Noise of a run and its leakage meter: on the wire, through the clip, and in the result."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from scipy.optimize import brentq
from scipy.special import log_ndtr
from torch import Tensor

from fluvial.data import SiteTexts
from fluvial.errors import ClientError, ConfigError, PrivacyError, WireError
from fluvial.federation.releases import count_releases
from fluvial.federation.sites import Site
from fluvial.methods.flglm.audit import leakage
from fluvial.methods.flglm.middle import Middle
from fluvial.methods.flglm.release import Release
from fluvial.models.pool import ModelPool
from fluvial.models.split import decoder_layers
from fluvial.models.states import initial_state
from fluvial.report.page import write_page
from fluvial.report.show import run_tables
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import parse
from fluvial.runs.opening import site_of, texts_of
from fluvial.runs.plan import plan
from fluvial.runs.run import execute
from fluvial.seeds import generator
from fluvial.storage.run_files import read_run
from fluvial.training.train import train
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import norm, subtract
from tests.support.models import four_layers
from tests.support.runs import adapter_of, run_table
from tests.support.weights import read_weights

OFF = {"sites": "none"}
SMALL = {"texts": 2, "tokens": 8}


@pytest.fixture
def table(one_site: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run of two rounds at one site, on a model of four layers."""
    return one_site | {
        "model": {"name_or_path": str(four_layers(tmp_path / "model"))},
        "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": "attention"},
    }


def with_method(table: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return table | {"method": {"name": "flglm", **settings}}


def readings(result: dict[str, Any]) -> dict[str, float]:
    """Return the tokens read by each attack."""
    return {row["attack"]: row["accuracy"] for row in result["leakage"]["attacks"]}


# -- noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sequential", "hierarchical"])
def test_the_server_receives_clipped_and_noisy_states(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    made: list[Tensor] = []
    received: list[Tensor] = []
    release = Release.__call__
    forward = Middle.forward

    def released(self: Release, rows: Tensor, place: str = "") -> Tensor:
        made.append(rows.clone())
        return release(self, rows, place)

    def forwarded(self: Middle, rows: Tensor, *args: Any, **options: Any) -> Tensor:
        received.append(rows.clone())
        return forward(self, rows, *args, **options)

    monkeypatch.setattr(Release, "__call__", released)
    monkeypatch.setattr(Middle, "forward", forwarded)
    noise = {"clip": 0.3, "multiplier": 0.5}
    run_table(with_method(table, mode=mode, noise=noise, leakage=OFF), tmp_path / "run")

    sent = made[: len(received)]  # training comes before measuring
    assert len(received) == 2 * 3
    clipped = torch.cat(sent)
    assert float(clipped.norm(dim=-1).max()) <= 0.3 * (1 + 1e-6)
    assert float(clipped.norm(dim=-1).max()) > 0.3 * (1 - 1e-6)
    disturbance = (torch.cat(received) - clipped).double()
    # About 10,000 values: the standard error of the deviation is below 1 %.
    assert disturbance.numel() > 5_000
    assert float(disturbance.std()) == pytest.approx(0.15, rel=0.05)
    assert abs(float(disturbance.mean())) < 0.01


def test_the_gradient_of_the_front_goes_through_the_clip(
    table: dict[str, Any], tmp_path: Path
) -> None:
    """With almost no noise, the run is plain training of a whole model that clips its own hidden
    states behind the front."""
    sgd = table["train"] | {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    table = table | {"rounds": 1, "train": sgd}
    clip = 0.3
    noise = {"clip": clip, "multiplier": 1e-6}
    split = run_table(with_method(table, noise=noise, leakage=OFF), tmp_path / "run")

    config = parse(table, "test")
    pool = ModelPool(config.model, config.lora)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    (name,) = texts.names
    start = initial_state(pool.layout, config.seed)

    def shorten(_layer: object, _arguments: object, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        lengths = hidden.norm(dim=-1, keepdim=True)
        short = torch.where(lengths > clip, hidden * clip / lengths, hidden)
        return (short, *output[1:]) if isinstance(output, tuple) else short

    with pool.model(start, trainable="A and B") as model:
        hook = decoder_layers(model)[1][0].register_forward_hook(shorten)
        train(
            model,
            texts.load(name).train,
            config.train,
            pad_token_id=pool.tokenizer.pad_token_id,
            generator=generator(config.seed, "train", 1, name),
        )
        hook.remove()
        whole = read_weights(model)

    step = norm(subtract(whole, start))
    assert norm(subtract(adapter_of(split), whole)) < 1e-3 * step  # the noise is 1e-6 of the clip


def test_noise_is_in_inference_only_if_asked(table: dict[str, Any], tmp_path: Path) -> None:
    def base_loss(name: str, **settings: Any) -> float:
        run = with_method(table | {"rounds": 1}, leakage=OFF, **settings)
        loss: float = run_table(run, tmp_path / name)["heldout"]["base"]["loss"]
        return loss

    noise = {"clip": 1.0, "multiplier": 1.0}
    exact = base_loss("exact")
    assert base_loss("training", noise=noise) == exact
    assert base_loss("inference", noise=noise | {"inference": True}) != exact


def test_the_noise_comes_from_a_secret_and_not_from_the_seed(
    table: dict[str, Any], tmp_path: Path
) -> None:
    noisy = with_method(table, noise={"clip": 1.0, "multiplier": 0.1}, leakage=OFF)
    one, other = (run_table(noisy, tmp_path / name) for name in ("one", "other"))
    assert one["adapter_sha256"] != other["adapter_sha256"]

    plain = with_method(table, leakage=OFF)
    one, other = (run_table(plain, tmp_path / f"plain {name}") for name in ("one", "other"))
    assert one["adapter_sha256"] == other["adapter_sha256"]


@pytest.mark.parametrize("mode", ["sequential", "client-batch"])
def test_a_round_that_is_done_again_is_accounted_once(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Cut in the second step of round 2 and resumed, a run ends as one that was not cut: the noise
    follows from secret and content. Another conversation is refused."""
    noise = {"clip": 1.0, "multiplier": 0.1}
    noisy = with_method(table, mode=mode, noise=noise, leakage=OFF)
    config = parse(noisy, "test")
    folder = tmp_path / "run"
    for seen, _ in enumerate(execute(config, folder), start=1):
        if seen == 2:
            break

    shutil.copytree(folder, tmp_path / "undisturbed")
    *_, undisturbed = execute(config, tmp_path / "undisturbed", resume=True)
    release = Release.__call__
    calls: list[int] = []

    def cut(self: Release, rows: Tensor, place: str = "") -> Tensor:
        calls.append(len(rows))
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return release(self, rows, place)

    with monkeypatch.context() as patch:
        patch.setattr(Release, "__call__", cut)
        with pytest.raises(ClientError, match="RuntimeError"):
            list(execute(config, folder, resume=True))

    assert len(calls) == 2
    *_, last = execute(config, folder, resume=True)
    for key in ("adapter_sha256", "heldout", "noise"):
        assert last.values[key] == undisturbed.values[key]

    (ledger,) = folder.glob("sites/*/private")
    assert count_releases(ledger) == 2
    site = opened(noisy, folder)
    message = Payload(values={"round": 1})
    with pytest.raises(PrivacyError, match="release 3"):
        Release.in_training(site, message, round=1)


def opened(table: dict[str, Any], folder: Path) -> Site:
    """Return the one site of a run."""
    config = parse(table, "test")
    pool = ModelPool(config.model, config.lora)
    texts = texts_of(config, pool)
    return site_of(config, texts.names[0], pool, texts, RunFolder(folder).store)


# -- epsilon ---------------------------------------------------------------------------------------


def independent_epsilon(separation: float, delta: float) -> float:
    """Solve delta(epsilon) of the Gaussian mechanism (Balle and Wang, 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        a = log_ndtr(separation / 2 - epsilon / separation)
        b = epsilon + log_ndtr(-separation / 2 - epsilon / separation)
        return float(torch.tensor(a, dtype=torch.float64).exp() - torch.tensor(b).exp()) - delta

    return float(brentq(excess, 0.0, 10_000.0, xtol=1e-9))


@pytest.mark.parametrize("inference", [False, True])
def test_epsilon_is_that_of_the_passes(
    table: dict[str, Any], tmp_path: Path, inference: bool
) -> None:
    noise = {"clip": 1.0, "multiplier": 4.0, "delta": 1e-6, "inference": inference}
    noisy = with_method(table, noise=noise, leakage=OFF)
    entry = run_table(noisy, tmp_path / "run")["noise"]

    config = parse(noisy, "test")
    texts = SiteTexts(config.data, ModelPool(config.model, config.lora).tokenizer, seed=config.seed)
    sequences = len(texts.load(texts.names[0]).train)
    batches = -(-sequences // 4)
    passes = 2 * -(-3 // batches)  # two rounds of three steps, each epoch sends a text once
    assert entry["passes"] == passes
    expected = independent_epsilon(2 / 4.0 * passes**0.5, 1e-6)
    assert entry["epsilon"] == pytest.approx(expected, rel=1e-6)
    assert any("gradients" in line for line in entry["outside"])
    assert any("held-out" in line for line in entry["outside"]) is not inference

    if inference:  # the base, and the final model
        expected = independent_epsilon(2 / 4.0 * 2**0.5, 1e-6)
        assert entry["heldout_epsilon"] == pytest.approx(expected, rel=1e-6)
    else:
        assert entry["heldout_epsilon"] is None

    row = next(row["value"] for row in plan(config)["rows"] if row["what"] == "noise")
    assert f"at most {passes} passes" in row
    assert "gradients" in row


# -- leakage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", ["first", "all"])
@pytest.mark.parametrize("ends", ["shared", "own"])
def test_a_run_says_that_an_untuned_front_gives_all_away(
    table: dict[str, Any], run_config: dict[str, Any], tmp_path: Path, sites: str, ends: str
) -> None:
    three = table | {"data": run_config["data"], "rounds": 1}
    settings = {"parts": {"front": "frozen"}, "ends": ends, "leakage": SMALL | {"sites": sites}}
    result = run_table(with_method(three, **settings), tmp_path / "run")
    assert readings(result)["exact causal search"] == 1.0
    assert result["leakage"]["texts"] == (6 if sites == "all" else 2)
    assert "could read 100 % of the tokens from hidden states" in result["leakage"]["sentence"]
    assert result["bytes"]["by_kind"]["up leakage"] > 0

    without = settings | {"leakage": OFF}
    silent = run_table(with_method(three, **without), tmp_path / "silent")
    assert silent["adapter_sha256"] == result["adapter_sha256"]
    assert silent["bytes"]["up"] == result["bytes"]["up"]
    assert silent["round_ratio"] == result["round_ratio"]


def test_less_is_read_under_noise(table: dict[str, Any], tmp_path: Path) -> None:
    """Noise on hidden states hides them; the gradient shows the labels as before."""
    plain, noisy = (
        run_table(with_method(table, leakage={"tokens": 12}, **more), tmp_path / name)
        for name, more in {
            "plain": {},
            "noisy": {"noise": {"clip": 1.0, "multiplier": 5.0}},
        }.items()
    )
    assert readings(plain)["exact causal search"] > 0.9
    # A token of 300 by chance, and some by their frequency.
    hidden = {name: value for name, value in readings(noisy).items() if "gradient" not in name}
    assert max(hidden.values()) < 0.5
    assert readings(noisy)["gradient matching"] > max(hidden.values())


def test_off_means_no_task(table: dict[str, Any], tmp_path: Path) -> None:
    off = with_method(table, leakage=OFF)
    result = run_table(off, tmp_path / "run")
    assert result["leakage"] is None
    assert not [kind for kind in result["bytes"]["by_kind"] if "leakage" in kind]

    site = opened(off, tmp_path / "run")
    with pytest.raises(WireError, match="does not measure"):
        next(leakage(site, Payload(values={"round": 1, "which": "final"})))


def test_leakage_is_measured_every_so_often(table: dict[str, Any], tmp_path: Path) -> None:
    often = with_method(table | {"rounds": 3}, leakage=SMALL | {"every": 1})
    run_table(often, tmp_path / "run")
    measured = [record.get("leakage") for record in RunFolder(tmp_path / "run").metrics()]
    assert [value is not None for value in measured] == [
        True,
        True,
        False,
    ]  # then the result has it


def test_a_setting_without_effect_is_refused_or_remarked(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="texts: without effect"):
        parse(with_method(table, leakage={"sites": "none", "texts": 2}), "test")

    for every, remarked in ((1, False), (2, True)):
        notes = plan(parse(with_method(table, leakage={"every": every}), "test"))["notes"]
        assert any("method.leakage.every" in note for note in notes) is remarked


def test_people_see_the_verdict(table: dict[str, Any], tmp_path: Path) -> None:
    noisy = with_method(table, noise={"clip": 1.0, "multiplier": 1.0}, leakage=SMALL)
    noisy["evaluate"] = {"sample_prompt": "the", "sample_tokens": 4}
    result = run_table(noisy, tmp_path / "run")
    run = read_run(tmp_path / "run")
    uncounted = result["leakage"]["uncounted"]
    assert uncounted == 2  # BOS, with which both texts begin
    assert result["leakage"]["tokens"] == 2 * SMALL["tokens"] - uncounted
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(run_tables(run))
    shown = console.export_text()
    assert "Leakage  the server could read" in shown
    assert "; 2 of 16 are not counted, because all texts of a site begin with them" in shown
    assert "Further 2 tokens are not counted" in shown
    assert "Noise    epsilon" in shown
    assert "exact causal search" in shown

    write_page(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "tokens that the server could read" in page
    assert "Leakage, by attack" in page
    assert "2 of 16 are not counted" in page

    # Measures, the audit and the text that the model continues are no part of the rounds.
    rounds = RunFolder(tmp_path / "run").metrics()
    for way in ("up", "down"):
        assert result["bytes"][way] == sum(record[f"bytes_{way}"] for record in rounds)
        for task in ("evaluate", "leakage", "sample"):
            assert result["bytes"]["by_kind"][f"{way} {task}"] > 0
    assert json.loads((tmp_path / "run/result.json").read_text())["noise"] == result["noise"]
