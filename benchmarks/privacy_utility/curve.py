"""Tokens that a server reads, and the tuned model's quality, by noise, clip and cut.

    python -m benchmarks.privacy_utility [--quick] [--out FILE.json]

Each row is the mean over seeds of whole runs of `flglm` on the embedded model and the text of its
eight sites: the held-out loss and next-token accuracy at the end, and the verdict of the run's own
leakage meter. Noise is in units of the clip C, which is the median norm of a hidden state on public
text, or half of it. "in use too" means noise in inference, so that the model is measured under it.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.leakage.bed import median_norm, public
from benchmarks.leakage.curve import FULL as LEAKAGE
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show
from fluvial.methods.flglm.leakage.meter import GRADIENTS
from fluvial.methods.flglm.leakage.noise import NoiseConfig, spent
from fluvial.runs.config import parse
from fluvial.runs.run import execute


@dataclass(frozen=True)
class Case:
    """A configuration of noise."""

    cut: int
    """Layers at the site before the server's, p."""
    multiplier: float = 0.0
    """Standard deviation in units of the clip; 0 is a run without noise and clip."""
    share: float = 1.0
    """The clip in units of the median norm."""
    inference: bool = False

    @property
    def name(self) -> str:
        """Return the case in words."""
        if not self.multiplier:
            return "no noise"
        words = f"sigma = {self.multiplier:g} C"
        words += "" if self.share == 1 else f", C = {self.share:g} of the median norm"
        return words + (", in use too" if self.inference else "")


@dataclass(frozen=True)
class Size:
    """The work of a run."""

    cases: tuple[Case, ...]
    seeds: tuple[int, ...]
    rounds: int
    heldout: int
    """Held-out sequences of a site on which the model is measured."""
    texts: int
    """Held-out texts of the first site that are attacked."""
    tokens: int


FULL = Size(
    cases=(
        Case(1),
        Case(1, 0.1),
        Case(1, 0.3),
        Case(1, 0.1, inference=True),
        Case(1, 0.3, share=0.5),
        Case(2),
        Case(2, 0.3),
    ),
    seeds=(0, 1),
    rounds=3,
    heldout=24,
    texts=4,
    tokens=16,
)
QUICK = Size(
    cases=(Case(1), Case(1, 5.0, inference=True)),
    seeds=(0,),
    rounds=1,
    heldout=4,
    texts=2,
    tokens=8,
)
COLUMNS = {
    "cut": "p",
    "case": "case",
    "clip": "clip",
    "epsilon": "epsilon, 1 state 1 pass",
    "loss": "held-out loss",
    "loss_spread": "max - min over seeds",
    "accuracy": "next-token accuracy",
    "base_loss": "base loss",
    "hidden": "tokens read, hidden states",
    "gradients": "tokens read, gradients",
}


def configuration(case: Case, size: Size, seed: int, noise: NoiseConfig | None) -> dict[str, Any]:
    """Return a run's configuration: that of configs/flglm.toml, without baselines and codecs."""
    method: dict[str, Any] = {
        "name": "flglm",
        "front": case.cut,
        "leakage": {"texts": size.texts, "tokens": size.tokens},
    }
    if noise is not None:
        method["noise"] = noise.model_dump()

    return {
        "seed": seed,
        "rounds": size.rounds,
        "model": {"dtype": "float32", "device": "cpu"},
        "data": {"max_length": 64, "max_heldout": size.heldout},
        "lora": {
            "r": 8,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "target_modules": "attention",
        },
        "train": {"learning_rate": 5e-3, "per_device_train_batch_size": 8, "max_steps": 4},
        "evaluate": {"sample_tokens": 1},
        "fleet": {"workers": 2},
        "method": method,
    }


def row_of(case: Case, size: Size) -> Row:
    """Run a case with every seed."""
    noise = None
    if case.multiplier:
        clip = float(f"{case.share * median_norm(case.cut, public(LEAKAGE)[:32]):.2g}")
        noise = NoiseConfig(clip=clip, multiplier=case.multiplier, inference=case.inference)

    results = [_run(configuration(case, size, seed, noise)) for seed in size.seeds]
    final = [result["heldout"]["final"] for result in results]
    losses = [row["loss"] for row in final]
    row: Row = {
        "cut": case.cut,
        "case": case.name,
        "clip": None if noise is None else noise.clip,
        "epsilon": None if noise is None else spent(noise, 1),
        "loss": mean(losses),
        "loss_spread": max(losses) - min(losses),
        "accuracy": mean(row["accuracy"] for row in final),
        "base_loss": mean(result["heldout"]["base"]["loss"] for result in results),
        "hidden": mean(_read(result, gradients=False) for result in results),
        "gradients": mean(_read(result, gradients=True) for result in results),
        "tokens": sum(result["leakage"]["tokens"] for result in results),
    }
    show(f"p = {case.cut}, {case.name}", COLUMNS, [row])
    return row


def _run(configuration: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        *_, last = execute(parse(configuration, "benchmark"), Path(folder) / "run")
    return last.values


def _read(result: dict[str, Any], *, gradients: bool) -> float:
    """Return the share of tokens that the best attack on hidden states, or on gradients, read."""
    shares: list[float] = [
        row["accuracy"]
        for row in result["leakage"]["attacks"]
        if (row["attack"] == GRADIENTS) == gradients
    ]
    return max(shares)


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Return tokens read without noise, and from gradients."""
    plain = [row["hidden"] for row in rows if row["epsilon"] is None]
    gradients = [row["gradients"] for row in rows]
    return [
        Claim("without noise, read from hidden states, each p", min(plain), 0.95, "at least"),
        Claim("any noise, read from gradients", min(gradients), 0.75, "at least"),
    ]


def main() -> None:
    """See the module."""
    parser = parser_of("privacy_utility", __doc__, quick="a minute: two cases, one round")
    options = parser.parse_args()
    load = os.getloadavg()
    torch.set_num_threads(1)
    size = QUICK if options.quick else FULL
    settings = {name: value for name, value in vars(size).items() if name != "cases"}
    report = Report("privacy_utility", {"quick": options.quick, **settings})
    report.rows = [row_of(case, size) for case in size.cases]
    report.claims = claims(report.rows)
    report.finish(options.out, load)
