"""TGAP that takes no update from a site: moments fit the same transform, sites measure it
themselves."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fluvial.codecs import read_settings
from fluvial.codecs.base import Snapshot
from fluvial.codecs.klt.codec import Klt
from fluvial.codecs.klt.moments import Moments, MomentsSum, num_bytes
from fluvial.codecs.klt.settings import KltSettings
from fluvial.codecs.quantise import Identity
from fluvial.errors import ConfigError, GateError, WireError
from fluvial.exchange import check_codec, collecting, gate, tgap_tasks
from fluvial.exchange import report as gate_report
from fluvial.exchange.ensemble import loaded
from fluvial.exchange.probe import Probe, fold
from fluvial.exchange.recoding import PASSES, feedback_error
from fluvial.exchange.tgap import TgapConfig, split_by_time
from fluvial.federation.fleet import Fleet
from fluvial.report import round_lines
from fluvial.report.page import write_page
from fluvial.runs.config import parse
from fluvial.runs.run import execute
from fluvial.storage.run_files import read_run
from fluvial.wire.payload import Limits, Payload
from fluvial.wire.tensors import Layout, Named, add, energy, only, relative_error, scale, subtract
from tests.support.runs import run_table, run_with_stops
from tests.support.updates import attention_layout
from tests.unit.codecs.test_klt import HELD_OUT, LAYOUT, SEEN

QUIET = {"source": "sites-covariance", "reading": "local", "rounds": 5, "holdout": 0.4}
KLT = {"name": "klt", "rate": 8}


def summed(updates: list[Named]) -> Moments:
    total = MomentsSum()
    for update in updates:
        total.add(Moments.of(LAYOUT, update))
    return total.total()


def mean_error(codec: Klt, updates: list[Named]) -> float:
    return sum(
        relative_error(update, codec.decode(codec.encode(update))) for update in updates
    ) / len(updates)


# -- moments -------------------------------------------------------------------------------------


def test_moments_are_those_of_the_updates() -> None:
    moments = Moments.of(LAYOUT, SEEN[0])
    size = math.sqrt(sum(float(x.double().square().sum()) for x in SEEN[0].values()))
    name = LAYOUT.names[0]
    x = SEEN[0][name].double() / size
    assert torch.allclose(
        moments.rows[: 8 * 9 // 2].double(), (x @ x.T)[*torch.triu_indices(8, 8)], rtol=1e-5
    )
    assert math.fsum(moments.energy) == pytest.approx(size**2)
    assert 4 * (moments.grams.numel() + moments.rows.numel()) == num_bytes(LAYOUT)


def test_sums_of_sites_are_moments_of_the_union() -> None:
    """In any order, bit for bit; and on the way of a site, which adds in fp32, but for rounding."""
    union = summed(SEEN)
    backwards = summed(SEEN[::-1])
    assert torch.equal(union.grams, backwards.grams)
    assert torch.equal(union.rows, backwards.rows)
    assert (union.energy, union.count) == (backwards.energy, backwards.count)
    halves = MomentsSum()

    for part in (SEEN[:5], SEEN[5:]):
        site = Moments.of(LAYOUT, part[0])
        for update in part[1:]:
            site = site + Moments.of(LAYOUT, update)
        halves.add(Moments.read(LAYOUT, Payload.from_bytes(site.payload().to_bytes()), most=7))

    both = halves.total()
    assert torch.allclose(both.grams, union.grams, atol=1e-6)
    assert torch.allclose(both.rows, union.rows, atol=1e-6)
    assert both.energy == pytest.approx(union.energy)
    assert both.count == union.count == len(SEEN)


@pytest.mark.parametrize("rate", [8, 16, 64])
def test_moments_fit_what_updates_fit(rate: int) -> None:
    """The published directions are the same; the error may be a little above, because no histogram
    goes up."""
    settings = KltSettings(rate=rate)
    known = Klt.fit(settings, LAYOUT, SEEN, seed=0)
    quiet = Klt.fit_moments(settings, LAYOUT, summed(SEEN))

    for name in ("tops", "rotations"):
        mine, theirs = (getattr(codec.model, name).int() for codec in (quiet, known))
        assert int(torch.minimum((mine - theirs).abs(), (mine + theirs).abs()).max()) <= 1

    assert torch.equal(quiet.model.groups, known.model.groups)
    assert mean_error(quiet, HELD_OUT) <= 1.03 * mean_error(known, HELD_OUT)


def test_the_size_of_an_update_does_not_matter() -> None:
    loud = [scale(update, 10.0**number) for number, update in enumerate(SEEN[:4])]
    plain = summed(SEEN[:4])
    assert torch.allclose(summed(loud).grams, plain.grams, atol=1e-6)


@pytest.mark.parametrize("which", ["A", "B"])
def test_one_factor_alone(which: Any) -> None:
    updates = [only(update, which) for update in SEEN]
    layout = Layout.of(updates[0])
    total = MomentsSum()

    for update in updates:
        total.add(Moments.of(layout, update))
    codec = Klt.fit_moments(KltSettings(rate=16), layout, total.total())
    assert mean_error(codec, [only(update, which) for update in HELD_OUT]) < 0.1


def test_an_update_of_zeros_can_be_summed() -> None:
    zero = Moments.of(LAYOUT, scale(SEEN[0], 0.0))
    assert not zero.grams.any()
    codec = Klt.fit_moments(KltSettings(), LAYOUT, Moments.read(LAYOUT, zero.payload(), most=1))
    assert relative_error(SEEN[0], codec.decode(codec.encode(SEEN[0]))) < 1


def mutations() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    good = summed(SEEN)
    nan = good.grams.clone()
    negative = good.grams.clone()
    large = good.rows.clone()
    nan[7] = math.nan
    negative[0] = -1e-3
    large[1] = 5.0
    energy = list(good.energy)

    return {
        "expected torch.float32": ({"grams": good.grams[:-1]}, {}),
        "found torch.float64": ({"rows": good.rows.double()}, {}),
        "expected tensors": ({"more": good.rows}, {}),
        "NaN or Inf": ({"grams": nan}, {}),
        "no sums of squares": ({"grams": negative}, {}),
        "no sums of squares of 12 updates": ({"rows": 2 * good.rows}, {}),
        "larger than the largest square": ({"rows": large}, {}),
        "of 0 updates": ({}, {"count": 0}),
        "of 13 updates": ({}, {"count": 13}),
        "'count': expected int": ({}, {"count": True}),
        "energies from 0 on": ({}, {"energy": [-1.0, *energy[1:]]}),
        "expected 8 energies": ({}, {"energy": energy[1:]}),
        "found \\['x'": ({}, {"energy": ["x", *energy[1:]]}),
    }


@pytest.mark.parametrize("text", list(mutations()))
def test_moments_that_cannot_be_are_refused(text: str) -> None:
    good = summed(SEEN).payload()
    assert Moments.read(LAYOUT, good, most=12).count == 12
    tensors, values = mutations()[text]

    with pytest.raises(WireError, match=text):
        Moments.read(LAYOUT, Payload(good.tensors | tensors, good.values | values), most=12)
    for name in ("grams", "rows"):
        with pytest.raises(WireError):
            Moments.read(
                LAYOUT,
                Payload({k: v for k, v in good.tensors.items() if k != name}, good.values),
                most=12,
            )


@examples(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_is_accepted_fits_a_working_codec(seed: int) -> None:
    """Sums within the bounds that are of no updates at all: the fit is still finite, and the codec
    contracts."""
    draw = np.random.default_rng(seed)
    good = summed(SEEN[:2])
    flip = torch.from_numpy(draw.choice([-1.0, 1.0], good.grams.shape).astype(np.float32))
    grams = torch.where(
        torch.from_numpy(draw.random(good.grams.shape) < draw.random()),
        good.grams * flip,
        good.grams,
    )

    try:
        odd = Moments.read(LAYOUT, dataclasses.replace(good, grams=grams).payload(), most=2)
    except WireError:
        return

    codec = Klt.fit_moments(KltSettings(), LAYOUT, odd)
    assert relative_error(SEEN[5], codec.decode(codec.encode(SEEN[5]))) < 1


# -- error feedback ----------------------------------------------------------------------------


def test_the_error_after_feedback_is_that_of_the_same_update_in_every_round() -> None:
    """The passes are written out here; only the later half of them counts."""
    codec = Klt.fit(KltSettings(rate=16), LAYOUT, SEEN, seed=0)
    update = SEEN[3]
    residual = scale(update, 0.0)
    errors = []
    for number in range(PASSES):
        coded = add(update, residual)
        decoded = codec.decode(codec.encode(coded, seed=number, round=number))
        residual = subtract(coded, decoded)
        errors.append(energy(residual) / energy(coded))

    heldout = [Snapshot("s0", 7, residual, update)]
    expected = sum(errors[PASSES // 2 :]) / (PASSES - PASSES // 2)
    assert feedback_error(codec, heldout, "delta") == pytest.approx(expected)
    assert errors[-1] > errors[0]  # feedback makes an update unlike those of the fit


# -- probes --------------------------------------------------------------------------------------


def test_probes_fold_into_what_the_server_would_have_measured() -> None:
    """Errors, cosine, bytes and contraction are the same; what only the server could know is left
    open."""
    codec = Klt.fit(KltSettings(rate=16), LAYOUT, SEEN, seed=0)
    zero = scale(SEEN[0], 0.0)
    heldout = [
        Snapshot(f"s{number % 2}", 2 + number // 2, zero, update)
        for number, update in enumerate(SEEN[:4])
    ]
    direct = gate.measure(codec, [Snapshot("s0", 1, zero, SEEN[5])], heldout, "delta")
    probes = [
        Probe.of(codec, [s for s in heldout if s.site == site], "delta", fed_back=True)
        for site in ("s0", "s1")
    ]
    probes = [
        Probe.read(Payload.from_bytes(each.payload().to_bytes()), most=2, fed_back=True)
        for each in probes
    ]
    folded = fold(probes, LAYOUT, "delta")
    assert folded.feedback_error == pytest.approx(feedback_error(codec, heldout, "delta"))

    for name in ("a", "b", "all"):
        assert getattr(folded.errors, name) == pytest.approx(getattr(direct.errors, name))
    assert folded.errors.aggregate == folded.errors.all
    for name in (
        "snapshots",
        "bytes_per_update",
        "raw_bytes",
        "cosine",
        "snr",
        "snr_printed",
        "contraction",
    ):
        assert getattr(folded, name) == pytest.approx(getattr(direct, name))

    assert folded.failed == []
    assert folded.shuffled_error is not None
    assert folded.shuffled_error > 1
    assert list(folded.predictors) == ["zero"]
    assert (folded.product_error, folded.aggregate_cosine, folded.b_norm_ratio) == (
        None,
        None,
        None,
    )
    assert folded.reproduction.items() <= direct.reproduction.items()


def test_a_site_with_one_snapshot_cannot_shuffle() -> None:
    probe = Probe.of(Identity.of(LAYOUT), [Snapshot("a", 1, SEEN[0], SEEN[1])], "delta")
    report = fold([Probe.read(probe.payload(), most=1)], LAYOUT, "delta")
    assert report.shuffled_error is None
    assert "depends on the input" not in report.reproduction
    assert report.failed == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"count": 3}, "3 snapshots"),
        ({"count": 0}, "0 snapshots"),
        ({"bytes": 0}, "in 0 bytes"),
        ({"lost_a": -1.0}, "an energy below 0"),
        ({"energy_b": 1e200}, "beyond 1e100"),
        ({"shuffled": -1.0}, "an energy below 0"),
        ({"cosine": -3.0}, "cosines of 2 snapshots add up to -3.0"),
        ({"contraction": "x"}, "'contraction': expected float, found str"),
    ],
)
def test_a_probe_that_cannot_be_is_refused(values: dict[str, Any], text: str) -> None:
    snapshots = [Snapshot("a", number, SEEN[0], SEEN[number]) for number in (1, 2)]
    good = Probe.of(Identity.of(LAYOUT), snapshots, "delta").payload()
    assert Probe.read(good, most=2).count == 2

    with pytest.raises(WireError, match=text):
        Probe.read(Payload(values=good.values | values), most=2)


def test_snapshots_come_back_from_a_sites_disk() -> None:
    snapshots = [Snapshot("a", number, SEEN[0], SEEN[number]) for number in (9, 10, 11)]
    kept = Payload.from_bytes(tgap_tasks.join_snapshots(snapshots).to_bytes())
    found = tgap_tasks.split_snapshots(kept, "a")
    assert [each.round for each in found] == [9, 10, 11]

    for mine, theirs in zip(found, snapshots, strict=True):
        assert all(torch.equal(mine.update[name], theirs.update[name]) for name in LAYOUT.names)
        assert all(torch.equal(mine.received[name], theirs.received[name]) for name in LAYOUT.names)

    assert tgap_tasks.split_snapshots(Payload(), "a") == []


# -- whole runs ----------------------------------------------------------------------------------


def test_the_transform_is_that_of_the_same_snapshots(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Twice the same TGAP: once the updates come up, once only moments."""
    seen: list[Snapshot] = []
    found: list[Moments] = []
    collect = collecting.collect
    collect_moments = collecting.collect_moments

    def keep(*arguments: Any, **named: Any) -> list[Snapshot]:
        seen.extend(loaded(collect(*arguments, **named)))
        return seen

    def keep_moments(*arguments: Any, **named: Any) -> Moments:
        found.append(collect_moments(*arguments, **named))
        return found[0]

    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "collect", keep)
        patch.setattr(collecting, "collect_moments", keep_moments)
        for source in ("sites", "sites-covariance"):
            method = {"name": "cgfedllm", "tgap": QUIET | {"source": source}}
            table = run_config | {"rounds": 1, "method": method, "codec": KLT}
            results[source] = run_table(table, tmp_path / source)

    training, heldout = split_by_time(seen, 0.4)
    layout = Layout.of(training[0].update)
    settings = KltSettings(rate=8)
    known = Klt.fit(settings, layout, [each.update for each in training], seed=0)
    quiet = Klt.fit_moments(settings, layout, found[0])
    mine = quiet.model.tops.int()
    theirs = known.model.tops.int()
    assert int(torch.minimum((mine - theirs).abs(), (mine + theirs).abs()).max()) <= 1
    updates = [each.update for each in heldout]
    assert mean_error(quiet, updates) <= 1.02 * mean_error(known, updates)
    reports = [results[source]["setup"]["gate"] for source in ("sites-covariance", "sites")]
    assert reports[0]["errors"]["all"] <= 1.02 * reports[1]["errors"]["all"]
    assert reports[0]["snapshots"] == reports[1]["snapshots"] == 6
    assert results["sites-covariance"]["setup"]["snapshots"] == 15


class Ups:
    """Every reply of a run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[str, Payload]] = []
        ask = Fleet.ask

        def recorded(
            fleet: Fleet,
            task: str,
            messages: Mapping[str, Payload],
            *,
            read: Any,
            **options: Any,
        ) -> Any:
            def reading(site: str, reply: Payload) -> Any:
                self.sent.append((task, reply))
                return read(site, reply)

            return ask(fleet, task, messages, read=reading, **options)

        monkeypatch.setattr(Fleet, "ask", recorded)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedavg"},
        {"name": "fedavg", "factors": "B"},
        {"name": "cgfedllm"},
        {"name": "cgfedllm", "representation": "state", "gate": "report"},
    ],
    ids=str,
)
def test_no_update_leaves_a_site(
    method: dict[str, Any],
    run_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ups = Ups(monkeypatch)
    table = run_config | {"method": method | {"tgap": QUIET}, "codec": KLT}
    result = run_table(table, tmp_path / "run")
    by_task = {task: [reply for found, reply in ups.sent if found == task] for task, _ in ups.sent}
    assert all(reply == Payload() for reply in by_task["snapshot"])
    assert len(by_task["snapshot"]) == 15
    assert all(set(reply.tensors) == {"grams", "rows"} for reply in by_task["moments"])
    assert all(not reply.tensors for reply in by_task["probe"])
    assert len(by_task["moments"]) == len(by_task["probe"]) == 3
    kinds = result["bytes"]["by_kind"]
    assert kinds["up snapshot"] < 15 * 100
    assert kinds["up probe"] < 3 * 500
    assert "down install" not in kinds  # the probe has brought the codec
    assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]


def test_klt_trellis_is_fitted_too(run_config: dict[str, Any], tmp_path: Path) -> None:
    method = {"name": "fedavg", "tgap": QUIET}
    result = run_table(
        run_config | {"method": method, "codec": {"name": "klt_trellis", "rate": 16}},
        tmp_path / "run",
    )
    assert result["setup"]["gate"]["errors"]["all"] < 0.5


@pytest.mark.parametrize("feedback", [True, False])
def test_auto_chooses_by_what_sites_measure(
    feedback: bool, run_config: dict[str, Any], tmp_path: Path
) -> None:
    table = run_config | {
        "method": {"name": "fedavg", "tgap": QUIET},
        "codec": {"name": "auto", "rate": 16, "error_feedback": feedback},
    }
    result = run_table(table, tmp_path / "run")
    assert result["setup"]["choice"]["codec"]["name"] in ("trellis", "sign", "eden", "klt")
    assert result["bytes"]["up"] < result["bytes"]["up_raw"] / 8


def test_what_is_not_known_is_shown_as_such(run_config: dict[str, Any], tmp_path: Path) -> None:
    method = {
        "name": "fedavg",
        "tgap": QUIET | {"rounds": 2},
    }  # one held-out snapshot for each site
    result = run_table(run_config | {"method": method, "codec": KLT}, tmp_path / "run")
    report = result["setup"]["gate"]
    assert report["shuffled_error"] is report["aggregate_cosine"] is report["product_error"] is None
    words = "\n".join(round_lines.setup_lines(result["setup"]))
    assert "3 held-out of 6 updates" in words
    assert "the best guess without a message (zero) has 1.000" in words
    write_page(read_run(tmp_path / "run"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Cosine to the true update" in page
    assert "None" not in page.split("<summary>All settings")[0]


def test_a_codec_that_sites_cannot_use_is_refused(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Random updates: the gate still says so, from the sites' numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_report, "MARGIN", 0.999)
        method = {"name": "cgfedllm", "tgap": QUIET}
        with pytest.raises(GateError, match="codec 'klt' does not carry(.|\n)*of predictor 'zero'"):
            list(
                execute(
                    parse(run_config | {"method": method, "codec": KLT}, "test"), tmp_path / "run"
                )
            )

    refused = json.loads((tmp_path / "run" / "refused.json").read_text())
    assert refused["gate"]["failed"]


def test_resume_is_a_straight_run(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of TGAP, after set-up and after a round; moments are not added
    twice."""
    codec = KLT | {"error_feedback": True}
    table = run_config | {"method": {"name": "fedavg", "tgap": QUIET}, "codec": codec}
    straight = run_table(table, tmp_path / "straight")
    config = parse(table, "test")
    folder = tmp_path / "stopped"
    ask = Fleet.ask
    asked = []

    def failing(fleet: Fleet, task: str, messages: Mapping[str, Payload], **named: Any) -> Any:
        asked.append(task)
        if asked.count("snapshot") == 3:
            raise KeyboardInterrupt
        return ask(fleet, task, messages, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Fleet, "ask", failing)
        with pytest.raises(KeyboardInterrupt):
            list(execute(config, folder))

    result = run_with_stops(table, folder, (1, 1, 99), resume=True)
    assert result["adapter_sha256"] == straight["adapter_sha256"]
    assert result["setup"]["gate"] == straight["setup"]["gate"]
    assert result["bytes"] == straight["bytes"]


def test_the_order_of_replies_changes_nothing(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = run_config | {"rounds": 1, "method": {"name": "fedavg", "tgap": QUIET}, "codec": KLT}
    first = run_table(table, tmp_path / "sorted")
    ask = Fleet.ask

    def backwards(self: Fleet, task: str, messages: Mapping[str, Payload], **rest: Any) -> Any:
        return iter(list(ask(self, task, messages, **rest))[::-1])

    monkeypatch.setattr(Fleet, "ask", backwards)
    second = run_table(table, tmp_path / "reversed")
    assert first["adapter_sha256"] == second["adapter_sha256"]
    assert first["setup"] == second["setup"]


def test_a_refit_goes_on_from_moments(run_config: dict[str, Any], tmp_path: Path) -> None:
    method = {"name": "fedavg", "tgap": QUIET | {"refit": "broadcast", "refit_every": 2}}
    result = run_table(run_config | {"rounds": 4, "method": method, "codec": KLT}, tmp_path / "run")
    assert "down install" not in result["bytes"]["by_kind"]


# -- refusals ------------------------------------------------------------------------------------


def test_reading_federated_is_refused(run_config: dict[str, Any]) -> None:
    method = {"name": "fedavg", "tgap": {"source": "sites-covariance"}}
    with pytest.raises(ConfigError, match="keeps at the sites; set reading='local'"):
        parse(run_config | {"method": method, "codec": KLT}, "test")


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        (
            {"name": "resnet"},
            "'resnet' learns from updates themselves(.|\n)*codec.name='klt'.* or 'auto'",
        ),
        ({"name": "vq"}, "'vq' learns from updates themselves"),
        ({"name": "int8"}, "codec 'int8' learns nothing, so no moments are needed; choose 'none'"),
    ],
)
def test_what_moments_cannot_fit_is_refused(codec: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_codec(read_settings(codec), TgapConfig.model_validate(QUIET), LAYOUT)


def test_moments_beyond_a_message_are_refused() -> None:
    """They grow with the square of the width: a model of 7 billion parameters is out of reach."""
    wide = attention_layout(d=4096, kv=4096, layers=32, rank=8)
    assert num_bytes(wide) > 3 * Limits().max_bytes

    with pytest.raises(
        ConfigError, match="over the 2,147,483,648 of a message, because they grow with the square"
    ):
        check_codec(read_settings(KLT), TgapConfig.model_validate(QUIET), wide)
