"""Memory and time of a step over quantised bases, and what merging an adapter would change.

    python -m benchmarks.quantised --part costs|merging [--quick] [--out FILE.json]

Costs are those of QLoRA on a random model of the shape of Qwen2.5-0.5B, each format in a process of
its own. Merging trains the embedded model on its own text over each base, and measures held-out
loss with the adapter beside the base, merged into float weights, and merged and quantised again.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.child import answer_of
from benchmarks.options import parser_of
from benchmarks.quantised.merging import merging
from benchmarks.report import Claim, Report, Row, show

SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
"""Shape of Qwen2.5-0.5B, without its weights."""
SMALL = {"vocab_size": 2000, "num_hidden_layers": 2}
ALLOCATORS: dict[str, dict[str, str]] = {
    "as it is": {},
    "fixed": {"MALLOC_MMAP_THRESHOLD_": "1048576"},
}
"""Environments of glibc's allocator: as it is, it keeps freed blocks of up to 32 MB; with a fixed
threshold it returns those of 1 MB and more."""
FORMATS = ("bfloat16", "int8", "nf4", "nf4-double")
LENGTH = 256
TIMEOUT_S = 600.0


def random_model(folder: Path, *, quick: bool) -> None:
    """Write a random model of that shape, bfloat16."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**SHAPE | (SMALL if quick else {}))
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    assert load_file(folder / "model.safetensors")


def costs(report: Report, *, quick: bool) -> None:
    """Add rows and claims about memory and time."""
    length, steps = (32, 1) if quick else (LENGTH, 2)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder), quick=quick)
        for kind in FORMATS:
            for allocator, environment in ALLOCATORS.items():
                measured = _probe(folder, kind, length, steps, environment)
                names = {"part": "costs", "format": kind, "allocator": allocator}
                rows.append({**names, **measured, **_megabytes(measured)})

    show(
        f"One step of an adapter, batch 1, {length} tokens",
        {
            "format": "base",
            "allocator": "allocator",
            "stored_mb": "weights MB",
            "load_peak_mb": "peak of loading MB",
            "held_mb": "held MB",
            "step_peak_mb": "peak with steps MB",
            "load_s": "loading CPU s",
            "step_s": "step CPU s",
        },
        rows,
    )
    report.rows += rows
    by_case = {(row["format"], row["allocator"]): row for row in rows}
    floats, nested = by_case["bfloat16", "fixed"], by_case["nf4-double", "fixed"]
    as_it_is = [by_case[kind, "as it is"] for kind in ("nf4-double", "bfloat16")]
    report.claims += [
        Claim(
            "stored bytes of nf4-double against bfloat16",
            nested["stored_bytes"] / floats["stored_bytes"],
            0.6,
            "at most",
        ),
        Claim(
            "peak of loading nf4-double against bfloat16",
            nested["load_peak_bytes"] / floats["load_peak_bytes"],
            1.0,
            "below",
        ),
        Claim(
            "peak with steps over nf4-double against bfloat16, fixed allocator",
            nested["step_peak_bytes"] / floats["step_peak_bytes"],
            1.0,
            "below",
        ),
        Claim(
            "the same, allocator as it is",
            as_it_is[0]["step_peak_bytes"] / as_it_is[1]["step_peak_bytes"],
            1.0,
            "below",
        ),
        Claim(
            "CPU time of a step over nf4-double against bfloat16",
            nested["step_s"] / floats["step_s"],
            2.0,
            "at most",
        ),
    ]


def _megabytes(measured: dict[str, Any]) -> dict[str, float]:
    return {
        key.replace("_bytes", "_mb"): value / 1e6
        for key, value in measured.items()
        if key.endswith("_bytes")
    }


def _probe(
    folder: str, kind: str, length: int, steps: int, environment: dict[str, str]
) -> dict[str, Any]:
    """Return what a process of its own measured; raises `RuntimeError` with the end of its error
    output."""
    return answer_of(
        "benchmarks.quantised.probe",
        folder,
        kind,
        length,
        steps,
        environment=environment,
        timeout_s=TIMEOUT_S,
    )


PARTS = {"costs": costs, "merging": merging}


def main() -> None:
    """See the module."""
    parser = parser_of("quantised", __doc__, quick="a small model, few steps: seconds")
    parser.add_argument("--part", choices=PARTS, required=True, help="what to measure")
    options = parser.parse_args()
    load = os.getloadavg()
    report = Report(
        "quantised",
        {"part": options.part, "quick": options.quick, "shape": SHAPE, "length": LENGTH},
    )
    PARTS[options.part](report, quick=options.quick)
    report.finish(options.out, load)
