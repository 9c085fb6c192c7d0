"""Part "compute" of `benchmarks.fedcybgd`: the time of a training step by the block that is
trained.

Full tuning and every block of one random model take turns in one process, in another order each
time, and a block's time is compared with that of full tuning in the same turn. The count: a forward
pass is 1 for every linear layer, and so are gradients of inputs and gradients of weights. Full
tuning takes all three everywhere. A block takes the forward pass everywhere, input gradients in
itself and above, and weight gradients in itself: no graph is made below it. On a GPU the models
have 1 to 8 B parameters in bf16, and the peak of memory is measured too.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from benchmarks.fedcybgd.memory import LLAMA_3_8B
from benchmarks.fedcybgd.shapes import Shape, llama
from benchmarks.report import Claim, Report, Row, show

WITHIN = 0.10
"""How far the mean share may be from the count's."""
COLUMNS = {
    "model": "model",
    "trains": "trains",
    "step_ms": "ms per step",
    "share": "of full tuning",
    "lowest": "lowest",
    "highest": "highest",
    "predicted": "by count",
    "peak_gb": "peak GB",
    "formula_gb": "by formula GB",
}


@dataclass(frozen=True)
class Load:
    """Model and batch that are timed."""

    batch: int
    length: int
    steps: int
    """Steps of one call of the training loop."""
    turns: int


@dataclass(frozen=True)
class Setting:
    """A model, where it is, and what it is given."""

    name: str
    shape: Shape
    dtype: str
    load: Load
    blocks: tuple[int, ...] | None = None
    """Which are timed; None is all."""


CPU = Setting(
    "hidden 512, 8 layers",
    Shape(hidden=512, intermediate=1408, layers=8, heads=8, key_value_heads=8, vocabulary=2000),
    "float32",
    Load(batch=16, length=96, steps=2, turns=5),
)
QUICK = Setting(
    "hidden 256, 4 layers",
    Shape(hidden=256, intermediate=704, layers=4, heads=4, key_value_heads=4, vocabulary=500),
    "float32",
    Load(batch=4, length=64, steps=2, turns=3),
)
GPU = (
    Setting(
        "1.2 B",
        Shape(
            hidden=2048,
            intermediate=8192,
            layers=16,
            heads=32,
            key_value_heads=8,
            vocabulary=128256,
        ),
        "bfloat16",
        Load(batch=4, length=512, steps=4, turns=5),
        (0, 4, 8, 12, 15),
    ),
    Setting(
        "8 B",
        LLAMA_3_8B,
        "bfloat16",
        Load(batch=4, length=512, steps=4, turns=5),
        (0, 8, 16, 24, 31),
    ),
)


def compute_part(report: Report, *, quick: bool, device: str) -> None:
    """Measure times by block; with `device` "cuda" on the large models, or a line that there is no
    GPU."""
    import torch

    settings: Sequence[Setting] = (QUICK,) if quick else (CPU,)

    if device == "cuda":
        if not torch.cuda.is_available():
            report.skip("compute: no GPU here")
            return

        settings = GPU

    report.settings["compute"] = [asdict(setting) for setting in settings]
    rows = [row for setting in settings for row in measured(setting, device)]
    show(
        "Time of a step by the block that is trained, over full tuning in the same turn",
        COLUMNS,
        rows,
    )
    report.rows += [{"part": "compute", "device": device, **row} for row in rows]
    report.claims += [claim for setting in settings for claim in claims(setting, rows)]


def measured(setting: Setting, device: str) -> list[Row]:
    """Return a row for full tuning, where it fits, and one for each block."""
    import torch

    model = random_model(setting, device)
    names = {"full": frozenset(name for name, _ in model.named_parameters())}
    names |= {
        f"block {index}": frozenset(block) for index, block in enumerate(_blocks(model, setting))
    }
    wanted = {
        "full",
        *(f"block {index}" for index in setting.blocks or range(setting.shape.layers)),
    }
    names = {what: each for what, each in names.items() if what in wanted}
    seconds: dict[str, list[float]] = {what: [] for what in names}
    peaks: dict[str, int] = {}

    for turn in range(setting.load.turns + 1):  # the first warms up
        order = list(seconds)
        random.Random(turn).shuffle(order)
        for what in order:
            try:
                taken, peaks[what] = timed(model, names[what], setting, device)
            except torch.OutOfMemoryError:
                del seconds[what], names[what]  # such as full tuning of 8 B parameters
                torch.cuda.empty_cache()
                continue

            if turn:
                seconds[what].append(taken)

    return [_row(setting, model, what, seconds, peaks[what], names[what]) for what in seconds]


def random_model(setting: Setting, device: str) -> Any:
    """Return a model that has learnt nothing, made where it is used."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            llama(setting.shape), dtype=getattr(torch, setting.dtype)
        )

    return model.requires_grad_(False).eval()


def timed(model: Any, trained: frozenset[str], setting: Setting, device: str) -> tuple[float, int]:
    """Seconds of one step of the package's training loop, and on a GPU the most memory in use,
    bytes."""
    import torch

    from fluvial.data import Example
    from fluvial.training.config import TrainConfig
    from fluvial.training.train import train

    load = setting.load
    draw = torch.Generator().manual_seed(0)
    examples = []

    for _ in range(load.batch):
        ids = torch.randint(3, setting.shape.vocabulary, (load.length,), generator=draw).tolist()
        examples.append(Example(ids, ids))

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    config = TrainConfig(
        learning_rate=1e-6, per_device_train_batch_size=load.batch, max_steps=load.steps
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()

    since = time.perf_counter()
    train(model, examples, config, pad_token_id=0, generator=draw)
    if device == "cuda":
        torch.cuda.synchronize()

    taken = (time.perf_counter() - since) / load.steps
    return taken, torch.cuda.max_memory_allocated() if device == "cuda" else 0


def _blocks(model: Any, setting: Setting) -> list[tuple[str, ...]]:
    from fluvial.methods.fedcybgd.blocks import partition
    from fluvial.models.tuning import tuned_layout

    blocks = [block.layout.names for block in partition(tuned_layout(model, None)).blocks]
    assert len(blocks) == setting.shape.layers, "a block is a layer"

    return blocks


def predicted(shape: Shape, block: int) -> float:
    """Work of a step that trains layer `block` over that of full tuning, by linear layers;
    attention's own products and the optimizer are left out."""
    width = shape.hidden // shape.heads
    layer = shape.hidden * (
        2 * shape.hidden + 2 * shape.key_value_heads * width + 3 * shape.intermediate
    )
    head = shape.hidden * shape.vocabulary
    forward = shape.layers * layer + head

    return (forward + head + (shape.layers - block) * layer + layer) / (3 * forward)


def by_specification(shape: Shape) -> float:
    """Return the mean over the blocks as the method's description counts it: (1 + 1/2 + 1/D) /
    3."""
    return (1.5 + 1 / shape.layers) / 3


def _row(
    setting: Setting,
    model: Any,
    what: str,
    seconds: dict[str, list[float]],
    peak: int,
    trained: frozenset[str],
) -> Row:
    from fluvial.methods.fedcybgd.memory import client_memory
    from fluvial.methods.fedcybgd.visit_sizes import Full, Sizes

    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    own = sum(sizes[name] for name in trained)
    width: Any = 4 if setting.dtype == "float32" else 2
    formula = client_memory(Sizes(own, sum(sizes.values()) - own, 0), Full(), width=width)
    row: Row = {
        "model": setting.name,
        "trains": what,
        "parameters": sum(sizes.values()),
        "trained": own,
        "step_ms": 1e3 * median(seconds[what]),
        "peak_gb": peak / 1e9 if peak else None,
        "formula_gb": formula.peak() / 1e9,
    }

    if what == "full":
        return {**row, "share": 1.0, "predicted": 1.0}

    row["predicted"] = predicted(setting.shape, int(what.removeprefix("block ")))
    if "full" not in seconds:
        return row

    shares = [own / full for own, full in zip(seconds[what], seconds["full"], strict=True)]
    return {**row, "share": median(shares), "lowest": min(shares), "highest": max(shares)}


def claims(setting: Setting, rows: Sequence[Row]) -> list[Claim]:
    """Return the mean share against both counts, and that a lower block is never cheaper than the
    last one."""
    mine = [row for row in rows if row["model"] == setting.name and row["trains"] != "full"]
    if any("share" not in row for row in mine):
        return []

    share = mean(row["share"] for row in mine)
    count = mean(row["predicted"] for row in mine)
    name = f"compute: {setting.name}"
    found = [
        Claim(
            f"{name}: mean share of a step, off the count",
            abs(share / count - 1),
            WITHIN,
            "at most",
        ),
        Claim(
            f"{name}: last block's step over the first one's",
            mine[-1]["share"] / mine[0]["share"],
            1.0,
            "below",
        ),
    ]

    if setting.blocks is None:
        half = by_specification(setting.shape)
        found.append(Claim(f"{name}: mean share of a step", share, half * (1 + WITHIN), "at most"))

    return found
