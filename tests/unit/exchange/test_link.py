"""Both directions: the coded downlink, learned codecs under every method, refits, the policy, sites
that lost all."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.codecs import read_settings
from fluvial.codecs.base import Codec
from fluvial.codecs.quantise import Int8Settings
from fluvial.errors import ConfigError, WireError
from fluvial.exchange import gate
from fluvial.exchange.downlink import Downlink
from fluvial.exchange.report import GateReport
from fluvial.models.adapters import is_side
from fluvial.models.states import initial_state
from fluvial.seeds import generator
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, add, norm, subtract
from tests.support.runs import run_table

LAYOUT = Layout(
    tuple(
        (f"layers.{layer}.{module}.lora_{which}.weight", (4, 32) if which == "A" else (32, 4))
        for layer in range(2)
        for module in ("q_proj", "v_proj")
        for which in ("A", "B")
    )
)
START = initial_state(LAYOUT, 0)


def drift(round: int) -> Named:
    random = generator(0, "drift", round)
    return {name: 1e-3 * torch.randn(shape, generator=random) for name, shape in LAYOUT.shapes}


def moves(rounds: int) -> list[Named]:
    """The adapter at the start of each round, from 1."""
    adapters = [START]
    for round in range(1, rounds):
        adapters.append(add(adapters[-1], drift(round)))
    return adapters


def test_the_reference_follows_the_adapter_and_forgets_nothing() -> None:
    """With a codec of 1/16 the reference stays near the adapter: what one round loses, later rounds
    bring."""
    down = Downlink(read_settings({"name": "top_k", "rate": 8}), 0, START)
    adapters = moves(12)
    lost = []

    for round, adapter in enumerate(adapters, 1):
        down.advance(adapter, round)
        lost.append(norm(subtract(adapter, down.reference)))

    assert lost[0] == 0
    assert lost[-1] < 4 * norm(drift(1))
    for round in range(13, 40):  # standing still, it arrives
        down.advance(adapters[-1], round)
    assert norm(subtract(adapters[-1], down.reference)) < 0.05 * norm(drift(1))


def test_frames_add_up_for_a_site_that_was_away() -> None:
    down = Downlink(Int8Settings(), 0, START)
    sizes = []
    for round, adapter in enumerate(moves(4), 1):
        down.advance(adapter, round)
        message = down.message("away", {"round": round})
        sizes.append(len(message.value("sizes", list)))

        if round == 2:
            down.acknowledge("near")

    assert sizes == [0, 1, 2, 3]
    assert len(down.message("near", {"round": 4}).value("sizes", list)) == 2
    assert down.message("away", {}) is down.message("new", {})


def test_after_too_many_frames_the_exact_adapter_is_shorter() -> None:
    down = Downlink(Int8Settings(), 0, START)
    for round, adapter in enumerate(moves(7), 1):
        down.advance(adapter, round)
    message = down.message("away", {"round": 7})
    assert "base" not in message.values
    assert len(message.to_bytes()) < LAYOUT.raw_bytes + 100
    assert sum(map(len, down.frames.values())) <= LAYOUT.raw_bytes


def test_no_frame_has_a_frozen_factor() -> None:
    """A side path of another layer changes, and has one scale with the frozen A in a frame."""
    names = LAYOUT.names
    side = {name: name.replace(".weight", ".side.weight") for name in names if "layers.1" in name}
    assert all(map(is_side, side.values()))

    def adapter(tensors: Named) -> Named:
        renamed = {side.get(name, name): tensor for name, tensor in tensors.items()}
        return renamed | {name: START[name] for name in frozen}

    frozen = [name for name in names if ".lora_A." in name and name not in side]
    settings = read_settings({"name": "trellis", "rate": 4})
    down = Downlink(settings, 0, adapter(START), factors="B")
    both = Downlink(settings, 0, adapter(START))
    for round, tensors in enumerate(moves(4), 1):
        down.advance(adapter(tensors), round)
        both.advance(adapter(tensors), round)

    moved = subtract(down.reference, adapter(START))
    assert {name for name in moved if not moved[name].any()} == set(frozen)
    assert all((both.reference[name] != START[name]).any() for name in frozen)

    with pytest.raises(ConfigError, match="lora_A.* has changed, which .* factors='B' freeze"):
        down.advance(adapter(START) | {frozen[0]: torch.ones(4, 32)}, 5)


def test_the_state_of_the_downlink_is_all() -> None:
    first = Downlink(Int8Settings(), 0, START)
    adapters = moves(5)
    for round, adapter in enumerate(adapters[:3], 1):
        first.advance(adapter, round)
        first.acknowledge("a")

    second = Downlink(Int8Settings(), 0, START)
    second.restore(Payload.from_bytes(first.state().to_bytes()))
    for round in (4, 5):
        for each in (first, second):
            each.advance(adapters[round - 1], round)
        for site in ("a", "b"):
            assert first.message(site, {}).to_bytes() == second.message(site, {}).to_bytes()


METHODS: list[dict[str, Any]] = [
    {"name": "fedavg"},
    {"name": "fedavg", "factors": "B"},
    {"name": "fedavg", "fraction": 0.7},
    {"name": "cgfedllm", "tgap": {"source": "none"}},
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_any_method_takes_a_coded_downlink(
    method: dict[str, Any], run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Fewer bytes come down, and the adapter is near that of an exact downlink."""
    table = run_config | {"rounds": 4, "method": method, "codec": {"name": "int8"}}
    exact = run_table(table, tmp_path / "exact")
    coded = run_table(table | {"downlink": {"name": "int8"}}, tmp_path / "coded")
    assert coded["bytes"]["down"] < 0.35 * exact["bytes"]["down"]
    assert coded["heldout"]["final"]["loss"] == pytest.approx(
        exact["heldout"]["final"]["loss"], abs=0.01
    )


def test_an_identity_downlink_changes_nothing(run_config: dict[str, Any], tmp_path: Path) -> None:
    """fp32 differences round, so the adapters agree to the last bits."""
    exact = run_table(run_config, tmp_path / "exact")
    coded = run_table(run_config | {"downlink": {"name": "identity"}}, tmp_path / "coded")
    assert coded["heldout"]["final"]["loss"] == pytest.approx(
        exact["heldout"]["final"]["loss"], abs=1e-5
    )
    assert coded["bytes"]["down"] == pytest.approx(exact["bytes"]["down"], rel=0.02)


def test_a_site_that_lost_its_state_is_sent_everything(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """The folder of one site is emptied between rounds; the run continues, and the site trains in
    every round."""
    import shutil

    from fluvial.runs.config import parse
    from fluvial.runs.run import execute

    folder = tmp_path / "run"
    table = run_config | {
        "rounds": 3,
        "codec": {"name": "int8", "error_feedback": True},
        "downlink": {"name": "int8"},
    }
    rounds = []

    for event in execute(parse(table, "test"), folder):
        if event.kind == "round":
            rounds.append(event.values)
            victim = sorted(path for path in (folder / "sites").iterdir() if path.is_dir())[0]
            shutil.rmtree(victim)

    assert [record["sites"] for record in rounds] == [3, 3, 3]
    assert rounds[2]["missing"] == []
    lost = [
        site
        for site, row in rounds[2]["bytes"].items()
        if row["down train"] > rounds[2]["bytes_down"] / 2
    ]
    assert len(lost) == 1  # one site was sent the exact adapter, the others a frame


def test_a_message_that_does_not_fit_together_is_refused() -> None:
    from fluvial.exchange.downlink import _split_frames
    from fluvial.wire.payload import frame_payload

    for sizes in ([3], [-1, 5], [True, 3], [2.0, 2]):
        with pytest.raises(WireError):
            _split_frames(frame_payload(b"four", sizes=sizes))  # type: ignore[arg-type]

    assert _split_frames(frame_payload(b"four", sizes=[1, 3])) == [b"f", b"our"]


@pytest.mark.parametrize("factors", ["A and B", "B"])
def test_fedavg_learns_a_codec(factors: str, run_config: dict[str, Any], tmp_path: Path) -> None:
    """The same learned codec under FedAvg and FFA-LoRA, with TGAP on the sites."""
    method = {"name": "fedavg", "factors": factors, "tgap": {"source": "sites", "rounds": 3}}
    table = run_config | {
        "rounds": 2,
        "method": method,
        "codec": {"name": "klt", "rate": 8, "error_feedback": True},
    }
    result = run_table(table, tmp_path / "run")
    assert result["setup"]["gate"]["errors"]["all"] < 0.6
    assert result["bytes"]["up"] < result["bytes"]["up_raw"] / 4


def test_the_server_moves_by_its_learning_rate(run_config: dict[str, Any], tmp_path: Path) -> None:
    """After one round: twice the rate is twice the way."""
    from safetensors.torch import load_file

    moved = []

    for rate in (1.0, 2.0):
        folder = tmp_path / str(rate)
        run_table(
            run_config | {"rounds": 1, "method": {"name": "fedavg", "server_learning_rate": rate}},
            folder,
        )
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
        moved.append(
            {name: tensor for name, tensor in weights.items() if "lora_B" in name}
        )  # B starts at zero

    for name, tensor in moved[0].items():
        assert torch.allclose(2 * tensor, moved[1][name], rtol=1e-5)


@pytest.mark.parametrize("refit", ["decoded", "broadcast"])
def test_a_refit_follows_the_run(refit: str, run_config: dict[str, Any], tmp_path: Path) -> None:
    """Every second round the transform moves to another epoch; only "decoded" sends it again."""
    tgap = {"source": "sites", "rounds": 4, "refit": refit, "refit_every": 2}
    method = {"name": "fedavg", "tgap": tgap}
    table = run_config | {
        "rounds": 6,
        "method": method,
        "codec": {"name": "klt", "rate": 8, "error_feedback": True},
    }
    result = run_table(table, tmp_path / "run")
    installed = result["bytes"]["by_kind"]["down install"]
    once = run_table(
        table | {"method": {"name": "fedavg", "tgap": {"source": "sites", "rounds": 4}}},
        tmp_path / "no",
    )
    fixed = once["bytes"]["by_kind"]["down install"]
    assert (
        installed == pytest.approx(3 * fixed, rel=0.05)
        if refit == "decoded"
        else installed == fixed
    )
    assert result["adapter_sha256"] != once["adapter_sha256"]
    assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]


def test_a_site_that_missed_a_refit_is_installed_anew(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """With two of three sites in a cohort, no site sees every adapter: a refit without bytes is not
    always possible."""
    method = {
        "name": "fedavg",
        "fraction": 0.7,
        "tgap": {"source": "sites", "rounds": 4, "refit": "broadcast", "refit_every": 2},
    }
    table = run_config | {"rounds": 6, "method": method, "codec": {"name": "klt", "rate": 8}}
    result = run_table(table, tmp_path / "run")
    sites = [row["bytes"] for row in _rounds(tmp_path / "run")]
    assert any("down install" in row for record in sites for row in record.values())
    assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]


def test_the_step_follows_the_noise_between_sites(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """After some rounds codec noise is near the wanted share of the sampling noise, whatever rate
    it began with."""
    ratios = []
    for wanted in (0.05, 1.0):
        codec = {"name": "klt", "rate": 16, "noise_ratio": wanted}
        method = {"name": "fedavg", "tgap": {"source": "sites", "rounds": 4}}
        table = run_config | {"rounds": 8, "method": method, "codec": codec}
        run_table(table, tmp_path / str(wanted))
        last = _rounds(tmp_path / str(wanted))[-1]
        ratios.append(last["codec_noise"] / last["sampling_noise"])

    assert ratios[0] < 0.15
    assert ratios[1] > 2 * ratios[0]


@pytest.mark.parametrize("feedback", [True, False])
def test_auto_chooses_and_says_why(
    feedback: bool, run_config: dict[str, Any], tmp_path: Path
) -> None:
    table = run_config | {
        "rounds": 2,
        "method": {"name": "fedavg", "tgap": {"source": "sites", "rounds": 4}},
        "codec": {"name": "auto", "rate": 16, "error_feedback": feedback},
    }
    result = run_table(table, tmp_path / "run")
    choice = result["setup"]["choice"]
    assert choice["codec"]["error_feedback"] is feedback
    assert choice["codec"]["name"] in ("trellis", "sign", "int4", "eden", "klt")
    assert result["bytes"]["up"] < result["bytes"]["up_raw"] / 8
    assert len(choice["why"]) > 20


@pytest.mark.parametrize("source", ["sites", "sites-covariance"])
def test_auto_counts_the_time_of_a_codec_with_the_upload(
    source: str, run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a line of a terabit no upload is worth a search of paths; on one of a kilobit, it is."""
    measured: list[str] = []  # a codec that is too slow is left out before its errors are measured
    measure = gate.measure

    def counted(codec: Codec, *rest: Any) -> GateReport:
        measured.append(codec.settings.name)
        return measure(codec, *rest)

    monkeypatch.setattr(gate, "measure", counted)
    names = []
    for uplink_mbps, upload_s in ((1e6, 1e-3), (1e-3, 8.0)):
        table = run_config | {
            "rounds": 1,
            "method": {
                "name": "fedavg",
                "tgap": {"source": source, "rounds": 3, "reading": "local"},
            },
            "codec": {"name": "auto", "uplink_mbps": uplink_mbps, "upload_s": upload_s},
        }
        choice = run_table(table, tmp_path / str(uplink_mbps))["setup"]["choice"]
        assert f"coding + upload at {uplink_mbps:g} Mbit/s" in choice["why"]
        assert choice["codec"]["error_feedback"]
        names.append(choice["codec"]["name"])

    assert names[0] in ("int8", "int4")
    assert names[1] in ("trellis", "sign")
    if source == "sites":
        assert measured[0] == names[0]


def _rounds(folder: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_unbiased_codec_is_not_held_to_the_error_of_one_update(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Its error at low rates is above 1, and the mean over many sites repays it."""
    table = run_config | {
        "rounds": 1,
        "method": {"name": "fedavg", "tgap": {"source": "sites", "rounds": 3}},
        "codec": {"name": "auto", "rate": 28, "error_feedback": False},
    }
    result = run_table(table, tmp_path / "run")
    assert result["setup"]["choice"]["codec"]["name"] in ("eden", "klt")


def test_weights_lower_the_error_of_the_weights(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Scales are known at both ends and cost no byte; what is decoded is the update again."""
    from fluvial.codecs import build
    from fluvial.exchange.coding import Plain
    from fluvial.exchange.weighting import Weighted, weighted
    from fluvial.wire.tensors import relative_error

    received = {
        name: (0.05 if ".lora_B." in name else 1.0) * tensor
        for name, tensor in add(START, drift(3)).items()
    }
    codec = build(read_settings({"name": "trellis", "rate": 8, "weighted": True}), LAYOUT)
    plain = Plain(codec)
    heavy = weighted(codec, received)
    assert isinstance(heavy, Weighted)
    frame, _ = heavy.encode(drift(5), seed=1)
    assert len(frame) <= LAYOUT.raw_bytes / 8
    errors = {}

    for name, each in (("plain", plain), ("heavy", heavy)):
        decoded = each.decode(each.encode(drift(5), seed=1)[0])
        b = {key: tensor for key, tensor in drift(5).items() if ".lora_B." in key}
        errors[name] = relative_error(b, {key: decoded[key] for key in b})

    assert errors["heavy"] < errors["plain"]  # A is large, so a change of B weighs more
    method = {"name": "fedavg", "tgap": {"source": "sites", "rounds": 4}}
    for settings in (
        {"name": "klt", "rate": 8, "error_feedback": True},
        {"name": "trellis", "rate": 8},
    ):
        table = run_config | {"rounds": 2, "codec": {**settings, "weighted": True}}
        table |= {"method": method} if settings["name"] == "klt" else {}
        result = run_table(table, tmp_path / str(settings["name"]))
        assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]
