"""The benchmarks of CG-FedLLM's autoencoder and of C-Eval: their plan, files and statistics."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cgfedllm.autoencoder import ADAM, BEST, STAGES, autoencoder, plan
from benchmarks.cgfedllm.ceval import ALL, category_rows, read_split
from benchmarks.cgfedllm.gate_and_loss import QUICK
from fluvial.codecs.learned.resnet import ResNetSettings
from fluvial.data.multiple_choice import Choice
from fluvial.training.choice_scores import Marks
from tests.support.benchmarks import quick_report

SUBJECTS = ("law", "marxism", "college_physics")


def records() -> list[dict[str, object]]:
    """Return four questions of each subject, with commas, quotes and line ends in them."""
    return [
        {
            "id": f"{subject}-{number}",
            "subject": subject,
            "question": f'"{subject}",\n{number}?',
            "choices": ["one", "two, or", "three", "four"],
            "answer": "ABCD"[number],
        }
        for subject in sorted(SUBJECTS)
        for number in range(4)
    ]


def test_the_published_files_hold_the_questions_of_the_records(tmp_path: Path) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records())
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "val.jsonl").write_text(lines)
    (tmp_path / "val").mkdir()
    for subject in SUBJECTS:
        with (tmp_path / "val" / f"{subject}_val.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "question", "A", "B", "C", "D", "answer"])
            for number, record in enumerate(r for r in records() if r["subject"] == subject):
                choices = record["choices"]
                assert isinstance(choices, list)
                writer.writerow([number, record["question"], *choices, record["answer"]])

    def contents(found: list[Choice]) -> list[tuple[object, ...]]:
        return [(one.question, one.choices, one.answer, one.subject) for one in found]

    assert contents(read_split(tmp_path, "val")) == contents(read_split(tmp_path / "ours", "val"))
    with pytest.raises(SystemExit, match="SUBJECT_dev.csv"):
        read_split(tmp_path, "dev")


def test_categories_are_means_over_questions_and_subjects(tmp_path: Path) -> None:
    """`law` is of the humanities, `marxism` a social science, `college_physics` STEM and Hard."""
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records()))
    questions = read_split(tmp_path, "val")
    draw = np.random.default_rng(0)
    subjects = tuple(question.subject for question in questions)
    before, *after = (Marks(tuple(draw.random(12) < 0.5), subjects) for _ in range(3))
    rows = {row["category"]: row for row in category_rows("arm", before, after, questions)}
    assert set(rows) == {"STEM", "Social sciences", "Humanities", "Hard", ALL}
    old = np.array(before.right, float)
    new = np.mean([marks.right for marks in after], axis=0)
    physics = np.array([subject == "college_physics" for subject in subjects])

    for name, numbers in (("STEM", physics), ("Hard", physics), (ALL, np.ones(12, bool))):
        row = rows[name]
        assert row["questions"] == numbers.sum()
        assert row["before"] == pytest.approx(old[numbers].mean())
        assert row["after"] == pytest.approx(new[numbers].mean())
        assert row["gain"] == pytest.approx((new - old)[numbers].mean())
        assert row["macro"] == pytest.approx(row["after"])  # all subjects have four questions

    assert rows[ALL]["gain_low"] < rows[ALL]["gain"] < rows[ALL]["gain_high"]


def test_the_plan_has_every_training_setting_once_and_the_packages_defaults() -> None:
    fits = list(plan(3))
    assert len(set(fits)) == len(fits)
    assert {(fit.stages, fit.seed) for fit in fits if fit.what == "loss"} == {
        (stages, seed) for stages in STAGES for seed in range(3)
    }
    assert {fit.kind for fit in fits} == {ADAM, "gradients of SGD", "states"}
    defaults = ResNetSettings()
    assert {name: getattr(defaults, name) for name in BEST} == BEST


def test_what_time_leaves_out_is_listed() -> None:
    rows, claims, skipped = autoencoder(QUICK, ["stdlib"], None, minutes=-1)
    assert rows == []
    assert len(skipped) == len(list(plan(QUICK.seeds)))
    assert not any(claim.holds for claim in claims)


@pytest.mark.slow
def test_autoencoder_takes_its_fits_from_the_file(tmp_path: Path) -> None:
    options = (
        "--part",
        "autoencoder",
        "--iterations",
        "1",
        "--cache",
        str(tmp_path / "fits.jsonl"),
    )
    content = quick_report("cgfedllm", tmp_path / "first.json", *options)
    again = quick_report("cgfedllm", tmp_path / "again.json", *options, "--minutes", "0")
    assert again["rows"] == content["rows"]
    assert again["skipped"] == []
