"""Differential privacy: secret noise, exact clipping, counted releases, and an epsilon that others
compute too."""

import io
import json
import math
import secrets
import stat
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from scipy.special import log_ndtr

from fluvial.errors import CheckpointError, ConfigError, DivergenceError, PrivacyError
from fluvial.federation import noise, releases
from fluvial.federation.epsilon import epsilon_of, multiplier_for
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import InProcess
from fluvial.federation.releases import Mechanism, claim, count_releases, secret_of
from fluvial.formatting import epsilon_words, privacy_words
from fluvial.methods import cgfedllm
from fluvial.methods.cgfedllm import privacy
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.report.show import run_tables
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from fluvial.runs.run import execute, in_process
from fluvial.storage.run_files import read_run
from fluvial.training.train import TrainReport
from fluvial.wire.tensors import Named, norm, subtract
from tests.support.runs import adapter_of, run_table

KEY = bytes(range(32))
PUBLIC = {"source": "public", "rounds": 3, "simulated_sites": 2}
RESNET = {"name": "resnet", "canvas": "grouped", "stages": 2, "iterations": 20}
SITES = ("north", "south", "west")


def private(run_config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A configuration whose sites add noise to int8 updates; `changes` are of [method.privacy]."""
    promised = {"placement": "update", "clip_norm": 0.05, "noise_multiplier": 1.0} | changes
    method = {
        "name": "cgfedllm",
        "tgap": {"source": "none"},
        "max_growth": 1e9,
        "privacy": promised,
    }

    return run_config | {"method": method, "codec": {"name": "identity"}}


# -- the noise -----------------------------------------------------------------------------------


def test_noise_is_gaussian_to_the_tail() -> None:
    """Kolmogorov-Smirnov on 400,000 values, and the tail beyond 4 deviations against its
    probability."""
    drawn = noise.gaussian(KEY, 400_000)
    assert stats.kstest(drawn, "norm").pvalue > 0.01
    expected = 2 * stats.norm.sf(4) * len(drawn)
    assert abs(np.sum(np.abs(drawn) > 4) - expected) < 5 * math.sqrt(expected)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / math.sqrt(len(drawn))


def test_noise_is_a_function_of_its_key_alone() -> None:
    assert np.array_equal(noise.gaussian(KEY, 70_000)[:1000], noise.gaussian(KEY, 1000))
    other = noise.derive_key(KEY, "noise", b"another release")
    assert abs(np.corrcoef(noise.gaussian(KEY, 10_000), noise.gaussian(other, 10_000))[0, 1]) < 0.05


def test_keys_of_different_parts_differ() -> None:
    """Parts are separated by their lengths, so that none can pass for two."""
    keys = {noise.derive_key(KEY, "a", *parts) for parts in ((b"bc",), (b"b", b"c"), (b"", b"bc"))}
    keys |= {noise.derive_key(KEY, "ab", b"c"), noise.derive_key(bytes(32), "a", b"bc")}
    assert len(keys) == 5


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e6, 3e38])
@pytest.mark.parametrize("clip_norm", [1e-4, 0.37, 5.0])
def test_what_is_disturbed_is_within_the_clip_norm_exactly(size: float, clip_norm: float) -> None:
    """In rational numbers, without rounding."""
    vector = size * torch.randn(500, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    std = 0.7 * clip_norm
    steps = noise.on_grid(vector, std, clip_norm=clip_norm)
    grid = Fraction(noise.grid_of(std))
    assert np.array_equal(steps, np.trunc(steps))
    exact = sum((Fraction(int(step)) * grid) ** 2 for step in steps)
    assert exact <= Fraction(clip_norm) ** 2

    if float(vector.double().norm()) > clip_norm:
        assert float(exact) == pytest.approx(clip_norm**2, rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_releases_noise_alone(bad: float) -> None:
    vector = torch.ones(10)
    vector[3] = bad
    assert not noise.on_grid(vector, 1.0, clip_norm=1.0).any()


def test_what_can_come_out_does_not_depend_on_the_value() -> None:
    """Mironov's attack reads the last bits of a sum; here every sum lies on one grid, whatever was
    disturbed."""
    std = 0.3
    for size in (0.0, 1e-7, 0.123456):
        steps = noise.on_grid(torch.full((1000,), size), std, clip_norm=10.0)
        released = noise.disturb(steps, std, KEY).double().numpy() / noise.grid_of(std)
        assert np.array_equal(released, np.rint(released))


def test_released_values_have_the_stated_deviation() -> None:
    steps = noise.on_grid(torch.zeros(200_000), 0.3, clip_norm=1.0)
    released = noise.disturb(steps, 0.3, secrets.token_bytes(32))
    assert float(released.std()) == pytest.approx(0.3, rel=0.01)
    assert abs(float(released.mean())) < 0.005


# -- the ledger ----------------------------------------------------------------------------------

MECHANISM = Mechanism("update", 1.0, 2.0, 2)


def test_the_same_release_draws_the_same_noise_and_counts_once(tmp_path: Path) -> None:
    first = claim(tmp_path / "site", MECHANISM, b"round 1", b"update")
    assert claim(tmp_path / "site", MECHANISM, b"round 1", b"update") == first
    assert count_releases(tmp_path / "site") == 1
    assert claim(tmp_path / "site", MECHANISM, b"round 1", b"another update") != first
    assert claim(tmp_path / "other", MECHANISM, b"round 1", b"update") != first


def test_one_release_too_many_is_refused(tmp_path: Path) -> None:
    claim(tmp_path, MECHANISM, b"1")
    second = claim(tmp_path, MECHANISM, b"2")
    with pytest.raises(PrivacyError, match="release 3 of this site, and epsilon counts 2"):
        claim(tmp_path, MECHANISM, b"3")
    assert claim(tmp_path, MECHANISM, b"2") == second
    assert count_releases(tmp_path) == 2


@pytest.mark.parametrize("change", [{"noise_multiplier": 0.1}, {"clip_norm": 9.0}, {"releases": 9}])
def test_another_mechanism_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """A server that says hello again with less noise, or more rounds, in the same run."""
    claim(tmp_path, MECHANISM, b"1")
    changed = Mechanism(**{**MECHANISM.__dict__, **change})

    with pytest.raises(PrivacyError, match="epsilon cannot count both"):
        claim(tmp_path, changed, b"2")


def test_the_ledger_is_private_and_damage_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    secret = secret_of(folder)
    assert len(secret) == 32
    assert secret_of(folder) == secret
    path = folder / "releases.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    text = path.read_text()
    path.write_text(
        text.replace(secret.hex()[:4], "0123" if secret.hex()[:4] != "0123" else "3210", 1)
    )

    with pytest.raises(CheckpointError, match="is damaged: its content is not what was written"):
        secret_of(folder)


def test_the_ledger_is_on_the_disk_before_the_key_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret_of(tmp_path)

    def full(path: Path, data: bytes) -> None:
        raise CheckpointError("cannot write")

    monkeypatch.setattr(releases, "write_atomically", full)
    with pytest.raises(CheckpointError):
        claim(tmp_path, MECHANISM, b"1")


# -- epsilon -------------------------------------------------------------------------------------


def exact_delta(epsilon: float, multiplier: float, rounds: int) -> float:
    """Balle and Wang, ICML 2018, theorem 8: the least delta of Gaussian releases, which compose
    into one."""
    std = multiplier / math.sqrt(rounds)
    first = stats.norm.cdf(0.5 / std - epsilon * std)
    return float(first - math.exp(epsilon + log_ndtr(-0.5 / std - epsilon * std)))


def renyi_epsilon(multiplier: float, rounds: int, delta: float) -> float:
    """The same from Renyi orders by hand (Canonne, Kamath, Steinke 2020, proposition 12)."""
    orders = np.concatenate([np.arange(1.01, 20, 0.01), np.geomspace(20, 1e5, 4000)])
    renyi = rounds * orders / (2 * multiplier**2)
    found = renyi + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return float(found.min())


@pytest.mark.parametrize("delta", [1e-5, 1e-8])
@pytest.mark.parametrize("rounds", [1, 3, 20, 500])
@pytest.mark.parametrize("multiplier", [0.6, 1.0, 5.0, 40.0])
def test_epsilon_is_an_upper_bound_and_agrees_with_others(
    multiplier: float, rounds: int, delta: float
) -> None:
    found = epsilon_of(multiplier, rounds, delta)
    assert exact_delta(found, multiplier, rounds) <= delta
    assert exact_delta(0.9999 * found, multiplier, rounds) > delta
    assert found <= renyi_epsilon(multiplier, rounds, delta)


@pytest.mark.parametrize("epsilon", [1e-3, 0.01, 8.0, 1e3])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.1])
def test_the_noise_for_an_epsilon_is_the_least_that_suffices(epsilon: float, delta: float) -> None:
    """At the ends of what may be set too; Renyi orders of an accountant end where noise is
    large."""
    for rounds in (1, 20):
        multiplier = multiplier_for(epsilon, rounds, delta)
        assert 0.999 * epsilon < epsilon_of(multiplier, rounds, delta) <= epsilon
        assert exact_delta(epsilon, multiplier, rounds) <= delta
        assert exact_delta(epsilon, 0.999 * multiplier, rounds) > delta


def test_an_epsilon_is_told_with_digits_and_never_as_0() -> None:
    assert multiplier_for(1e-3, 1, 1e-5) == pytest.approx(1724, rel=1e-3)
    assert epsilon_words(epsilon_of(1724.3, 1, 1e-5)) == "0.001"
    assert epsilon_words(4.2e-6) == "4.2e-06"
    covered = epsilon_of(1e6, 1, 1e-5)  # 4e-7 is all that anything can tell
    assert covered == 0
    report = {"placement": "update", "epsilon": covered, "delta": 1e-5, "releases": 1}
    assert privacy_words(report | {"outside": []}).startswith("epsilon below 1e-09 at delta 1e-05")


# -- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["update", "aggregate"])
def test_a_resumed_run_equals_its_straight_run(
    placement: str, run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in round 2 after the sites answered: they release the same bytes again, and count them
    once."""
    monkeypatch.setattr(
        secrets, "token_bytes", lambda count: KEY[:count]
    )  # the same secrets in both runs
    config = parse(private(run_config, placement=placement), "test")
    *_, straight = execute(config, tmp_path / "straight")

    from fluvial.runs.checkpoint import RunFolder

    save = RunFolder.save

    def killed(self: RunFolder, round: int, checkpoint: Any) -> None:
        if round == 2:
            raise KeyboardInterrupt
        save(self, round, checkpoint)

    monkeypatch.setattr(RunFolder, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        list(execute(config, tmp_path / "resumed"))
    monkeypatch.setattr(RunFolder, "save", save)
    *_, resumed = execute(config, tmp_path / "resumed", resume=True)
    assert resumed.values["adapter_sha256"] == straight.values["adapter_sha256"]

    if placement == "update":
        for site in SITES:
            assert count_releases(tmp_path / "resumed" / "sites" / site / "private") == 2


def test_two_runs_of_one_seed_end_with_other_weights(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    ends = {
        run_table(private(run_config), tmp_path / name)["adapter_sha256"] for name in ("a", "b")
    }
    assert len(ends) == 2


def test_nothing_is_measured_at_the_sites_unless_asked(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    result = run_table(private(run_config), tmp_path / "run")
    assert result["heldout"]["base"] is None
    assert result["heldout"]["final"] is None
    assert result["heldout_by_site"] == {}
    assert result["samples"] == []
    assert "up evaluate" not in result["bytes"]["by_kind"]
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["loss"] for line in lines] == [None, None]
    assert result["privacy"]["epsilon"] == lines[-1]["epsilon"] == epsilon_of(1.0, 2, 1e-5)
    assert result["privacy"]["outside"] == []
    assert result["public"]["base"]["loss"] > 0
    assert result["public"]["final"] != result["public"]["base"]
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert privacy_words(result["privacy"]) in card
    assert "Held-out loss" not in card
    assert str(
        json.loads((tmp_path / "run/sites/north/private/releases.json").read_text())["ledger"][
            "secret"
        ]
    )


def test_exact_measures_are_said_to_be_outside_epsilon(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    result = run_table(private(run_config, heldout="exact"), tmp_path / "run")
    assert result["heldout"]["final"]["loss"] > 0
    assert result["privacy"]["outside"] == [privacy.OUTSIDE]
    assert privacy_words(result["privacy"]).endswith(privacy.OUTSIDE)


def test_no_secret_is_in_what_the_server_keeps(run_config: dict[str, Any], tmp_path: Path) -> None:
    run_table(private(run_config), tmp_path / "run")
    folder = tmp_path / "run"
    held = [bytes.fromhex(each) for each in _secrets(folder)]
    assert len(set(held)) == 3

    for path in folder.rglob("*"):
        if path.is_file() and "private" not in path.parts:
            content = path.read_bytes()
            assert not any(each in content or each.hex().encode() in content for each in held), path


def _secrets(folder: Path) -> Iterator[str]:
    for path in folder.glob("sites/*/private/releases.json"):
        yield json.loads(path.read_text())["ledger"]["secret"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"method": {"tgap": {"source": "sites"}}},
            "tgap.source='sites': undisturbed updates would leave",
        ),
        (
            {
                "method": {"tgap": {"source": "sites-covariance", "reading": "local"}},
                "codec": {"name": "klt"},
            },
            "tgap.source='sites-covariance': moments and measures of undisturbed updates would "
            "leave",
        ),
        ({"method": {"representation": "state"}}, "clipping a whole adapter"),
        ({"codec": {"name": "int8", "error_feedback": True}}, "codec.error_feedback"),
        ({"codec": {"name": "int8", "weighted": True}}, "codec.weighted"),
        ({"codec": {"name": "auto"}, "method": {"tgap": PUBLIC}}, "codec.error_feedback"),
        ({"compare": ["local"]}, "compare: local would send undisturbed updates or losses"),
        ({"compare": ["fedavg", "central"]}, "compare: fedavg, central would send"),
        (
            {"evaluate": {"every": 1}},
            "evaluate.every: without effect, because method.privacy.heldout='none'",
        ),
        ({"evaluate": {"max_new_tokens": 4}}, "evaluate.max_new_tokens: without effect"),
        (
            {"codec": RESNET, "method": {"tgap": PUBLIC, "privacy": {"placement": "latent"}}},
            "codec 'resnet' sends scales of the undisturbed update",
        ),
        (
            {
                "codec": {"name": "cnn"},
                "method": {"tgap": PUBLIC, "privacy": {"placement": "latent"}},
            },
            "codec 'cnn' sends scales of the undisturbed update",
        ),
        (
            {"codec": {"name": "klt", "noise_ratio": 0.5}, "method": {"tgap": PUBLIC}},
            "codec.noise_ratio: method.privacy lets no error",
        ),
        (
            {
                "codec": {"name": "klt"},
                "method": {
                    "tgap": PUBLIC | {"refit": "decoded"},
                    "privacy": {"placement": "aggregate"},
                },
            },
            "tgap.refit='decoded': the codec would be fitted to undisturbed updates",
        ),
    ],
    ids=lambda each: "" if isinstance(each, str) else " ".join(sorted(map(str, each.values()))),
)
def test_what_epsilon_would_not_count_is_refused(
    change: dict[str, Any], text: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    table = private(run_config)
    method = change.get("method", {})
    promised = table["method"]["privacy"] | method.get("privacy", {})
    table |= change | {"method": table["method"] | method | {"privacy": promised}}

    with pytest.raises(ConfigError, match=text):
        run_table(table, tmp_path / "run")


def test_a_site_answers_no_task_that_epsilon_does_not_count(run_config: dict[str, Any]) -> None:
    """Whatever a server asks: raw snapshots, moments, measures and exact sums are not among its
    tasks."""
    from fluvial.runs.opening import tasks_of

    assert set(tasks_of(parse(private(run_config), "test"))) == {"train", "install"}
    exact = parse(private(run_config, heldout="exact"), "test")
    assert set(tasks_of(exact)) == {"train", "install", "evaluate"}


def test_training_that_diverges_releases_noise(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal would tell something of the data."""

    def diverge(*_: Any, **__: Any) -> None:
        raise DivergenceError("step 1 of 3: loss nan")

    monkeypatch.setattr(cgfedllm, "train_locally", diverge)
    result = run_table(private(run_config) | {"rounds": 1}, tmp_path / "run")
    released = norm(subtract(adapter_of(result), initial(run_config)))
    numel = sum(tensor.numel() for tensor in adapter_of(result).values())
    assert released == pytest.approx(
        0.05 * math.sqrt(numel / 3), rel=0.1
    )  # the mean of three sites' noise


def initial(run_config: dict[str, Any]) -> Named:
    config = parse(run_config, "test")
    return initial_state(ModelPool(config.model, config.adapter).layout, config.seed)


def test_check_and_show_say_what_a_run_spends(run_config: dict[str, Any], tmp_path: Path) -> None:
    table = private(run_config, heldout="exact")
    rows = {row["what"]: row["value"] for row in plan(parse(table, "test"))["rows"]}
    said = (
        f"epsilon {epsilon_of(1.0, 2, 1e-5):.3g} at delta 1e-05 after 2 releases of a "
        "site, noise added at the site"
    )
    assert rows["privacy"] == f"{said}; {privacy.OUTSIDE}"
    quiet = {row["what"] for row in plan(parse(run_config, "test"))["rows"]}
    assert "privacy" not in quiet

    result = run_table(private(run_config), tmp_path / "run")
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    console.print(run_tables(read_run(Path(result["folder"]))))
    assert said in shown.getvalue()
    assert "not measured" in shown.getvalue()


def test_under_the_servers_noise_no_site_fails_because_of_another(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that sends zero instead of its update must move the mean by no more than its own
    clipped share."""
    layout = initial(run_config)

    def train(site: Any, *_: Any, **__: Any) -> tuple[Named, Any]:
        size = 1e-9 if site.name != "west" else 1.0
        report = TrainReport(steps=1, label_tokens=1, loss=1.0, grad_norm=1.0)
        return {name: torch.full(tensor.shape, size) for name, tensor in layout.items()}, report

    monkeypatch.setattr(cgfedllm, "train_locally", train)
    table = private(run_config, placement="aggregate") | {
        "rounds": 1,
        "fleet": {"on_failure": "skip"},
    }
    run_table(table, tmp_path / "run")
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert (json.loads(line)["sites"], json.loads(line)["missing"]) == (3, [])


def test_an_answer_that_is_lost_on_the_way_is_sent_again_and_counts_once(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        secrets, "token_bytes", lambda count: KEY[:count]
    )  # the same secrets in both runs
    config = parse(private(run_config) | {"fleet": {"on_failure": "retry"}}, "test")
    *_, straight = execute(config, tmp_path / "straight")

    lost: set[tuple[str, int]] = set()

    def assemble(*given: Any) -> Fleet:
        fleet = in_process(*given)
        transport = fleet.transport
        assert isinstance(transport, InProcess)
        train = transport.tasks["train"]

        def loses(site: Any, message: Any) -> Any:
            answer = train(site, message)
            mark = (site.name, message.value("round", int))
            if mark not in lost:
                lost.add(mark)
                raise ConnectionError

            return answer

        transport.tasks = {**transport.tasks, "train": loses}
        return fleet

    *_, again = execute(config, tmp_path / "again", assemble=assemble)
    assert len(lost) == 6
    assert again.values["adapter_sha256"] == straight.values["adapter_sha256"]

    for site in SITES:
        assert count_releases(tmp_path / "again" / "sites" / site / "private") == 2
