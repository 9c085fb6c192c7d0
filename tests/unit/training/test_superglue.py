"""SuperGLUE: its files as clozes, its metrics by hand, and `fluvial evaluate --superglue`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.errors import ConfigError
from fluvial.runs.evaluation import with_remedies
from fluvial.training.superglue import READERS, Cloze, read_superglue
from fluvial.training.superglue_scores import METRICS, metrics
from tests.support.superglue import RECORDS, write_superglue
from tests.unit.training.test_evaluate_as_trained import _evaluate

PROMPTS = {
    "BoolQ": ("Ice is cold. Question: is ice cold? Answer:", " Yes", ""),
    "CB": ('"It is wet"?', " Yes", ', "It rains."'),
    "COPA": ('"it broke" or "it flew"? The cup fell, so', " it broke", ""),
    "MultiRC": (
        'Mara has a cat and a dog. Question: What has Mara? Is it "A cat"?',
        " Yes",
        "",
    ),
    "ReCoRD": (
        "The old town had a mill. Mara ran the mill of Ostrel.\n- Ostrel is a town\nThe mill of",
        "Ostrel",
        ", a town, was old",
    ),
    "RTE": ('"It is wet"?', " Yes", ', "It rains."'),
    "WiC": (
        '"The bank of the river." / "The bank has money." Similar sense of "bank"?',
        " No",
        "",
    ),
    "WSC": (
        "Mara called Nils because *she* was late. The pronoun '*she*' refers to",
        " Mara",
        "",
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Cloze]]:
    return read_superglue(write_superglue(tmp_path_factory.mktemp("superglue")))


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", list(READERS))
def test_the_first_record_of_a_task_is_its_papers_prompt(
    task: str, tasks: dict[str, list[Cloze]]
) -> None:
    before, answer, after = PROMPTS[task]
    cloze = tasks[task][0]
    assert (cloze.before, cloze.answers, cloze.after) == (before, (answer,), after)


def test_candidates_are_labels_choices_or_texts_of_the_record(
    tasks: dict[str, list[Cloze]],
) -> None:
    assert [cloze.answers for cloze in tasks["CB"]] == [(" Yes",), (" No",), (" Maybe",)]
    assert tasks["CB"][0].candidates == (" Yes", " No", " Maybe")
    assert tasks["COPA"][1].before.endswith("The cup fell, because")
    assert tasks["COPA"][1].answers == (" i pushed it",)
    assert tasks["ReCoRD"][0].candidates == (" Mara", " Ostrel", " old town")
    assert tasks["ReCoRD"][0].endings()[1] == " Ostrel, a town, was old"
    assert [cloze.answers for cloze in tasks["BoolQ"]] == [(" Yes",), (" No",)]
    first, second, third = tasks["MultiRC"]
    assert first.question == second.question != third.question


def test_nouns_for_one_pronoun_are_rivals(tasks: dict[str, list[Cloze]]) -> None:
    mara, nils, mill = tasks["WSC"]
    assert (mara.candidates, mara.answers) == ((" Mara", " Nils"), (" Mara",))
    assert (nils.candidates, nils.answers) == ((" Nils", " Mara"), (" Mara",))
    assert (mill.candidates, mill.answers) == ((" The mill",), (" The mill",))


def test_only_the_tasks_of_the_folder_are_read(tmp_path: Path) -> None:
    write_superglue(tmp_path, {"RTE": RECORDS["RTE"]})
    assert list(read_superglue(tmp_path)) == ["RTE"]
    with pytest.raises(ConfigError, match=r"has no task of SuperGLUE: expected TASK/val\.jsonl"):
        read_superglue(tmp_path / "RTE")


def without(task: str, key: str) -> dict[str, Any]:
    return {name: value for name, value in RECORDS[task][0].items() if name != key}


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("BoolQ", without("BoolQ", "label"), "'label' is missing.* test files have no labels"),
        ("BoolQ", RECORDS["BoolQ"][0] | {"label": 1}, "'label' must be true or false: a number"),
        ("CB", RECORDS["CB"][0] | {"label": "maybe"}, "'label' must be 'entailment' or"),
        ("COPA", RECORDS["COPA"][0] | {"label": 2}, "'label' must be a whole number from 0 to 1"),
        ("COPA", RECORDS["COPA"][0] | {"question": "why"}, "'question' must be 'cause' or"),
        ("MultiRC", {"passage": {"text": "t", "questions": []}}, "passage: 'questions' must be"),
        ("MultiRC", {"passage": "t"}, "passage must be an object, and is text"),
        ("ReCoRD", RECORDS["ReCoRD"][0] | {"qas": [{"query": "x"}]}, "must have '@placeholder'"),
        (
            "ReCoRD",
            RECORDS["ReCoRD"][0] | {"passage": {"text": "t", "entities": [{"start": 0, "end": 1}]}},
            "passage: entities 1: 'end' must be a whole number from 0 to 0",
        ),
        ("RTE", RECORDS["RTE"][0] | {"premise": " "}, "'premise' must be text, and is blank"),
        ("WiC", RECORDS["WiC"][0] | {"word": 3}, "'word' must be text, and is a number"),
        ("WSC", without("WSC", "target"), "field 'target' is missing"),
    ],
)
def test_a_record_of_another_form_is_named_by_file_and_line(
    task: str, record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_superglue(tmp_path, {task: [RECORDS[task][0], record]})
    with pytest.raises(ConfigError, match=rf"val\.jsonl, line 2.*{message}") as caught:
        read_superglue(tmp_path)
    assert "faults" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"x", "is not JSON"),
        (b'{"passage": "caf\xe9"}', "byte 17 of the file is 0xe9.* save it anew as UTF-8"),
        ("{}\n{}".encode("utf-16"), "line 1 .* save it anew as UTF-8"),
        ("{}\n{}".encode("utf-16-le"), "byte 2 .* save it anew as UTF-8"),
        (b"[{}]", "is one JSON document, .*; write it so"),
    ],
)
def test_no_setting_of_records_is_the_remedy_for_a_file_of_superglue(
    data: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "BoolQ").mkdir()
    (tmp_path / "BoolQ" / "val.jsonl").write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught, with_remedies({"sites": ["north"]}):
        read_superglue(tmp_path)
    assert "--s" not in str(caught.value)
    assert "data." not in str(caught.value)


# -- metrics ---------------------------------------------------------------------------------------


def clozes(*answers: str, questions: str = "") -> list[Cloze]:
    """Clozes with one right candidate each."""
    return [
        Cloze("r", "", (), (answer,), question=question)
        for answer, question in zip(answers, questions or " " * len(answers), strict=True)
    ]


@pytest.mark.parametrize("task", ["BoolQ", "COPA", "RTE", "WiC", "WSC"])
def test_accuracy_is_the_share_of_right_candidates(task: str) -> None:
    assert metrics(task, clozes("a", "b", "a", "b"), ["a", "b", "b", "b"]) == {"accuracy": 3 / 4}


def test_a_noun_without_rivals_that_is_wrong_is_never_right() -> None:
    lone = Cloze("r", "", (" it",), ())
    assert metrics("WSC", [lone, *clozes(" it")], [" it", " it"]) == {"accuracy": 1 / 2}


def test_cb_has_the_mean_of_the_f1_of_its_classes() -> None:
    # Yes: 2 labels, 3 picks, 2 both: 4/5. No: 2 labels, 1 pick, 1 both: 2/3. Maybe: 1, 1, 0: 0.
    labels = clozes("Yes", "Yes", "No", "No", "Maybe")
    picks = ["Yes", "Yes", "No", "Maybe", "Yes"]
    assert metrics("CB", labels, picks) == {
        "accuracy": 3 / 5,
        "macro_f1": pytest.approx((4 / 5 + 2 / 3 + 0) / 3, abs=1e-15),
    }


def test_multirc_counts_answers_and_whole_questions() -> None:
    labels = clozes(" Yes", " No", " Yes", " Yes", " No", questions="aabbc")
    picks = [" Yes", " No", " Yes", " No", " Yes"]

    # Of the class Yes: 3 labels, 3 picks, 2 both. Question a is right, b and c are not.
    assert metrics("MultiRC", labels, picks) == {"f1a": 2 / 3, "exact_match": 1 / 3}
    assert metrics("MultiRC", labels, [" No"] * 5)["f1a"] == 0.0


def test_record_takes_the_best_answer_by_words() -> None:
    queries = [
        Cloze("r", "", (), ("Ostrel", "town of Ostrel")),
        Cloze("r", "", (), ("the Mara",)),
        Cloze("r", "", (), ("mill",)),
    ]
    picks = [" old Ostrel", " Mara", " Mara"]

    # First: 2/3 against Ostrel, 2/5 against the other. Second: articles do not count. Third: 0.
    assert metrics("ReCoRD", queries, picks) == {
        "f1": pytest.approx((2 / 3 + 1 + 0) / 3, abs=1e-15),
        "exact_match": 1 / 3,
    }


def test_every_task_has_metrics() -> None:
    assert list(METRICS) == list(READERS)


# -- the command -----------------------------------------------------------------------------------


def likeliest(folder: Path, cloze: Cloze) -> str:
    """The candidate by one forward pass for each, of nothing but transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    scores = []

    for ending in cloze.endings():
        ids = torch.tensor([tokenizer(cloze.before + ending)["input_ids"]])
        start = len(tokenizer(cloze.before)["input_ids"])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0].log_softmax(-1)
        terms = logs[start - 1 : -1].gather(1, ids[0, start:, None])
        scores.append(float(terms.sum()) / (1 if cloze.words else len(ending.encode())))

    return cloze.candidates[scores.index(max(scores))]


def test_evaluate_measures_every_task(
    tiny_model: Path, tasks: dict[str, list[Cloze]], tmp_path: Path
) -> None:
    folder = write_superglue(tmp_path / "superglue")
    measured = _evaluate(tiny_model, "--superglue", folder)["superglue"]
    scores = []

    for task, row in measured["tasks"].items():
        picks = [likeliest(tiny_model, cloze) for cloze in tasks[task]]
        assert row["model"] == metrics(task, tasks[task], picks), task
        assert (row["clozes"], row["cut"]) == (len(tasks[task]), 0)
        scores.append(sum(row["model"].values()) / len(row["model"]))

    assert list(measured["tasks"]) == list(READERS)
    assert measured["tasks"]["WSC"]["alone"] == 1
    assert measured["average"]["model"] == pytest.approx(sum(scores) / 8, abs=1e-15)


def test_a_prompt_beyond_the_context_loses_its_beginning(tiny_model: Path, tmp_path: Path) -> None:
    record = RECORDS["BoolQ"][0] | {"passage": "Ice is cold. " * 2000}
    folder = write_superglue(tmp_path / "superglue", {"BoolQ": [record, RECORDS["BoolQ"][1]]})
    measured = _evaluate(tiny_model, "--superglue", folder)
    assert measured["superglue"]["tasks"]["BoolQ"]["cut"] == 1
    assert "data" not in measured
    json.dumps(measured, allow_nan=False)
