"""The rate follows the codec's noise: it converges, it follows a change, and a run keeps it."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.codecs import CODECS, build, read_settings
from fluvial.codecs.base import Codec, LearnedCodec, RatedCodec
from fluvial.errors import ConfigError
from fluvial.exchange import rates
from fluvial.exchange.rates import RateControl, bits_of
from fluvial.exchange.uplink import coder_of
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from fluvial.seeds import derive
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Named, add, relative_error, scale
from tests.support.runs import run_table, run_with_stops
from tests.support.updates import attention_layout, subspace_updates

LAYOUT = attention_layout(layers=1)
SITES = 3
DRIVEN = [name for name, kind in CODECS.items() if issubclass(kind, RatedCodec)]


def update_of(round: int, site: int, *, loud: float = 1.0, common: float = 0.0) -> Named:
    """Return an update with `loud` times larger factors B, and a `common` part of all sites."""
    (own,) = subspace_updates(LAYOUT, 1, seed=derive(0, round, site), decay=0.6)
    (shared,) = subspace_updates(LAYOUT, 1, seed=derive(0, round, "all"), decay=0.6)
    both = add(own, scale(shared, common))
    return {name: loud * x if "lora_B" in name else x for name, x in both.items()}


def codec_of(name: str, **values: Any) -> Codec:
    start = 32.0 if name == "klt_trellis" else 16.0
    settings = read_settings({"name": name, "rate": start, **values})
    kind = CODECS[name]
    if not issubclass(kind, LearnedCodec):
        return build(settings, LAYOUT)
    seen = [update_of(100 + number, 0) for number in range(8)]
    return kind.fit(settings, LAYOUT, seen, seed=0)


def play(codec: Codec, rounds: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Return the metrics of rounds whose updates are made by `update_of`."""
    control = RateControl.of(codec.settings, LAYOUT)
    assert control is not None
    states: list[dict[str, Payload]] = [{} for _ in range(SITES)]
    metrics = []

    for round, kinds in enumerate(rounds, start=1):
        assert isinstance(codec, RatedCodec)
        coder = coder_of(codec.at_rate(control.rate), {})
        mean: Named | None = None
        for site in range(SITES):
            update = update_of(round, site, **kinds)
            frame, states[site] = coder.encode(update, states[site], seed=site, round=round)
            assert len(frame) <= LAYOUT.raw_bytes / control.rate
            decoded = coder.decode(frame, round=round)
            error = (
                states[site]["residual"].value("error", float)
                if states[site]
                else relative_error(update, decoded)
            )
            control.fold(error, decoded)
            part = scale(decoded, 1 / SITES)
            mean = part if mean is None else add(mean, part)

        assert mean is not None
        metrics.append({"error": error, **control.close(mean)})

    return metrics


def snr_db(record: dict[str, Any]) -> float:
    return float(-10 * torch.log10(torch.tensor(record["error"])))


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("name", DRIVEN)
def test_the_snr_becomes_the_one_that_was_asked_for(name: str, feedback: bool) -> None:
    if name == "eden" and feedback:
        return  # it has no bias, and feedback around it diverges
    for target in (2.0, 9.0):
        if name == "klt_trellis":
            target = min(target, 4.0)  # its rate is at least 16
        codec = codec_of(name, snr_db=target, error_feedback=feedback)
        played = play(codec, [{}] * 9)
        assert snr_db(played[-1]) == pytest.approx(target, abs=0.6)


@pytest.mark.parametrize("name", ["trellis", "hadamard", "klt"])
def test_the_rate_follows_a_change_of_the_updates_within_the_run(name: str) -> None:
    """From round 9 nearly all energy is in half of the values: the same SNR takes fewer bytes."""
    codec = codec_of(name, snr_db=8.0)
    played = play(codec, [{}] * 8 + [{"loud": 16.0}] * 8)
    assert snr_db(played[7]) == pytest.approx(8, abs=0.6)
    assert snr_db(played[8]) > 9
    assert snr_db(played[-1]) == pytest.approx(8, abs=0.6)
    assert played[-1]["rate"] > 1.3 * played[7]["rate"]


@pytest.mark.parametrize("name", DRIVEN)
def test_noise_becomes_the_wanted_share_of_the_variance_between_sites(name: str) -> None:
    """From round 9 sites agree: what they have in common needs no finer code than their noise."""
    codec = codec_of(name, noise_ratio=0.3, error_feedback=name != "eden")
    played = play(codec, [{}] * 8 + [{"common": 2.0}] * 8)

    for record in (played[7], played[-1]):
        within = record["sampling_noise"]
        if name == "eden":
            within -= record["codec_noise"]
        assert record["codec_noise"] / within == pytest.approx(0.3, rel=0.25)

    assert played[-1]["rate"] < 0.8 * played[7]["rate"]


def test_steps_are_damped_and_end_where_the_codec_does() -> None:
    codec = codec_of("trellis", snr_db=30.0)
    falling = [record["rate"] for record in play(codec, [{}] * 6)]
    pairs = list(itertools.pairwise(falling))
    assert all(before / after <= 2.001 for before, after in pairs)
    assert falling[-1] < 6
    assert all(record["rate"] >= 4 for record in play(codec_of("eden", snr_db=30.0), [{}] * 6))
    rising = [record["rate"] for record in play(codec_of("trellis", snr_db=0.01), [{}] * 14)]
    assert rising[-1] == rising[-2] > 400
    room = CODECS["trellis"].frame_size
    values = codec.settings.model_dump()
    room(read_settings(values | {"rate": rising[-1]}), LAYOUT)
    with pytest.raises(ConfigError):
        room(read_settings(values | {"rate": 1.02 * rising[-1]}), LAYOUT)


def test_one_site_does_not_change_the_rate_of_all() -> None:
    settings = codec_of("trellis", snr_db=6.0).settings
    update = update_of(1, 0)
    chosen = []
    for lie in (0.25, 0.0, 1e4):
        control = RateControl.of(settings, LAYOUT)
        assert control is not None
        for error in (0.25, lie, 0.25):
            control.fold(error, update)
        control.close(update)
        chosen.append(control.rate)

    assert chosen[0] == chosen[1] == chosen[2]


def test_bits_are_those_of_the_gaussian_bound() -> None:
    assert bits_of(1 / 16, without_bias=False) == 2
    assert bits_of(1 / 15, without_bias=True) == pytest.approx(2)
    assert bits_of(5.0, without_bias=False) == rates._LEAST_BITS


DRIVEN_RUN = {
    "rounds": 4,
    "codec": {"name": "trellis", "rate": 8, "snr_db": 5.0, "error_feedback": True},
}


def test_a_run_keeps_its_rate_through_stops(run_config: dict[str, Any], tmp_path: Path) -> None:
    table = run_config | DRIVEN_RUN
    straight = run_table(table, tmp_path / "straight")
    stopped = run_with_stops(table, tmp_path / "stopped", [2, 1, 1, 100])
    assert stopped["adapter_sha256"] == straight["adapter_sha256"]
    lines = (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert next(record["rate"] for record in records) == 8
    assert len({record["rate"] for record in records}) == 4
    sizes = [record["bytes_up"] for record in records]
    assert sizes == sorted(sizes, reverse=True)
    rows = str(plan(parse(table, "test"))["rows"])
    assert "the rate of each round follows the errors that sites report" in rows


def test_auto_passes_the_target_on(run_config: dict[str, Any], tmp_path: Path) -> None:
    table = run_config | {
        "rounds": 2,
        "method": {"name": "fedavg", "tgap": {"source": "sites", "rounds": 4}},
        "codec": {"name": "auto", "rate": 16, "snr_db": 4.0},
    }
    result = run_table(table, tmp_path / "run")
    assert result["setup"]["choice"]["codec"]["snr_db"] == 4.0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["rate"] for line in lines][1] > 16


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"codec": {"name": "trellis", "snr_db": 3.0, "noise_ratio": 1.0}}, "remove one"),
        ({"codec": {"name": "trellis", "snr_db": -3.0}}, "sending nothing has 0 dB"),
        ({"codec": {"name": "int8"}, "downlink": {"name": "trellis", "snr_db": 3.0}}, "downlink"),
        (
            {
                "codec": {"name": "trellis", "rate": 8, "snr_db": 3.0},
                "method": {"name": "fedavg", "aggregation": {"mode": "residual"}},
            },
            "codec.snr_db",
        ),
        (
            {"rounds": 1, "codec": {"name": "trellis", "rate": 8, "snr_db": 3.0}},
            "the rate follows from the second on",
        ),
    ],
)
def test_what_cannot_follow_is_refused(
    change: dict[str, Any], text: str, run_config: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=text):
        plan(parse(run_config | change, "test"))
