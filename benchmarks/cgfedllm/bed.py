"""The beds of `benchmarks.cgfedllm`: which model learns which corpus, its snapshots, and one run of
it."""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from benchmarks.report import Row
from fluvial.codecs import CODECS, build
from fluvial.codecs.base import Codec, LearnedCodec, Snapshot
from fluvial.data import SiteTexts
from fluvial.errors import DivergenceError, FluvialError, GateError
from fluvial.exchange import Terms, TgapConfig, collecting, gate
from fluvial.exchange.report import GateReport
from fluvial.exchange.representation import Representation, coded_object
from fluvial.exchange.tgap import split_by_time
from fluvial.models.pool import ModelPool
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.run import Run, execute
from fluvial.wire.tensors import Layout

SHARED = Path(os.path.relpath(Path(__file__).resolve().parents[3] / "shared"))
"""Data and small real models of a development checkout; the parts that need them are skipped where
it is absent."""

Source = Literal["sites", "public"]
Reading = Literal["federated", "local"]
Table = dict[str, Any]
Training = tuple[tuple[str, Any], ...]
"""Settings of a `[train]` table, by which `ensemble` can remember its result."""


@dataclass(frozen=True)
class Corpus:
    """A model and the text that its sites own."""

    name: str
    model: str = "embedded"
    folder: str | None = None
    """Below `SHARED`, with train.jsonl; None is Python's standard library."""
    public: str | None = "tinystories"
    """Below `SHARED`: text that no site owns, for TGAP on public text; the standard library
    has its own."""
    data: Table = field(default_factory=dict)
    """Further settings of the `data` table."""

    @property
    def present(self) -> bool:
        """Return True where this checkout has the files of the corpus."""
        return self.folder is None or (SHARED / "data" / self.folder).is_dir()

    def tables(self) -> Table:
        """Return the `model` and `data` tables of a configuration."""
        if self.folder is None:
            return {"model": {"name_or_path": self.model, "dtype": "float32"}, "data": {}}

        data: Table = {
            "source": str(SHARED / "data" / self.folder / "train.jsonl"),
            "partition": {"by": "column", "column": "client", "largest": 8},
            "public_source": str(SHARED / "data" / f"{self.public}" / "train.jsonl"),
            **self.data,
        }
        model = self.model if self.model == "embedded" else str(SHARED / "models" / self.model)
        return {"model": {"name_or_path": model, "dtype": "float32"}, "data": data}


ANSWERS = {"columns": {"completion": "answer"}, "public": {"columns": {}}}
"""Questions with answers, beside public text that is plain."""
PACKED = {"packing": True}
"""Utterances are shorter than a sequence."""
CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus("stdlib"),
        Corpus("fairytales", "stories260k", "fairytales"),
        Corpus("mini_ops", "stories260k", "mini_ops", data=ANSWERS),
        Corpus("fairytales, embedded model", "embedded", "fairytales"),
        Corpus("mini_ops, embedded model", "embedded", "mini_ops", data=ANSWERS),
        Corpus("shakespeare", "stories260k", "shakespeare", data=PACKED),
        Corpus("babi", "stories260k", "babi"),
        Corpus("fairytales, babyllama105", "babyllama105", "fairytales"),
        Corpus("mini_ops, babyllama105", "babyllama105", "mini_ops", data=ANSWERS),
        Corpus("shakespeare, babyllama105", "babyllama105", "shakespeare", data=PACKED),
        Corpus("babi, babyllama105", "babyllama105", "babi"),
    )
}
DEFAULT = ("stdlib", "fairytales", "mini_ops")


@dataclass(frozen=True)
class Size:
    """How much is run; everything else is fixed."""

    rounds: int
    steps: int
    tgap_rounds: int
    heldout: int
    iterations: int
    """Adam steps of the paper's autoencoder."""
    seeds: int


def config(
    corpus: str,
    size: Size,
    *,
    method: Table,
    codec: Table | None = None,
    seed: int = 0,
    rank: int = 8,
    train: Training | None = None,
    **fleet: Any,
) -> RunConfig:
    """Return the configuration of one run on `corpus`; alpha is twice the rank, so that every rank
    has the same scale. `train` changes the local training."""
    tables = CORPORA[corpus].tables()
    tables["data"] |= {"max_length": 128, "max_heldout": size.heldout}
    table: Table = {
        **tables,
        "seed": seed,
        "rounds": size.rounds,
        "lora": {
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": 0.0,
            "target_modules": "attention",
        },
        "train": {"learning_rate": 5e-3, "per_device_train_batch_size": 4, "max_steps": size.steps}
        | dict(train or ()),
        "method": method,
        "evaluate": {"sample_tokens": 1},
        "fleet": fleet,
    }

    if codec is not None:
        table["codec"] = codec

    return parse(table, corpus)


@dataclass(frozen=True)
class Ensemble:
    """Snapshots that TGAP collected, split by time."""

    layout: Layout
    training: list[Snapshot]
    heldout: list[Snapshot]
    seconds: float


@lru_cache(None)
def ensemble(
    corpus: str,
    size: Size,
    source: Source,
    reading: Reading = "federated",
    seed: int = 0,
    rank: int = 8,
    train: Training | None = None,
) -> Ensemble:
    """Snapshots of `corpus`, collected once in a process by the package's own TGAP."""
    since = time.perf_counter()
    wanted: Table = {"source": source, "reading": reading, "rounds": size.tgap_rounds}
    resolved = config(
        corpus,
        size,
        method={"name": "cgfedllm", "tgap": wanted},
        codec={"name": "klt"},
        seed=seed,
        rank=rank,
        train=train,
    )
    settings = TgapConfig.model_validate(wanted)

    with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder)) as place:
        pool = ModelPool(resolved.model, resolved.lora)
        run = Run(
            resolved, place, pool, SiteTexts(resolved.data, pool.tokenizer, seed=resolved.seed)
        )
        fleet = (
            run.fleet
            if source == "sites"
            else collecting.simulated_fleet(Terms(settings), run.context)
        )
        alike = source == "sites"  # simulated sites have a seed of their own
        snapshots = collecting.collect(settings, fleet, pool.layout, seed, same_seed=alike)

    training, heldout = split_by_time(snapshots, settings.holdout)
    return Ensemble(pool.layout, training, heldout, time.perf_counter() - since)


def fitted(
    table: Table,
    layout: Layout,
    training: Sequence[Snapshot],
    representation: Representation = "delta",
) -> Codec:
    """Return the codec of a `[codec]` table, fitted to `training` if it learns."""
    kind = CODECS[table["name"]]
    settings = parse({"method": {"name": "cgfedllm"}, "codec": table}, "benchmark").coding

    if not issubclass(kind, LearnedCodec):
        return build(settings, layout)

    objects = [
        coded_object(snapshot.received, snapshot.update, representation) for snapshot in training
    ]
    return kind.fit(settings, layout, objects, seed=0)


def gate_row(report: GateReport) -> Row:
    """Return the figures of a gate report, by short names."""
    return {
        "bytes": report.bytes_per_update,
        "ratio": report.raw_bytes / report.bytes_per_update,
        "error_a": report.errors.a,
        "error_b": report.errors.b,
        "error": report.errors.all,
        "error_aggregate": report.errors.aggregate,
        "error_product": report.product_error,
        "error_shuffled": report.shuffled_error,
        "cosine": report.cosine,
        "cosine_aggregate": report.aggregate_cosine,
        "b_norm_ratio": report.b_norm_ratio,
        "snr_db": report.snr_db,
        "snr": report.snr,
        "snr_printed": report.snr_printed,
        "contraction": report.contraction,
        "passes": not report.failed,
        "passes_reproduction": all(report.reproduction.values()),
        "failed": report.failed,
        "failed_reproduction": [name for name, passed in report.reproduction.items() if not passed],
    }


GATE_COLUMNS = {
    "ratio": "1/",
    "error_a": "err A",
    "error_b": "err B",
    "error": "err all",
    "error_aggregate": "err agg",
    "error_shuffled": "shuffled",
    "cosine": "cosine",
    "b_norm_ratio": "B ratio",
    "snr_db": "SNR dB",
    "snr_printed": "SNR as printed",
    "contraction": "contr.",
    "passes": "gate",
    "passes_reproduction": "repr.",
}


def outcome(resolved: RunConfig) -> Row:
    """Return the result of one run, in figures; a run that the package refused or stopped says
    why."""
    since = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            *_, last = execute(resolved, Path(folder) / "run")
    except (GateError, DivergenceError) as error:
        return {"stopped": f"{error}"[:200], "seconds": time.perf_counter() - since}
    except FluvialError as error:
        return {
            "stopped": f"{type(error).__name__}: {error}"[-200:],
            "seconds": time.perf_counter() - since,
        }

    found = last.values
    report = found["setup"].get("gate")
    return {
        "base_loss": found["heldout"]["base"]["loss"],
        "loss": found["heldout"]["final"]["loss"],
        "accuracy": found["heldout"]["final"]["accuracy"],
        "bytes_up": found["bytes"]["up"] // (found["sites"] * found["rounds"]),
        "round_ratio": found["round_ratio"],
        "amortised_ratio": found["amortised_ratio"],
        "amortised_uplink_ratio": found["amortised_uplink_ratio"],
        "setup_bytes": found["bytes"]["setup"],
        "gate_error": report and report["errors"]["all"],
        "gate_passed": report and report["passed"],
        "adapter_sha256": found["adapter_sha256"],
        "seconds": time.perf_counter() - since,
    }


def gate_rows(
    corpus: str,
    size: Size,
    codecs: Sequence[Table],
    *,
    source: Source = "sites",
    representation: Representation = "delta",
    rank: int = 8,
) -> list[Row]:
    """Each codec fitted to the earlier snapshots of `corpus` and measured on the later ones."""
    found = ensemble(corpus, size, source, rank=rank)
    rows = []

    for table in codecs:
        row: Row = {
            "corpus": corpus,
            "codec": label(table),
            "rank": rank,
            "representation": representation,
        }
        since = time.perf_counter()
        try:
            codec = fitted(table, found.layout, found.training, representation)
        except FluvialError as error:
            rows.append({**row, "stopped": f"{error}"[:200]})
            continue

        fit_s = time.perf_counter() - since
        report = gate.measure(codec, found.training, found.heldout, representation)
        rows.append({**row, **gate_row(report), "fit_s": fit_s})

    return rows


def label(table: Table) -> str:
    """Return a codec's settings in a few characters."""
    name: str = table["name"]
    if name == "resnet":
        name += f", 1/{2 ** table.get('stages', 6)}, {table['iterations']} it."
        name += f", {table['normalise']}" if "normalise" in table else ""
    elif "rate" in table:
        name += f", 1/{table['rate']}"
    elif name == "half_sign":
        name += ", 1/64"

    return name + (" + EF" if table.get("error_feedback") else "")


@contextmanager
def workers(processes: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Yield processes of one thread, as many as there are cores unless a number is given.

    Two sites in threads of one process share its interpreter, which small models keep busier than
    the tensors.
    """
    processes = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_one_thread
    ) as pool:
        yield pool


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
