"""Payloads: named tensors and plain values, on the wire, on a site's disk and in a checkpoint.

The bytes are a safetensors file; the plain values are JSON in its metadata. A payload of one codec
frame and nothing else, which is what sites send round after round, is packed tighter: 8 bytes, the
values as JSON, the frame. Reading trusts nothing: sizes, counts, names, types, shapes and offsets
are checked against `Limits` before anything of their size is allocated, and no part of the format
can run code.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fluvial.errors import WireError
from fluvial.wire.tensors import Named

Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FRAME = "f"
"""Name of the one tensor of a payload that carries a codec frame."""
_MAGIC = b"FLU2"
_TAG = 1 << 31  # set in the length of a packed frame's values; no safetensors header is that long
_KEY = "v"  # one metadata key, so that equal payloads have equal bytes
_MAX_DEPTH = 32  # of nested lists and objects among the values
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 cannot


@dataclass(frozen=True)
class Limits:
    """Upper bounds for a payload from outside."""

    max_bytes: int = 2**31
    max_header_bytes: int = 2**22
    max_tensors: int = 2**16
    max_name: int = 512
    """Characters of a tensor's name."""
    max_dims: int = 8


OWN_FILES = Limits(max_bytes=2**40, max_header_bytes=2**26)
"""Limits for files that this installation wrote itself."""


@dataclass(frozen=True)
class Payload:
    """Named tensors and plain values (JSON types; floats are finite)."""

    tensors: Named = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Encode the payload; equal payloads give equal bytes."""
        for name, tensor in self.tensors.items():
            assert tensor.dtype in _DTYPES.values(), f"{name}: {tensor.dtype} has no wire form"
        fault = _fault(self.values)
        assert fault is None, f"values{fault}"
        text = json.dumps(self.values, allow_nan=False, sort_keys=True, separators=(",", ":"))

        if self.tensors.keys() == {FRAME} and len(text) < _TAG and _is_frame(self.tensors[FRAME]):
            body = text.encode() if self.values else b""
            return _MAGIC + (_TAG | len(body)).to_bytes(4, "little") + body + payload_frame(self)

        metadata = {_KEY: text} if self.values else None
        return safetensors.torch.save(_apart(self.tensors), metadata=metadata)

    @classmethod
    def from_bytes(cls, data: bytes, limits: Limits | None = None) -> "Payload":
        """Decode untrusted bytes; raises `WireError` saying what is wrong and where."""
        limits = limits or Limits()
        if data[:4] == _MAGIC and len(data) >= 8 and data[7] & 0x80:
            return _unpack(data, limits)

        values = _validate(data, limits)
        try:
            return cls(safetensors.torch.load(data), values)
        except SafetensorError as error:  # its JSON is stricter than ours, on "-0" for instance
            raise WireError(f"payload: {error!s:.200}") from None

    def value(self, name: str, kind: type) -> Any:
        """Return a plain value that must be there and of type `kind`; raises `WireError` (a bool is
        not an int)."""
        plain = self.values.get(name)
        if type(plain) is not kind:
            raise WireError(
                f"message value {name!r}: expected {kind.__name__}, found {type(plain).__name__}"
            )

        return plain

    def whole(self, name: str, low: int, high: int) -> int:
        """Return a whole number that must be there; raises `WireError` unless low <= number <=
        high."""
        number: int = self.value(name, int)
        if not low <= number <= high:
            shown = (
                str(number) if abs(number) < 2**64 else f"a number of {number.bit_length()} bits"
            )
            raise WireError(f"message value {name!r}: {shown} is not from {low} to {high}")

        return number

    def number(self, name: str, low: float, high: float) -> float:
        """Return a float that must be there; raises `WireError` unless low <= number <= high."""
        real: float = self.value(name, float)
        if not low <= real <= high:
            raise WireError(f"message value {name!r}: {real!r} is not from {low:g} to {high:g}")
        return real

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that must be there; raises `WireError`."""
        if name not in self.tensors:
            raise WireError(f"message tensor {name!r} is missing; found {sorted(self.tensors)[:5]}")
        return self.tensors[name]


def _apart(tensors: Named) -> Named:
    """Return `tensors` on the CPU and contiguous; those that share memory with one before, as
    copies.

    safetensors refuses shared memory, such as one tensor under two names.
    """
    found: Named = {}
    seen = set()

    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        memory = here.untyped_storage().data_ptr()
        found[name] = here.clone() if memory in seen else here
        seen.add(memory)

    return found


def read_values(path: Path) -> dict[str, Value]:
    """Return the plain values of a payload in a file of this installation, without its tensors;
    raises `WireError`."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > OWN_FILES.max_header_bytes:
            raise WireError(f"{path}: is no payload with named tensors")
        header = _json(file.read(size), str(path))

    return _plain_values(header.get("__metadata__", {}).get(_KEY, "{}"))


def frame_payload(frame: bytes, /, **values: Value) -> Payload:
    """Return a payload that carries one codec frame, not empty; every byte beyond it is envelope,
    so names are short."""
    return Payload({FRAME: torch.frombuffer(bytearray(frame), dtype=torch.uint8)}, values)


def payload_frame(payload: Payload) -> bytes:
    """Return the codec frame of a `frame_payload`; raises `WireError` if there is none."""
    tensor = payload.tensor(FRAME)
    if not _is_frame(tensor):
        raise WireError(
            f"frame: expected one-dimensional uint8, found {tensor.dtype} with shape "
            f"{tuple(tensor.shape)}"
        )

    return tensor.numpy().tobytes()


def join(parts: dict[str, Payload]) -> Payload:
    """Return one payload of several, as a checkpoint keeps them; names of tensors get the part's
    name in front."""
    tensors = join_tensors({part: each.tensors for part, each in parts.items()})
    return Payload(tensors, {part: each.values for part, each in parts.items()})


def split(payload: Payload, parts: tuple[str, ...]) -> dict[str, Payload]:
    """Invert `join`; raises `WireError` when a part's values are missing."""
    return {
        part: Payload(tensors_of(part, payload.tensors), payload.value(part, dict))
        for part in parts
    }


def join_tensors(parts: Mapping[str, Named]) -> Named:
    """Return the tensors of several parts, whose names get the part's name in front."""
    return {
        f"{part}/{name}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def tensors_of(part: str, tensors: Named) -> Named:
    """Return the tensors of one part by their own names, out of those of `join_tensors`."""
    start = f"{part}/"
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def _is_frame(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8 and tensor.dim() == 1 and tensor.numel() > 0


def _unpack(data: bytes, limits: Limits) -> Payload:
    """Return a packed frame and its values."""
    _check_size(data, limits)
    end = 8 + (int.from_bytes(data[4:8], "little") ^ _TAG)

    if end - 8 > limits.max_header_bytes or end >= len(data):
        raise WireError(
            f"packed frame: values of {end - 8} bytes exceed the limit or the payload of "
            f"{len(data)} bytes"
        )

    return frame_payload(data[end:], **_plain_values(data[8:end] or "{}"))


def _check_size(data: bytes, limits: Limits) -> None:
    if len(data) > limits.max_bytes:
        raise WireError(f"payload of {len(data)} bytes exceeds the limit of {limits.max_bytes}")


def _plain_values(text: bytes | str) -> dict[str, Value]:
    """Return JSON values from outside, checked."""
    values = _json(text, "values")
    if not isinstance(values, dict):
        raise WireError("values are not a JSON object")
    fault = _fault(values)
    if fault is not None:
        raise WireError(f"values{fault}")
    return values


def _fault(value: object, depth: int = 0) -> str | None:
    """Return why `value` is not a plain value, after the place inside it where that is so; None
    when it is one."""
    if depth > _MAX_DEPTH:
        return ": nested too deeply"
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, dict) and (not isinstance(key, str) or _SURROGATE.search(key)):
                return f": key {key!r:.40} is not text"
            fault = _fault(item, depth + 1)
            if fault is not None:
                return f"[{key!r:.40}]{fault}"

        return None

    if isinstance(value, str):
        return f": {value!r:.40} is not text" if _SURROGATE.search(value) else None
    if isinstance(value, float) and not math.isfinite(value):
        return f": {value}"

    return None if value is None or isinstance(value, int | float) else f": {type(value).__name__}"


def _validate(data: bytes, limits: Limits) -> dict[str, Value]:
    """Check everything about `data` that the parser would otherwise take on trust; returns the
    plain values."""
    _check_size(data, limits)
    if len(data) < 8:
        raise WireError(f"payload of {len(data)} bytes is shorter than its length field")

    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > min(limits.max_header_bytes, len(data) - 8):
        raise WireError(
            f"header of {header_bytes} bytes exceeds the limit or the payload of {len(data)} bytes"
        )

    header = _json(data[8 : 8 + header_bytes], "header")
    if not isinstance(header, dict):
        raise WireError("header is not a JSON object")

    metadata = header.pop("__metadata__", {})
    if (
        not isinstance(metadata, dict)
        or not set(metadata) <= {_KEY}
        or not isinstance(metadata.get(_KEY, ""), str)
    ):
        raise WireError(f"metadata must be an object with at most the text {_KEY!r}")

    values = _plain_values(metadata.get(_KEY, "{}"))
    if len(header) > limits.max_tensors:
        raise WireError(f"{len(header)} tensors exceed the limit of {limits.max_tensors}")

    spans = sorted(_span(name, entry, limits) for name, entry in header.items())
    position = 0
    for begin, end in spans:
        if begin != position:
            raise WireError(
                f"tensor data leaves a gap or overlaps at byte {begin}, expected {position}"
            )

        position = end

    if position != len(data) - 8 - header_bytes:
        raise WireError(f"tensors take {position} bytes, {len(data) - 8 - header_bytes} are there")

    return values


def _span(name: str, entry: object, limits: Limits) -> tuple[int, int]:
    """Return the begin and end of a tensor's bytes, after its name, type and shape were checked."""
    shown = f"tensor {name[:64]!r}"
    if not 0 < len(name) <= limits.max_name or not name.isprintable():
        raise WireError(f"{shown}: names have 1 to {limits.max_name} printable characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WireError(f"{shown}: expected dtype, shape and data_offsets")

    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]

    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise WireError(f"{shown}: unknown type {dtype!r:.40}")
    if not _whole_numbers(shape) or len(shape) > limits.max_dims:
        raise WireError(f"{shown}: shape must be at most {limits.max_dims} whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise WireError(f"{shown}: data_offsets must be two whole numbers")

    size = math.prod(shape) * _DTYPES[dtype].itemsize
    strides = math.prod(
        max(side, 1) for side in shape
    )  # what an empty tensor with huge sides would overflow
    if strides > limits.max_bytes or size != offsets[1] - offsets[0]:
        raise WireError(f"{shown}: {dtype} {shape!r:.80} does not fill bytes {offsets!r:.60}")

    return offsets[0], offsets[1]


def _whole_numbers(found: object) -> bool:
    return isinstance(found, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in found
    )


def _json(text: bytes | str, what: str) -> Any:
    """Return strict JSON: UTF-8, no duplicate keys, no NaN, no nesting beyond the interpreter's
    stack."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("duplicate key")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(decoded, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not valid JSON: {error}") from None
