"""Tokens that a server of split learning reads, by noise and by cut, on the embedded model.

    python -m benchmarks.leakage [--quick] [--part curve|published|tuned ...] [--out FILE.json]

"curve": noise of several multiples of the clip, which is the median norm of a token's hidden state
on public text, for p = 1, 2, 3 layers at the site. "published": the noise of FedSEA-LLaMA (mean
absolute noise of 0.02 and 0.1), without a clip that binds; the embedded model's hidden states are
longer than Llama-2's, so that relative to them this is less noise than there, where 0.1 is a sigma
of 0.08 C at a norm of 1.6. "tuned": the site's front and back carry
a LoRA that the attacker does not have. The attacker has the public base, chooses its settings on
public text, and reads held-out text of the eight sites. Gradients are those of one training step
with the site's own text as labels, q = 1; at p = 3 the embedded model leaves no layer for a server,
so that only hidden states are attacked.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.leakage.bed import (
    KEY,
    Size,
    base,
    heldout,
    median_norm,
    public,
    rows_of,
    tokenizer,
)
from benchmarks.leakage.site import Pair, tuned
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show
from fluvial.methods.flglm.leakage.attacks import attacks, on_gradients
from fluvial.methods.flglm.leakage.gradients import GradientMatching
from fluvial.methods.flglm.leakage.meter import GRADIENTS, Leakage, measure
from fluvial.methods.flglm.leakage.noise import (
    HiddenNoise,
    NoiseConfig,
    separation,
    spent,
    std_of_mean_absolute,
)
from fluvial.methods.flglm.leakage.public_model import PublicModel

FULL = Size(
    cuts=(1, 2, 3),
    multipliers=(0.1, 0.2, 0.3, 0.5),
    texts=8,
    tokens=24,
    public_texts=400,
    decoder_steps=200,
    tuning_steps=(200,),
)
QUICK = Size(
    cuts=(1,),
    multipliers=(0.3, 5.0),
    texts=2,
    tokens=12,
    public_texts=40,
    decoder_steps=30,
    tuning_steps=(5,),
)
PUBLISHED = (0.02, 0.1)
"""Mean absolute noise of FedSEA-LLaMA: its default, and the largest of its noise study."""
COLUMNS = {
    "part": "part",
    "cut": "p",
    "case": "case",
    "clip": "clip",
    "sigma": "sigma",
    "epsilon": "epsilon, 1 state 1 pass",
    "attack": "attack",
    "accuracy": "tokens read",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
}
PARTS = ("curve", "published", "tuned")
SEARCH = "exact causal search"


def attacked(
    pair: Pair, cut: int, noise: NoiseConfig | None, size: Size, texts: Sequence[Tensor]
) -> Leakage:
    """Return what all attacks read of `texts`, which the sites of `pair` send under `noise`."""
    model = PublicModel(base(), cut, noise)
    readers = attacks(model, public(size), size.effort())
    if pair.trains:
        readers[GRADIENTS] = on_gradients(GradientMatching(pair.public_back))

    mechanism = None if noise is None else HiddenNoise(noise, KEY)
    observations = [pair.step(ids, mechanism, number) for number, ids in enumerate(texts)]
    return measure(observations, readers, tokenizer().decode)


def curve_part(size: Size) -> list[Row]:
    """Return a row for each cut, noise and attack."""
    rows: list[Row] = []
    texts = heldout(size)

    for cut in size.cuts:
        clip = median_norm(cut, public(size)[:32])
        pair = Pair(base(), cut)
        cases: list[NoiseConfig | None] = [None]
        cases += [NoiseConfig(clip=clip, multiplier=each) for each in size.multipliers]

        for noise in cases:
            case = "no noise" if noise is None else f"sigma = {noise.multiplier:g} C"
            rows += _rows("curve", cut, case, noise, attacked(pair, cut, noise, size, texts))

    return rows


def published_part(size: Size) -> list[Row]:
    """Return a row for each of the published noises, cut and attack."""
    rows: list[Row] = []
    texts = heldout(size)

    for cut in size.ends:
        pair = Pair(base(), cut)
        longest = max(float(pair.front(ids).norm(dim=-1).max()) for ids in texts)

        for mean_absolute in PUBLISHED:
            std = std_of_mean_absolute(mean_absolute)
            noise = NoiseConfig(clip=2 * longest, multiplier=std / (2 * longest))
            leakage = attacked(pair, cut, noise, size, texts)
            rows += _rows("published", cut, f"mean |noise| = {mean_absolute}", noise, leakage)

    return rows


def tuned_part(size: Size) -> list[Row]:
    """Return a row for each number of LoRA steps at the site and attack, without noise."""
    rows: list[Row] = []
    texts = heldout(size)

    for steps in size.tuning_steps:
        model = tuned(steps)
        for cut in size.ends:
            leakage = attacked(Pair(base(), cut, site=model), cut, None, size, texts)
            rows += _rows("tuned", cut, f"{steps} steps of LoRA", None, leakage)

    return rows


def _rows(part: str, cut: int, case: str, noise: NoiseConfig | None, leakage: Leakage) -> list[Row]:
    facts: Row = {"part": part, "cut": cut, "case": case}

    if noise is not None:
        facts |= {
            "clip": noise.clip,
            "multiplier": noise.multiplier,
            "sigma": noise.std,
            "mu": separation(noise, 1),
            "epsilon": spent(noise, 1),
            "delta": noise.delta,
        }

    found = [{**facts, **row} for row in rows_of(leakage)]
    show(f"{part}, p = {cut}, {case}: {leakage.sentence}", COLUMNS, found)
    return found


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Tokens read without noise, under the published noise, and from gradients."""

    def least(part: str, attack: str, case: str) -> float | None:
        values = [
            row["accuracy"]
            for row in rows
            if (row["part"], row["attack"]) == (part, attack) and row["case"].startswith(case)
        ]
        return min(values) if values else None

    found = []
    if any(row["part"] == "curve" for row in rows):
        search = least("curve", SEARCH, "no noise")
        found.append(Claim("without noise, exact search reads, all p", search, 0.95, "at least"))
        gradients = least("curve", GRADIENTS, "")
        found.append(Claim("any noise on h_A, gradients give away", gradients, 0.99, "at least"))
    if any(row["part"] == "published" for row in rows):
        search = least("published", SEARCH, "")
        found.append(
            Claim("published noise, exact search reads, each p measured", search, 0.9, "at least")
        )

    return found


def main() -> None:
    """See the module."""
    parser = parser_of("leakage", __doc__, quick="a minute: p = 1, two texts")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    options = parser.parse_args()
    load = os.getloadavg()
    torch.set_num_threads(1)
    size = QUICK if options.quick else FULL
    chosen = options.part or list(PARTS)
    report = Report("leakage", {"quick": options.quick, "parts": chosen, **vars(size)})
    run = {"curve": curve_part, "published": published_part, "tuned": tuned_part}

    for part in chosen:
        report.rows += run[part](size)

    report.claims = claims(report.rows)
    report.finish(options.out, load)
