"""EcoLoRA: equal to FedAvg with one dense segment, round robin, feedback both ways, sites that were
away, resume."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fluvial.data import Example, SiteData
from fluvial.errors import ConfigError, WireError
from fluvial.exchange import is_stale
from fluvial.federation.in_process import local_fleet
from fluvial.federation.sites import Site
from fluvial.federation.store import StateStore
from fluvial.methods import Context
from fluvial.methods import ecolora as module
from fluvial.methods.ecolora import METHOD, EcoLoraServer
from fluvial.methods.ecolora.config import EcoLoraConfig, check_segments
from fluvial.methods.ecolora.segments import Slice, Sparsifier, mix, segment, share, turn
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.run import execute
from fluvial.training.config import TrainConfig
from fluvial.wire.payload import Payload, Value, frame_payload, payload_frame
from fluvial.wire.tensors import Layout, Named
from tests.support.runs import run_table, run_with_stops

LAYOUT = Layout.of({"m.lora_A.weight": torch.zeros(4, 40), "m.lora_B.weight": torch.zeros(30, 4)})
TRAIN = TrainConfig(learning_rate=1e-2)
"""Settings with which training can reach the noise of `_Sites`, of standard deviation 1."""
PLAIN = {
    "name": "ecolora",
    "segments": 1,
    "most": 1.0,
    "least_a": 1.0,
    "least_b": 1.0,
    "mixing": "none",
}


def _context(**changes: Any) -> Context:
    def refuse() -> Any:
        raise AssertionError("not needed")

    settings: dict[str, Any] = {
        "seed": 1,
        "rounds": 2,
        "layout": LAYOUT,
        "codec": METHOD.traits.codec,
        "downlink": None,
    }
    return Context(
        **settings | changes, train=TRAIN, open_pool=refuse, secret=refuse, public=refuse
    )


class _Pool:
    """Stands for a pool of models where nothing is trained."""

    layout = LAYOUT


class _Report:
    loss = 2.0


class _Sites:
    """Sites whose training adds noise; what they started from and added is kept for the tests."""

    def __init__(self, config: EcoLoraConfig, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = StateStore(None)
        self.config = config
        self.started: dict[tuple[str, int], np.ndarray[Any, Any]] = {}
        self.updates: dict[tuple[str, int], np.ndarray[Any, Any]] = {}
        self.sent: list[tuple[str, int, Payload]] = []
        self.fleet = local_fleet(
            [f"s{number}" for number in range(count)], self._open, {"train": self._train}
        )
        monkeypatch.setattr(module, "train_locally", self._tune)

    def _open(self, name: str) -> Site:
        return Site(
            name=name,
            seed=1,
            pool=_Pool(),  # type: ignore[arg-type]
            load=lambda: SiteData([Example((1,), (1,))] * 2, [], [], 2, 0, 0),
            train=TRAIN,
            codec=METHOD.traits.codec,
            downlink=None,
            method=self.config,
            store=self.store,
            rounds=9,
        )

    def _train(self, site: Site, message: Payload) -> Payload:
        reply = module.train(site, message)
        self.sent.append((site.name, message.value("round", int), reply))
        return reply

    def _tune(self, site: Site, received: Named, round: int, **_: Any) -> tuple[Named, _Report]:
        noise = (
            np.random.default_rng([int(site.name[1:]), round])
            .standard_normal(LAYOUT.numel)
            .astype(np.float32)
        )
        self.started[site.name, round] = LAYOUT.flatten(received).numpy().copy()
        self.updates[site.name, round] = noise

        return LAYOUT.unflatten(torch.from_numpy(noise)), _Report()


def test_it_learns_from_few_bytes(run_config: dict[str, Any], tmp_path: Path) -> None:
    dense = run_table(run_config | {"method": PLAIN | {"values": "fp32"}}, tmp_path / "dense")[
        "bytes"
    ]["by_kind"]
    result = run_table(run_config | {"method": {"name": "ecolora"}}, tmp_path / "sparse")
    assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]
    assert (
        result["bytes"]["by_kind"]["up train"] < 0.15 * dense["up train"]
    )  # 16 of 32 bits, 1/5, 0.95, envelope
    assert result["bytes"]["by_kind"]["down train"] < dense["down train"]


def test_resume_is_a_straight_run(run_config: dict[str, Any], tmp_path: Path) -> None:
    table = run_config | {
        "rounds": 4,
        "method": {"name": "ecolora", "fraction": 0.7, "segments": 2, "least_b": 0.1},
    }
    straight = run_table(table, tmp_path / "straight")
    result = run_with_stops(table, tmp_path / "stopped", (1, 2, 1, 99))
    assert result["adapter_sha256"] == straight["adapter_sha256"]
    assert result["bytes"] == straight["bytes"]


def test_a_site_that_lost_its_store_is_sent_everything(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """The folder of one site is deleted after every round; the site trains in every round."""
    folder = tmp_path / "run"
    table = run_config | {"rounds": 3, "method": {"name": "ecolora", "segments": 2}}
    rounds = []

    for event in execute(parse(table, "test"), folder):
        if event.kind == "round":
            rounds.append(event.values)
            victim = sorted(path for path in (folder / "sites").iterdir() if path.is_dir())[0]
            shutil.rmtree(victim)

    assert [record["sites"] for record in rounds] == [3, 3, 3]
    assert all(record["missing"] == [] for record in rounds)
    # Asked twice, first with what changed since its last answer and then with all of it.
    down = [row["down train"] for row in rounds[2]["bytes"].values()]
    assert max(down) > 1.5 * min(down)


@pytest.mark.parametrize("segments", [1, 2, 5, 7, 280])
def test_segments_tile_the_adapter(segments: int) -> None:
    parts = [segment(number, segments, LAYOUT.numel) for number in range(segments)]
    assert [place for part in parts for place in range(part.start, part.stop)] == list(
        range(LAYOUT.numel)
    )
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("cohort", "segments"), [(5, 5), (8, 5), (3, 1)])
def test_every_round_covers_every_segment(cohort: int, segments: int) -> None:
    for number in range(1, 9):
        assert {turn(place, number, segments) for place in range(cohort)} == set(range(segments))


def test_every_site_sends_every_segment_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are fewer sites than segments."""
    config = EcoLoraConfig(segments=4)
    sites = _Sites(config, 3, monkeypatch)
    server = EcoLoraServer(config, _context())

    for number in range(1, 5):
        assert server.round(number, sites.fleet)["segments"] == 3
    for name in sites.fleet.sites:
        assert {reply.value("segment", int) for site, _, reply in sites.sent if site == name} == {
            0,
            1,
            2,
            3,
        }


def test_what_was_sent_and_the_residual_are_the_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without mixing and with one segment; the tolerance is for fp32 sums."""
    config = EcoLoraConfig(segments=1, most=0.3, least_a=0.1, least_b=0.1, mixing="none")
    sites = _Sites(config, 2, monkeypatch)
    server = EcoLoraServer(config, _context())

    for number in range(1, 6):
        server.round(number, sites.fleet)
    for name in sites.fleet.sites:
        sent = sum(
            server.uploads[0].decode_dense(payload_frame(reply), round=number)
            for site, number, reply in sites.sent
            if site == name
        )
        residual = sites.store.read(name, "ecolora").tensor("residual").numpy()
        updates = sum(update for (site, _), update in sites.updates.items() if site == name)
        assert np.allclose(sent + residual, updates, atol=1e-5)
        assert np.count_nonzero(residual) > 0.3 * LAYOUT.numel


def test_a_site_that_was_away_knows_what_the_others_know(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EcoLoraConfig(
        fraction=0.5, segments=2, most=0.3, least_a=0.2, least_b=0.1, mixing="none"
    )
    sites = _Sites(config, 6, monkeypatch)
    server = EcoLoraServer(config, _context())

    for number in range(1, 10):
        server.round(number, sites.fleet)
        for (_, round), start in sites.started.items():
            assert round != number or np.array_equal(start, server.view)

    assert any(number < 9 for number in server.answered.values())


def test_what_the_download_leaves_out_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the adapter stands still, everything arrives, the largest differences first."""
    config = EcoLoraConfig(most=0.2, least_a=0.2, least_b=0.2)
    server = EcoLoraServer(config, _context())
    server.adapter = np.random.default_rng(0).standard_normal(LAYOUT.numel).astype(np.float32)
    gaps = []

    for number in range(1, 6):
        server._broadcast(number, 0.2, 0.2)
        gaps.append(float(np.abs(server.adapter - server.view).max()))
        assert np.count_nonzero(server.changed) == number * LAYOUT.numel // 5

    assert gaps == sorted(gaps, reverse=True)
    assert np.allclose(server.view, server.adapter, rtol=1e-3)


def test_a_site_mixes_in_its_own_adapter_by_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EcoLoraConfig(beta=0.7)
    sites = _Sites(config, 5, monkeypatch)
    server = EcoLoraServer(config, _context())
    server.round(1, sites.fleet)
    assert np.array_equal(sites.started["s0", 1], server.view)
    server.round(2, sites.fleet)
    own = sites.started["s0", 1] + sites.updates["s0", 1]
    weight = math.exp(-0.7)
    assert np.allclose(sites.started["s0", 2], weight * own + (1 - weight) * server.view, atol=1e-5)


def test_weight_zero_is_the_other_to_the_bit() -> None:
    random = np.random.default_rng(0)
    ours, others = random.standard_normal((2, 99)).astype(np.float32)
    assert np.array_equal(mix(ours, others, 0.0), others)


def test_the_share_falls_with_the_loss() -> None:
    assert share(0.5, 0.95, 2.0, 0.0) == 0.95
    assert share(0.5, 0.95, 2.0, -3.0) == 0.95
    assert share(0.5, 0.95, 2.0, 0.5) == pytest.approx(0.5 + 0.45 / math.e, abs=1e-4)
    assert share(0.5, 0.95, 2.0, 50.0) == 0.5


def test_the_server_lowers_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EcoLoraConfig()
    sites = _Sites(config, 5, monkeypatch)
    server = EcoLoraServer(config, _context())
    first = server.round(1, sites.fleet)
    monkeypatch.setattr(_Report, "loss", 1.0)
    server.round(2, sites.fleet)
    third = server.round(3, sites.fleet)
    assert (first["share_a"], first["share_b"]) == (0.95, 0.95)
    assert third["share_a"] == pytest.approx(0.6 + 0.35 * math.exp(-1), abs=1e-4)
    assert third["share_b"] == pytest.approx(0.5 + 0.45 * math.exp(-2), abs=1e-4)


def test_a_and_b_are_chosen_apart() -> None:
    change = np.concatenate([np.full(160, 9.0), np.full(120, 1.0)]).astype(np.float32)
    chosen = Sparsifier(LAYOUT).choose(change, Slice(0, 280), 0.5, 0.25)
    assert [int(np.sum(chosen < 160)), len(chosen)] == [80, 110]
    chosen = Sparsifier(LAYOUT).choose(change[150:180], Slice(150, 180), 0.5, 0.25)
    assert [int(np.sum(chosen < 10)), len(chosen)] == [5, 10]


def test_the_first_download_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sites know the initial adapter."""
    server = EcoLoraServer(EcoLoraConfig(), _context())
    server._broadcast(1, 0.9, 0.9)
    assert not server.changed.any()


def test_the_state_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EcoLoraConfig()
    sites = _Sites(config, 5, monkeypatch)
    server = EcoLoraServer(config, _context())
    server.round(1, sites.fleet)
    server.round(2, sites.fleet)
    again = EcoLoraServer(config, _context(seed=2))
    again.restore(Payload.from_bytes(server.state().to_bytes()))
    assert again.state().to_bytes() == server.state().to_bytes()

    with pytest.raises(WireError, match="view"):
        again.restore(
            Payload({**server.state().tensors, "view": torch.zeros(3)}, server.state().values)
        )


def test_damaged_replies_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EcoLoraConfig()
    sites = _Sites(config, 5, monkeypatch)
    server = EcoLoraServer(config, _context())
    server.round(1, sites.fleet)
    _, _, reply = sites.sent[0]
    which = reply.value("segment", int)
    asked = {"a": which}
    server._read(asked, 1, "a", reply)
    frame = payload_frame(reply)
    damaged = frame[:20] + bytes([frame[20] ^ 1]) + frame[21:]
    values: dict[str, Value] = {"n": 2, "loss": 1.0, "segment": which}

    for wrong in (
        Payload(reply.tensors, values | {"segment": 5}),
        Payload(reply.tensors, values | {"segment": (which + 1) % 5}),
        Payload(reply.tensors, values | {"n": 0}),
        Payload(reply.tensors, values | {"loss": 1e30}),
        frame_payload(damaged, **values),
    ):
        with pytest.raises(WireError):
            server._read(asked, 1, "a", wrong)


def test_an_update_that_no_training_can_make_is_refused() -> None:
    server = EcoLoraServer(EcoLoraConfig(segments=1, values="fp32"), _context())
    far = np.full(LAYOUT.numel, 1e3, dtype=np.float32)
    frame = server.uploads[0].encode(far, np.arange(len(far)), round=1)
    reply = frame_payload(frame, n=2, loss=1.0, segment=0)
    with pytest.raises(WireError, match="training with these settings reaches no"):
        server._read({"a": 0}, 1, "a", reply)


def test_a_site_refuses_what_it_cannot_build_on(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EcoLoraConfig()
    sites = _Sites(config, 5, monkeypatch)
    server = EcoLoraServer(config, _context())
    good = server._messages({"s0": 1}, 1, [0.9, 0.9], ["s0"])["s0"]
    module.train(sites._open("s0"), good)
    wrong: list[dict[str, Value]] = [
        {"segment": 5},
        {"segment": -1},
        {"share": [0.5]},
        {"share": [0.5, 2.0]},
        {"round": 2},
    ]

    for bad in wrong:
        with pytest.raises(WireError):
            module.train(sites._open("s0"), Payload(good.tensors, {**good.values, **bad}))

    unknown = Payload(good.tensors, {**good.values, "since": 1})
    assert is_stale(module.train(sites._open("s0"), unknown)), "it asks for everything"


def test_impossible_settings_are_refused(run_config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="least_a"):
        EcoLoraConfig(most=0.5)
    with pytest.raises(ValueError, match="beta: without effect"):
        EcoLoraConfig(mixing="none", beta=2.0)
    with pytest.raises(ConfigError, match="choose fewer"):
        check_segments(EcoLoraConfig(segments=281), LAYOUT)
    with pytest.raises(ValueError, match="codec"):
        RunConfig.model_validate(
            run_config | {"method": {"name": "ecolora"}, "codec": {"name": "bf16"}}
        )
