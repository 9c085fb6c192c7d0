"""Payloads: what is sent arrives, equal payloads are equal bytes, and nothing from outside is
believed."""

import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fluvial
from fluvial.errors import WireError
from fluvial.wire.payload import Limits, Payload, Value, frame_payload, payload_frame
from tests.support.memory import allocates_less

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def raw(header: object, data: bytes = b"") -> bytes:
    """A payload with the given header (JSON is made of it unless it is bytes), true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def values(text: str) -> bytes:
    """A payload with no tensors and `text` in the place of its values."""
    return raw({"__metadata__": {"v": text}})


def same(left: Payload, right: Payload) -> bool:
    """Equal names, types, shapes, bits and values."""
    return left.values == right.values and {n: bits(t) for n, t in left.tensors.items()} == {
        n: bits(t) for n, t in right.tensors.items()
    }


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    data = tensor.contiguous().reshape(-1)
    return (
        tensor.dtype,
        tuple(tensor.shape),
        data.view(torch.uint8).numpy().tobytes() if data.numel() else b"",
    )


def sample() -> Payload:
    """A small payload of several types, shapes and kinds of values."""
    generator = torch.Generator().manual_seed(0)
    return Payload(
        {
            "layer.0.lora_A.weight": torch.randn(3, 4, generator=generator),
            "layer.0.lora_B.weight": torch.randn(4, 3, generator=generator).bfloat16(),
            "f": torch.arange(40, dtype=torch.uint8),
            "steps": torch.tensor(7),
        },
        {"round": 3, "site": "Köln", "loss": 1.25, "seen": [1, None, True, {"deep": [[]]}]},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(5,), (2, 3), (), (0,), (0, 3), (1, 1, 1, 1, 1, 1, 1, 2)], ids=str
)
def test_every_type_and_shape_comes_back_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    numbers = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 100
    sent = Payload({"x": (numbers > 50) if dtype == torch.bool else numbers.to(dtype)})
    assert same(Payload.from_bytes(sent.to_bytes()), sent)


def test_special_floats_keep_their_bits() -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    sent = Payload({"x": special, "half": special.bfloat16()})
    assert same(Payload.from_bytes(sent.to_bytes()), sent)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).reshape(3, 4).T,
        torch.arange(12)[2:9:3],
        torch.zeros(1).expand(4),
        torch.nn.Parameter(torch.ones(3)),
    ],
    ids=["transposed", "strided", "expanded", "parameter"],
)
def test_views_and_parameters_are_sent_by_value(tensor: Tensor) -> None:
    received = Payload.from_bytes(Payload({"x": tensor}).to_bytes()).tensors["x"]
    assert torch.equal(received, tensor.detach())
    assert not received.requires_grad


def test_tensors_that_share_memory_are_sent_by_value() -> None:
    whole = torch.arange(6.0)
    sent = Payload({"a": whole, "again": whole, "head": whole[:4], "tail": whole[2:]})
    assert same(Payload.from_bytes(sent.to_bytes()), sent)


def test_a_received_tensor_is_the_receivers_own() -> None:
    data = Payload({"x": torch.zeros(3)}).to_bytes()
    Payload.from_bytes(data).tensors["x"].fill_(9)
    assert Payload.from_bytes(data).tensors["x"].tolist() == [0, 0, 0]


def test_equal_payloads_give_equal_bytes_in_whatever_order_they_were_built() -> None:
    one = sample()
    other = Payload(dict(reversed(one.tensors.items())), dict(reversed(one.values.items())))
    assert one.to_bytes() == other.to_bytes()
    assert Payload.from_bytes(one.to_bytes()).to_bytes() == one.to_bytes()
    changed = Payload(one.tensors, one.values | {"round": 4})
    assert changed.to_bytes() != one.to_bytes()


def test_a_printable_name_of_another_script_is_kept() -> None:
    sent = Payload({"größe.重み": torch.ones(2)})
    assert same(Payload.from_bytes(sent.to_bytes()), sent)


def test_an_empty_payload_has_few_bytes() -> None:
    data = Payload().to_bytes()
    assert len(data) <= 16
    assert same(Payload.from_bytes(data), Payload())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (float("nan"), r"values\['k'\]: nan"),
        ([1, float("inf")], r"values\['k'\]\[1\]: inf"),
        ((1, 2), r"values\['k'\]: tuple"),
        ({"in": torch.ones(1)}, r"values\['k'\]\['in'\]: Tensor"),
        ({3: 1}, r"values\['k'\]: key 3 is not text"),
        (b"bytes", r"values\['k'\]: bytes"),
        ("\ud800", "is not text"),
    ],
)
def test_values_that_json_cannot_hold_are_the_senders_bug(bad: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        Payload(values={"k": bad}).to_bytes()


def test_values_nested_too_deeply_are_the_senders_bug() -> None:
    deep: Value = 1
    for _ in range(31):
        deep = [deep]
    assert Payload.from_bytes(Payload(values={"k": deep}).to_bytes()).values == {"k": deep}
    with pytest.raises(AssertionError, match="nested too deeply"):
        Payload(values={"k": [deep]}).to_bytes()


def test_a_type_without_wire_form_is_the_senders_bug() -> None:
    with pytest.raises(AssertionError, match=r"x: torch.complex64 has no wire form"):
        Payload({"x": torch.zeros(1, dtype=torch.complex64)}).to_bytes()


def test_value_asks_for_exactly_the_kind() -> None:
    payload = Payload(values={"n": 3, "yes": True})
    assert payload.value("n", int) == 3
    for name, kind, found in [("yes", int, "bool"), ("n", float, "int"), ("none", str, "NoneType")]:
        with pytest.raises(
            WireError, match=f"message value '{name}': expected {kind.__name__}, found {found}"
        ):
            payload.value(name, kind)


def test_tensor_asks_for_a_name_that_is_there() -> None:
    payload = sample()
    assert payload.tensor("f") is payload.tensors["f"]
    with pytest.raises(WireError, match=r"message tensor 'g' is missing; found \['f', 'layer.0"):
        payload.tensor("g")


def test_a_frame_travels_in_one_tensor() -> None:
    received = Payload.from_bytes(frame_payload(b"\x00codec\xff", round=2).to_bytes())
    assert payload_frame(received) == b"\x00codec\xff"
    assert received.value("round", int) == 2

    for wrong in (torch.zeros(3), torch.zeros(3, 1, dtype=torch.uint8)):
        with pytest.raises(WireError, match="frame: expected one-dimensional uint8"):
            payload_frame(Payload({"f": wrong}))


MALFORMED: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "payload of 0 bytes is shorter than its length field"),
    ("seven bytes", b"\0" * 7, "payload of 7 bytes is shorter"),
    (
        "header past the end",
        (99).to_bytes(8, "little") + b"{}",
        "header of 99 bytes exceeds the limit or the payload",
    ),
    ("huge header", b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes exceeds"),
    ("not UTF-8", raw(b'{"\xff": 1}'), "header is not valid JSON"),
    ("not JSON", raw(b"{]"), "header is not valid JSON"),
    ("empty header", raw(b""), "header is not valid JSON"),
    (
        "duplicate names",
        raw(b'{"a":' + json.dumps(F32).encode() + b',"a":1}', bytes(4)),
        "header.*duplicate key",
    ),
    ("NaN in header", raw(b'{"a": NaN}'), "NaN is not JSON"),
    ("bomb", raw(b"[" * 100_000), "header is not valid JSON"),
    ("digits", raw(b'{"a":' + b"9" * 10_000 + b"}"), "header is not valid JSON"),
    ("list", raw([1]), "header is not a JSON object"),
    (
        "metadata list",
        raw({"__metadata__": [1]}),
        "metadata must be an object with at most the text 'v'",
    ),
    ("metadata null", raw({"__metadata__": None}), "metadata must be an object"),
    ("other metadata", raw({"__metadata__": {"format": "pt"}}), "metadata must be an object"),
    ("metadata number", raw({"__metadata__": {"v": 3}}), "metadata must be an object"),
    ("values not JSON", values("{"), "values is not valid JSON"),
    ("values list", values("[1]"), "values are not a JSON object"),
    ("values twice", values('{"a":1,"a":2}'), "values is not valid JSON: duplicate key"),
    ("values infinite", values('{"a":-Infinity}'), "-Infinity is not JSON"),
    ("values overflow", values('{"a":[1e999]}'), r"values\['a'\]\[0\]: inf"),
    ("values deep", values('{"a":' + "[" * 40 + "]" * 40 + "}"), "nested too deeply"),
    ("values bomb", values('{"a":' * 100_000), "values is not valid JSON"),
    ("values surrogate", values('{"a":"\\ud800"}'), "is not text"),
    ("values surrogate key", values('{"\\ud800":1}'), r"key '\\ud800' is not text"),
    ("bare surrogate", raw(b'{"__metadata__":{"v":"{\\"\\ud800\\":1}"}}'), "key .* is not text"),
    ("no name", raw({"": F32}, bytes(4)), "tensor '': names have 1 to 512 printable characters"),
    ("long name", raw({"n" * 513: F32}, bytes(4)), "names have 1 to 512"),
    ("newline in name", raw({"a\nb": F32}, bytes(4)), r"tensor 'a\\nb': names have"),
    ("right-to-left name", raw({"a\u202eb": F32}, bytes(4)), "names have"),
    (
        "surrogate name",
        raw(b'{"\\ud800":' + json.dumps(F32).encode() + b"}", bytes(4)),
        "names have",
    ),
    ("entry list", raw({"a": [1]}), "tensor 'a': expected dtype, shape and data_offsets"),
    (
        "entry short",
        raw({"a": {"dtype": "F32", "shape": [1]}}),
        "expected dtype, shape and data_offsets",
    ),
    (
        "entry long",
        raw({"a": F32 | {"more": 1}}, bytes(4)),
        "expected dtype, shape and data_offsets",
    ),
    (
        "type",
        raw({"a": F32 | {"dtype": "F8_E4M3"}}, bytes(4)),
        "tensor 'a': unknown type 'F8_E4M3'",
    ),
    ("type list", raw({"a": F32 | {"dtype": [[1]]}}, bytes(4)), r"unknown type \[\[1\]\]"),
    (
        "shape text",
        raw({"a": F32 | {"shape": "1"}}, bytes(4)),
        "shape must be at most 8 whole numbers",
    ),
    ("shape float", raw({"a": F32 | {"shape": [1.0]}}, bytes(4)), "shape must be"),
    ("shape bool", raw({"a": F32 | {"shape": [True]}}, bytes(4)), "shape must be"),
    ("shape negative", raw({"a": F32 | {"shape": [-1]}}, bytes(4)), "shape must be"),
    ("shape huge", raw({"a": F32 | {"shape": [2**63]}}, bytes(4)), "shape must be"),
    ("nine dimensions", raw({"a": F32 | {"shape": [1] * 9}}, bytes(4)), "shape must be at most 8"),
    (
        "offsets one",
        raw({"a": F32 | {"data_offsets": [4]}}, bytes(4)),
        "data_offsets must be two whole numbers",
    ),
    ("offsets null", raw({"a": F32 | {"data_offsets": None}}, bytes(4)), "data_offsets must be"),
    (
        "offsets negative",
        raw({"a": F32 | {"data_offsets": [-4, 0]}}, bytes(4)),
        "data_offsets must be",
    ),
    (
        "offsets swapped",
        raw({"a": F32 | {"data_offsets": [4, 0]}}, bytes(4)),
        "does not fill bytes",
    ),
    (
        "too few bytes",
        raw({"a": F32 | {"shape": [2]}}, bytes(4)),
        r"F32 \[2\] does not fill bytes \[0, 4\]",
    ),
    (
        "stride overflow",
        raw({"a": {"dtype": "F32", "shape": [0, 2**31, 2**31, 2**31], "data_offsets": [0, 0]}}),
        "fill",
    ),
    (
        "empty and vast",
        raw({"a": {"dtype": "U8", "shape": [2**40, 0], "data_offsets": [0, 0]}}),
        "does not fill",
    ),
    (
        "gap",
        raw({"a": F32 | {"data_offsets": [4, 8]}}, bytes(8)),
        "gap or overlaps at byte 4, expected 0",
    ),
    ("overlap", raw({"a": F32, "b": F32}, bytes(4)), "gap or overlaps at byte 0, expected 4"),
    ("data short", raw({"a": F32}, bytes(3)), "tensors take 4 bytes, 3 are there"),
    ("data long", raw({"a": F32}, bytes(5)), "tensors take 4 bytes, 5 are there"),
    ("data without tensors", raw({}, b"x"), "tensors take 0 bytes, 1 are there"),
    ("minus zero", raw(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "payload: "),
]


@pytest.mark.parametrize(
    ("data", "message"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED]
)
def test_malformed_bytes_are_refused_with_a_reason(data: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message) as raised:
        Payload.from_bytes(data)
    assert len(str(raised.value)) < 400
    str(raised.value).encode()


LIMITED = Payload({"abc": torch.zeros(2, 3), "d": torch.zeros(1)}, {"k": "v" * 50})


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_bytes=100), "bytes exceeds the limit of 100"),
        (Limits(max_header_bytes=64), "bytes exceeds the limit or the payload"),
        (Limits(max_tensors=1), "2 tensors exceed the limit of 1"),
        (Limits(max_name=2), "names have 1 to 2 printable"),
        (Limits(max_dims=1), "at most 1 whole numbers"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_every_limit_holds(limits: Limits, message: str) -> None:
    data = LIMITED.to_bytes()
    assert same(
        Payload.from_bytes(
            data, Limits(max_tensors=2, max_name=3, max_dims=2, max_bytes=len(data))
        ),
        LIMITED,
    )
    with pytest.raises(WireError, match=message):
        Payload.from_bytes(data, limits)


@pytest.mark.parametrize(
    "shape", [[2_500_000_000], [50_000, 50_000], [2**62], [0, 10**10]], ids=str
)
@pytest.mark.parametrize("end", [0, 10_000_000_000], ids=["empty", "10 GB"])
def test_an_announced_giant_costs_nothing(shape: list[int], end: int) -> None:
    data = raw({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}, bytes(8))
    assert len(data) < 200
    assert allocates_less(lambda: _outcome(data), 2**20)
    assert _outcome(data) == "refused"


def test_no_format_that_can_run_code_is_in_the_package() -> None:
    sources = sorted(Path(fluvial.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    running = re.compile(
        r"\b(import|from)\s+(c?pickle|dill|cloudpickle|joblib|marshal|shelve)\b|pickle\.|(?<!safetensors\.)torch\.(load|save)\("
    )

    for path in sources:
        text = path.read_text()
        assert not running.search(text), f"{path}: {running.search(text)}"


_plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=8,
)


@st.composite
def payloads(draw: Callable[..., Any]) -> Payload:
    names = draw(
        st.lists(
            st.text(st.sampled_from("abcxyz.é重_0"), min_size=1, max_size=12),
            unique=True,
            max_size=4,
        )
    )
    tensors = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        dtype = draw(st.sampled_from(DTYPES))
        size = int(torch.Size(shape).numel()) * dtype.itemsize
        data = draw(st.binary(min_size=size, max_size=size))

        if dtype == torch.bool:
            data = bytes(byte & 1 for byte in data)

        flat = (
            torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.reshape(shape)

    keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    return Payload(tensors, draw(st.dictionaries(keys, _plain, max_size=4)))


@settings(max_examples=150, deadline=None)
@given(payloads())
def test_any_payload_comes_back(payload: Payload) -> None:
    data = payload.to_bytes()
    received = Payload.from_bytes(data)
    assert same(received, payload)
    assert received.to_bytes() == data


def _flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, draw: random.Random) -> bytes:
    return (
        data[: draw.randrange(len(data))]
        if draw.random() < 0.7
        else data + draw.randbytes(draw.randrange(1, 20))
    )


def _random_bytes(data: bytes, draw: random.Random) -> bytes:
    noise = draw.randbytes(draw.randrange(300))
    return noise if draw.random() < 0.5 else len(noise).to_bytes(8, "little") + noise


STRANGE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**53, 2**62, 2**63, 2**64, 10**300, 1.0, -0.0, 1e308,
    "", "F32", "F8_E5M2", "U64", "\ud800", "x" * 1000, [], [0], [0, 0], [0, 4], [2**40, 0], [1] * 9,
    [0, 2**31, 2**31], [[[]]], {}, {"dtype": "F32"}, F32, float("nan"),
]  # fmt: skip


def _edit(data: bytes, draw: random.Random) -> bytes:
    """Replace, remove, add or rename one thing in the header, which stays JSON."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    place: Any = header

    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.3:
            break
        place = place[key]

    action = draw.random()
    if action < 0.6:
        place[key] = draw.choice(STRANGE)
    elif action < 0.75:
        del place[key]
    elif isinstance(place, dict):
        place[draw.choice(["", "a\nb", "n" * 600, "__metadata__", "more", "shape"])] = draw.choice(
            STRANGE
        )
    else:
        place.append(draw.choice(STRANGE))

    return raw(header, data[8 + length :])


def _bomb(data: bytes, draw: random.Random) -> bytes:
    size = draw.choice([10, 100, 900, 980, 1000, 5000])
    opened, closed = draw.choice([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]"), ("[[],", "]")])
    nested = opened * size + draw.choice(["1", "", "null"]) + closed * draw.choice([size, size, 0])
    entry = '{"dtype":%s,"shape":%s,"data_offsets":%s}'
    parts = ['"F32"', "[]", "[0,4]"]
    parts[draw.randrange(3)] = nested
    text = draw.choice([nested, '{"a":' + nested + "}", '{"a":' + entry % tuple(parts) + "}"])

    return raw(text.encode(), bytes(4)) if draw.random() < 0.6 else values('{"a":' + nested + "}")


def _words(data: bytes, draw: random.Random) -> bytes:
    """Duplicate keys, constants that are not JSON, numbers that are too long."""
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode()
    word = draw.choice(
        [
            "NaN",
            "Infinity",
            "-Infinity",
            "1e999",
            "9" * 4299,
            "9" * 5000,
            "-" + "9" * 400,
            '"\\ud800"',
            "-0",
            "+1",
            "\x00",
        ]
    )

    if draw.random() < 0.4:
        numbers = list(re.finditer(r"\d+", text))
        found = draw.choice(numbers)
        text = text[: found.start()] + word + text[found.end() :]
    elif draw.random() < 0.5:
        name = draw.choice(["f", "steps", "__metadata__", "shape"])
        text = "{" + f'"{name}":{draw.choice([word, json.dumps(F32)])},' + text[1:]
    else:
        return values(draw.choice(['{"a":%s}', '{"a":1,"a":%s}', "%s", '{"a":[%s]}']) % word)

    return raw(text.encode(), data[8 + length :])


BREAKERS = [_flip, _truncate, _random_bytes, _edit, _bomb, _words]


@pytest.mark.parametrize("breaker", BREAKERS, ids=lambda breaker: breaker.__name__)
def test_broken_payloads_are_refused_or_understood_but_never_crash(
    breaker: Callable[..., bytes],
) -> None:
    """2000 of each of six kinds: 12,000 in all."""
    draw = random.Random(breaker.__name__)
    data = sample().to_bytes()
    outcomes = Counter[str]()
    slowest = 0.0

    for _ in range(2000):
        broken = breaker(data, draw)
        started = time.process_time()
        outcomes[_outcome(broken)] += 1
        slowest = max(slowest, time.process_time() - started)
        allowed = 2**16 + 64 * (len(broken) + 1)
        assert allocates_less(partial(_outcome, broken), allowed), broken

    assert slowest < 3  # a bomb would take minutes; the machine may be busy
    assert outcomes["refused"] > 500, outcomes


def _outcome(broken: bytes) -> str:
    """Return whether a payload is refused, with a message that can be sent, or understood."""
    try:
        received = Payload.from_bytes(broken)
    except WireError as error:
        str(error).encode()
        return "refused"

    received.to_bytes()
    return "understood"


def test_a_full_header_of_small_things_stays_proportionate() -> None:
    """4 MiB of empty lists is the most that a header can make Python allocate."""
    data = values('{"a":[' + "[]," * 300_000 + "1]}")
    assert allocates_less(lambda: Payload.from_bytes(data), 40 * len(data))
