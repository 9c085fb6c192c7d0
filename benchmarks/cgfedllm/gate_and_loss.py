"""CG-FedLLM's codecs: the gate on held-out snapshots, and held-out loss against bytes.

    python -m benchmarks.cgfedllm [--quick] [--part NAME ...] [--corpus NAME ...]
                                  [--iterations N] [--cache FILE.jsonl] [--minutes M]
                                  [--out FILE.json]

Without `--part`: gate and loss. The paper's autoencoder is `resnet`, on the canvas "grouped"
because keys and values are narrower in some of the models; how long it was trained stands in its
name. Byte ratios are to 32-bit values: of a round's uplink, and amortised over uplink, downlink and
set-up.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.cgfedllm import parts
from benchmarks.cgfedllm.autoencoder import autoencoder
from benchmarks.cgfedllm.bed import (
    CORPORA,
    DEFAULT,
    GATE_COLUMNS,
    Size,
    Table,
    config,
    gate_rows,
    label,
    outcome,
    workers,
)
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show

FULL = Size(rounds=6, steps=4, tgap_rounds=8, heldout=16, iterations=1500, seeds=3)
QUICK = Size(rounds=2, steps=2, tgap_rounds=3, heldout=4, iterations=300, seeds=1)
LOSS_ITERATIONS = 200
"""Iterations of an autoencoder that is fitted for every run; the gate shows both budgets."""
FEDAVG = "fedavg, uncompressed"
HALF = 0.45
"""Share of the signs whose frame is within 1/64."""

AT_64: tuple[Table, ...] = (
    {"name": "klt", "rate": 64},
    {"name": "ternary", "rate": 64},
    {"name": "top_k", "rate": 64},
    {"name": "half_sign", "share": HALF},
    {"name": "random_k", "rate": 64},
)
OTHERS: tuple[Table, ...] = (
    {"name": "identity"},
    {"name": "int8"},
    {"name": "int4"},
    {"name": "sign"},
    {"name": "klt", "rate": 16},
    {"name": "ternary", "rate": 16},
    {"name": "top_k", "rate": 16},
    {"name": "random_k", "rate": 16},
)
LOSS: tuple[Table, ...] = (
    {"name": "identity"},
    *({**AT_64[number], "error_feedback": True} for number in (0, 1, 3)),
)
"""Over all seeds."""
LOSS_ONCE: tuple[Table, ...] = (
    {"name": "klt", "rate": 64},
    {"name": "top_k", "rate": 64, "error_feedback": True},
    {"name": "random_k", "rate": 64, "error_feedback": True},
    {"name": "sign", "error_feedback": True},
    {"name": "int4"},
    {"name": "int8"},
)
"""With the first seed only."""


def resnet(iterations: int, **settings: Any) -> Table:
    """Return the paper's autoencoder."""
    return {"name": "resnet", "canvas": "grouped", "iterations": iterations, **settings}


def gate_part(pool: Executor, corpora: Sequence[str], size: Size) -> tuple[list[Row], list[Claim]]:
    """Every codec on every corpus, fitted to and measured on what its sites send (TGAP source
    "sites")."""
    simple = [*AT_64, *OTHERS, resnet(size.iterations)]
    waiting = [pool.submit(gate_rows, corpus, size, simple) for corpus in corpora]

    if size.iterations > QUICK.iterations:
        waiting += [
            pool.submit(gate_rows, corpus, size, [resnet(LOSS_ITERATIONS)]) for corpus in corpora
        ]

    rows = sorted(
        (row for each in waiting for row in each.result()),
        key=lambda row: corpora.index(row["corpus"]),
    )
    columns = {"corpus": "corpus", "codec": "codec", **GATE_COLUMNS}
    show("Gate, on held-out rounds (1 is the error of sending nothing)", columns, rows)

    return [{"part": "gate", **row} for row in rows], gate_claims(rows)


def gate_claims(rows: Sequence[Row]) -> list[Claim]:
    """Claims a, b, c and e."""
    at_64 = [row for row in rows if ", 1/64" in row["codec"]]
    theirs = [row for row in at_64 if row["codec"].startswith("resnet")]
    klt = {row["corpus"]: row for row in at_64 if row["codec"].startswith("klt")}
    gain = [
        klt[corpus]["error"]
        / min(row["error"] for row in at_64 if row["corpus"] == corpus and row is not klt[corpus])
        for corpus in klt
    ]

    return [
        Claim(
            "a: best innovation cosine of the paper's autoencoder at 1/64",
            _most(theirs, "cosine"),
            0.1,
            "below",
        ),
        Claim(
            "a: corpora and budgets in which it passes the gate",
            float(sum(row["passes"] for row in theirs)),
            0,
            "at most",
        ),
        Claim(
            "b: share of the corpora in which klt passes the gate",
            mean(row["passes"] for row in klt.values()),
            1,
            "at least",
        ),
        Claim(
            "c: error of klt at 1/64 over the best other codec's, worst corpus",
            max(gain),
            1.0,
            "below",
        ),
        Claim(
            "e: best innovation cosine of any codec at 1/64", _most(at_64, "cosine"), 0.90, "below"
        ),
    ]


def _most(rows: Sequence[Row], key: str) -> float:
    return max(float(row[key]) for row in rows)


def loss_part(
    pool: Executor, corpora: Sequence[str], size: Size, *, quick: bool
) -> tuple[list[Row], list[Claim]]:
    """Federated runs with each codec; what learns has learnt from public text, so the sites sent
    nothing before."""
    plan: list[tuple[str, Table | None, int]] = []
    autoencoder = resnet(LOSS_ITERATIONS)

    for corpus in corpora:
        plan.append((corpus, None, 0))
        if quick:
            plan += [(corpus, table, 0) for table in LOSS[:3]]
            continue

        plan.append((corpus, autoencoder, 0))
        plan.append((corpus, {**autoencoder, "error_feedback": True}, 0))
        plan += [(corpus, table, seed) for seed in range(size.seeds) for table in LOSS]
        plan += [(corpus, table, 0) for table in LOSS_ONCE]
        plan += [(corpus, autoencoder, seed) for seed in range(1, size.seeds)]

    waiting = [
        pool.submit(outcome, _configured(corpus, table, seed, size)) for corpus, table, seed in plan
    ]
    found = [
        {
            "corpus": corpus,
            "codec": FEDAVG if table is None else label(table),
            "seed": seed,
            **run.result(),
        }
        for (corpus, table, seed), run in zip(plan, waiting, strict=True)
    ]
    rows = _over_seeds(found)
    columns = {
        "corpus": "corpus",
        "codec": "codec",
        "seeds": "seeds",
        "base_loss": "base",
        "loss": "loss",
        "lowest": "lowest",
        "highest": "highest",
        "excess": "excess",
        "gain_kept": "gain kept",
        "bytes_up": "bytes up",
        "round_ratio": "round",
        "amortised_ratio": "amortised",
        "stopped": "stopped",
    }
    shown = [row | {"stopped": "refused" if row["stopped"] else None} for row in rows]
    show(
        f"Held-out loss after {size.rounds} rounds (excess: over identity, same seeds, relative)",
        columns,
        shown,
    )

    return [{"part": "loss", **row} for row in rows], loss_claims(found, rows)


def _configured(corpus: str, table: Table | None, seed: int, size: Size) -> Any:
    if table is None:
        return config(corpus, size, method={"name": "fedavg"}, seed=seed, workers=1)
    learns = table["name"] in ("klt", "resnet")
    tgap = {"source": "public", "rounds": size.tgap_rounds} if learns else {"source": "none"}
    method: Table = {"name": "cgfedllm", "tgap": tgap} | ({"gate": "report"} if learns else {})

    return config(corpus, size, method=method, codec=table, seed=seed, workers=1)


def _over_seeds(found: Sequence[Row]) -> list[Row]:
    rows = []
    plain = {
        (row["corpus"], row["seed"]): row["loss"] for row in found if row["codec"] == "identity"
    }
    for corpus, codec in dict.fromkeys((row["corpus"], row["codec"]) for row in found):
        runs = [row for row in found if (row["corpus"], row["codec"]) == (corpus, codec)]
        stopped = [row["stopped"] for row in runs if "stopped" in row]
        runs = [row for row in runs if "stopped" not in row]
        row: Row = {
            "corpus": corpus,
            "codec": codec,
            "seeds": len(runs),
            "stopped": stopped[0] if stopped else None,
        }

        if runs:
            losses = [each["loss"] for each in runs]
            excess = [each["loss"] / plain[corpus, each["seed"]] - 1 for each in runs]
            row |= {
                "loss": mean(losses),
                "lowest": min(losses),
                "highest": max(losses),
                "excess": mean(excess),
            }
            gains = [each["base_loss"] - each["loss"] for each in runs]
            whole = [each["base_loss"] - plain[corpus, each["seed"]] for each in runs]
            row |= {
                "gain_kept": sum(gains) / sum(whole),
                "run_s": mean(each["seconds"] for each in runs),
            }

            for key in (
                "base_loss",
                "bytes_up",
                "round_ratio",
                "amortised_ratio",
                "gate_error",
                "setup_bytes",
            ):
                if runs[0][key] is not None:
                    row[key] = mean(each[key] for each in runs)

        rows.append(row)

    return rows


def loss_claims(found: Sequence[Row], rows: Sequence[Row]) -> list[Claim]:
    """Claims d and f."""
    claims = [
        Claim(
            f"d: {row['corpus']}, {row['codec']}: loss over uncompressed, less 1",
            row.get("excess"),
            0.005,
            "at most",
        )
        for row in rows
        if row["codec"] == "klt, 1/64 + EF"
    ]
    claims += [
        Claim(
            f"d: {row['corpus']}, {row['codec']}: share of the uncompressed gain kept",
            row.get("gain_kept"),
            0.9,
            "at least",
        )
        for row in rows
        if row["codec"] == "klt, 1/64 + EF"
    ]
    digests: dict[str, set[str]] = {}

    for row in found:
        if row["seed"] == 0 and row["codec"] in ("identity", FEDAVG):
            digests.setdefault(row["corpus"], set()).add(row["adapter_sha256"])

    differ = sum(len(each) > 1 for each in digests.values())
    return [
        *claims,
        Claim(
            "f: corpora where identity through FAF is not bitwise FedAvg",
            float(differ),
            0,
            "at most",
        ),
    ]


def main() -> None:
    """See the module."""
    parser = parser_of(
        "cgfedllm", __doc__, quick="under a minute: standard library, one seed, short runs"
    )
    parser.add_argument(
        "--part",
        action="append",
        choices=["gate", "loss", "autoencoder", *parts.PARTS],
        help="default: gate and loss",
    )
    parser.add_argument(
        "--corpus", action="append", choices=list(CORPORA), help="default: all that are present"
    )
    parser.add_argument(
        "--iterations", type=int, help="Adam steps of the paper's autoencoder (1500; quick: 300)"
    )
    parser.add_argument(
        "--cache", type=Path, help="JSON lines: fits of `autoencoder` to take, and to add to"
    )
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="`autoencoder` begins no fit after these"
    )
    options = parser.parse_args()
    load = os.getloadavg()
    size = QUICK if options.quick else FULL

    if options.iterations:
        size = Size(**{**vars(size), "iterations": options.iterations})

    chosen = options.part or ["gate", "loss"]
    wanted = options.corpus or (["stdlib"] if options.quick else list(DEFAULT))
    report = Report(
        "cgfedllm", {"quick": options.quick, "parts": chosen, "corpora": wanted, **vars(size)}
    )

    for corpus in wanted:
        if not CORPORA[corpus].present:
            report.skip(f"{corpus}: this checkout has no ../shared beside it")

    corpora = [corpus for corpus in wanted if CORPORA[corpus].present]
    with workers() as pool:
        for part in chosen:
            if part == "gate":
                rows, claims = gate_part(pool, corpora, size)
            elif part == "loss":
                rows, claims = loss_part(pool, corpora, size, quick=options.quick)
            elif part == "autoencoder":
                rows, claims, left = autoencoder(size, corpora, options.cache, options.minutes)
                for line in left:
                    report.skip(line)
            else:
                rows, claims = parts.PARTS[part](pool, corpora, size, report.skip)

            report.rows += rows
            report.claims += claims

    report.finish(options.out, load)
