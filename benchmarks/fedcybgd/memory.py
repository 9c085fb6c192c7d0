"""Part "memory" of `benchmarks.fedcybgd`: the peak of one visit in a process of its own, against
the formula.

    python -m benchmarks.fedcybgd.memory LARGE SMALL TUNES HOLD

makes one visit to each model and prints one JSON object.

The process does a visit by the package's own task: it receives a message, trains, and codes the
change. The base is a folder of files that it has never held. What counts is the growth over what it
holds after the same visit to the tiny model in SMALL; pages of mapped files count as they do for
the system (VmHWM). Freed memory goes back at once, so that the peak is what is in use and not what
the allocator keeps. The formula, `ClientMemory.visit`, leaves out activations, which are small here
(one sequence). Where the rest is on disk, it is asked with the largest weight, which is in use
during a backward pass. A second ratio is to `ClientMemory.peak`, without the state from which the
change is taken.
"""

import gc
import importlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from benchmarks.child import answer_of
from benchmarks.fedcybgd.shapes import FULL, QUICK, SMALL, Shape, layout_of, write_model
from benchmarks.report import Claim, Report, Row, show

if TYPE_CHECKING:
    from fluvial.wire.tensors import Layout


Tunes = Literal["full", "block"]
Hold = Literal["memory", "disk"]
Case = tuple[Tunes, str, Hold]
STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
    "MALLOC_TRIM_THRESHOLD_": "0",
    "OMP_NUM_THREADS": "1",
}
WITHIN = 0.10
"""How far a measured peak may be from the formula."""
TOKENS = 32
"""Tokens of the one sequence that is trained on."""
LLAMA_2_7B = Shape(4096, 11008, 32, 32, 32, 32000, tied=False)
LLAMA_3_8B = Shape(4096, 14336, 32, 32, 8, 128256, tied=False)
CASES: tuple[Case, ...] = (
    ("full", "float32", "memory"),
    ("full", "bfloat16", "memory"),
    ("block", "float32", "memory"),
    ("block", "bfloat16", "memory"),
    ("block", "float32", "disk"),
    ("block", "bfloat16", "disk"),
)
QUICK_CASES: tuple[Case, ...] = (CASES[0], CASES[2], CASES[4])
BITS = {"int8": 8.25, "hadamard 1/16": 2.0, "hadamard 1/32": 1.0}
"""Bits of a coded change by value."""
COLUMNS = {
    "case": "tunes, type, rest in",
    "formula_mb": "formula MB",
    "before_mb": "receiving MB",
    "train_mb": "training MB",
    "after_mb": "coding MB",
    "ratio": "training, of formula",
    "visit_ratio": "whole visit, of formula",
    "ratio_to_peak": "training, without start state",
    "share": "of full tuning",
    "formula_share": "by formula",
}
SHAPE_COLUMNS = {
    "model": "model",
    "form": "form",
    "coded": "upload coded",
    "block": "values of a block",
    "up_half": "up, half",
    "up_coded": "up, coded",
    "down_half": "down, half",
    "down_fp32": "down, fp32 block",
    "memory": "memory",
    "peak": "peak",
    "full_memory": "full tuning",
    "badam": "2M + 16M/D",
}


def visit_once(folder: Path, tunes: Tunes, hold: Hold, meter: Callable[[Any], Any]) -> None:
    """Make a site's first visit with the model in `folder`; `meter` wraps the training loop, just
    before the visit."""
    from fluvial.codecs.quantise import Int8, Int8Settings
    from fluvial.data import Example, SiteData
    from fluvial.federation.sites import Site
    from fluvial.federation.store import StateStore
    from fluvial.methods.fedcybgd.config import FedCyBgdConfig, partition
    from fluvial.methods.fedcybgd.download.send import Sender
    from fluvial.methods.fedcybgd.ledger import Ledger
    from fluvial.models.pool import ModelPool
    from fluvial.models.pretrained import ModelConfig
    from fluvial.models.states import initial_state
    from fluvial.training.config import TrainConfig
    from fluvial.wire.payload import Payload

    module: Any = importlib.import_module(
        "fluvial.methods.fedcybgd.visit"
    )  # the package has a function of this name
    dtype = json.loads((folder / "config.json").read_text())["dtype"]
    model = ModelConfig.model_validate(
        {"name_or_path": str(folder), "dtype": dtype, "device": "cpu"}
    )
    pool = ModelPool(model, None)
    config = FedCyBgdConfig(order="full" if tunes == "full" else "ascending", hold=hold)
    parts = partition(config, pool.layout)
    ledger = Ledger(
        parts,
        [Int8(Int8Settings(), each.layout) for each in parts.blocks],
        initial_state(pool.layout, 0),
    )
    sender = Sender(config.download, ledger, 0, lambda: pool, _no_proxy)
    values: Any = {"round": 1, "rate": 1.0, "visits": 1}
    message = sender.message("site", trained_block(len(parts)), "1/0", values).to_bytes()
    del ledger, sender
    ids = list(range(1, TOKENS + 1))
    data = SiteData([Example(ids, ids)], [], [], 1, 0, 0)
    site = Site(
        name="site",
        seed=0,
        pool=pool,
        load=lambda: data,
        train=TrainConfig(learning_rate=1e-5, max_steps=2, per_device_train_batch_size=1),
        codec=Int8Settings(),
        method=config,
        downlink=None,
        store=StateStore(None),
        rounds=1,
    )
    train = module.train
    module.train = meter(train)

    try:
        reply = module.visit(site, Payload.from_bytes(message))
    finally:
        module.train = train

    assert "visit" in reply.values, "the site could not follow"


def _no_proxy(_block: int, _visit: str) -> Any:
    raise AssertionError("a cache has no proxy")


def trained_block(blocks: int) -> int:
    """In the middle."""
    return blocks // 2


def status(key: str) -> int:
    """Return a figure of this process in bytes: VmRSS, or VmHWM, the most since it was reset."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def probe(large: Path, small: Path, tunes: Tunes, hold: Hold) -> dict[str, int]:
    """Return the bytes that a visit adds to a process that has made a small one.

    The figures are the peaks before, in and after training.
    """
    import torch

    torch.set_num_threads(1)
    visit_once(small, tunes, hold, lambda train: train)
    gc.collect()
    base = status("VmRSS")
    found = dict[str, int]()

    def metered(train: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            found["before"] = status("VmHWM") - base
            RESET.write_text("5")
            report = train(*arguments, **named)
            found["train"] = status("VmHWM") - base
            RESET.write_text("5")

            return report

        RESET.write_text("5")
        return run

    visit_once(large, tunes, hold, metered)
    return {**found, "after": status("VmHWM") - base, "baseline": base}


# -- the part ------------------------------------------------------------------------------------


def memory_part(report: Report, *, quick: bool) -> None:
    """Measured peaks, and the formulas' table for two large models."""
    shape, cases = (QUICK, QUICK_CASES) if quick else (FULL, CASES)
    report.settings["memory"] = asdict(shape)

    if STATUS.exists() and RESET.exists():
        rows = measured(shape, cases)
        show("Growth of the process in one visit, against `memory.client_memory`", COLUMNS, rows)
        report.rows += [{"part": "memory", **row} for row in rows]
        report.claims += claims(rows)
    else:
        report.skip("memory: peaks are read from Linux's /proc")

    shapes = tables()
    show("By formula, bytes of one visit and of a client", SHAPE_COLUMNS, shapes)
    report.rows += [{"part": "shapes", **row} for row in shapes]


def measured(shape: Shape, cases: Sequence[Case]) -> list[Row]:
    """Return a row for every case, each in a fresh process."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        for dtype in dict.fromkeys(dtype for _, dtype, _ in cases):
            small = Path(place) / f"small-{dtype}"
            large = Path(place) / f"large-{dtype}"
            write_model(small, SMALL, dtype)
            write_model(large, shape, dtype)
            rows += [
                _row(shape, case, _ask(large, small, case)) for case in cases if case[1] == dtype
            ]
            shutil.rmtree(large)

    full = {row["dtype"]: row for row in rows if row["tunes"] == "full"}
    for row in rows:
        whole = full[row["dtype"]]
        row["share"] = row["train_mb"] / whole["train_mb"]
        row["formula_share"] = row["formula_mb"] / whole["formula_mb"]

    return rows


def _ask(large: Path, small: Path, case: Case) -> dict[str, int]:
    tunes, _, hold = case
    found: dict[str, int] = answer_of(
        "benchmarks.fedcybgd.memory", large, small, tunes, hold, environment=ALLOCATOR
    )
    return found


def _row(shape: Shape, case: Case, found: dict[str, int]) -> Row:
    from fluvial.methods.fedcybgd.blocks import partition
    from fluvial.methods.fedcybgd.memory import client_memory
    from fluvial.methods.fedcybgd.visit_sizes import Full, OnDisk, Sizes

    tunes, dtype, hold = case
    layout = layout_of(shape)
    parts = partition(layout, whole=tunes == "full")
    block = trained_block(len(parts))
    width: Any = 4 if dtype == "float32" else 2
    form = OnDisk(Full()) if hold == "disk" else Full()
    memory = client_memory(Sizes.of(parts, block), form, width=width)
    own = parts.blocks[block].layout
    in_use = width * largest_beside(layout, own) if hold == "disk" else 0
    expected = memory.visit(in_use)

    return {
        "case": ", ".join(case),
        "tunes": tunes,
        "dtype": dtype,
        "hold": hold,
        "parameters": layout.numel,
        "trained": own.numel,
        "formula_mb": expected / 1e6,
        "states_mb": memory.states / 1e6,
        **{f"{stage}_mb": found[stage] / 1e6 for stage in ("before", "train", "after", "baseline")},
        "ratio": found["train"] / expected,
        "visit_ratio": max(found["before"], found["train"], found["after"]) / expected,
        "ratio_to_peak": found["train"] / memory.peak(in_use),
    }


def largest_beside(layout: "Layout", block: "Layout") -> int:
    """Values of the largest tensor outside a block."""
    return max(math.prod(shape) for name, shape in layout.shapes if name not in set(block.names))


def tables() -> list[Row]:
    """Return the formulas for LLaMA-2-7B and Llama-3-8B in half precision, by form of download and
    by codec of the upload."""
    from fluvial.methods.fedcybgd.shape_table import shape_table

    layouts = {"LLaMA-2-7B": layout_of(LLAMA_2_7B), "Llama-3-8B": layout_of(LLAMA_3_8B)}

    return [
        {"coded": coded, **asdict(row)}
        for coded, bits in BITS.items()
        for row in shape_table(layouts, coded_bits=bits)
        if coded == "int8" or row.form == "cache"
    ]


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Peaks against the formula, in training and of the whole visit; shares of full tuning."""
    found = []
    for row in rows:
        case = f"memory: {row['case']}"
        found.append(
            Claim(f"{case}: training off the formula", abs(row["ratio"] - 1), WITHIN, "at most")
        )
        found.append(
            Claim(
                f"{case}: whole visit off the formula",
                abs(row["visit_ratio"] - 1),
                WITHIN,
                "at most",
            )
        )

        if row["tunes"] == "block":
            found.append(
                Claim(
                    f"{case}: training over full tuning's, measured", row["share"], 1 / 3, "at most"
                )
            )

    return found


def main(arguments: list[str]) -> None:
    """See the module."""
    large, small, tunes, hold = arguments
    found = probe(Path(large), Path(small), cast(Tunes, tunes), cast(Hold, hold))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
