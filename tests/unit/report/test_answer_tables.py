"""Tables of generated answers name what repeats below them."""

from typing import Any

from rich.console import Console, Group

from fluvial.report.answer_tables import answer_tables
from fluvial.report.evaluation_tables import evaluation_tables

HEADINGS = {"base": "base", "adapter": "adapter"}


def figure(mean: float) -> dict[str, Any]:
    return {"mean": mean, "interval": None, "interval_by": None}


def part(questions: int, **scores: float) -> dict[str, Any]:
    """Return the scores of records, which the base has at half."""
    tuned = {key: figure(mean) for key, mean in scores.items()}
    base = {key: figure(mean / 2) for key, mean in scores.items()}
    return {"questions": questions, "base": base, "adapter": tuned}


def printed(answers: dict[str, Any]) -> list[str]:
    """Return the lines of the tables of answers."""
    whole = {"max_new_tokens": 4, "distinct_questions": answers["questions"], "left_out": {}}
    console = Console(width=160)
    with console.capture() as capture:
        console.print(Group(*answer_tables(whole | {"too_long": 0} | answers, HEADINGS)))
    return [line.strip() for line in capture.get().splitlines()]


def rows_of(lines: list[str], beginning: str) -> int:
    return sum(line.startswith(beginning) for line in lines)


def test_a_score_that_equals_another_is_named_and_has_no_row() -> None:
    scores = {"exact_match": 0.5, "exact_match_squad": 0.5, "f1": 0.75, "rouge_1": 0.75}
    lines = printed(part(4, **scores, rouge_l=0.7))
    assert [rows_of(lines, name) for name in ("exact match", "token F1", "ROUGE-1", "ROUGE-L")] == [
        *(1, 1, 0, 1),
    ]
    words = "equal to exact match: exact match as in SQuAD; equal to token F1: ROUGE-1"
    assert f"greedy, at most 4 tokens; {words}" in " ".join(lines)

    others = printed(part(4, exact_match=0.5, f1=0.75))
    assert not any("equal to" in line for line in others)


def test_a_score_by_site_is_left_out_where_it_equals_another_at_all_sites() -> None:
    north = part(2, exact_match=0.0, exact_match_squad=0.5, f1=0.5, rouge_1=0.5, rouge_2=0.5)
    south = part(2, exact_match=1.0, exact_match_squad=1.0, f1=1.0, rouge_1=1.0)
    whole = part(4, exact_match=0.5, exact_match_squad=0.75, f1=0.75, rouge_1=0.75)
    lines = printed(whole | {"by_site": {"north": north, "south": south}})
    below = lines[lines.index("Generated answers by site") :]
    assert (rows_of(below, "north"), rows_of(below, "south")) == (3, 2)
    assert below[-1] == "equal to token F1: ROUGE-1"
    assert not any("SQuAD" in line for line in below)


def test_one_site_has_no_table_of_its_own() -> None:
    whole = part(4, exact_match=0.5)
    lines = printed(whole | {"by_site": {"north": whole}})
    assert "Generated answers to 4 records of site north" in lines
    assert "Generated answers by site" not in lines
    assert "Generated answers to 4 records" in printed(whole)


def test_one_subject_has_no_table_of_its_own() -> None:
    row = {"accuracy": 0.5, "macro_accuracy": 0.5, "standard_error": 0.1, "interval": [0.3, 0.7]}
    choices: dict[str, Any] = {
        "source": "q.jsonl",
        "questions": 4,
        "scoring": "letters",
        "shots": 0,
        "chance": 0.25,
        "short_of_shots": 0,
        "dropped_shots": 0,
        "cut_questions": 0,
        "model": row | {"interval_by": "wilson"},
    }

    def shown(*subjects: str) -> str:
        table = {name: {"questions": 2, "model": 0.5} for name in subjects}
        console = Console(width=100)
        with console.capture() as capture:
            measured = {"model": "tiny", "choices": choices | {"by_subject": table}}
            console.print(evaluation_tables(measured))
        return capture.get()

    assert "By subject" in shown("law", "physics")
    assert "By subject" not in shown("law")
