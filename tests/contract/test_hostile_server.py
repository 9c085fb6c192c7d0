"""What a hostile server can make a site do: nothing but refuse, in bounded time and memory, and
keep nothing."""

import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.data import SiteTexts
from fluvial.errors import FluvialError, RefusalError, WireError
from fluvial.exchange import is_stale
from fluvial.federation.in_process import InProcess
from fluvial.federation.sites import Site, adapter_message
from fluvial.federation.store import StateStore
from fluvial.federation.talk import only_answer
from fluvial.federation.transport import Request
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import site_of, tasks_of
from fluvial.site_process.process import JOIN, SiteProcess
from fluvial.wire.payload import Payload, frame_payload
from tests.contract.test_hostile_site import TABLES, with_values
from tests.support.replay import record
from tests.support.site_process import header, site_file

WRONG: list[Any] = [
    None,
    True,
    "1",
    [],
    {},
    float("nan"),
    float("inf"),
    1e308,
    -1.0,
    -1,
    0,
    2**40,
    10**30,
]
PATHS = ["../../x", "/etc/passwd", "a\0b", "x" * 10_000, "\x1b[2J"]


def messages_of(table: dict[str, Any], folder: Path) -> tuple[RunConfig, dict[str, bytes]]:
    """The first message of each task of an honest round, as bytes."""
    seen: dict[str, bytes] = {}
    send = InProcess.send

    def noted(self: InProcess, request: Request) -> None:
        seen.setdefault(request.task, request.data)
        send(self, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InProcess, "send", noted)
        played = record(table, folder)

    return played.config, seen


@pytest.mark.parametrize("what", list(TABLES))
def test_a_forged_message_is_refused_and_nothing_is_kept(
    what: str, run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each value of each message, wrong in every way: a `FluvialError` of the site, at once, before
    any training."""
    table = run_config | TABLES[what]
    if table.get("tune") == "full" or what == "fedcybgd":
        table.pop("lora")

    config, seen = messages_of(table, tmp_path / "run")
    pool = ModelPool(config.model, config.adapter)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)

    class TrainedError(Exception):
        """The message was taken."""

    def train(*_: Any, **__: Any) -> None:
        raise TrainedError

    for module in ("fluvial.training.processes", "fluvial.methods.fedcybgd.visit"):
        monkeypatch.setattr(sys.modules[module], "train", train)
    store = StateStore(tmp_path / "sites")

    def tried(task: str, wire: bytes) -> Site | None:
        site = site_of(config, "north", pool, texts, store)
        started = time.monotonic()
        try:
            answer = only_answer(tasks_of(config)[task](site, Payload.from_bytes(wire)))
        except FluvialError:
            return None
        except TrainedError:
            return site
        finally:
            assert time.monotonic() - started < 5

        return None if is_stale(answer) and not site.kept else site

    count = 0
    for task, wire in sorted(seen.items()):
        sent = Payload.from_bytes(wire)
        harmless = {"n", "visit"}
        for name in sent.values:
            if name in harmless or task in ("evaluate", "install", "probe"):
                continue

            for wrong in [each for each in WRONG if each != sent.values[name]]:
                forged = {**sent.values, name: wrong}
                if (name, wrong) in (("segment", 0), ("checkpointing", True)):
                    continue  # a right one: there is one segment, and a plan may ask for either
                kept = tried(task, with_values(wire, forged))
                count += 1
                assert kept is None, (task, name, wrong)

    assert count > 5 or not any(Payload.from_bytes(wire).values for wire in seen.values())
    assert not list((tmp_path / "sites").rglob("*.safetensors"))


@pytest.fixture
def table(run_config: dict[str, Any]) -> dict[str, Any]:
    return run_config | {"codec": {"name": "top_k", "rate": 8, "error_feedback": True}}


@pytest.fixture
def pool(table: dict[str, Any]) -> ModelPool:
    config = parse(table, "test")
    return ModelPool(config.model, config.adapter)


def joined(table: dict[str, Any], tmp_path: Path) -> SiteProcess:
    process = SiteProcess(site_file(tmp_path))
    process.answer(header(task=JOIN, round=0), Payload(values={"config": table}).to_bytes())
    return process


@pytest.mark.parametrize("change", ["nan", "shape", "names", "huge", "empty", "type"])
def test_an_adapter_that_does_not_fit_is_refused(
    change: str, table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    process = joined(table, tmp_path)
    adapter = initial_state(pool.layout, 1)
    name = next(iter(adapter))

    if change == "shape":
        adapter[name] = torch.zeros(3, 3)
    elif change == "names":
        adapter["../" + name] = adapter.pop(name)
    elif change == "huge":
        adapter[name] = torch.zeros(2000, 2000)

    wire = adapter_message(adapter, round=1).to_bytes()
    if change == "nan":
        frame = bytearray(Payload.from_bytes(wire).tensors["f"].numpy().tobytes())
        frame[8:12] = b"\0\0\xc0\x7f"
        frame[-4:] = zlib.crc32(frame[:-4]).to_bytes(4, "little")
        wire = frame_payload(bytes(frame), round=1).to_bytes()

    if change == "empty":
        wire = frame_payload(b"\0", round=1).to_bytes()
    if change == "type":
        wire = Payload({"f": torch.zeros(4, dtype=torch.int64)}, {"round": 1}).to_bytes()

    with pytest.raises(WireError):
        process.answer(header(), wire)
    assert not list((tmp_path / "site").rglob("residual-*"))


@pytest.mark.parametrize("name", PATHS)
def test_a_path_in_the_name_of_a_run_or_task_stays_a_name(
    name: str, table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    from fluvial.site_process.journal import Header

    if not 0 < len(name) <= 200:
        with pytest.raises(WireError):
            Header.read(header(run=name).values())
        return

    process = SiteProcess(site_file(tmp_path))
    process.answer(
        header(task=JOIN, round=0, run=name), Payload(values={"config": table}).to_bytes()
    )
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert all((tmp_path / "site") in path.parents for path in before)

    with pytest.raises(WireError, match="unknown task"):
        process.answer(
            header(run=name, task=name),
            adapter_message(initial_state(pool.layout, 1), round=1).to_bytes(),
        )


def test_a_forged_acknowledgement_makes_a_site_keep_nothing(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    process = joined(table, tmp_path)
    wire = adapter_message(initial_state(pool.layout, 1), round=1).to_bytes()
    process.answer(header(seq=1), wire)

    for ack, session in ((-1, "first"), (2**70, "first"), (7, "other")):
        process.answer(header(seq=2, ack=ack, session=session), wire)
        assert not list((tmp_path / "site").rglob("residual-*"))


@pytest.mark.parametrize("tokens", [-1, 10**9, 2**70])
def test_a_site_does_not_generate_without_end(
    tokens: int, table: dict[str, Any], tmp_path: Path
) -> None:
    process = joined(table, tmp_path)
    message = Payload(values={"which": "base", "generate": tokens}).to_bytes()
    with pytest.raises((WireError, RefusalError)):
        process.answer(header(task="evaluate"), message)
