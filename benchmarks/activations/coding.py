"""Activation codecs: bytes a token, error on what crosses a cut, and time beside a line.

    python -m benchmarks.activations [--quick] [--out FILE.json]

Errors are relative, ||decoded - x|| / ||x|| over all rows, of the embedded model trained on public
text and cut behind its first and before its last layer: hidden states h_A and h_B are rounded to
nearest, their gradients g_A and g_B without bias. "recurring" rows code changes of samples (AQ-SGD)
from the second epoch on. Times are of Gaussian rows of 4096 tokens and width 896 in fp32, on one
thread: the fastest of several repetitions, in seconds of the processor, and MB of fp32 a second.
"of the line" is the time to encode and decode over the time in which a line of 1 Gbit/s carries the
bytes; "in all" is the sum of both times over that in which it carries 16 bits a value.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from benchmarks.activations.hidden import Step, steps
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show
from fluvial.codecs.activations import ActivationSettings, build_activation
from fluvial.codecs.activations.floats import BFloat16RowsSettings, ExactRowsSettings
from fluvial.codecs.activations.largest import TopKRowsSettings
from fluvial.codecs.activations.levels import Int4RowsSettings, Int8RowsSettings
from fluvial.codecs.activations.recurring import Recurring
from fluvial.codecs.activations.samples import SampleMemory
from fluvial.seeds import generator

TOKENS = 4096
WIDTH = 896
"""Hidden size of Qwen2.5-0.5B."""
LINE = 1e9 / 8
"""Bytes a second of the line that codecs are timed against."""
BAR_LINE = 0.5
BAR_BYTES = 0.3
"""Bar for int4 against 16 bits a value."""
CODECS: dict[str, ActivationSettings] = {
    "exact": ExactRowsSettings(),
    "bf16": BFloat16RowsSettings(),
    "int8": Int8RowsSettings(),
    "int4": Int4RowsSettings(),
    "int4, 8 outlier channels": Int4RowsSettings(outlier_channels=8),
    "top_k, 10 %": TopKRowsSettings(share=0.1),
}
RECURRING = ("int8", "int4")
ENDS = ("h_A", "h_B", "g_A", "g_B")


def _draws(end: str) -> Generator | None:
    """Return randomness for a gradient, and none for hidden states."""
    return generator(0, "rounding", end) if end.startswith("g") else None


class Errors:
    """Relative errors of one codec by tensor, summed over steps."""

    def __init__(self) -> None:
        self._lost: dict[str, float] = defaultdict(float)
        self._energy: dict[str, float] = defaultdict(float)

    def add(self, end: str, rows: Tensor, decoded: Tensor) -> None:
        """Count one step."""
        self._lost[end] += float((decoded - rows).double().square().sum())
        self._energy[end] += float(rows.double().square().sum())

    def by_end(self) -> Row:
        """Return the relative error of each tensor."""
        return {end: float((self._lost[end] / self._energy[end]) ** 0.5) for end in self._lost}


def errors(name: str, trained: list[Step]) -> Row:
    """Return the errors of a codec over all steps after the first epoch."""
    codec = build_activation(CODECS[name], torch.float32)
    found = Errors()

    for end in ENDS:
        draws = _draws(end)
        for step in trained:
            if step.epoch > 0:
                rows = step.rows[end]
                found.add(end, rows, codec.decode(codec.encode(rows, generator=draws), *rows.shape))

    return found.by_end()


def recurring_errors(name: str, trained: list[Step]) -> Row:
    """Return the errors where changes are coded, over the same steps."""
    change = build_activation(CODECS[name], torch.float32)
    codec = Recurring(change, build_activation(ExactRowsSettings(), torch.float32))
    found = Errors()

    for end in ENDS:
        draws = _draws(end)
        width = trained[0].rows[end].shape[1]
        memory = SampleMemory.empty(width, torch.float32, 2**30)
        for step in trained:
            rows = step.rows[end]
            _, memory = codec.encode(memory, step.batch, rows, generator=draws)
            if step.epoch > 0:
                found.add(end, rows, memory.join(step.batch, "cpu"))

    return found.by_end()


def fastest(call: Callable[[], object], seconds: float) -> float:
    """Return the processor's seconds of the fastest of at least three calls, and of as many as fit
    into `seconds`."""
    best = float("inf")
    calls = 0
    since = time.perf_counter()

    while calls < 3 or time.perf_counter() - since < seconds:
        started = time.thread_time()
        call()
        best = min(best, time.thread_time() - started)
        calls += 1

    return best


def times(name: str, rows: Tensor, seconds: float, *, unbiased: bool) -> Row:
    """Return bytes and seconds of a codec on `rows` (tokens, width), fp32."""
    codec = build_activation(CODECS[name], torch.float32)
    draws = generator(0, "rounding") if unbiased else None
    data = codec.encode(rows, generator=draws)
    encode_s = fastest(lambda: codec.encode(rows, generator=draws), seconds)
    decode_s = fastest(lambda: codec.decode(data, *rows.shape), seconds)
    megabytes = rows.nbytes / 1e6

    return {
        "codec": name,
        "rounding": "unbiased" if unbiased else "nearest",
        "bytes_token": len(data) / rows.shape[0],
        "share_16_bit": len(data) / (2 * rows.numel()),
        "encode_mb_s": megabytes / encode_s,
        "decode_mb_s": megabytes / decode_s,
        "both_mb_s": megabytes / (encode_s + decode_s),
        "line_share": (encode_s + decode_s) / (len(data) / LINE),
        "total_share": (encode_s + decode_s + len(data) / LINE) / (2 * rows.numel() / LINE),
    }


def claims(timed: list[Row]) -> list[Claim]:
    """Return the claims on bytes and time, of codecs that round."""
    found = []
    for row in timed:
        label = f"{row['codec']}, {row['rounding']}"
        if row["codec"] == "exact":
            continue

        found.append(
            Claim(f"{label}: coding, of the line's time", row["line_share"], BAR_LINE, "at most")
        )
        if row["codec"] != "bf16":
            found.append(
                Claim(f"{label}: in all, of 16 bits a value", row["total_share"], 1.0, "below")
            )
        if row["codec"].startswith("int4"):
            found.append(
                Claim(
                    f"{label}: bytes, of 16 bits a value", row["share_16_bit"], BAR_BYTES, "at most"
                )
            )

    return found


def main() -> None:
    """See the module."""
    parser = parser_of("activations", __doc__, quick="few texts, short repetitions")
    options = parser.parse_args()
    load = os.getloadavg()
    torch.set_num_threads(1)
    count, tokens, epochs, seconds = (4, 32, 2, 0.02) if options.quick else (32, 128, 4, 0.5)
    settings = {"texts": count, "tokens": tokens, "epochs": epochs, "threads": 1}
    report = Report("activations", settings)

    trained = list(steps(count=count, tokens=tokens, epochs=epochs))
    lost: list[Row] = [{"codec": name, **errors(name, trained)} for name in CODECS]
    lost += [
        {"codec": f"{name}, recurring", **recurring_errors(name, trained)} for name in RECURRING
    ]
    show("Relative error", {"codec": "codec", **{end: end for end in ENDS}}, lost)

    rows = torch.randn(TOKENS, WIDTH, generator=generator(0, "rows"))
    timed = [times(name, rows, seconds, unbiased=way) for name in CODECS for way in (False, True)]
    columns = {
        "codec": "codec",
        "rounding": "rounding",
        "bytes_token": "bytes a token",
        "share_16_bit": "of 16 bits a value",
        "encode_mb_s": "encode MB/s",
        "decode_mb_s": "decode MB/s",
        "both_mb_s": "both MB/s",
        "line_share": "of the line",
        "total_share": "in all",
    }
    show(f"Bytes and time, {TOKENS} tokens of width {WIDTH}", columns, timed)

    report.rows += [{"part": "error", **row} for row in lost]
    report.rows += [{"part": "time", **row} for row in timed]
    report.claims += claims(timed)
    report.finish(options.out, load)
