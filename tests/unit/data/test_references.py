"""Several right answers of one record: read, checked, and scored by the best."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import DataConfig, DataError, Question, read_whole
from fluvial.models.generation import Continuation
from fluvial.training.answer_scores import AnswerSums


def lines(folder: Path, *records: dict[str, Any]) -> DataConfig:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig.model_validate({"source": str(path), "max_length": 128})


def test_references_stand_beside_the_answer_that_is_learned(
    tmp_path: Path,
    tokenizer: Any,
) -> None:
    data = lines(
        tmp_path,
        {"prompt": "p", "completion": "c", "references": ["d", "e"]},
        {"prompt": "p", "completion": "c", "references": []},
        {"prompt": "p", "completion": "c", "references": None},
        {"prompt": "p", "completion": "c"},
    )
    whole = read_whole(data, tokenizer, "--data")

    assert whole.questions == [Question("p", "c", ("d", "e")), *[Question("p", "c")] * 3]
    assert len({tuple(example.labels) for example in whole.examples}) == 1


def test_an_answer_counts_by_its_best_reference() -> None:
    question = Question("p", "red hat", ("a blue cap", "cap"))
    answers = [Continuation(text, cut=text == "hat") for text in ("cap", "hat", "blue cap")]
    assert AnswerSums.over(answers, [question] * 3) == (
        AnswerSums.of("cap", ["cap"])
        + AnswerSums.of("hat", ["red hat"])
        + AnswerSums.of("blue cap", ["a blue cap"])
        + AnswerSums(without_end=1)
    )


def test_alpaca_records_and_renamed_columns_have_references_too(
    tmp_path: Path,
    tokenizer: Any,
) -> None:
    data = lines(tmp_path, {"instruction": "i", "output": "o", "also": ["u"]})
    data = data.model_copy(update={"columns": {"references": "also"}})
    (question,) = read_whole(data, tokenizer, "--data").questions
    assert (question.answer, question.references) == ("o", ("u",))


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ("d", "line 2: field 'references' must be a list of texts, .* and is text; write a list"),
        ({"text": ["d"]}, "line 2: field 'references' must be a list of texts, .* and is an obj"),
        (["d", 3], "line 2: text 2 of field 'references' must be text, and is a number; put it in"),
        ([None], "line 2: text 1 of field 'references' must be text, and is null"),
        (["d", " \n"], "line 2: field 'references' has a blank text"),
    ],
)
def test_references_of_another_type_are_named_by_file_and_line(
    references: Any,
    message: str,
    tmp_path: Path,
    tokenizer: Any,
) -> None:
    data = lines(
        tmp_path,
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "completion": "c", "references": references},
    )
    with pytest.raises(DataError, match=rf"records\.jsonl, {message}"):
        read_whole(data, tokenizer, "--data")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"prompt": "p", "completion": ["c", "d"]}, "completion"),
        ({"instruction": "i", "output": ["c"]}, "output"),
    ],
)
def test_several_answers_in_the_place_of_one_are_told_where_they_belong(
    fields: dict[str, Any], name: str, tmp_path: Path, tokenizer: Any
) -> None:
    data = lines(tmp_path, fields)
    remedy = re.escape(f"data.columns = {{{name} = '{name}', references = '{name}'}}")
    with pytest.raises(DataError, match=f"field '{name}' must be text, and is a list; .*{remedy}"):
        read_whole(data, tokenizer, "--data")

    for columns in ({name: name, "references": name}, {"references": name}):
        listed = data.model_copy(update={"columns": columns})
        (question,) = read_whole(listed, tokenizer, "--data").questions
        assert question.answer == fields[name][0]
        assert question.references == tuple(fields[name][1:])


def test_a_column_of_answers_may_be_within_an_object_and_hold_one(
    tmp_path: Path, tokenizer: Any
) -> None:
    data = lines(
        tmp_path,
        {"qa": {"question": "p", "answers": ["c", "d"]}},
        {"qa": {"question": "p", "answers": "c"}},
    )
    columns = {"prompt": "qa.question", "completion": "qa.answers", "references": "qa.answers"}
    found = read_whole(data.model_copy(update={"columns": columns}), tokenizer, "--data")
    assert [(each.answer, each.references) for each in found.questions] == [
        ("c", ("d",)),
        ("c", ()),
    ]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "lists no answer"),
        ([" "], "the answer is empty"),
        (["c", 1], "text 2 of field .* must be text"),
        ([["c"]], "text 1 of field .* must be text"),
        (["c", " "], "has a blank text"),
    ],
)
def test_a_list_of_answers_has_texts(
    answers: list[Any], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    data = lines(tmp_path, {"prompt": "p", "answers": answers})
    columns = {"completion": "answers", "references": "answers"}
    with pytest.raises(DataError, match=message):
        read_whole(data.model_copy(update={"columns": columns}), tokenizer, "--data")
