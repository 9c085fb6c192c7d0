"""Subjects of MMLU, C-Eval and CMMLU in the groups of their papers, and means over these groups.

The assignment of a subject to a group is the benchmark's own; `Benchmark.source` names the file.
The same subject may belong to another group elsewhere: `anatomy` is Other in MMLU and STEM in
CMMLU.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Mean = Literal["micro", "macro"]
BenchmarkName = Literal["mmlu", "ceval", "cmmlu"]
AVERAGE = "Average"


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


@dataclass(frozen=True)
class Benchmark:
    """A multiple-choice test and its published groups of subjects."""

    name: str
    mean: Mean
    """Mean of the benchmark's own code: over questions, or over subjects."""
    source: str
    """The file that assigns subjects to groups."""
    groups: Mapping[str, frozenset[str]]
    """Disjoint groups of subjects."""
    extra: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Groups whose subjects are reported a second time, under another name."""

    @property
    def subjects(self) -> frozenset[str]:
        """All subjects of the benchmark."""
        return frozenset().union(*self.groups.values())


MMLU = Benchmark(
    name="MMLU",
    mean="micro",
    source="github.com/hendrycks/test, categories.py",
    groups={
        "STEM": _names(
            """
            abstract_algebra astronomy college_biology college_chemistry
            college_computer_science college_mathematics college_physics computer_security
            conceptual_physics electrical_engineering elementary_mathematics
            high_school_biology high_school_chemistry high_school_computer_science
            high_school_mathematics high_school_physics high_school_statistics
            machine_learning
        """
        ),
        "Social sciences": _names(
            """
            econometrics high_school_geography high_school_government_and_politics
            high_school_macroeconomics high_school_microeconomics high_school_psychology
            human_sexuality professional_psychology public_relations security_studies
            sociology us_foreign_policy
        """
        ),
        "Humanities": _names(
            """
            formal_logic high_school_european_history high_school_us_history
            high_school_world_history international_law jurisprudence logical_fallacies
            moral_disputes moral_scenarios philosophy prehistory professional_law
            world_religions
        """
        ),
        "Other": _names(
            """
            anatomy business_ethics clinical_knowledge college_medicine global_facts
            human_aging management marketing medical_genetics miscellaneous nutrition
            professional_accounting professional_medicine virology
        """
        ),
    },
)

CEVAL = Benchmark(
    name="C-Eval",
    mean="macro",
    source="github.com/hkust-nlp/ceval, subject_mapping.json; Hard is the list of the paper",
    groups={
        "STEM": _names(
            """
            advanced_mathematics college_chemistry college_physics college_programming
            computer_architecture computer_network discrete_mathematics electrical_engineer
            high_school_biology high_school_chemistry high_school_mathematics
            high_school_physics metrology_engineer middle_school_biology
            middle_school_chemistry middle_school_mathematics middle_school_physics
            operating_system probability_and_statistics veterinary_medicine
        """
        ),
        "Social sciences": _names(
            """
            business_administration college_economics education_science
            high_school_geography high_school_politics mao_zedong_thought marxism
            middle_school_geography middle_school_politics teacher_qualification
        """
        ),
        "Humanities": _names(
            """
            art_studies chinese_language_and_literature high_school_chinese
            high_school_history ideological_and_moral_cultivation law legal_professional
            logic middle_school_history modern_chinese_history professional_tour_guide
        """
        ),
        "Other": _names(
            """
            accountant basic_medicine civil_servant clinical_medicine
            environmental_impact_assessment_engineer fire_engineer physician
            plant_protection sports_science tax_accountant urban_and_rural_planner
        """
        ),
    },
    extra={
        "Hard": _names(
            """
            advanced_mathematics college_chemistry college_physics discrete_mathematics
            high_school_chemistry high_school_mathematics high_school_physics
            probability_and_statistics
        """
        )
    },
)

CMMLU = Benchmark(
    name="CMMLU",
    mean="macro",
    source="github.com/haonan-li/CMMLU, src/categories.py",
    groups={
        "STEM": _names(
            """
            anatomy astronomy college_actuarial_science college_engineering_hydrology
            college_mathematics college_medical_statistics computer_science
            conceptual_physics electrical_engineering elementary_mathematics genetics
            high_school_biology high_school_chemistry high_school_mathematics
            high_school_physics machine_learning virology
        """
        ),
        "Social sciences": _names(
            """
            ancient_chinese business_ethics chinese_civil_service_exam chinese_food_culture
            chinese_foreign_policy chinese_teacher_qualification college_education economics
            education elementary_chinese ethnology high_school_geography
            high_school_politics journalism management marketing modern_chinese
            professional_accounting professional_psychology public_relations security_study
            sociology
        """
        ),
        "Humanities": _names(
            """
            arts chinese_history chinese_literature college_law global_facts
            international_law jurisprudence logical marxist_theory philosophy
            professional_law world_history world_religions
        """
        ),
        "Other": _names(
            """
            agronomy chinese_driving_rule clinical_knowledge college_medicine
            computer_security construction_project_management elementary_commonsense
            elementary_information_and_technology food_science human_sexuality
            legal_and_moral_basis nutrition professional_medicine sports_science
            traditional_chinese_medicine
        """
        ),
    },
    extra={
        "China specific": _names(
            """
            ancient_chinese chinese_civil_service_exam chinese_driving_rule
            chinese_food_culture chinese_foreign_policy chinese_history chinese_literature
            chinese_teacher_qualification construction_project_management elementary_chinese
            elementary_commonsense ethnology high_school_politics modern_chinese
            traditional_chinese_medicine
        """
        )
    },
)

BENCHMARKS: dict[BenchmarkName, Benchmark] = {"mmlu": MMLU, "ceval": CEVAL, "cmmlu": CMMLU}


def plain_subject(name: str) -> str:
    """Return a subject's name as the benchmarks write it: lower case, joined by underscores.

    A benchmark's name before it ("mmlu_anatomy") and a split behind it ("law_val") are left out.
    """
    joined = re.sub(r"[\s_-]+", "_", name.strip().lower())
    return re.sub(
        r"_(dev|val|valid|test)$",
        "",
        re.sub(r"^(mmlu|ceval|cmmlu)_((valid|val|test)_)?", "", joined),
    )


def detect(subjects: Iterable[str], *, chinese: bool) -> Benchmark | None:
    """Return the benchmark that has the most of `subjects`, None if none has more than half.

    Of two that have equally many, questions in Chinese decide.
    """
    names = {plain_subject(subject) for subject in subjects if subject}
    order: tuple[BenchmarkName, ...] = ("mmlu", "ceval", "cmmlu")
    candidates = [BENCHMARKS[key] for key in (order[1:] + order[:1] if chinese else order)]
    best = max(candidates, key=lambda benchmark: len(names & benchmark.subjects))

    return best if 2 * len(names & best.subjects) > len(names) else None


def grouped(
    benchmark: Benchmark, marks: Mapping[str, Mapping[str, tuple[int, int]]]
) -> dict[str, Any]:
    """Return the accuracy of each group and the average, as JSON types.

    `marks` holds, for each model, right answers and questions of each subject. "micro" is the mean
    over questions, "macro" the mean over subjects, each counting the same. Subjects without a group
    count in no mean here.
    """
    first = next(iter(marks.values()))
    grouped_subjects = [
        subject for subject in first if plain_subject(subject) in benchmark.subjects
    ]
    groups = {**benchmark.groups, AVERAGE: benchmark.subjects, **benchmark.extra}
    table: dict[str, Any] = {}

    for name, members in groups.items():
        inside = [subject for subject in grouped_subjects if plain_subject(subject) in members]
        if not inside:
            continue

        table[name] = {
            "subjects": len(inside),
            "of_subjects": len(members),
            "questions": sum(first[subject][1] for subject in inside),
            **{
                model: _means([counts[subject] for subject in inside])
                for model, counts in marks.items()
            },
        }

    return {
        "benchmark": benchmark.name,
        "mapping": benchmark.source,
        "reported_mean": benchmark.mean,
        "table": table,
        "without_group": [subject for subject in first if subject not in grouped_subjects],
    }


def _means(pairs: Iterable[tuple[int, int]]) -> dict[Mean, float]:
    counts = list(pairs)
    right, asked = (sum(column) for column in zip(*counts, strict=True))
    return {
        "micro": right / asked,
        "macro": sum(hits / questions for hits, questions in counts) / len(counts),
    }
