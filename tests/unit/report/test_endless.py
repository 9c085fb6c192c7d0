"""Answers of the final model that do not end are told with the remedy, where they are many."""

from pathlib import Path

import pytest

from fluvial.report.page import write_page
from fluvial.report.result_tables import endless_words
from fluvial.report.show import run_tables
from fluvial.storage.run_files import read_run
from tests.unit.report.test_show import config, records, result, text_of, write

WORDS = "25 of 100 answers (25.00 %) of the final model do not end: they stop at"


def test_the_terminal_and_the_page_tell_answers_without_an_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config(folder, "fedavg")
    ours = result("fedavg", "int8", 3.2, 2200, 131200, questions=100, answers_without_end=25)
    for table in filter(None, ours["heldout"].values()):
        table |= {"exact_match": 0.5, "f1": 0.6, "rouge_l": 0.7}
    write(folder, records(2200, 131200, start=3.3), ours)
    run = read_run(folder)
    assert WORDS in " ".join(text_of(run_tables(run)).split())
    write_page(run, tmp_path / "page.html")
    assert WORDS in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("count", [None, 0, 20])
def test_few_of_them_are_not_told(count: int | None) -> None:
    assert endless_words({"questions": 100, "answers_without_end": count}) == ""
    assert endless_words({"questions": 0, "answers_without_end": 0}) == ""
