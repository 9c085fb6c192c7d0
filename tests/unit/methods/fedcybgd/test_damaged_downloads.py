"""FedCyBGD's downloads to a site that lost what it kept, and messages that are damaged or lie."""

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fluvial.errors import WireError
from fluvial.federation.store import StateStore
from fluvial.methods.fedcybgd.download.replay import crc
from fluvial.methods.fedcybgd.proxy import cut
from fluvial.wire.payload import Payload, payload_frame
from tests.support.ledger import FORMS, Scene, commit_of, equal, shapes_of


@pytest.mark.parametrize("form", ["cache", "low-bit"])
def test_a_site_that_lost_what_it_kept_says_so_and_is_sent_everything(
    form: str, scene: Callable[..., Scene]
) -> None:
    made = scene(form)
    made.move(0, 1)
    made.visit(1)
    made.move(1)
    kept = made.store
    made.store = StateStore(None)
    assert made.read(made.send(2), made.site()) is None
    made.store = kept
    made.visit(2)
    made.store = StateStore(None)
    assert made.read(made.send(2), made.site()) is None, "though nothing has moved since"
    made.sender.forget("a")
    received = made.visit(2)
    block = made.parts.blocks[2].layout
    assert equal(received.start, {name: made.weights[name] for name in block.names})
    assert made.read(made.send(3), made.site()) is not None


@pytest.mark.parametrize("form", ["cache", "low-bit"])
def test_a_site_that_holds_another_version_does_not_build_on_it(
    form: str, scene: Callable[..., Scene]
) -> None:
    made = scene(form)
    made.move(0, 1)
    made.visit(1)
    made.visit(3)
    made.move(0, 0)
    assert made.read(made.send(2), made.site()) is not None
    made.sender.holds["a"][0] = 2 if form == "cache" else 3  # and it has version 1
    assert made.read(made.send(2), made.site()) is None


def test_a_block_that_is_not_the_servers_is_noticed_by_its_checksum(
    scene: Callable[..., Scene],
) -> None:
    made = scene("cache")
    made.move(1)
    message = made.send(1)
    assert message.values["crc"] == crc(made.ledger.block(1))
    wrong = Payload(message.tensors, {**message.values, "crc": message.value("crc", int) ^ 1})
    assert made.read(wrong, made.site()) is None


def mutated(message: Payload, draw: np.random.Generator) -> Payload:
    """One thing about a message is changed: some bytes of it, a value, or a tensor. May raise
    `WireError`."""
    if draw.random() < 0.4:
        data = bytearray(message.to_bytes())
        header = (
            8 + int.from_bytes(data[:4], "little") if data[4:8] == bytes(4) else min(len(data), 400)
        )
        for _ in range(draw.integers(1, 4)):
            place = draw.integers(header if draw.random() < 0.7 else len(data))
            data[place] ^= 1 << draw.integers(8)

        return Payload.from_bytes(bytes(data))

    values = json.loads(json.dumps(message.values))
    tensors = dict(message.tensors)
    if not tensors or draw.random() < 0.6:
        _mutate_value(values, draw)
    else:
        name = str(draw.choice(sorted(tensors)))
        tensor = tensors.pop(name)
        kind = draw.integers(7)

        if kind == 1:
            tensors[name + "x"] = tensor
        elif kind == 2:
            tensors[name] = tensor.reshape(-1)[:-1]
        elif kind == 3:
            tensors[name] = tensor.to(
                torch.float16 if tensor.dtype != torch.float16 else torch.int64
            )
        elif kind == 4:
            tensors[name] = tensor.unsqueeze(0)
        elif kind == 5 and tensor.is_floating_point():
            tensors[name] = (
                tensor.clone()
                .reshape(-1)
                .index_fill(0, torch.tensor([0]), math.nan)
                .view_as(tensor)
            )
        elif kind == 6:
            tensors[name] = torch.zeros(0, dtype=tensor.dtype)

    return Payload.from_bytes(Payload(tensors, values).to_bytes())


_JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2,
        5,
        2**31,
        2**70,
        -(2**70),
        0.5,
        1.0,
        -2.0,
        1e300,
        5e-324,
        "",
        "a",
        "ff",
        [],
        {},
    ),
    *([0], [[]], [1, 2, 3, 4], {"0": 1.5}, {"1": "00"}),
)


def _mutate_value(values: Any, draw: np.random.Generator) -> None:
    """Replace, remove or repeat something in a nest of values."""
    keys = sorted(values) if isinstance(values, dict) else list(range(len(values)))
    key: Any = keys[draw.integers(len(keys))]
    inside = values[key]

    if isinstance(inside, dict | list) and inside and draw.random() < 0.8:
        _mutate_value(inside, draw)
    elif draw.random() < 0.1:
        del values[key]
    elif isinstance(values, list) and draw.random() < 0.1:
        values.append(inside)
    else:
        values[key] = _JUNK[draw.integers(len(_JUNK))]


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        *((form, "full") for form in FORMS if form != "whole proxy"),
        ("stale-subset", "lora"),
        ("cache", "lora"),
    ],
)
def test_mutated_messages_are_refused_or_bring_a_model(
    form: str, kind: str, scene: Callable[..., Scene]
) -> None:
    """Whatever comes in, a site raises `WireError`, or says that it cannot follow, or has finite
    weights that fit."""
    made = scene(form, kind)
    made.move(0, 1, 3)
    made.visit(1)
    made.move(0, 0, 0, 0, 2, 2, 3)
    made.ledger.commit(2, commit_of(made.ledger, 2, factor=0.5, weights=(3, 4)))
    whole = dict(made.pool.layout.shapes)
    message = made.send(2)
    draw = np.random.default_rng(len(form))
    outcomes = Counter[str]()
    assert made.read(message, made.site()) is not None

    for _ in range(300):
        try:
            received = made.read(mutated(message, draw), made.site())
        except WireError:
            outcomes["refused"] += 1
            continue

        outcomes["stale" if received is None else "received"] += 1
        if received is None:
            continue

        shapes = (
            whole if received.manifest is None else shapes_of(cut(made.weights, received.manifest))
        )
        assert all(t.dtype == torch.float32 for t in received.start.values())
        assert shapes_of(received.start).items() <= shapes.items()

        for name in shapes.keys() - received.start.keys():
            tensor = received.rest.get(name)
            assert tuple(tensor.shape) == shapes[name]
            assert bool(torch.isfinite(tensor).all())

        assert all(bool(torch.isfinite(tensor).all()) for tensor in received.start.values())

    assert outcomes["refused"] > 100
    assert outcomes["received"] > 10


@pytest.mark.parametrize(
    "row",
    [
        [0, 0, 1],
        [4, 0, 1, [[1.0, [8], [1]]]],
        [-1, 0, 1, [[1.0, [8], [1]]]],
        [True, 0, 1, [[1.0, [8], [1]]]],
        [0, 0, 1, []],
        [0, 0, 1, [[1, [8], [1]]]],
        [0, 0, 1, [[0.0, [8], [1]]]],
        [0, 0, 1, [[1.5, [8], [1]]]],
        [0, 0, 1, [[-1.0, [8], [1]]]],
        [0, 0, 1, [[1.0, [], []]]],
        [0, 0, 1, [[1.0, [8], [1, 1]]]],
        [0, 0, 1, [[1.0, [8], [0]]]],
        [0, 0, 1, [[1.0, [8], [2**31 + 1]]]],
        [0, 0, 1, [[1.0, [2**40], [1]]]],
        [0, 0, 1, [[1.0, [0], [1]]]],
        [0, 0, 1, [[1.0, [8.0], [1]]]],
        {},
    ],
    ids=str,
)
def test_news_that_make_no_sense_are_refused(row: Any, scene: Callable[..., Scene]) -> None:
    made = scene("cache")
    made.move(0)
    message = made.send(1)

    with pytest.raises(WireError):
        made.read(Payload(message.tensors, {**message.values, "news": [row]}), made.site())


def test_bytes_that_belong_to_no_commit_are_refused(scene: Callable[..., Scene]) -> None:
    made = scene("cache")
    made.move(0)
    message = made.send(1)
    frame = payload_frame(message)

    for data in (frame + b"x", frame[:-1]):
        with pytest.raises(WireError):
            made.read(
                Payload(
                    {"f": torch.frombuffer(bytearray(data), dtype=torch.uint8)}, message.values
                ),
                made.site(),
            )


@pytest.mark.parametrize("form", [form for form in FORMS if form != "cache"])
def test_a_tensor_too_many_or_too_few_is_refused(form: str, scene: Callable[..., Scene]) -> None:
    made = scene(form)
    made.move(1, 2)
    message = made.send(0)
    block = made.parts.blocks[0].layout.names
    lacking = [
        {name: tensor for name, tensor in message.tensors.items() if name != gone}
        for gone in (
            block if form == "stale-subset" else message.tensors
        )  # which of the others come is its choice
    ]
    strange = [
        {**message.tensors, f"model.layers.{n}.mlp.up_proj.weight": torch.zeros(2)} for n in (4, 10)
    ]

    for tensors in lacking + strange:
        with pytest.raises(WireError):
            made.read(Payload(tensors, message.values), made.site())


@pytest.mark.parametrize("form", FORMS)
def test_a_block_that_is_not_there_is_refused(form: str, scene: Callable[..., Scene]) -> None:
    made = scene(form)
    message = made.send(0)
    for block in (-1, 4, 2**40, True, 1.0, "0", None):
        with pytest.raises(WireError):
            made.read(Payload(message.tensors, {**message.values, "block": block}), made.site())
