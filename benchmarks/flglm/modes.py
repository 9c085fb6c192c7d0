"""Seconds for 1,000 sequences by mode and number of sites, as FedSEA-LLaMA's Table 7 has them.

All contenders share the same cores, in wall and in CPU seconds. In each repetition they run one
after another; a figure is the mean over the repetitions, with its standard deviation.

The papers give every site a device, which one machine cannot show. "computed" is the time with one
core for the server and one for each site, from the CPU seconds of the same runs: the server's, and
the sites' divided by the number of sites that work at the same time.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.flglm.bed import run, table
from benchmarks.report import Claim, Report, Row, show

CLIENTS = (2, 4, 8)
EMBEDDED = "embedded, 4 layers"
DEEP = "12 layers, width 512"
"""A random model of which the server has ten layers of twelve; it has 30 of 32 in the papers."""
MODELS = {EMBEDDED: (1, *CLIENTS), DEEP: (8,)}
"""Numbers of sites by model."""
SEQUENTIAL = "sequential"
BATCH = "client-batch"
WHOLE = "whole model at the sites (FedAvg)"
BAR_BATCH = 2.0
"""Bar for a client batch of eight sites against sequential steps (paper: 1.41)."""
BAR_STEP = 1.05
"""Bar for split steps of one site against steps of the whole model."""


@dataclass(frozen=True)
class Times:
    """Seconds for 1,000 sequences of one run."""

    wall: float
    server_cpu: float
    sites_cpu: float
    at_once: int
    """Sites that work at the same time where each has a device."""

    @property
    def computed(self) -> float:
        """Seconds with one core for the server and one for each site."""
        return self.server_cpu + self.sites_cpu / self.at_once


def contenders() -> dict[str, dict[str, Any]]:
    """Return `[method]` by contender."""
    methods = {
        mode: {"name": "flglm", "mode": mode, "leakage": {"sites": "none"}}
        for mode in (SEQUENTIAL, BATCH, "hierarchical")
    }
    return methods | {WHOLE: {"name": "fedavg"}}


def measure(report: Report, *, source: str, length: int, steps: int, repeats: int) -> None:
    """Add rows and claims to `report`: `steps` of one sequence for each site and round."""
    times: dict[tuple[str, str, int], list[Times]] = defaultdict(list)
    with _models() as folders:
        for _ in range(repeats):
            for model, counts in MODELS.items():
                for sites in counts:
                    for name, method in contenders().items():
                        base = table(source=source, sites=sites, length=length, rounds=3)
                        base["model"] |= folders[model]
                        base["data"] |= {"max_heldout": 4}
                        few = steps if model == EMBEDDED else min(steps, 6)
                        times[model, name, sites].append(one(base, method, sites, few))

    def wall(one: Times) -> float:
        return one.wall

    def computed(one: Times) -> float:
        return one.computed

    rows: list[Row] = [
        {
            "model": model,
            "mode": name,
            "clients": sites,
            "seconds": mean(each.wall for each in some),
            "deviation": stdev(each.wall for each in some) if len(some) > 1 else None,
            "over_sequential": _over(times, model, name, sites, wall),
            "server_cpu": mean(each.server_cpu for each in some),
            "sites_cpu": mean(each.sites_cpu for each in some),
            "computed": mean(each.computed for each in some),
            "computed_over_sequential": _over(times, model, name, sites, computed),
        }
        for (model, name, sites), some in times.items()
    ]
    report.rows += rows
    columns = {
        "model": "model",
        "mode": "mode",
        "clients": "sites",
        "seconds": "s for 1,000 sequences",
        "deviation": "standard deviation",
        "over_sequential": "times as fast as sequential",
        "server_cpu": "CPU s, server",
        "sites_cpu": "CPU s, all sites",
        "computed": "computed s, a core for each",
        "computed_over_sequential": "computed, times as fast as sequential",
    }
    show("Modes, all on the same cores", columns, rows)
    for model in MODELS:
        on_cores = _over(times, model, BATCH, 8, wall)
        for_each = _over(times, model, BATCH, 8, computed)
        what = f"{model}: client batch of 8 sites over sequential, speed"
        report.claims += [
            Claim(f"{what} on the same cores", on_cores, BAR_BATCH, "at least"),
            Claim(f"{what} computed for a core for each", for_each, BAR_BATCH, "at least"),
        ]

    split, whole = (times[EMBEDDED, name, 1] for name in (SEQUENTIAL, WHOLE))
    step = mean(each.wall for each in split) / mean(each.wall for each in whole)
    report.claims.append(
        Claim("split steps over steps of the whole model, time", step, BAR_STEP, "at most")
    )


def one(base: dict[str, Any], method: dict[str, Any], sites: int, steps: int) -> Times:
    """Run three rounds of `steps` steps at each site."""
    outcome = run(base | {"method": method, "train": base["train"] | {"max_steps": steps}})
    thousands = steps * sites / 1000
    return Times(
        outcome.seconds / thousands,
        outcome.server_cpu_s / thousands,
        outcome.sites_cpu_s / thousands,
        1 if method.get("mode") == SEQUENTIAL else sites,
    )


def _over(
    times: Mapping[tuple[str, str, int], Sequence[Times]],
    model: str,
    name: str,
    sites: int,
    seconds: Callable[[Times], float],
) -> float:
    """Return how many times as fast as sequential steps a contender is, by these `seconds`."""
    sequential, own = (mean(map(seconds, times[model, mode, sites])) for mode in (SEQUENTIAL, name))
    return sequential / own


@contextmanager
def _models() -> Iterator[dict[str, dict[str, str]]]:
    """Yield settings of `[model]` by model, as long as the folder of the random one exists."""
    tokenizer = AutoTokenizer.from_pretrained(str(resources.files("fluvial") / "assets" / "tiny"))
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "deep"
        LlamaForCausalLM(shape).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield {EMBEDDED: {}, DEEP: {"name_or_path": str(folder)}}
