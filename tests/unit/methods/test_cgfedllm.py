"""CG-FedLLM item by item: TGAP, FAF, the gate, SNR, privacy. Numbers are the checklist's."""

import io
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fluvial.codecs import CODECS, build
from fluvial.codecs.base import Codec, LearnedCodec, Snapshot
from fluvial.codecs.quantise import Identity
from fluvial.codecs.sign import TernarySettings
from fluvial.data import SiteTexts
from fluvial.errors import CheckpointError, ConfigError, GateError
from fluvial.exchange import collecting, gate
from fluvial.exchange.ensemble import loaded
from fluvial.exchange.report import GateReport
from fluvial.exchange.representation import Representation
from fluvial.exchange.tgap import d1_of, d2_of, split_by_time
from fluvial.federation import noise
from fluvial.federation.epsilon import epsilon_of
from fluvial.federation.fleet import Fleet
from fluvial.methods.cgfedllm import privacy
from fluvial.models.tokenizers import load_tokenizer
from fluvial.report import show
from fluvial.runs.config import parse
from fluvial.runs.run import execute
from fluvial.storage.run_files import read_run
from fluvial.wire.frame import Reader
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, add, cosine, energy, norm, scale, subtract
from tests.support.runs import adapter_of, run_table

LAYOUT = Layout(
    tuple(
        (
            f"model.layers.{layer}.self_attn.{target}.lora_{factor}.weight",
            (4, 32) if factor == "A" else (32, 4),
        )
        for layer in range(2)
        for target in ("k_proj", "q_proj")
        for factor in "AB"
    )
)


def random_update(seed: int, size: float = 1e-3) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in LAYOUT.shapes}


def ensemble(rounds: int = 5, sites: int = 3) -> list[Snapshot]:
    received = random_update(999, 0.1)
    return [
        Snapshot(f"s{site}", number, received, random_update(100 * number + site))
        for number in range(1, rounds + 1)
        for site in range(sites)
    ]


class Constant(Codec):
    """Always decodes to the same update: what a collapsed autoencoder does."""

    code = 200

    def __init__(self, value: Named) -> None:
        super().__init__(TernarySettings(), LAYOUT)
        self.value = value

    def body(self, vector: torch.Tensor, seed: int) -> bytes:
        return b""

    def parse(self, reader: Reader) -> torch.Tensor:
        return self.layout.flatten(self.value)


class Louder(Identity):
    """Decodes to three times the update: finite, dependent on the input, but no contraction."""

    def parse(self, reader: Reader) -> torch.Tensor:
        return 3 * super().parse(reader)


def known(figure: float | None) -> float:
    """A figure of a report that was made from snapshots, where all are known."""
    assert figure is not None
    return figure


def measured(codec: Codec, representation: Representation = "delta") -> GateReport:
    return gate.measure(codec, *split_by_time(ensemble(), 0.4), representation)


# -- the gate (8, 10) ----------------------------------------------------------------------------


def test_the_identity_passes_both_verdicts() -> None:
    report = measured(Identity.of(LAYOUT))
    assert report.failed == []
    assert all(report.reproduction.values())
    assert report.cosine == pytest.approx(1)
    assert report.errors.all == report.contraction == 0


def test_nothing_sent_fails() -> None:
    report = measured(Constant(scale(random_update(0), 0)))
    assert report.errors.all == 1
    assert any("no contraction" in line for line in report.failed)
    assert any("does not depend on the input" in line for line in report.failed)
    assert any("for A its error 1.000 is not below 0.950" in line for line in report.failed)
    assert any("for the aggregate" in line for line in report.failed)


def test_the_training_mean_looks_good_as_a_state_and_is_refused() -> None:
    """The trap of f.2: a state error far below 1 % with an innovation cosine near zero."""
    training, _ = split_by_time(ensemble(), 0.4)
    states = [add(snapshot.received, snapshot.update) for snapshot in training]
    mean = scale(states[0], 0)

    for state in states:
        mean = add(mean, scale(state, 1 / len(states)))
    report = measured(Constant(mean), "state")
    assert known(report.coded_error_a) < 0.01
    assert known(report.coded_error_b) < 0.01
    assert abs(report.cosine) < 0.2
    assert report.failed


def test_a_codec_that_is_no_contraction_fails() -> None:
    report = measured(Louder.of(LAYOUT))
    assert report.contraction == pytest.approx(2)
    assert any("no contraction (error / update norm 2.000" in line for line in report.failed)


def test_a_lossy_codec_that_works_passes_ours_and_not_the_reproductions() -> None:
    report = measured(build(TernarySettings(rate=24), LAYOUT))
    assert report.failed == []
    assert not report.reproduction["innovation cosine >= 0.90"]
    assert 0.3 < report.errors.all < 0.9
    assert known(report.shuffled_error) > 1.2


def test_both_signal_to_noise_ratios() -> None:
    """The printed one has a mean below a sum, so it is larger by the number of values (C6)."""
    report = measured(build(TernarySettings(rate=16), LAYOUT))
    assert known(report.snr_printed) == pytest.approx(known(report.snr) * LAYOUT.numel)
    assert report.snr == pytest.approx(1 / report.errors.all, rel=1e-6)
    assert report.snr_db == pytest.approx(-10 * math.log10(report.errors.all), rel=1e-6)


def test_the_product_error_is_that_of_the_dense_change() -> None:
    _, heldout = split_by_time(ensemble(), 0.4)
    codec = build(TernarySettings(rate=16), LAYOUT)
    guesses = [codec.decode(codec.encode(s.update, seed=n)) for n, s in enumerate(heldout)]
    lost = signal = 0.0

    for snapshot, guess in zip(heldout, guesses, strict=True):
        for a in (name for name in LAYOUT.names if ".lora_A." in name):
            b = a.replace(".lora_A.", ".lora_B.")

            def product(
                update: Named, a: str = a, b: str = b, received: Named = snapshot.received
            ) -> torch.Tensor:
                left = received[b] + update[b]
                right = received[a] + update[a]
                return left.double() @ right.double() - received[b].double() @ received[a].double()

            lost += float((product(snapshot.update) - product(guess)).square().sum())
            signal += float(product(snapshot.update).square().sum())

    assert gate._product_error(heldout, guesses) == pytest.approx(lost / signal, rel=1e-4)


# -- TGAP (7) ------------------------------------------------------------------------------------


def test_the_holdout_is_the_last_rounds() -> None:
    training, heldout = split_by_time(ensemble(rounds=5), 0.2)
    assert {snapshot.round for snapshot in training} == {1, 2, 3, 4}
    assert {snapshot.round for snapshot in heldout} == {5}
    both = split_by_time(ensemble(rounds=2), 0.99)
    assert [len(part) for part in both] == [3, 3]


def test_d1_and_d2_are_disjoint_and_cover() -> None:
    examples = list(range(10))
    assert d1_of(examples, 0.3) == [0, 1, 2]  # type: ignore[arg-type,comparison-overlap]
    assert d2_of(examples, 0.3) == [3, 4, 5, 6, 7, 8, 9]  # type: ignore[arg-type,comparison-overlap]

    with pytest.raises(ConfigError, match="cannot be split in two"):
        d2_of(examples[:1], 0.3)  # type: ignore[arg-type]


class Recorder:
    """Every message of a run, as bytes on the wire."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[str, str, Payload]] = []
        ask = Fleet.ask

        def recorded(
            fleet: Fleet,
            task: str,
            messages: Mapping[str, Payload],
            *,
            read: Any,
            **options: Any,
        ) -> Any:
            self.sent += [("down", task, message) for message in messages.values()]

            def reading(site: str, reply: Payload) -> Any:
                self.sent.append(("up", task, reply))
                return read(site, reply)

            return ask(fleet, task, messages, read=reading, **options)

        monkeypatch.setattr(Fleet, "ask", recorded)


SMALL_RESNET = {
    "name": "resnet",
    "canvas": "grouped",
    "stages": 2,
    "iterations": 3,
    "batch_size": 2,
}


def test_paper_mode_end_to_end(run_config: dict[str, Any], tmp_path: Path) -> None:
    """The autoencoder of the paper, TGAP on the sites' D1, FAF on D2; few iterations, so the gate
    only reports."""
    method = {"name": "cgfedllm", "gate": "report", "tgap": {"rounds": 2}}
    result = run_table(run_config | {"method": method, "codec": SMALL_RESNET}, tmp_path / "run")
    setup = result["setup"]
    assert setup["snapshots"] == 6
    assert len(setup["loss_curve"]) == 3
    assert setup["gate"]["failed"]
    assert result["bytes"]["by_kind"]["up snapshot"] > 6 * setup["gate"]["raw_bytes"]
    assert result["bytes"]["by_kind"]["down install"] > 0
    assert result["bytes"]["setup"] == sum(
        size
        for kind, size in result["bytes"]["by_kind"].items()
        if kind.split()[1] in ("snapshot", "install")
    )
    assert result["amortised_ratio"] > 1  # two rounds cannot pay for raw TGAP and an autoencoder


@pytest.mark.parametrize("reading", ["federated", "local"])
@pytest.mark.parametrize("source", ["sites", "public"])
def test_both_readings_and_sources(
    reading: str,
    source: str,
    run_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder(monkeypatch)
    method = {
        "name": "cgfedllm",
        "gate": "report",
        "tgap": {"rounds": 3, "reading": reading, "source": source},
    }
    codec = {"name": "klt", "rate": 8}
    result = run_table(
        run_config | {"rounds": 1, "method": method, "codec": codec}, tmp_path / "run"
    )
    assert ("up snapshot" in result["bytes"]["by_kind"]) == (source == "sites")
    sent = [message for way, task, message in recorder.sent if (way, task) == ("down", "snapshot")]
    shared = {message.to_bytes()[-64:] for message in sent}
    # "local" sends each of the three sites its own adapter, which is the initial one in round 1.
    if source == "sites":
        assert len(shared) == (1 + 2 * 3 if reading == "local" else 3)


def test_local_reading_follows_each_sites_own_path(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """The server's record of what a site started from is what the site had."""
    found: list[Snapshot] = []
    collect = collecting.collect

    def keep(*arguments: Any, **named: Any) -> list[Snapshot]:
        found.extend(loaded(collect(*arguments, **named)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "collect", keep)
        method = {"name": "cgfedllm", "gate": "report", "tgap": {"rounds": 3, "reading": "local"}}
        run_table(
            run_config | {"rounds": 1, "method": method, "codec": {"name": "int8"}},
            tmp_path / "run",
        )

    by_site = {site: [s for s in found if s.site == site] for site in {s.site for s in found}}
    for steps in by_site.values():
        for before, after in itertools.pairwise(steps):
            expected = add(before.received, before.update)
            assert all(torch.equal(after.received[name], expected[name]) for name in expected)


def test_public_tgap_needs_public_text(run_config: dict[str, Any], tmp_path: Path) -> None:
    data = {key: value for key, value in run_config["data"].items() if key != "public_source"}
    method = {"name": "cgfedllm", "tgap": {"source": "public"}}
    with pytest.raises(
        ConfigError, match="data.public_source: a codec that learns from public text needs some"
    ):
        run_table(
            run_config | {"data": data, "method": method, "codec": {"name": "klt"}},
            tmp_path / "run",
        )


# -- FAF (5, and error feedback) -----------------------------------------------------------------

LINEAR = {"name": "klt", "rate": 8}
PUBLIC = {"source": "public", "rounds": 3, "simulated_sites": 2}


def test_the_server_never_sees_an_uncoded_update(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In FAF a reply holds one frame of the run's codec, no larger than its size, and nothing
    else."""
    recorder = Recorder(monkeypatch)
    method = {"name": "cgfedllm", "tgap": PUBLIC}
    result = run_table(run_config | {"method": method, "codec": LINEAR}, tmp_path / "run")
    replies = [message for way, task, message in recorder.sent if (way, task) == ("up", "train")]
    assert len(replies) == 6

    for reply in replies:
        assert set(reply.tensors) == {"f"}
        assert reply.tensors["f"].dtype == torch.uint8
        assert reply.tensors["f"].numel() <= result["setup"]["gate"]["raw_bytes"] / 8
        assert int(reply.tensors["f"][1]) == CODECS["klt"].code
        assert set(reply.values) == {"n", "loss"}


@pytest.mark.parametrize("feedback", [False, True])
def test_a_decoder_is_downloaded_only_for_error_feedback(
    feedback: bool, run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    # A collapsed autoencoder is refused with error feedback; here a training of three steps must
    # do.
    passed = measured(Identity.of(LAYOUT))
    monkeypatch.setattr(gate, "measure", lambda *_: passed)
    method = {"name": "cgfedllm", "tgap": PUBLIC, "max_growth": 1e9}
    codec = SMALL_RESNET | {"error_feedback": feedback}
    run_table(run_config | {"rounds": 1, "method": method, "codec": codec}, tmp_path / "run")
    installs = [
        message for way, task, message in recorder.sent if (way, task) == ("down", "install")
    ]
    assert len(installs) == 3

    for message in installs:
        assert any(name.startswith("encoder") for name in message.tensors)
        assert any(name.startswith("decoder") for name in message.tensors) == feedback


def test_residuals_are_what_was_lost_and_decay_for_missed_rounds(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """What the server has decoded so far plus the residual is everything the site has wanted to
    send."""
    from fluvial.codecs.sign import HalfSign, HalfSignSettings
    from fluvial.exchange.at_site import encode
    from fluvial.exchange.uplink import coder_of
    from fluvial.federation.sites import Site
    from fluvial.federation.store import StateStore
    from fluvial.training.config import TrainConfig

    settings = HalfSignSettings(error_feedback=True, feedback_decay=0.5)
    codec = HalfSign(settings, LAYOUT)
    store = StateStore(None)

    def answer(update: Named, round: int) -> Named:
        unused: Any = None
        site = Site("a", 0, unused, unused, TrainConfig(), settings, None, None, store, 9)
        frame, _ = encode(site, coder_of(codec, {}), update, round)
        decoded = codec.decode(frame)

        for slot, payload in site.kept.items():
            store.write("a", slot, payload, round)
        return decoded

    first, second, third = (random_update(seed) for seed in (1, 2, 3))
    sent = answer(first, 1)
    residual = subtract(first, sent)
    kept = store.read("a", "residual")
    assert all(torch.equal(kept.tensors[name], residual[name]) for name in residual)
    assert kept.values["error"] == pytest.approx(energy(residual) / energy(first))
    wanted = add(second, residual)  # the next round: no decay
    residual = subtract(wanted, answer(second, 2))
    kept = store.read("a", "residual")
    assert all(torch.equal(kept.tensors[name], residual[name]) for name in residual)
    wanted = add(third, scale(residual, 0.5**2))  # rounds 3 and 4 were missed
    residual = subtract(wanted, answer(third, 5))
    kept = store.read("a", "residual")
    assert all(torch.equal(kept.tensors[name], residual[name]) for name in residual)


def test_error_feedback_repairs_a_coarse_codec(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Over eight rounds a coarse codec with feedback ends nearer to the uncompressed adapter than
    without."""
    table = run_config | {"rounds": 8}
    plain = adapter_of(run_table(table, tmp_path / "plain"))
    distance = {}

    for feedback in (False, True):
        codec = {"name": "top_k", "rate": 16, "error_feedback": feedback}
        coded = adapter_of(run_table(table | {"codec": codec}, tmp_path / str(feedback)))
        distance[feedback] = norm(subtract(coded, plain))

    assert distance[True] < distance[False]


def test_a_refused_codec_explains_itself(run_config: dict[str, Any], tmp_path: Path) -> None:
    method = {"name": "cgfedllm", "tgap": PUBLIC}
    config = parse(run_config | {"method": method, "codec": SMALL_RESNET}, "test")
    with pytest.raises(
        GateError, match=r"codec 'resnet' does not carry(.|\n)*codec.name='klt'(.|\n)*gate='report'"
    ):
        list(execute(config, tmp_path / "run"))

    assert not (tmp_path / "run" / "result.json").exists()
    text = Console(record=True, width=200, file=io.StringIO())
    text.print(show.run_tables(read_run(tmp_path / "run")))
    assert "Refused by the gate: codec 'resnet' does not carry" in text.export_text()


def test_a_refused_codec_can_be_changed_without_training_the_baselines_again(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    table = run_config | {"compare": ["local"], "method": {"name": "cgfedllm", "tgap": PUBLIC}}
    with pytest.raises(GateError):
        list(execute(parse(table | {"codec": SMALL_RESNET}, "test"), tmp_path / "run"))
    baseline = (tmp_path / "run" / "compare" / "local" / "result.json").read_bytes()
    *_, last = execute(parse(table | {"codec": LINEAR}, "test"), tmp_path / "run", resume=True)
    assert last.values["codec"] == "klt"
    assert (tmp_path / "run" / "compare" / "local" / "result.json").read_bytes() == baseline
    assert not (tmp_path / "run" / "refused.json").exists()

    with pytest.raises(CheckpointError, match="another configuration"):
        list(
            execute(
                parse(table | {"codec": LINEAR | {"rate": 16}}, "test"),
                tmp_path / "run",
                resume=True,
            )
        )


def test_feedback_without_contraction_is_refused_even_when_only_reporting(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    method = {"name": "cgfedllm", "gate": "report", "tgap": PUBLIC}
    codec = SMALL_RESNET | {"normalise": "none", "error_feedback": True}
    with pytest.raises(
        GateError, match="residuals would grow without bound; set codec.error_feedback=false"
    ):
        run_table(run_config | {"method": method, "codec": codec}, tmp_path / "run")


def test_the_site_reports_its_codec_error_under_feedback(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    method = {"name": "cgfedllm", "tgap": PUBLIC}
    run_table(
        run_config | {"method": method, "codec": LINEAR | {"error_feedback": True}},
        tmp_path / "run",
    )
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert 0 < record["codec_error"] < 1
        assert record["snr_db"] == pytest.approx(-10 * math.log10(record["codec_error"]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"representation": "state"},
            "codec.error_feedback: the residual of a whole adapter means nothing",
        ),
        (
            {"privacy": {"placement": "update", "clip_norm": 1.0, "noise_multiplier": 1.0}},
            "codec.error_feedback: it would send later what clipping and noise took away",
        ),
    ],
)
def test_feedback_that_cannot_work_is_refused(
    change: dict[str, Any], text: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    method = {"name": "cgfedllm", "tgap": PUBLIC} | change
    with pytest.raises(ConfigError, match=text):
        run_table(
            run_config | {"method": method, "codec": LINEAR | {"error_feedback": True}},
            tmp_path / "run",
        )


# -- privacy (11) --------------------------------------------------------------------------------


def test_clipping_bounds_the_norm_and_keeps_the_direction() -> None:
    update = random_update(1)
    clipped = privacy.clip(update, 0.5 * norm(update))
    assert norm(clipped) == pytest.approx(0.5 * norm(update))
    assert cosine(clipped, update) == pytest.approx(1)
    assert privacy.clip(update, 2 * norm(update)) is update


def test_epsilon_is_not_far_below_a_simple_bound() -> None:
    """Zero-concentrated privacy of T Gaussian releases: eps <= T/(2 s^2) + sqrt(2 T log(1/delta)) /
    s."""
    for multiplier, rounds in ((1.0, 1), (2.0, 10), (5.0, 20)):
        bound = rounds / (2 * multiplier**2) + math.sqrt(2 * rounds * math.log(1e5)) / multiplier
        found = epsilon_of(multiplier, rounds, 1e-5)
        assert 0.7 * bound < found <= bound + 1e-3

    assert epsilon_of(1.0, 0, 1e-5) == 0


@pytest.mark.parametrize("epsilon", [0.25, 2.0, 8.0])
def test_the_papers_budgets_are_met_and_not_wasted(epsilon: float) -> None:
    config = privacy.PrivacyConfig(placement="update", clip_norm=1.0, epsilon=epsilon)
    found = epsilon_of(config.multiplier(20), 20, config.delta)
    assert 0.98 * epsilon < found <= epsilon


@pytest.mark.parametrize("placement", ["update", "latent", "aggregate"])
def test_every_placement_runs_and_accounts(
    placement: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Noise comes from secrets of the operating system, so a run with the same seed ends with other
    weights."""
    method: dict[str, Any] = {"name": "cgfedllm", "tgap": PUBLIC, "max_growth": 1e9}
    quiet = run_table(run_config | {"method": method, "codec": LINEAR}, tmp_path / "quiet")
    method["privacy"] = {
        "placement": placement,
        "clip_norm": 0.05,
        "epsilon": 8.0,
        "heldout": "exact",
    }
    noisy = run_table(run_config | {"method": method, "codec": LINEAR}, tmp_path / "noisy")
    assert noisy["adapter_sha256"] != quiet["adapter_sha256"]
    assert noisy["heldout"]["base"] == quiet["heldout"]["base"]
    lines = [
        json.loads(line) for line in (tmp_path / "noisy" / "metrics.jsonl").read_text().splitlines()
    ]
    assert 0 < lines[0]["epsilon"] < lines[1]["epsilon"] <= 8.0
    assert noisy["privacy"]["epsilon"] == lines[1]["epsilon"]
    again = run_table(run_config | {"method": method, "codec": LINEAR}, tmp_path / "again")
    assert again["adapter_sha256"] != noisy["adapter_sha256"]


def test_a_latent_needs_a_codec_that_has_one(run_config: dict[str, Any], tmp_path: Path) -> None:
    secret = {"placement": "latent", "clip_norm": 1.0, "epsilon": 8.0}
    method = {"name": "cgfedllm", "tgap": {"source": "none"}, "privacy": secret}
    with pytest.raises(ConfigError, match="codec 'int8' has no latent; use 'resnet' or 'klt'"):
        run_table(run_config | {"method": method, "codec": {"name": "int8"}}, tmp_path / "run")


def test_aggregate_noise_is_scaled_by_the_heaviest_site(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean moves by at most clip_norm * max p_i when one site is taken away."""
    stds: list[float] = []
    disturb = noise.disturb

    def spy(steps: Any, std: float, key: bytes) -> torch.Tensor:
        stds.append(std)
        return disturb(steps, std, key)

    monkeypatch.setattr(noise, "disturb", spy)
    secret = {"placement": "aggregate", "clip_norm": 0.1, "noise_multiplier": 2.0}
    method = {"name": "cgfedllm", "tgap": {"source": "none"}, "privacy": secret, "max_growth": 1e9}
    run_table(
        run_config | {"rounds": 1, "method": method, "codec": {"name": "identity"}},
        tmp_path / "run",
    )
    config = parse(run_config, "test")
    texts = SiteTexts(config.data, load_tokenizer(config.model), seed=config.seed)
    weights = [len(texts.load(name).train) for name in texts.names]
    assert stds == [pytest.approx(0.1 * 2.0 * max(weights) / sum(weights))]


def test_every_learned_codec_is_a_learned_codec() -> None:
    learned = {name for name, kind in CODECS.items() if issubclass(kind, LearnedCodec)}
    assert learned == {"resnet", "cnn", "vq", "klt", "klt_trellis", "klt_sum"}
