"""Figures of docs/fidelity.md, from what benchmarks left behind.

They stand in the cells of its tables, between `<!-- figure: NAME -->` and `<!-- /figure -->`;
`write_tables.py` fills them and, with `--check`, says whether they are up to date.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from split_tables import leak_decoders, leak_gradients, leak_plain, leak_published

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
Row = dict[str, Any]
CELL = re.compile(r"(<!-- figure: ([a-z-]+) -->)(.*?)(<!-- /figure -->)", re.DOTALL)
TASKS = {
    "embedded": "embedded task",
    "fairytales": "fairytales",
    "shakespeare": "shakespeare",
    "fairytales, babyllama105": "fairytales on babyllama105",
    "shakespeare, babyllama105": "shakespeare on babyllama105",
}
OURS = "fedcybgd int8"
FULL = "fed-full"
PAIRS = "fedbavg int8"
EQUAL_BYTES = "lora int8, bytes of fedcybgd int8"


def rows(name: str, part: str) -> list[Row]:
    """Return the rows of one part of a benchmark; raises `AssertionError` where there is none."""
    found = [row for row in json.loads((RESULTS / name).read_text())["rows"] if row["part"] == part]
    assert found, f"{name} has no part {part!r}"
    return found


def autoencoder() -> str:
    """Error of the paper's autoencoder over all corpora and budgets."""
    found = [row for row in rows("cgfedllm.json", "gate") if row["codec"].startswith("resnet")]
    errors = [row["error"] for row in found]
    cosine = max(row["cosine"] for row in found)

    return (
        f"relative squared error {min(errors):.3f} to {max(errors):.3f} in {len(found)} fits, "
        "where sending nothing "
        f"has 1; innovation cosine at most {cosine:.3f}"
    )


def transfer() -> str:
    """Errors on corpora that a codec was not fitted on."""
    found = [
        row
        for row in rows("cgfedllm_transfer.json", "transfer")
        if row["fitted"].startswith("public")
    ]
    words = []

    for start, name in (("resnet", "the paper's"), ("linear", "the linear one")):
        errors = [row["error"] for row in found if row["codec"].startswith(start)]
        words.append(f"{name} {min(errors):.3f} to {max(errors):.3f}")

    quick = json.loads((RESULTS / "cgfedllm_transfer.json").read_text())["settings"]["quick"]
    corpora = len({row["corpus"] for row in found})
    return (
        f"fitted on public text, relative squared error on {corpora} "
        f"corpora{' (--quick)' if quick else ''}: "
        f"{', '.join(words)}"
    )


def _losses() -> dict[str, dict[str, Row]]:
    table: dict[str, dict[str, Row]] = {}
    for row in rows("fedcybgd_losses.json", "losses"):
        table.setdefault(row["cell"], {})[row["contender"]] = row
    return table


def losses() -> str:
    """Return the final loss of FedCyBGD beside its rivals on every task."""
    names = {
        OURS: "FedCyBGD int8",
        FULL: "Fed-full",
        PAIRS: "FedBAvg",
        EQUAL_BYTES: "LoRA at the same bytes",
        "central": "central",
    }
    tasks = []

    for cell, found in _losses().items():
        each = [
            f"{words} {found[name]['loss']:.3f}" for name, words in names.items() if name in found
        ]
        tasks.append(f"{TASKS[cell]}: {', '.join(each)}")

    return "; ".join(tasks)


def losses_verdict() -> str:
    """On how many tasks FedCyBGD reaches its rivals."""
    table = _losses()
    near = [
        cell for cell, found in table.items() if found[OURS]["loss"] <= 1.01 * found[FULL]["loss"]
    ]
    worst = max(found[OURS]["loss"] / found[FULL]["loss"] - 1 for found in table.values())
    lora = [
        cell for cell, found in table.items() if found[OURS]["loss"] < found[EQUAL_BYTES]["loss"]
    ]
    central = [
        cell for cell, found in table.items() if found[OURS]["loss"] < found["central"]["loss"]
    ]
    shares = [found[OURS]["up_share"] for found in table.values()]

    return (
        f"not: within 1 % of Fed-full on {len(near)} of {len(table)} tasks, at worst "
        f"{100 * worst:.1f} % behind it, "
        f"at 1/{1 / max(shares):.0f} to 1/{1 / min(shares):.0f} of its upload; ahead of LoRA at "
        "equal bytes on "
        f"{len(lora)} of {len(table)}, of central tuning on {len(central)}"
    )


def pairs() -> str:
    """FedCyBGD against FedBAvg, task by task."""
    parts = []
    for cell, found in _losses().items():
        more = found[PAIRS]["bytes_up"] > 1.01 * found[OURS]["bytes_up"]
        parts.append(
            f"{found[OURS]['loss']:.3f} against {found[PAIRS]['loss']:.3f} "
            f"({TASKS[cell]}{', where FedBAvg sends more' if more else ''})"
        )

    return ", ".join(parts)


def pairs_verdict() -> str:
    """On how many tasks the claim holds."""
    table = _losses()
    better = sum(found[OURS]["loss"] <= found[PAIRS]["loss"] for found in table.values())
    return f"on {better} of {len(table)} tasks"


def _downloads() -> dict[str, Row]:
    return {row["form"]: row for row in rows("fedcybgd_download.json", "download")}


def downloads() -> str:
    """Bytes of a visit in the forms of download."""
    found = _downloads()
    names = {
        "full": "full",
        "proxy, kept 0.5": "proxy at 0.5",
        "stale subset 0.5": "`stale-subset` at 0.5",
        "low-bit nf4": "nf4",
        "cache, hadamard 1/16": "`cache` with Hadamard 1/16",
    }
    each = (f"{words} {round(found[form]['down'], -3):,.0f}" for form, words in names.items())

    return "embedded task, B a visit: " + ", ".join(each)


def half() -> str:
    """Return the cost of half of the updated blocks in loss and gradient."""
    found = _downloads()
    stale = found["stale subset 0.5"]
    proxy = found["proxy, kept 0.5"]
    full = found["full"]

    return (
        f"`stale-subset` {stale['loss']:.3f} against {full['loss']:.3f} whole, gradient cosine "
        f"{stale['cosine_tuned']:.2f}; the proxy that keeps 0.5 ends at {proxy['loss']:.3f}, "
        "cosine "
        f"{proxy['cosine_base']:.2f} at the base"
    )


def memory() -> str:
    """Memory of training a block, of full tuning's."""
    shape = json.loads((RESULTS / "fedcybgd_memory.json").read_text())["settings"]["memory"]
    found = {row["case"]: row for row in rows("fedcybgd_memory.json", "memory")}
    block, disk = (found[f"block, float32, {hold}"] for hold in ("memory", "disk"))

    return (
        f"{shape['layers']} blocks of {block['trained'] / 1e6:.1f} M values, fp32, training: "
        f"{block['share']:.2f} of "
        f"full tuning with the rest in memory, {disk['share']:.2f} with it on disk"
    )


def _steps() -> list[Row]:
    return [
        row for row in rows("fedcybgd_compute.json", "compute") if row["trains"].startswith("block")
    ]


def compute() -> str:
    """Time of a block's step, of full tuning's."""
    found = _steps()
    shares, counted = ([row[key] for row in found] for key in ("share", "predicted"))

    return (
        f"{shares[0]:.2f} of full tuning's step at the first of {len(found)} blocks, "
        f"{shares[-1]:.2f} at the last, "
        f"mean {fmean(shares):.2f} (medians, {found[0]['model']}, CPU); "
        f"by count {counted[0]:.2f} to {counted[-1]:.2f}, mean {fmean(counted):.2f}"
    )


def compute_verdict() -> str:
    """Return the verdict on measured and counted time."""
    found = _steps()
    off = fmean(row["share"] for row in found) / fmean(row["predicted"] for row in found) - 1
    return f"reproduced: {abs(100 * off):.0f} % {'less' if off < 0 else 'more'} than by count"


FIGURES: dict[str, Callable[[], str]] = {
    "autoencoder": autoencoder,
    "transfer": transfer,
    "losses": losses,
    "losses-verdict": losses_verdict,
    "pairs": pairs,
    "pairs-verdict": pairs_verdict,
    "downloads": downloads,
    "half": half,
    "memory": memory,
    "compute": compute,
    "compute-verdict": compute_verdict,
    "leak-plain": leak_plain,
    "leak-published": leak_published,
    "leak-gradients": leak_gradients,
    "leak-decoders": leak_decoders,
}


def fill_cells(text: str) -> str:
    """`text` with every marked cell filled; raises `KeyError` for a name that is no figure."""
    return CELL.sub(lambda found: f"{found[1]}{FIGURES[found[2]]()}{found[4]}", text)
