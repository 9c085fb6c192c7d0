"""How fast codecs are: encode and decode, in megabytes of fp32 update a second, on one thread.

    python -m benchmarks.codecs speed [--quick] [--layout NAME ...] [--codec NAME ...]
        [--out FILE.json]

Updates are synthetic: Gaussian with a falling spectrum along the feature axis of every module, in a
basis that all updates share, so that learned codecs have something to learn and entropy coders
something to save. Each figure is the fastest of several repetitions, in processor seconds. The last
columns set a codec against a copy of the same bytes in memory, and its memory against the update:
the median of five encodes, because the allocator sometimes keeps what earlier ones took.
"""

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch

from benchmarks.cgfedllm.bed import Table, fitted
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show
from fluvial.codecs import CODECS
from fluvial.codecs.base import Codec
from fluvial.errors import FluvialError
from fluvial.seeds import generator
from fluvial.wire.tensors import Layout, Named, factor, relative_error

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK = 8
BAR_MB_S = 100.0
"""Bar for klt: bytes of the update over the seconds of an encode, of a decode, and of both."""
KLT_CLAIMS = {"encode": "encode", "decode": "decode", "both": "encode and decode"}
ENCODE_BARS = {"hadamard, 1/64": 150.0, "trellis, 1/64": 20.0, "trellis, 1/64, memory 8": 70.0}
DECODE_BARS = {"hadamard, 1/64": 150.0, "trellis, 1/64": 200.0, "trellis, 1/64, memory 8": 200.0}
PEAK_BAR = 3.0
"""Bar for the memory of an encode beyond what the process held, over the update."""
SMALL = 1_000_000
"""Bytes of an update under which calls and not values take the time, and memory says nothing."""


@dataclass(frozen=True)
class Size:
    """A layout to time: LoRA of rank 8 on q, k, v, o."""

    layers: int
    width: int
    narrow: int
    """Width of keys and values."""
    fit: bool = True
    """True where codecs that learn are fitted; the layout that only encodes fits none."""
    decode: bool = True
    codecs: tuple[str, ...] = ()
    """Names of the codecs to time; all where there is none."""

    def layout(self) -> Layout:
        """Names as PEFT gives them."""
        shapes = []
        for layer in range(self.layers):
            for module in MODULES:
                start = f"model.layers.{layer}.self_attn.{module}"
                out = self.narrow if module in ("k_proj", "v_proj") else self.width
                shapes += [
                    (f"{start}.lora_A.weight", (RANK, self.width)),
                    (f"{start}.lora_B.weight", (out, RANK)),
                ]

        return Layout(tuple(sorted(shapes)))


WIDTHS = ("int8", "hadamard", "klt")
"""Codecs to time at widths of which a whole model would take too long to fit."""
LAYOUTS = {
    "d 64": Size(5, 64, 32),
    "d 128": Size(8, 128, 128),
    "d 256": Size(8, 256, 256, codecs=WIDTHS),
    "d 512": Size(4, 512, 512, codecs=WIDTHS),
    "d 896": Size(2, 896, 896, codecs=WIDTHS),
    "d 2048": Size(1, 2048, 2048, codecs=WIDTHS),
    "Qwen2.5-0.5B": Size(24, 896, 128, fit=False),
    "Qwen1.5-1.8B": Size(24, 2048, 2048),
    "LLaMA-7B": Size(32, 4096, 4096, fit=False, decode=False),
}
"""stories260k, the embedded model, some layers of wider ones, a small model without learned codecs,
and two from the papers; of the last, encode only and no learned codecs."""
QUICK = ("d 64", "d 128")
KLT: Table = {"name": "klt", "rate": 64}
TABLES: tuple[Table, ...] = (
    {"name": "identity"},
    {"name": "bf16"},
    {"name": "int8"},
    {"name": "int4"},
    {"name": "nf4"},
    {"name": "sign"},
    {"name": "half_sign"},
    *(
        {"name": name, "rate": 64}
        for name in (
            "top_k",
            "random_k",
            "ternary",
            "dct_top_k",
            "hadamard",
            "trellis",
            "eden",
            "powersgd",
            "vq",
            "cnn",
        )
    ),
    {"name": "trellis", "rate": 64, "memory": 8},
    KLT,
    {"name": "klt_trellis", "rate": 64},
    {"name": "klt", "rate": 16},
    {"name": "klt", "rate": 64, "mode": "dithered"},
)
LARGE = 1_000_000
"""On layouts of more values than this, only klt at 1/64 is fitted: fits take minutes there."""


def updates(layout: Layout, count: int) -> list[Named]:
    """Synthetic updates of a training run's size; the same every time."""
    found: list[Named] = [{} for _ in range(count)]
    for name, shape in layout.shapes:
        across = factor(name) == "A"
        width = shape[1] if across else shape[0]
        # Modules that read the same hidden state have the same basis for A, as in a real model.
        place = name.rsplit(".", 3)[0] + (".o" if "o_proj" in name else ".qkv") if across else name
        basis = generator(0, "basis", place)
        signs = torch.randint(0, 2, (width,), generator=basis) * 2.0 - 1.0
        order = torch.randperm(width, generator=basis)
        spectrum = (1.0 + torch.arange(width)) ** -0.5

        for number, update in enumerate(found):
            white = torch.randn(RANK, width, generator=generator(0, "update", number, name))
            mixed = _cosines((white * spectrum)[:, order]) * signs
            scaled = 1e-3 * mixed / mixed.square().mean().sqrt()
            update[name] = scaled.contiguous() if across else scaled.T.contiguous()

    return found


def _cosines(rows: torch.Tensor) -> torch.Tensor:
    """Return the orthonormal cosine transform of every row (rows, width)."""
    from scipy.fft import dct

    return torch.from_numpy(dct(rows.numpy(), norm="ortho")).float()


def fastest(call: Callable[[], object], seconds: float) -> float:
    """Processor seconds of the fastest of at least three calls, and of as many as fit into
    `seconds`; they are those of one core, whatever else the machine does."""
    best = float("inf")
    since = time.perf_counter()
    calls = 0

    while calls < 3 or time.perf_counter() - since < seconds:
        started = time.process_time()
        call()
        best = min(best, time.process_time() - started)
        calls = calls + 1

    return best


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Return by how many bytes the process grows at most during a call; None where the kernel does
    not say."""
    status = Path("/proc/self/status")
    reset = Path("/proc/self/clear_refs")
    if platform.libc_ver()[0] != "glibc" or not os.access(reset, os.W_OK):
        return None

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not serve this one
    reset.write_text("5")
    before = _kibibytes(status.read_text(), "VmRSS")
    call()
    return 1024 * (_kibibytes(status.read_text(), "VmHWM") - before)


def _kibibytes(status: str, field: str) -> int:
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def timed(codec: Codec, sample: Named, seconds: float, *, decode: bool) -> Row:
    """Seconds to encode and to decode `sample`, and the frame."""
    frame = codec.encode(sample)
    row: Row = {
        "frame_bytes": len(frame),
        "encode_s": fastest(lambda: codec.encode(sample), seconds),
    }

    raw_bytes = codec.layout.raw_bytes
    if raw_bytes >= SMALL:
        peaks = [peak_bytes(lambda: codec.encode(sample)) for _ in range(5)]
        known = [peak / raw_bytes for peak in peaks if peak is not None]
        row["encode_peak"] = median(known) if known else None

    if decode:
        row["error"] = relative_error(sample, codec.decode(frame))
        row["decode_s"] = fastest(lambda: codec.decode(frame), seconds)

    return row


def rows_of(name: str, wanted: list[str] | None, seconds: float, report: Report) -> list[Row]:
    """Every codec on one layout."""
    size = LAYOUTS[name]
    layout = size.layout()
    ensemble = updates(layout, 9 if size.fit else 1)
    sample = ensemble[-1]
    training = ensemble[:-1]
    vector = layout.flatten(sample)
    copy_s = fastest(vector.clone, seconds)
    rows = []

    for table in TABLES:
        codec_name = table["name"]
        named = wanted or size.codecs
        if codec_name not in CODECS or (named and codec_name not in named):
            continue

        learned = CODECS[codec_name].learned
        if learned and size.codecs and table != KLT:
            continue
        if learned and not (size.fit and (layout.numel <= LARGE or table == KLT)):
            report.skip(f"{name}, {_label(table)}: fitting it takes too long here")
            continue

        row: Row = {"layout": name, "codec": _label(table), "raw_bytes": layout.raw_bytes}
        since = time.perf_counter()
        try:
            codec = fitted_on(table, layout, training)
        except FluvialError as error:
            report.skip(f"{name}, {row['codec']}: {str(error)[:200]}")
            continue

        row |= {"fit_s": time.perf_counter() - since if learned else None, "copy_s": copy_s}
        row |= timed(codec, sample, seconds, decode=size.decode)
        megabytes = layout.raw_bytes / 1e6
        row |= {"encode_mb_s": megabytes / row["encode_s"], "copy_mb_s": megabytes / copy_s}
        row["encode_share"] = copy_s / row["encode_s"]

        if size.decode:
            row["decode_mb_s"] = megabytes / row["decode_s"]
            row["both_mb_s"] = megabytes / (row["encode_s"] + row["decode_s"])
            row["decode_share"] = copy_s / row["decode_s"]

        rows.append(row)

    return rows


def fitted_on(table: Table, layout: Layout, training: list[Named]) -> Codec:
    """Return the codec, fitted to `training` if it learns."""
    from fluvial.codecs.base import Snapshot

    snapshots = [Snapshot("site", number, {}, update) for number, update in enumerate(training)]
    return fitted(table, layout, snapshots)


def _label(table: Table) -> str:
    rate = f", 1/{table['rate']}" if "rate" in table else ""
    memory = f", memory {table['memory']}" if "memory" in table else ""
    dithered = ", dithered" if table.get("mode") == "dithered" else ""
    return f"{table['name']}{rate}{memory}{dithered}"


COLUMNS = {
    "codec": "codec",
    "frame_bytes": "bytes",
    "error": "error",
    "encode_mb_s": "encode MB/s",
    "decode_mb_s": "decode MB/s",
    "both_mb_s": "both MB/s",
    "encode_share": "of a copy's speed, encode",
    "decode_share": "decode",
    "encode_peak": "peak memory of an encode, in updates",
    "fit_s": "fit, s",
}


def claims_of(name: str, rows: list[Row]) -> list[Claim]:
    """Return the bars of klt and, on updates that are not small, of the rotated codecs."""
    claims = []
    for row in rows:
        codec = row["codec"]
        if codec == "klt, 1/64":
            for way, words in KLT_CLAIMS.items():
                what = f"{name}: {codec}: {words}, MB/s"
                claims.append(Claim(what, row.get(f"{way}_mb_s"), BAR_MB_S, "at least"))
        if row["raw_bytes"] < SMALL or codec not in ENCODE_BARS:
            continue

        for way, bars in (("encode", ENCODE_BARS), ("decode", DECODE_BARS)):
            if f"{way}_mb_s" in row:
                what = f"{name}: {codec}: {way}, MB/s"
                claims.append(Claim(what, row[f"{way}_mb_s"], bars[codec], "at least"))
        what = f"{name}: {codec}: memory of an encode, in updates"
        claims.append(Claim(what, row["encode_peak"], PEAK_BAR, "at most"))

    return claims


def main() -> None:
    """See the module."""
    parser = parser_of("codecs speed", __doc__, quick="the two small layouts, short repetitions")
    parser.add_argument("--layout", action="append", choices=list(LAYOUTS), help="default: all")
    parser.add_argument("--codec", action="append", help="default: all")
    options = parser.parse_args()
    load = os.getloadavg()
    torch.set_num_threads(1)
    wanted = options.layout or list(QUICK if options.quick else LAYOUTS)
    seconds = 0.05 if options.quick else 1.0
    report = Report(
        "speed", {"quick": options.quick, "layouts": wanted, "threads": 1, "seconds": seconds}
    )

    for name in sorted({table["name"] for table in TABLES} - set(CODECS)):
        report.skip(f"{name}: the package has no such codec")
    for name in wanted:
        rows = rows_of(name, options.codec, seconds, report)
        report.rows += rows
        copied = mean(row["copy_mb_s"] for row in rows) if rows else 0
        megabytes = LAYOUTS[name].layout().raw_bytes / 1e6
        show(
            f"{name}: {megabytes:.3g} MB of update; a copy runs at {copied:,.0f} MB/s",
            COLUMNS,
            rows,
        )
        report.claims += claims_of(name, rows)

    report.finish(options.out, load)
