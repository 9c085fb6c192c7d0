"""What one site can do to a run of all sites: nothing but fail, whatever it answers, in every
method."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.errors import ClientError
from fluvial.methods.fedavg import FedAvgServer
from fluvial.methods.fedsa import FedSaServer
from fluvial.methods.local import LocalServer
from fluvial.wire.payload import Payload, frame_payload
from fluvial.wire.tensors import Named
from tests.contract.test_methods import SETTINGS
from tests.support.replay import Round, record

LIAR = "west"
"""The largest of the three sites, and the last in order."""

TABLES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavg full": {"tune": "full"},
    "error feedback": {"codec": {"name": "top_k", "rate": 8, "error_feedback": True}},
    "local": {"method": {"name": "local"}, "evaluate": {}},
    "fedsa": SETTINGS["fedsa"],
    "fedsb": {"method": {"name": "fedsb"}},
    "flasc": {"method": {"name": "flasc"}},
    "ecolora": {"method": {"name": "ecolora", "segments": 2}},
    "fedcybgd": {"method": {"name": "fedcybgd"}},
    "cgfedllm": {
        "method": {"name": "cgfedllm", "tgap": {"rounds": 2}},
        "codec": {"name": "klt", "rate": 8, "error_feedback": True},
    },
    "fedpipe": SETTINGS["fedpipe"],
    "noise ratio": {
        "method": {"name": "fedavg", "tgap": {"source": "sites", "rounds": 2}},
        "codec": {"name": "klt", "rate": 8, "noise_ratio": 0.5},
    },
    "snr": {"codec": {"name": "trellis", "rate": 8, "snr_db": 6.0}},
    "covariance": {
        "method": {
            "name": "fedavg",
            "tgap": {"source": "sites-covariance", "reading": "local", "rounds": 2},
        },
        "codec": {"name": "klt", "rate": 8},
    },
}


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Round]:
    """Recorded when they are asked for, once."""
    return {}


@pytest.fixture(params=list(TABLES))
def played(
    request: pytest.FixtureRequest,
    rounds: dict[str, Round],
    run_config: dict[str, Any],
    tmp_path: Path,
) -> Round:
    if request.param not in rounds:
        table = run_config | TABLES[request.param]
        if table.get("tune") == "full" or table["method" if "method" in table else "seed"] == {
            "name": "fedcybgd"
        }:
            table.pop("lora")

        rounds[request.param] = record(table, tmp_path / "run")

    return rounds[request.param]


def values(data: bytes) -> dict[str, Any]:
    return dict(Payload.from_bytes(data).values)


def with_values(data: bytes, changed: dict[str, Any]) -> bytes:
    """The reply with other values, NaN and huge numbers too, which no honest `to_bytes` writes."""
    sent = Payload.from_bytes(data)
    if not sent.tensors or set(sent.tensors) != {"f"}:
        return _tensors(sent.tensors, changed)
    text = json.dumps(changed, separators=(",", ":")).encode()
    frame = sent.tensors["f"].numpy().tobytes()
    return b"FLU2" + (1 << 31 | len(text)).to_bytes(4, "little") + text + frame


def _tensors(tensors: Named, changed: dict[str, Any]) -> bytes:
    import safetensors.torch

    text = json.dumps(changed, separators=(",", ":"))
    return safetensors.torch.save(tensors, metadata={"v": text})


WRONG: list[Any] = [
    None,
    True,
    "1",
    [],
    {},
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    -1.0,
    -1,
    -(10**400),
    10**400,
    1e15,
]


def forgeries(data: bytes, other: bytes) -> Iterator[tuple[str, bytes]]:
    """Every reply that no honest site sends in the place of `data`; `other` is honest, of another
    task or place."""
    sent = Payload.from_bytes(data)
    for name, found in values(data).items():
        rest = {key: value for key, value in values(data).items() if key != name}
        yield f"no {name}", with_values(data, rest)
        for wrong in WRONG:
            if (
                isinstance(found, float)
                and isinstance(wrong, float)
                and wrong in (-1.0, 1e15)
                and name == "cosine"
            ):
                continue

            yield f"{name}={str(wrong)[:12]}", with_values(data, rest | {name: wrong})

    yield "more values", with_values(data, values(data) | {"more": 1})
    yield "more tensors", Payload({**sent.tensors, "more": torch.zeros(2)}, values(data)).to_bytes()
    for name, tensor in sent.tensors.items():
        kept = {key: each for key, each in sent.tensors.items() if key != name}
        yield f"no tensor {name}", Payload(kept, values(data)).to_bytes()
        for what, changed in (
            ("longer", torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]])),
            ("shorter", tensor.reshape(-1)[:-1]),
            ("another type", tensor.to(torch.int16)),
            (
                "zero bytes",
                torch.zeros_like(tensor) if tensor.dtype == torch.uint8 else tensor.double(),
            ),
            ("nan", tensor.float() * math.nan),
        ):
            yield f"{name} {what}", Payload(kept | {name: changed}, values(data)).to_bytes()

    yield "empty", b""
    yield "empty payload", Payload().to_bytes()
    yield "half", data[: len(data) // 2]
    yield "a byte less", data[:-1]
    yield "a byte more", data + b"\0"
    yield (
        "random",
        torch.randint(256, (len(data),), generator=torch.Generator().manual_seed(1))
        .byte()
        .numpy()
        .tobytes(),
    )
    yield "unknown", Payload(values={"unknown": True}).to_bytes()
    yield "stale and more", Payload({"x": torch.zeros(1)}, {"stale": True}).to_bytes()

    if other != data:
        yield "another reply", other


def model_bytes(server: Any) -> bytes:
    """Return the bytes of the shared model, or of the state where each site keeps its own."""
    if isinstance(server, LocalServer):
        return server.state().to_bytes()
    if isinstance(server, FedSaServer):
        return Payload(server.shared).to_bytes()

    model = server.model()
    return b"".join(model[name].numpy().tobytes() for name in sorted(model))


def test_whatever_a_site_answers_is_that_sites_failure(played: Round) -> None:
    """Each value and each tensor of each reply is forged in every way; the run continues as if the
    site were silent."""
    silent: dict[tuple[str, int], Any] = {}
    tried = 0

    for (task, site, number), data in sorted(played.replies.items()):
        if site != LIAR:
            continue

        other = next((each for key, each in played.replies.items() if key[0] != task), b"{}")

        def change(
            name: str, who: str, call: int, honest: bytes, place: Any = (task, number)
        ) -> bytes | None:
            return None if who == LIAR and (name, call) == place else honest

        server, fleet, _ = played.again(change)
        assert {failure.site for failure in fleet.failures} == {LIAR}
        silent[task, number] = model_bytes(server)

        for what, forgery in forgeries(data, other):
            if forgery == data:
                continue

            tried += 1

            def lie(
                name: str,
                who: str,
                call: int,
                honest: bytes,
                place: Any = (task, number),
                forgery: bytes = forgery,
            ) -> bytes:
                return forgery if who == LIAR and (name, call) == place else honest

            server, fleet, _ = played.again(lie)
            assert {failure.site for failure in fleet.failures} == {LIAR}, (task, what)
            assert all("Traceback" not in failure.reason for failure in fleet.failures), (
                task,
                what,
            )
            assert model_bytes(server) == silent[task, number], (task, what)

            with pytest.raises(ClientError, match=LIAR):
                played.again(lie, on_failure="stop", quorum=0.5)

    assert tried > 20


def test_whatever_a_site_answers_in_the_set_up_is_that_sites_failure(played: Round) -> None:
    """The same where sites send what a codec is fitted to and measured by; a sample of the
    forgeries of each reply."""
    seen = set()
    for (task, site, number), data in sorted(played.setup.items()):
        if site != LIAR or task in seen:
            continue

        seen.add(task)
        others = [each for each in forgeries(data, b"{}") if each[1] != data]
        for what, forgery in others[:: 7 if task in ("snapshot", "moments") else 3]:

            def lie(
                name: str,
                who: str,
                call: int,
                honest: bytes,
                place: Any = (task, number),
                forgery: bytes = forgery,
            ) -> bytes:
                return forgery if who == LIAR and (name, call) == place else honest

            with pytest.raises(ClientError, match=LIAR):
                _set_up(played, lie, f"{task}: {what}")


def _set_up(played: Round, lie: Any, what: str) -> None:
    played.set_up(lie, on_failure="stop", quorum=0.5)
    pytest.fail(what)


# -- how long, how heavy -------------------------------------------------------------------------


@pytest.fixture
def fedavg(run_config: dict[str, Any], tmp_path: Path) -> Round:
    return record(run_config, tmp_path / "run")


def resend(played: Round, data: bytes, factor: float = 1.0, **values: Any) -> bytes:
    """The same reply with an update `factor` times longer and other values."""
    server = played.run.server
    assert isinstance(server, FedAvgServer)
    codec = server.shared.exchange.link.uplink.codec
    assert codec is not None
    sent = Payload.from_bytes(data)
    update = codec.decode(sent.tensors["f"].numpy().tobytes())
    frame = codec.encode({name: factor * tensor for name, tensor in update.items()}, round=1)

    return frame_payload(frame, **{**sent.values, **values}).to_bytes()


def lying(**changes: Any) -> Any:
    """A change for `Round.again`: the liar's training reply is another one."""

    def make(played: Round) -> Any:
        def change(task: str, site: str, number: int, data: bytes) -> bytes | None:
            return resend(played, data, **changes) if (task, site) == ("train", LIAR) else data

        return change

    return make


def silent(task: str, site: str, number: int, data: bytes) -> bytes | None:
    return None if site == LIAR else data


@pytest.mark.parametrize("factor", [1e6, 1e3, 50.0])
@pytest.mark.parametrize("n", [40, 2**31])
def test_an_update_that_is_much_longer_than_the_others_is_that_sites_failure(
    factor: float, n: int, fedavg: Round
) -> None:
    change = lying(factor=factor, n=n)(fedavg)
    server, fleet, metrics = fedavg.again(change)
    alone, _, _ = fedavg.again(silent)
    assert [failure.site for failure in fleet.failures] == [LIAR]
    assert metrics["sites"] == 2
    assert model_bytes(server) == model_bytes(alone)

    with pytest.raises(
        ClientError, match=f"site '{LIAR}' failed: .*(max_update_growth|training with these|beyond)"
    ):
        fedavg.again(change, on_failure="stop", quorum=0.5)


def test_a_weight_beyond_its_share_is_lowered_and_told(fedavg: Round) -> None:
    honest, _, metrics = fedavg.again(lambda *call: call[-1])
    assert "clipped" not in metrics
    server, fleet, metrics = fedavg.again(lying(n=2**31)(fedavg))
    assert fleet.failures == []
    (told,) = metrics["clipped"]
    others = sum(values(data)["n"] for (_, site, _), data in fedavg.replies.items() if site != LIAR)
    assert told == {"site": LIAR, "weight": 2**31, "counted": math.floor(0.9 / 0.1 * others)}
    assert model_bytes(server) != model_bytes(honest)
    _, _, metrics = fedavg.again(lying(n=2**31)(fedavg), max_weight_share=0.5)
    assert metrics["clipped"][0]["counted"] == others
    _, _, metrics = fedavg.again(lying(n=2**31)(fedavg), max_weight_share=1.0)
    assert "clipped" not in metrics


# -- one quorum a round --------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["fails", "is stale again", "answers"])
def test_first_and_second_asks_of_a_round_have_one_quorum(then: str, fedavg: Round) -> None:
    """One of three says that it cannot follow, and then fails: two of three answered, and the run
    goes on."""
    calls = []

    def change(task: str, site: str, number: int, data: bytes) -> bytes | None:
        if site != LIAR:
            return data
        calls.append(task)
        if len(calls) == 1 or then == "is stale again":
            return Payload(values={"stale": True}).to_bytes()
        return None if then == "fails" else fedavg.replies[task, site, 1]

    _, fleet, metrics = fedavg.again(change, quorum=0.6)
    assert len(calls) == 2
    assert metrics["sites"] == (3 if then == "answers" else 2)
    assert [failure.site for failure in fleet.failures] == ([] if then == "answers" else [LIAR])


def test_a_site_that_does_not_take_the_codec_is_missing_and_nothing_worse(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    played = record(run_config | TABLES["cgfedllm"], tmp_path / "run")

    def change(task: str, site: str, number: int, data: bytes) -> bytes | None:
        return None if (task, site) == ("install", LIAR) else data

    _, fleet, _ = played.set_up(change)
    assert [(failure.site, failure.task) for failure in fleet.failures] == [(LIAR, "install")]


def test_errors_count_as_bytes_up(fedavg: Round) -> None:
    _, fleet, _ = fedavg.again(silent)
    told = fleet.failures[0].reason
    assert fleet.meter.current[LIAR]["up", "train"] == len(told.encode())
