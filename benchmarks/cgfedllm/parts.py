"""The parts of `benchmarks.cgfedllm` that are asked for by name: rates, transfer, noise, normalise,
tgap."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from statistics import median
from typing import Any, get_args

import torch

from benchmarks.cgfedllm.bed import (
    CORPORA,
    GATE_COLUMNS,
    Reading,
    Size,
    Source,
    Table,
    config,
    ensemble,
    fitted,
    gate_row,
    gate_rows,
    label,
    outcome,
)
from benchmarks.report import Claim, Row, show
from fluvial.codecs.normalise import Normalisation
from fluvial.exchange import gate
from fluvial.exchange.representation import Representation
from fluvial.seeds import generator
from fluvial.wire.tensors import energy, norm, subtract

Found = tuple[list[Row], list[Claim]]
Skip = Callable[[str], None]

SIGMAS = (5e-5, 5e-4, 5e-3, 5e-2, 5e-1)
EPSILONS = (0.25, 2.0, 8.0)


def _resnet(size: Size, **settings: Any) -> Table:
    return {"name": "resnet", "canvas": "grouped", "iterations": size.iterations, **settings}


def _gates(
    pool: Executor, jobs: Sequence[tuple[str, dict[str, Any], list[Table]]], size: Size
) -> list[Row]:
    waiting = [
        pool.submit(gate_rows, corpus, size, codecs, **options) for corpus, options, codecs in jobs
    ]
    return [row for each in waiting for row in each.result()]


def rates(
    pool: Executor,
    corpora: Sequence[str],
    size: Size,
    skip: Skip,  # noqa: ARG001 - as all parts
) -> Found:
    """Compression rates 1/4 to 1/256 and ranks 4 to 16, gate metrics; and the loss that each rate
    ends at."""
    klt: list[Table] = [{"name": "klt", "rate": rate} for rate in (8, 16, 64, 256)]
    ternary: list[Table] = [{"name": "ternary", "rate": rate} for rate in (16, 64, 256)]
    jobs: list[tuple[str, dict[str, Any], list[Table]]] = []

    for corpus in corpora:
        jobs += [(corpus, {}, [_resnet(size, stages=stages)]) for stages in (8, 6, 4, 2)]
        jobs.append((corpus, {}, [*klt, *ternary]))
        jobs += [(corpus, {"rank": rank}, [klt[2], ternary[1]]) for rank in (4, 16)]

    runs = []
    for corpus in corpora:
        for table in ({"name": "identity"}, *klt, *ternary):
            coded = {**table, "error_feedback": table["name"] != "identity"}
            method: Table = {"name": "cgfedllm", "tgap": {"source": "none"}}
            if table["name"] == "klt":
                tgap = {"source": "public", "rounds": size.tgap_rounds}
                method |= {"gate": "report", "tgap": tgap}
            runs.append(
                (corpus, coded, config(corpus, size, method=method, codec=coded, workers=1))
            )

    waiting = [pool.submit(outcome, run) for _, _, run in runs]
    gates = _gates(pool, jobs, size)
    losses = [
        {"corpus": corpus, "codec": label(table), "seed": 0, **run.result()}
        for (corpus, table, _), run in zip(runs, waiting, strict=True)
    ]
    show(
        "Rates and ranks, gate",
        {"corpus": "corpus", "codec": "codec", "rank": "rank", **GATE_COLUMNS},
        gates,
    )
    columns = {
        "corpus": "corpus",
        "codec": "codec",
        "bytes_up": "bytes up",
        "loss": "loss",
        "round_ratio": "round",
    }
    show(f"Rates, held-out loss after {size.rounds} rounds", columns, losses)

    return [{"part": "rates, gate", **row} for row in gates] + [
        {"part": "rates, loss", **row} for row in losses
    ], []


def normalise(
    pool: Executor,
    corpora: Sequence[str],
    size: Size,
    skip: Skip,  # noqa: ARG001 - as all parts
) -> Found:
    """Return the paper's autoencoder under four normalisations, coding updates or whole adapters
    (table f.3)."""
    jobs: list[tuple[str, dict[str, Any], list[Table]]] = [
        (corpus, {"representation": representation}, [_resnet(size, normalise=mode)])
        for corpus in corpora
        for representation in get_args(Representation)
        for mode in get_args(Normalisation)
    ]
    rows = _gates(pool, jobs, size)
    columns = {"corpus": "corpus", "codec": "codec", "representation": "codes", **GATE_COLUMNS}
    show("Normalisation and representation (errors are those of the innovation)", columns, rows)
    best = max(float(row["cosine"]) for row in rows)
    claim = Claim(
        "no normalisation makes the autoencoder carry updates: best innovation cosine",
        best,
        0.1,
        "below",
    )

    return [{"part": "normalise", **row} for row in rows], [claim]


def transfer(pool: Executor, corpora: Sequence[str], size: Size, skip: Skip) -> Found:
    """Codecs fitted on public text, measured on what the sites of other corpora send."""
    pairs = [
        (home, away)
        for home, others in (
            ("stdlib", ("stdlib", "fairytales, embedded model", "mini_ops, embedded model")),
            ("fairytales", ("fairytales", "mini_ops")),
        )
        for away in others
        if home in corpora
    ]
    present = [pair for pair in pairs if all(CORPORA[name].present for name in pair)]

    for home, away in pairs:
        if (home, away) not in present:
            skip(f"transfer {home} -> {away}: this checkout has no ../shared beside it")

    waiting = [pool.submit(_transferred, home, away, size) for home, away in present]
    rows = [row for each in waiting for row in each.result()]
    columns = {"fitted": "fitted on", "corpus": "measured on", "codec": "codec", **GATE_COLUMNS}
    show("Transfer of a codec from one text to another", columns, rows)
    ours = [
        row for row in rows if row["codec"].startswith("klt") and row["fitted"] != "its own sites"
    ]
    gates = sum(row["passes"] for row in ours) / len(ours)
    claim = Claim(
        "share of the pairs in which klt, fitted on public text, passes the gate",
        gates,
        1,
        "at least",
    )

    return [{"part": "transfer", **row} for row in rows], [claim]


def _transferred(home: str, away: str, size: Size) -> list[Row]:
    public = ensemble(home, size, "public")
    sites = ensemble(away, size, "sites")
    name = "public standard library" if home == "stdlib" else "TinyStories"
    rows = []

    for source, training in ((name, public.training), ("its own sites", sites.training)):
        for table in ({"name": "klt", "rate": 64}, _resnet(size)):
            if table["name"] == "resnet" and source == "its own sites":
                continue  # the part `gate` has it
            report = gate.measure(
                fitted(table, sites.layout, training), sites.training, sites.heldout, "delta"
            )
            rows.append(
                {"fitted": source, "corpus": away, "codec": label(table), **gate_row(report)}
            )

    return rows


def noise(pool: Executor, corpora: Sequence[str], size: Size, skip: Skip) -> Found:  # noqa: ARG001
    """Return the paper's noise table, and runs with differential privacy at three places and three
    budgets."""
    waiting = [pool.submit(_noised, corpus, size) for corpus in corpora]
    tables = [each.result() for each in waiting]
    rows = [row for table, _ in tables for row in table]
    show(
        "Noise on the update before coding: mean squared error of what the server reads",
        {
            "corpus": "corpus",
            "codec": "codec",
            "sigma": "sigma",
            "mse": "MSE",
            "power": "signal power",
        },
        rows,
    )
    runs = []

    for corpus, (_, clip_norm) in zip(corpora, tables, strict=True):
        for placement in ("update", "latent", "aggregate"):
            for epsilon in EPSILONS:
                secret = {
                    "placement": placement,
                    "clip_norm": clip_norm,
                    "epsilon": epsilon,
                    "heldout": "exact",
                }
                method = {
                    "name": "cgfedllm",
                    "gate": "report",
                    "tgap": {"source": "public", "rounds": size.tgap_rounds},
                    "privacy": secret,
                }
                run = config(
                    corpus, size, method=method, codec={"name": "klt", "rate": 64}, workers=1
                )
                runs.append(({"corpus": corpus, **secret}, pool.submit(outcome, run)))

    private = [{**described, **run.result()} for described, run in runs]
    columns = {
        "corpus": "corpus",
        "placement": "noise on",
        "epsilon": "epsilon",
        "base_loss": "base",
        "loss": "loss",
    }
    show("Differential privacy, klt 1/64, delta 1e-5", {**columns, "stopped": "stopped"}, private)
    flat = []

    for corpus in corpora:
        errors = [
            row["mse"]
            for row in rows
            if row["corpus"] == corpus and row["codec"].startswith("resnet")
        ]
        flat.append(max(errors[:2]) / min(errors[:2]))

    claim = Claim(
        "the autoencoder's MSE is flat: at sigma 5e-4 over that at 5e-5", max(flat), 2.0, "below"
    )
    return [{"part": "noise", **row} for row in rows] + [
        {"part": "privacy", **row} for row in private
    ], [claim]


def _noised(corpus: str, size: Size) -> tuple[list[Row], float]:
    found = ensemble(corpus, size, "public")
    numel = found.layout.numel * len(found.heldout)
    power = sum(energy(snapshot.update) for snapshot in found.heldout) / numel
    rows: list[Row] = []
    tables: tuple[Table, ...] = ({"name": "identity"}, {"name": "klt", "rate": 64}, _resnet(size))

    for table in tables:
        codec = fitted(table, found.layout, found.training)
        for sigma in SIGMAS:
            lost = 0.0
            for number, snapshot in enumerate(found.heldout):
                random = generator(
                    0, "noise", number, f"{sigma:g}"
                )  # a table to repeat, where nothing is to hide
                disturbed = {
                    name: tensor + sigma * torch.randn(tensor.shape, generator=random)
                    for name, tensor in sorted(snapshot.update.items())
                }
                lost += energy(subtract(snapshot.update, codec.decode(codec.encode(disturbed))))

            assert math.isfinite(lost)
            rows.append(
                {
                    "corpus": corpus,
                    "codec": label(table),
                    "sigma": sigma,
                    "mse": lost / numel,
                    "power": power,
                }
            )

    return rows, median(norm(snapshot.update) for snapshot in found.training)


def tgap(pool: Executor, corpora: Sequence[str], size: Size, skip: Skip) -> Found:  # noqa: ARG001
    """Both readings of TGAP and both sources: what the gate says, what the run ends at, and what it
    cost in bytes."""
    runs = []
    for corpus in corpora:
        for source in get_args(Source):
            for reading in get_args(Reading):
                wanted = {"source": source, "reading": reading, "rounds": size.tgap_rounds}
                method = {"name": "cgfedllm", "gate": "report", "tgap": wanted}
                codec = {"name": "klt", "rate": 64, "error_feedback": True}
                run = config(corpus, size, method=method, codec=codec, workers=1)
                runs.append(
                    ({"corpus": corpus, "codec": label(codec), **wanted}, pool.submit(outcome, run))
                )

    rows = [{**described, **run.result()} for described, run in runs]
    columns = {
        "corpus": "corpus",
        "source": "source",
        "reading": "reading",
        "gate_error": "gate error",
        "gate_passed": "gate",
        "loss": "loss",
        "setup_bytes": "set-up bytes",
        "round_ratio": "round",
        "amortised_ratio": "amortised",
        "amortised_uplink_ratio": "amortised uplink",
        "stopped": "stopped",
    }
    show(f"TGAP, {size.tgap_rounds} rounds, then {size.rounds} of FAF", columns, rows)

    return [{"part": "tgap", **row} for row in rows], []


PARTS: dict[str, Callable[[Executor, Sequence[str], Size, Skip], Found]] = {
    "rates": rates,
    "transfer": transfer,
    "noise": noise,
    "normalise": normalise,
    "tgap": tgap,
}
"""Functions by the name that `--part` takes."""
