"""Groups of MMLU, C-Eval and CMMLU: means by hand on made-up marks, and every subject of the real
files."""

import json
from pathlib import Path

import pytest

from fluvial.errors import ConfigError
from fluvial.training.choices import read_choices
from fluvial.training.subjects import (
    BENCHMARKS,
    CEVAL,
    CMMLU,
    MMLU,
    BenchmarkName,
    detect,
    grouped,
    plain_subject,
)
from tests.support import SHARED


def test_the_published_counts() -> None:
    counts = {name: [len(g) for g in bench.groups.values()] for name, bench in BENCHMARKS.items()}
    assert counts == {
        "mmlu": [18, 12, 13, 14],
        "ceval": [20, 10, 11, 11],
        "cmmlu": [17, 22, 13, 15],
    }
    assert [len(b.subjects) for b in BENCHMARKS.values()] == [
        57,
        52,
        67,
    ]  # so no subject is in two groups
    assert [len(extra) for extra in CEVAL.extra.values()] == [8]
    assert all(extra <= b.subjects for b in BENCHMARKS.values() for extra in b.extra.values())


def test_means_by_hand() -> None:
    """Two STEM subjects of unequal size, one of Humanities, one that is in no group."""
    marks = {
        "base": {
            "college_physics": (1, 2),
            "computer_network": (0, 8),
            "law": (3, 4),
            "chess": (5, 5),
        },
        "adapter": {
            "college_physics": (2, 2),
            "computer_network": (2, 8),
            "law": (1, 4),
            "chess": (0, 5),
        },
    }
    found = grouped(CEVAL, marks)
    stem, hard, average = (found["table"][name] for name in ("STEM", "Hard", "Average"))
    assert (stem["subjects"], stem["of_subjects"], stem["questions"]) == (2, 20, 10)
    assert stem["base"] == {"micro": 1 / 10, "macro": (1 / 2 + 0) / 2}
    assert stem["adapter"] == {"micro": 4 / 10, "macro": (1 + 2 / 8) / 2}
    assert hard["adapter"] == {"micro": 1.0, "macro": 1.0}
    assert average["base"] == {"micro": 4 / 14, "macro": pytest.approx((0.5 + 0 + 0.75) / 3)}
    assert average["adapter"] == {"micro": 5 / 14, "macro": pytest.approx((1 + 0.25 + 0.25) / 3)}
    assert "Other" not in found["table"]
    assert found["without_group"] == ["chess"]
    assert list(found["table"])[-1] == "Hard"


@pytest.mark.parametrize(
    ("subjects", "chinese", "expected"),
    [
        (["anatomy", "virology"], False, MMLU),
        (["anatomy", "virology"], True, CMMLU),
        (["sports_science"], True, CEVAL),
        (["High School Physics", "machine-learning"], False, MMLU),
        (["high_school_physics_val", "accountant_val"], False, CEVAL),
        (["mmlu_anatomy", "mmlu_us_foreign_policy"], False, MMLU),
        (["ceval-valid_law", "ceval-valid_accountant"], True, CEVAL),
        (["chess", "go", "law"], False, None),
        ([], True, None),
    ],
)
def test_a_benchmark_is_told_by_its_subjects(
    subjects: list[str], chinese: bool, expected: object
) -> None:
    assert detect(subjects, chinese=chinese) is expected


def test_one_subject_has_another_group_elsewhere() -> None:
    marks = {"adapter": {"anatomy": (1, 1)}}
    groups = [set(grouped(bench, marks)["table"]) - {"Average"} for bench in (MMLU, CMMLU)]
    assert groups == [{"Other"}, {"STEM"}]


def test_a_subject_may_stand_in_another_field(tmp_path: Path) -> None:
    record = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": "B", "task": "Law"}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert read_choices(path, "task")[0].subject == "Law"
    assert plain_subject("Law") in CEVAL.subjects

    with pytest.raises(
        ConfigError, match="line 1: --subject-field 'kind' is missing; found 'answer'"
    ):
        read_choices(path, "kind")


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside this checkout")
@pytest.mark.parametrize(
    ("file", "name"), [("mmlu/test", "mmlu"), ("ceval/val", "ceval"), ("cmmlu/test", "cmmlu")]
)
def test_every_subject_of_the_real_files_is_in_its_group(file: str, name: BenchmarkName) -> None:
    lines = (SHARED / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    subjects = {record["subject"] for record in records}
    assert subjects == BENCHMARKS[name].subjects
    assert detect(subjects, chinese=name != "mmlu") is BENCHMARKS[name]
    named = {"social_sciences": "Social sciences", "Social Science": "Social sciences"}

    for record in records:
        if "client" in record:
            group = named.get(record["client"], record["client"])
            wanted = {key.lower(): members for key, members in BENCHMARKS[name].groups.items()}
            assert record["subject"] in wanted[group.lower()]
