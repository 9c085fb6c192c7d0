"""In a run of FL-GLM no token, label, embedding row or head row crosses the wire, in either
direction, and the server's half reads no tokenizer and no label."""

import ast
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fluvial.data import SiteTexts
from fluvial.federation.in_process import InProcess
from fluvial.federation.store import StateStore
from fluvial.federation.transport import Arrival, Request
from fluvial.methods import flglm
from fluvial.models.pool import ModelPool
from fluvial.runs.config import parse
from fluvial.runs.run import execute
from fluvial.wire.payload import Payload
from tests.support.conversations import conversed
from tests.support.models import four_layers

SERVER = (
    *("server", "client_batch", "conversations", "replica"),
    *("middle", "serving", "setting", "order", "turns", "hidden", "memories"),
)
"""Modules of the server's half."""
SITE_ONLY = {"ends", "tasks", "use", "state", "site_memory"}
"""Modules of the site's half."""
TOKENS = 6
"""Token ids in a row that are looked for; fewer may be there by chance."""
CHARACTERS = 12
"""Characters of a record's text in a row that are looked for."""
VALUES = 8
"""Values of a row of weights that are looked for."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Wire:
    """All bytes of a run, both ways."""

    messages: list[bytes] = field(default_factory=list)

    def contains(self, pattern: bytes) -> bool:
        """Return whether a message has these bytes anywhere."""
        return any(pattern in message for message in self.messages)

    def seen(self, patterns: Iterator[tuple[str, bytes]]) -> list[str]:
        """Return the names of all patterns that crossed the wire."""
        return [name for name, pattern in patterns if self.contains(pattern)]


def recorded(table: dict[str, Any], folder: Path) -> Wire:
    """Make a whole run and keep every message of it."""
    wire = Wire()
    send = InProcess.send
    following = InProcess.next

    def noted_send(self: InProcess, request: Request) -> None:
        wire.messages.append(request.data)
        send(self, request)

    def noted_next(self: InProcess, timeout_s: float | None) -> Arrival | None:
        arrival = following(self, timeout_s)
        if arrival is not None:
            wire.messages.append(arrival.data)
        return arrival

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InProcess, "send", noted_send)
        patch.setattr(InProcess, "next", noted_next)
        *_, last = execute(parse(table, "test"), folder)

    assert last.kind == "result"
    assert len(wire.messages) > 50
    return wire


def of_ids(name: str, ids: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    """Yield token ids as the bytes of every usual type, and as JSON."""
    for start in range(0, len(ids) - TOKENS + 1, TOKENS):
        window = ids[start : start + TOKENS]
        for kind in "hiqfd":
            yield f"{name} as {kind}", struct.pack(f"<{TOKENS}{kind}", *window)
        yield f"{name} as bf16", torch.tensor(window).bfloat16().view(torch.int16).numpy().tobytes()

        for separator in (",", ", "):
            yield f"{name} as text", separator.join(map(str, window)).encode()


def of_text(name: str, text: str) -> Iterator[tuple[str, bytes]]:
    """Yield the characters of a text."""
    data = text.encode()
    for start in range(0, len(data) - CHARACTERS + 1, CHARACTERS):
        yield f"{name}, text", data[start : start + CHARACTERS]


def of_rows(name: str, weights: Tensor) -> Iterator[tuple[str, bytes]]:
    """Yield the first values of each row of weights, in every float type."""
    for dtype in DTYPES:
        for row, values in enumerate(weights.to(dtype)[:, :VALUES]):
            if values.count_nonzero():  # padding has a row of zeros, as many messages have
                yield f"{name}, row {row}", values.view(torch.uint8).numpy().tobytes()


def secrets(table: dict[str, Any], folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield all that must not cross the wire in a run that is over."""
    config = parse(table, "test")
    pool = ModelPool(config.model, config.adapter)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    for site in texts.names:
        data = texts.load(site)
        for example in (*data.train, *data.heldout):
            yield from of_ids(f"{site}, input_ids", example.input_ids)
            yield from of_ids(f"{site}, labels", example.labels)
            yield from of_text(site, pool.tokenizer.decode(example.input_ids))

    model = config.model.name_or_path
    weights = {"embedding": weight_of(model, "model.embed_tokens.weight")}
    weights["head"] = weight_of(model, "lm_head.weight")
    store = StateStore(folder / "sites")

    for site in texts.names:
        for name, tensor in store.read(site, "ends").tensors.items():
            if tensor.shape == weights["embedding"].shape:
                base = weights["embedding" if "embed" in name else "head"]
                weights[f"change of {name} at {site}"] = tensor
                weights[f"{name} of {site}"] = base + tensor
    if config.adapter != config.lora:
        assert len(weights) == 2 + 4 * len(texts.names)
    for name, tensor in weights.items():
        yield from of_rows(name, tensor)


def weight_of(folder: str | Path, name: str) -> Tensor:
    """Return a tensor of a model's folder."""
    return load_file(Path(folder) / "model.safetensors")[name]


@pytest.fixture
def table(run_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """One round of two steps, with measures and a sample, on a model with a head of its own."""
    model = four_layers(tmp_path / "model", tie_word_embeddings=False)
    return run_config | {
        "rounds": 1,
        "model": {"name_or_path": str(model)},
        "train": run_config["train"] | {"max_steps": 2},
    }


MODES = ("sequential", "client-batch", "hierarchical")


@pytest.mark.parametrize(
    ("mode", "ends", "tune"),
    [
        *((mode, ends, "lora") for mode in MODES for ends in ("shared", "own")),
        ("hierarchical", "own", "full"),
        ("client-batch", "own", "full"),
        ("client-batch", "own", "by parts"),
    ],
)
def test_no_token_label_embedding_or_head_crosses_the_wire(
    mode: str, ends: str, tune: str, table: dict[str, Any], tmp_path: Path
) -> None:
    method = {"name": "flglm", "mode": mode, "ends": ends}
    table = table | {"method": method, "tune": tune}
    if tune == "full":
        table = {name: value for name, value in table.items() if name != "lora"}
    if tune == "by parts":
        parts = {"front": "full", "middle": "lora", "back": "full"}
        table = {name: value for name, value in table.items() if name != "tune"}
        table = table | {"method": method | {"parts": parts}}
    if ends == "own":
        table = table | {"evaluate": {}}
    wire = recorded(table, tmp_path / "run")
    assert wire.seen(secrets(table, tmp_path / "run")) == []


def test_the_scan_finds_tokens_and_text() -> None:
    """Ids in a tensor of any type or among the values, and a text inside a longer one."""
    ids = list(range(100, 140))
    for dtype in (torch.int64, torch.int32, torch.int16, torch.float32, torch.bfloat16):
        message = Payload({"x": torch.tensor(ids, dtype=dtype)}).to_bytes()
        assert Wire([b"other", message]).seen(of_ids("ids", ids)), dtype

    assert Wire([Payload(values={"x": list(ids)}).to_bytes()]).seen(of_ids("ids", ids))
    text = "snow ice wind frost"
    assert Wire([Payload(values={"x": f"it is {text}"}).to_bytes()]).seen(of_text("", text))
    assert not Wire([b"snow, ice, wind and frost"]).seen(of_text("", text))


def test_the_scan_finds_rows_of_weights() -> None:
    """Rows in any float type, anywhere in a message."""
    weights = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for dtype in DTYPES:
        message = Payload({"a": torch.zeros(3, dtype=torch.uint8), "x": weights.to(dtype)})
        assert len(Wire([message.to_bytes()]).seen(of_rows("", weights))) == len(weights), dtype

    assert not Wire([message.to_bytes()]).seen(of_rows("", weights + 1))


@pytest.mark.parametrize("module", SERVER)
def test_the_servers_modules_import_nothing_of_tokens_or_labels(module: str) -> None:
    """Neither tokenizer, records, nor the site's half; and no name of theirs is used."""
    source = (Path(flglm.__file__).parent / f"{module}.py").read_text("utf-8")
    imported = set()
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            imported |= {node.module or "", *(f"{node.module}.{each.name}" for each in node.names)}
        elif isinstance(node, ast.Import):
            imported |= {each.name for each in node.names}
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Name):
            used.add(node.id)

    roots = {name.split(".")[0] for name in imported}
    assert not roots & {"transformers", "tokenizers", "datasets"}
    assert not any(
        name.startswith(("fluvial.data", "fluvial.training.evaluate")) for name in imported
    )
    assert not {f"fluvial.methods.flglm.{each}" for each in SITE_ONLY} & imported
    assert not used & {"tokenizer", "input_ids", "labels", "load_tokenizer", "embed", "logits"}


@pytest.mark.parametrize("mode", MODES)
def test_the_servers_half_asks_for_no_tokenizer(
    mode: str, table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process both halves share a pool; only the sites' threads may read its tokenizer."""
    load = ModelPool.__dict__["tokenizer"].func

    def of_a_site(pool: ModelPool) -> Any:
        assert threading.current_thread() is not threading.main_thread(), "the server's half asks"
        return load(pool)

    config = table | {"method": {"name": "flglm", "mode": mode}}
    with conversed(config, tmp_path / "run") as rounds, monkeypatch.context() as patch:
        patch.setattr(ModelPool, "tokenizer", property(of_a_site))
        _, fleet, metrics = rounds.again()

    assert metrics["sites"] == 3
    assert fleet.failures == []
