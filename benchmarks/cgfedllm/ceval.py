"""C-Eval before and after tuning on its dev split, by category, with intervals.

    python -m benchmarks.cgfedllm.ceval FOLDER [--model MODEL] [--quick] [--arm NAME ...]
        [--seeds N] [--rounds N] [--learning-rate X] [--scoring letter|text] [--out FILE.json]

FOLDER holds C-Eval as it is published (dev/SUBJECT_dev.csv and val/SUBJECT_val.csv with the columns
question, A to D and answer), or dev.jsonl and val.jsonl of `fluvial evaluate --choices`. MODEL is
any folder or name of a configuration. As in CG-FedLLM, three sites share the dev questions, in
random parts; the val questions measure. Accuracies are means over questions, and over subjects
(`macro`, as C-Eval reports). Intervals are 95 % bootstrap intervals over questions, each question
counted as the mean over its seeds: those of `gain` are of after less before on the same questions.
An interval around 0 is a null result.
"""

import argparse
import csv
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.cgfedllm.bed import Table
from benchmarks.options import parser_of
from benchmarks.report import Claim, Report, Row, show
from fluvial.data.multiple_choice import Choice, Scoring, chance, ending, language_of, render
from fluvial.models.pool import ModelPool
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.run import execute
from fluvial.seeds import generator
from fluvial.training.choice_prompts import prepare
from fluvial.training.choice_scores import Marks, bootstrap, score
from fluvial.training.choices import read_choices
from fluvial.training.evaluate import has_effect
from fluvial.training.folders import read_adapter_folder
from fluvial.training.subjects import CEVAL, plain_subject
from fluvial.wire.tensors import Named

SITES = 3
ALL = "All"
TRELLIS: Table = {"name": "trellis", "rate": 64, "error_feedback": True}
PAPERS: Table = {"name": "resnet", "canvas": "grouped"}
ARMS: dict[str, Table] = {
    "central": {"method": {"name": "central"}},
    "fedavg, uncompressed": {"method": {"name": "fedavg"}},
    "cgfedllm, trellis 1/64 + EF": {
        "method": {"name": "cgfedllm", "tgap": {"source": "none"}},
        "codec": TRELLIS,
    },
    "cgfedllm, resnet 1/4": {
        "method": {"name": "cgfedllm", "gate": "report", "tgap": {"source": "sites", "rounds": 8}},
        "codec": PAPERS | {"stages": 2},
    },
    "cgfedllm, resnet 1/64": {
        "method": {"name": "cgfedllm", "gate": "report", "tgap": {"source": "sites", "rounds": 8}},
        "codec": PAPERS,
    },
}
"""Runs by name. "central" and the uncompressed one are the paper's baselines."""
QUICK_ARMS = ("fedavg, uncompressed", "cgfedllm, trellis 1/64 + EF")


def read_split(folder: Path, split: str) -> list[Choice]:
    """Return the questions of dev or val from either form of the folder."""
    records = folder / f"{split}.jsonl"
    if records.is_file():
        return read_choices(records)

    found = [_published(path, split) for path in sorted((folder / split).glob(f"*_{split}.csv"))]
    if not found:
        raise SystemExit(f"{folder}: no {records.name}, and no {split}/SUBJECT_{split}.csv")

    with tempfile.TemporaryDirectory() as place:
        joined = Path(place) / records.name
        joined.write_text("".join(found), encoding="utf-8")
        return read_choices(joined)


def _published(path: Path, split: str) -> str:
    """Return a CSV file of C-Eval as JSON lines."""
    subject = path.name.removesuffix(f"_{split}.csv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))

    return "".join(
        json.dumps(
            {
                "id": f"{subject}-{row.get('id', number)}",
                "subject": subject,
                "question": row["question"],
                "choices": [row[letter] for letter in "ABCD"],
                "answer": row["answer"],
            },
            ensure_ascii=False,
        )
        + "\n"
        for number, row in enumerate(rows)
    )


def write_training(path: Path, questions: Sequence[Choice], scoring: Scoring, seed: int) -> None:
    """Write prompts and right answers, dealt at random to the sites."""
    order = generator(seed, "ceval", "sites")
    dealt = torch.randperm(len(questions), generator=order).tolist()
    lines = []
    for place, number in enumerate(dealt):
        choice = questions[number]
        language = language_of(choice.question)
        record = {
            "prompt": render(choice, [], scoring, language),
            "completion": ending(choice, choice.answer, scoring, language),
            "client": f"site-{place % SITES}",
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")

    path.write_text("".join(lines), encoding="utf-8")


def configured(arm: str, records: Path, options: argparse.Namespace, seed: int) -> RunConfig:
    """Return the configuration of a run, with the paper's rank and share of passes."""
    table: Table = {
        "seed": seed,
        "rounds": options.rounds,
        "model": {"name_or_path": options.model, "dtype": "float32"},
        "data": {
            "source": str(records),
            "partition": {"by": "column", "column": "client"},
            "max_length": options.max_length,
            "overlong": "shorten_prompt",
        },
        "lora": {
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "target_modules": "attention",
        },
        "train": {"learning_rate": options.learning_rate, "per_device_train_batch_size": 8},
        "evaluate": {"sample_tokens": 1},
        **ARMS[arm],
    }
    return parse(table, arm)


def marks_of(pool: ModelPool, tensors: Named, questions: Sequence[Choice], how: Scoring) -> Marks:
    """Return what a model answers rightly."""
    sheet = prepare(questions, pool.tokenizer, context=pool.outline.context, scoring=how)
    with pool.model(tensors) as model:
        return Marks.of(
            sheet, score(model, sheet.prompts, pad_token_id=pool.tokenizer.pad_token_id)
        )


def members(questions: Sequence[Choice]) -> Iterator[tuple[str, list[int]]]:
    """Yield each category of C-Eval with the numbers of its questions, Hard and all at the end."""
    for name, subjects in {**CEVAL.groups, **CEVAL.extra}.items():
        numbers = [
            number
            for number, question in enumerate(questions)
            if question.subject and plain_subject(question.subject) in subjects
        ]
        if numbers:
            yield name, numbers

    yield ALL, list(range(len(questions)))


def category_rows(
    arm: str, before: Marks, after: Sequence[Marks], questions: Sequence[Choice]
) -> list[Row]:
    """Return accuracies before and after, and the gain with its interval, by category."""
    rows = []
    for name, numbers in members(questions):
        base = [float(before.right[number]) for number in numbers]
        tuned = [mean(float(marks.right[number]) for marks in after) for number in numbers]
        gains = [new - old for new, old in zip(tuned, base, strict=True)]
        row: Row = {"arm": arm, "category": name, "questions": len(numbers), "seeds": len(after)}
        row |= _with_interval("before", base) | _with_interval("after", tuned)
        row |= {"macro": _macro(tuned, [questions[number] for number in numbers])}
        rows.append(row | _with_interval("gain", gains))

    return rows


def _with_interval(name: str, values: Sequence[float]) -> Row:
    found = bootstrap(values, 0)
    low, high = (None, None) if found is None else (found.low, found.high)
    return {name: mean(values), f"{name}_low": low, f"{name}_high": high}


def _macro(values: Sequence[float], questions: Sequence[Choice]) -> float:
    by_subject: dict[str | None, list[float]] = {}
    for value, question in zip(values, questions, strict=True):
        by_subject.setdefault(question.subject, []).append(value)

    return mean(mean(some) for some in by_subject.values())


def measure(options: argparse.Namespace, report: Report) -> None:
    """Add rows and claims to the report."""
    dev, val = (read_split(options.folder, split) for split in ("dev", "val"))
    if options.quick:
        dev, val = dev[::8], val[::8]

    arms = options.arm or (QUICK_ARMS if options.quick else tuple(ARMS))
    for arm in ARMS:
        if arm not in arms:
            report.skip(f"{arm}: not asked for")

    before: Marks | None = None
    for arm in arms:
        after = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as place:
                records = Path(place) / "train.jsonl"
                write_training(records, dev, options.scoring, seed)
                config = configured(arm, records, options, seed)
                *_, last = execute(config, Path(place) / "run")
                pool = ModelPool(config.model, config.adapter)
                tuned = read_adapter_folder(Path(place) / "run" / "adapter").tensors

            assert has_effect(pool, tuned, pool.tokenizer.encode(val[0].question)), arm
            if before is None:
                before = marks_of(pool, pool.base_state(), val, options.scoring)
            after.append(marks_of(pool, tuned, val, options.scoring))
            heldout: Mapping[str, Any] = last.values["heldout"]
            report.rows.append(
                {
                    "part": "run",
                    "arm": arm,
                    "seed": seed,
                    "accuracy": after[-1].accuracy,
                    "base_loss": heldout["base"]["loss"],
                    "loss": heldout["final"]["loss"],
                    "bytes_up": last.values["bytes"]["up"],
                }
            )

        assert before is not None
        report.rows += [{"part": "ceval", **row} for row in category_rows(arm, before, after, val)]

    rows = [row for row in report.rows if row["part"] == "ceval"]
    names = ["arm", "category", "questions", "before", "after", "macro"]
    names += ["gain", "gain_low", "gain_high"]
    show(f"C-Eval val, chance {chance(val)}", {name: name for name in names}, rows)
    report.claims += [
        Claim(
            f"{row['arm']}: lower end of the gain over all questions",
            row["gain_low"],
            0,
            "at least",
        )
        for row in rows
        if row["category"] == ALL
    ]


def main() -> None:
    """See the module."""
    parser = parser_of("cgfedllm.ceval", __doc__, quick="an eighth of the questions, two arms")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--arm", action="append", choices=list(ARMS), help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="the paper's 5")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="the paper's 2e-4")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--scoring", choices=["letter", "text"], default="letter")
    options = parser.parse_args()
    load = os.getloadavg()
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in ("out", "folder", "model")
    }
    settings |= {"folder": options.folder.name, "model": Path(options.model).name}
    report = Report("cgfedllm.ceval", settings)
    measure(options, report)
    report.finish(options.out, load)


if __name__ == "__main__":
    main()
