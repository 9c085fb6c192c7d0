"""Bytes of a step and the loss after the run, by activation codec.

A codec counts as good where its held-out loss is within half a percent of the exact one's, mean
over the seeds. `share` is of the formula that FL-GLM's released code sends: four tensors of 16-bit
values with all sequences padded to the longest allowed.
"""

from collections.abc import Collection
from statistics import mean, stdev
from typing import Any

from benchmarks.flglm.bed import run
from benchmarks.flglm.cloze import CLOZE_SCORES
from benchmarks.report import Claim, Report, Row, show
from fluvial.models.pretrained import read_config
from fluvial.report.result_tables import ANSWER_SCORES
from fluvial.runs.config import parse

EXACT = "exact"
INT4_OF_32 = {"name": "int4", "group_size": 32}
CODECS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "bf16": {"hidden": {"name": "bf16"}, "gradient": {"name": "bf16"}},
    "int8": {"hidden": {"name": "int8"}, "gradient": {"name": "int8"}},
    "int4": {"hidden": {"name": "int4"}, "gradient": {"name": "int4"}},
    "int4, groups of 32": {"hidden": INT4_OF_32, "gradient": INT4_OF_32},
    "int4, gradients int8": {"hidden": {"name": "int4"}, "gradient": {"name": "int8"}},
}
BAR_SHARE = 0.3
BAR_LOSS = 0.005


def measure(
    report: Report,
    configuration: dict[str, Any],
    *,
    names: Collection[str],
    seeds: int,
    cloze_field: str | None,
) -> None:
    """Add rows and claims to `report`, for runs of `configuration` exactly and with `names`.

    With `cloze_field`, right answers are looked for among those of records that are alike in it.
    """
    rows: list[Row] = []
    losses: dict[str, float] = {}
    shares: dict[str, float] = {}
    width = read_config(parse(configuration, "benchmark").model).hidden_size
    train = configuration["train"]
    sequences = train["per_device_train_batch_size"] * train["max_steps"]
    formula = 4 * sequences * configuration["data"]["max_length"] * width * 2

    for name, method in CODECS.items():
        if name not in (*names, EXACT):
            continue

        quiet = {"name": "flglm", "mode": "hierarchical", "leakage": {"sites": "none"}}
        split = quiet | method
        outcomes = [
            run(configuration | {"method": split, "seed": seed}, cloze_field=cloze_field)
            for seed in range(seeds)
        ]
        visits = outcomes[0].result["sites"] * configuration["rounds"]
        sent = mean(outcome.bytes_up + outcome.bytes_down for outcome in outcomes) / visits
        losses[name] = mean(outcome.loss for outcome in outcomes)
        shares[name] = sent / formula
        finals = [outcome.result["heldout"]["final"] for outcome in outcomes]
        rows.append(
            {
                "codec": name,
                "bytes_step": sent / train["max_steps"],
                "share": shares[name],
                "loss": losses[name],
                "deviation": stdev(outcome.loss for outcome in outcomes) if seeds > 1 else None,
                "base": mean(outcome.result["heldout"]["base"]["loss"] for outcome in outcomes),
                "over_exact": losses[name] / losses[EXACT] - 1,
                "accuracy": mean(final["accuracy"] for final in finals),
                **{
                    score: mean(final[score] for final in finals)
                    for score in ANSWER_SCORES
                    if score in finals[0]
                },
                **{
                    score: mean(outcome.cloze[score] for outcome in outcomes)
                    for score in outcomes[0].cloze
                },
            }
        )

    report.rows += rows
    columns = {
        "codec": "codec",
        "bytes_step": "bytes a step and site, both ways",
        "share": "of the formula at 16 bits, padded",
        "base": "loss before",
        "loss": "loss after",
        "deviation": "standard deviation",
        "over_exact": "over exact",
        "accuracy": "next-token accuracy",
    }
    scores = ANSWER_SCORES | CLOZE_SCORES
    columns |= {score: heading for score, heading in scores.items() if score in rows[0]}
    show("Activation codecs", columns, rows)
    for name in [name for name in losses if "int4" in name]:
        report.claims += [
            Claim(f"{name}: bytes of the formula", shares[name], BAR_SHARE, "at most"),
            Claim(
                f"{name}: loss over exact", losses[name] / losses[EXACT] - 1, BAR_LOSS, "at most"
            ),
        ]
