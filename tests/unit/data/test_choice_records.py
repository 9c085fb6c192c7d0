"""Questions with choices as records: the prompt, the right letter, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import DataConfig
from fluvial.data.faults import Faults
from fluvial.data.multiple_choice import Choice, language_of, render
from fluvial.data.read_as import read_as
from fluvial.data.record_reader import RecordReader
from fluvial.data.records import Answered, Chat
from fluvial.data.rows import Cells, Number
from fluvial.data.sources import Source, read_source
from fluvial.data.tokenise import tokenize
from fluvial.errors import ConfigError
from fluvial.runs.proposal.columns import guessed_columns
from fluvial.runs.proposal.records import read_records
from fluvial.training.choice_prompts import prepare
from fluvial.training.choices import read_choices
from tests.support.tokenizer_kinds import byte_level, characters, prefix_space, words

PROMPT = (
    "The following are multiple choice questions (with answers).\n\n"
    "Which is wet?\nA. Sand\nB. Water\nC. Fire\nAnswer:"
)
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "space before each text": prefix_space,
    "space before the first word": lambda: prefix_space(scheme="first"),
    "words": words,
    "characters": characters,
}
TEXTS = ["Sand", "Water", "Fire"]
ASKED = {"question": "Which is wet?", "choices": TEXTS}


def records_of(config: DataConfig) -> list[Any]:
    """Return the contents of all records of a source."""
    faults = Faults()
    found = read_source(Source("data", config.source, config.split, config.reading()), faults)
    faults.raise_any()
    return [entry.record.content for entry in found.entries]


def content(form: Any = "choices", columns: Any = (), numbers: Any = "refuse", **cells: Any) -> Any:
    """Return what the record of a row is read as."""
    reader = RecordReader(form, dict(columns), numbers)
    return reader.read("f, line 1", Cells(cells)).content


@pytest.mark.parametrize(
    "choices",
    [
        TEXTS,
        [" Sand", "Water\n", "Fire"],
        json.dumps(TEXTS),
        {"A": "Sand", "B": "Water", "C": "Fire"},
        {"text": TEXTS, "label": ["A", "B", "C"]},
        [{"label": label, "text": text} for label, text in zip("ABC", TEXTS, strict=True)],
    ],
    ids=["list", "blanks", "JSON", "object", "lists", "labelled"],
)
@pytest.mark.parametrize("answer", ["B", "b", " B ", "Water", Number("1")])
def test_every_form_of_choices_is_one_prompt_with_the_letter(choices: Any, answer: Any) -> None:
    read = content(question="Which is wet? ", choices=choices, answer=answer)
    assert read == Answered(PROMPT, " B", joined=True)


def test_choices_in_columns_are_the_same() -> None:
    row = {"question": "Which is wet?", "A": "Sand", "B": "Water", "C": "Fire", "answer": "B"}
    wanted = Answered(PROMPT, " B", joined=True)
    assert content("lettered_choices", **row, D="", E=None) == wanted
    renamed = {"A": "opa", "B": "opb", "C": "opc", "answer": "cop"}
    cells = {renamed.get(name, name): value for name, value in row.items()}
    assert content("lettered_choices", renamed, **cells) == wanted


def test_the_prompt_is_that_of_the_evaluation_of_choices(tmp_path: Path) -> None:
    """Equal for questions in English with a subject, and in Chinese."""
    rows = [
        ASKED | {"answer": "C", "subject": "high_school_physics"},
        ASKED | {"answer": "C", "context": "Rain falls.\n"},
        {"question": "水是什么", "choices": ["湿", "干"], "answer": 0},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source=str(path))
    contents = records_of(config)
    asked = read_choices(path)

    wording = [language_of(choice.question) for choice in asked]
    prompts = [render(q, (), "letter", w) for q, w in zip(asked, wording, strict=True)]
    assert [content.prompt for content in contents] == prompts
    assert [content.answer for content in contents] == [" C", " C", "A"]
    assert "Rain falls.\n\nWhich is wet?\nA. Sand" in prompts[1]
    assert prompts[0].startswith(
        "The following are multiple choice questions (with answers) about high school physics."
    )


def test_labels_are_those_of_the_record() -> None:
    choices = {"text": ["2", "3", "4"], "label": ["1", "2", "3"]}
    read = content(question="1 + 2?", choices=choices, answer="2")
    assert read.prompt.endswith("1 + 2?\nA. 2\nB. 3\nC. 4\nAnswer:")
    assert read.answer == " B"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"choices": ["x"]}, "field 'choices' must be a list of 2 to 10 texts, and is a list of 1"),
        ({"choices": ["x"] * 11}, "and is a list of 11; correct it, or remove the record"),
        (
            {"choices": "['x', 'y']"},
            "the text is no JSON .*; write the list of choices as JSON",
        ),
        ({"choices": "A) x B) y"}, "must be a list of 2 to 10 texts, and is text"),
        ({"choices": ["x", " "]}, "choice B of field 'choices' is blank"),
        ({"choices": ["x", Number("2")]}, "choice B of .* must be text, and is a number; put it"),
        ({"choices": {"text": ["x", "y"], "label": ["A", "A"]}}, "needs a label of its own"),
        ({"choices": {"text": ["x", "y"], "label": ["A"]}}, "needs a label of its own"),
        ({"answer": "D"}, "field 'answer' must be a letter from A to C, .*, and is none of them;"),
        ({"answer": "AB"}, "and is none of them;"),
        ({"answer": ""}, "and is none of them;"),
        ({"answer": Number("3")}, "or 0 to 2, and is none of them: numbers count from 0"),
        (
            {"answer": "1"},
            "numbers count from 0, as JSON numbers; else write letters",
        ),
        ({"answer": None}, "and is null"),
        ({"choices": ["x", "x", "y"], "answer": "x"}, "may be several of them"),
        ({"choices": ["C", "z", "y"], "answer": "C"}, "may be several of them"),
        ({"question": " "}, "field 'question' must be text that is not blank, and is blank"),
        ({"subject": Number("1")}, "field 'subject' must be text"),
        ({"context": Number("1")}, "field 'context' must be text"),
    ],
)
def test_faults_are_named_with_place_and_field(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"f, line 1: .*{problem}"):
        content(**ASKED | {"answer": "B"} | changes)


def test_a_missing_field_and_a_gap_between_columns_are_named() -> None:
    with pytest.raises(ConfigError, match="field 'answer' is missing; form 'choices' needs it"):
        content(**ASKED)
    with pytest.raises(ConfigError, match="columns A, B and so on, none left out; found A, C"):
        content("lettered_choices", question="q", A="x", C="y", answer="A")


def test_numbers_are_choices_where_the_setting_allows_it() -> None:
    numbers = [Number("2"), Number("4")]
    read = content(numbers="text", question="1 + 1?", choices=numbers, answer="A")
    assert read.prompt.endswith("1 + 1?\nA. 2\nB. 4\nAnswer:")


@pytest.mark.parametrize(
    ("row", "form", "columns"),
    [
        (ASKED | {"answer": 1, "subject": "s"}, "choices", {}),
        ({"question": "q", "A": "x", "B": "y", "C": "z", "answer": "B"}, "lettered_choices", {}),
        (
            {"question": "q", "opa": "x", "opb": "y", "opc": "z", "cop": 1, "exp": "because"},
            "lettered_choices",
            {"answer": "cop", "A": "opa", "B": "opb", "C": "opc"},
        ),
        (
            {"question": "q", "answer": "y", "options": {"A": "x", "B": "y"}, "answer_idx": "B"},
            "choices",
            {"choices": "options"},
        ),
        (
            {"article": "Rain falls.", "question": "q", "options": ["x", "y"], "answer": "A"},
            "choices",
            {"context": "article", "choices": "options"},
        ),
        (
            {"question": "q", "choices": json.dumps(["x", "y"]), "answer": "A"},
            "choices",
            {},
        ),
        (
            {"question_stem": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]},
             "answerKey": "B"},
            "choices",
            {"question": "question_stem", "answer": "answerKey"},
        ),
        ({"question": "q", "choices": "x or y", "answer": "x"}, "prompt_completion",
         {"prompt": "question", "completion": "answer"}),
        ({"question": "q", "choices": ["x", "y"], "answer": "z"}, "prompt_completion",
         {"prompt": "question", "completion": "answer"}),
    ],
    ids=["mmlu", "ceval", "medmcqa", "medqa", "race", "JSON", "arc", "text", "other answers"],
)  # fmt: skip
def test_a_proposal_finds_choices_by_name_and_content(
    row: dict[str, Any], form: str, columns: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 3)
    files = read_records(str(path))
    assert guessed_columns(files.names, files.rows) == (form, columns)

    config = DataConfig(source=str(path), columns=columns)
    assert len(records_of(config)) == 3


@pytest.mark.parametrize("question", ["Which?", "水是什么"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_to_learn_are_those_that_an_evaluation_scores(kind: str, question: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    row = {"question": question, "choices": ["he", "she"], "answer": "B"}
    (example,) = tokenize([("r", row)], "choices", tokenizer, max_length=400).examples
    choice = Choice("q", question, ("he", "she"), 1)
    prompt = prepare([choice], tokenizer, context=None).prompts[0]
    assert list(example.input_ids) == [*prompt.prefix, *prompt.endings[1], tokenizer.eos_token_id]
    assert example.label_tokens == len(prompt.endings[1]) + 1


def test_a_chat_template_gets_the_letter_without_the_space_before_it() -> None:
    reader = RecordReader("choices", {})
    row = ASKED | {"answer": "B"}
    chat = read_as(reader.read("r", row), "messages").content
    assert isinstance(chat, Chat)
    assert [message["content"] for message in chat.messages] == [PROMPT, "B"]


def test_a_list_that_python_wrote_is_proposed_so_that_its_fault_is_named(tmp_path: Path) -> None:
    """As a question with an answer, the letters of choices that nobody sees would be learned."""
    path = tmp_path / "d.csv"
    path.write_text("question,choices,answer\n" + "q,\"['x', 'y']\",A\n" * 3)
    files = read_records(str(path))
    assert guessed_columns(files.names, files.rows) == ("choices", {})
    with pytest.raises(ConfigError, match="3 times: field 'choices': the text is no JSON"):
        records_of(DataConfig(source=str(path)))
