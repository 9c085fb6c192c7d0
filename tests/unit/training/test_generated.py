"""Scores of generated answers: batched generation, figures by site, intervals, and refusals."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from lm_eval.tasks.mlqa.utils import exact_match_score, f1_score
from scipy import stats
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.data import Question
from fluvial.errors import ConfigError
from fluvial.models.generation import SHORT, continuations
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.report.result_tables import interval_words
from fluvial.training.answer_scores import equal_in_squad, token_f1
from fluvial.training.choice_scores import bootstrap
from fluvial.training.generated import NO_PAIRS, AnswerConfig, _lines, _scored
from tests.support.runs import run_table

SITES = ("north", "south", "south")
NEW_TOKENS = 6


def _records() -> list[dict[str, Any]]:
    """Questions of unequal length at two sites, one with two right answers."""
    words = ["river", "water", "stone", "bird", "tree"]
    return [
        {
            "clinic": SITES[number % 3],
            "prompt": "Name: " + " ".join(words[: 1 + number % 5]),
            "completion": f" {words[number % 5]} {number}",
            "references": [words[number % 4]],
        }
        for number in range(12)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "answered.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in _records()))
    return path


def _evaluate(*words: object) -> Any:
    command = ["evaluate", *map(str, words), "--format", "json"]
    return json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)


@pytest.mark.parametrize("name", ["tiny_model", "tiny_gpt2_model"])
def test_batches_answer_as_transformers_does_one_by_one(
    name: str, request: pytest.FixtureRequest
) -> None:
    """Rotary positions and learned ones, beside padding on the left."""
    from transformers import AutoModelForCausalLM

    folder = cast(Path, request.getfixturevalue(name))
    pool = ModelPool(ModelConfig(name_or_path=str(folder), device="cpu", dtype="float32"), None)
    tokenizer = pool.tokenizer
    prompts = [record["prompt"] for record in _records()]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []

    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        output = plain.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        new = output[0, ids["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True))

    with pool.model({}) as model:
        for size in (1, 5):
            answers = continuations(
                cast(Any, model), tokenizer, prompts, max_new_tokens=NEW_TOKENS, at_once=size
            )
            assert answers == expected
    assert len(set(expected)) > 3


def test_f1_and_the_normalised_match_are_those_of_an_official_script() -> None:
    """That of MLQA, which is SQuAD's for English, as lm-eval has it."""
    draw = np.random.default_rng(0)
    words = ["The", "cat", "a", "hat!", "an", "re-d", "$9", "Hat"]
    for _ in range(300):
        answer, reference = (
            " ".join(draw.choice(words, size=draw.integers(1, 6))) + " cat" for _ in range(2)
        )
        assert token_f1(answer, reference) == pytest.approx(f1_score(answer, reference, "en"))
        assert equal_in_squad(answer, reference) == exact_match_score(answer, reference, "en")


def _expected(rows: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, float]:
    """Means by rouge_score itself, and by plain comparison."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    matches = []
    overlaps = []
    for answer, record in rows:
        references = [record["completion"], *record["references"]]
        matches.append(any(answer.strip() == each.strip() for each in references))
        overlaps.append(max(scorer.score(each, answer)["rougeL"].fmeasure for each in references))

    return {"exact_match": sum(matches) / len(rows), "rouge_l": sum(overlaps) / len(rows)}


def test_scores_by_site_and_over_all(tiny_model: Path, data: Path) -> None:
    command = [tiny_model, "--data", data, "--generate", "--max-new-tokens", NEW_TOKENS]
    command += ["--site-field", "clinic", "--batch-size", 5]
    command += ["--answers", data.with_name("answers.jsonl")]
    found = _evaluate(*command)["data"]
    pool = ModelPool(ModelConfig(name_or_path=str(tiny_model), device="cpu"), None)
    records = _records()
    answers = pool.generate({}, [one["prompt"] for one in records], max_new_tokens=NEW_TOKENS)
    pairs = list(zip(answers, records, strict=True))
    written = map(json.loads, data.with_name("answers.jsonl").read_text().splitlines())
    assert list(written) == [
        {
            "prompt": record["prompt"],
            "references": [record["completion"], *record["references"]],
            "site": record["clinic"],
            "answers": {"model": answer},
        }
        for answer, record in pairs
    ]
    parts = {site: [pair for pair in pairs if pair[1]["clinic"] == site] for site in set(SITES)}

    assert found["answers"]["by_site"].keys() == parts.keys()
    for scored, rows in (
        (found["answers"], pairs),
        *((found["answers"]["by_site"][site], rows) for site, rows in parts.items()),
    ):
        assert scored["questions"] == len(rows)
        for key, mean in _expected(rows).items():
            figure = scored["model"][key]
            assert figure["mean"] == pytest.approx(mean, abs=1e-6)  # counted in millionths
            if figure["interval"] is not None:
                low, high = figure["interval"]
                assert low <= figure["mean"] <= high
    assert found["model"]["rouge_l"] == found["answers"]["model"]["rouge_l"]["mean"]


def test_corpus_scores_are_those_of_sacrebleu() -> None:
    from sacrebleu import corpus_bleu, corpus_chrf

    answers = ["the cat sat on the mat", "a dog ran", "birds fly south in autumn"]
    questions = [
        Question("p", "the cat sat on a mat", ("a cat sat on the mat",)),
        Question("p", "the dog ran"),
        Question("p", "birds fly south in winter"),
    ]
    streams = [
        [question.answer for question in questions],
        ["a cat sat on the mat", None, None],
    ]
    found = _scored({"model": answers}, questions, AnswerConfig(4, ("bleu", "chrf")), 0)["model"]
    assert found["bleu"]["mean"] == corpus_bleu(answers, streams).score
    assert found["chrf"]["mean"] == corpus_chrf(answers, streams).score
    low, high = found["chrf"]["interval"]
    assert 0 <= low < found["chrf"]["mean"] < high <= 100


def test_a_difference_is_over_the_same_records() -> None:
    """Two of eight records become right: the interval is above zero, or touches it."""
    questions = [Question("p", str(number)) for number in range(8)]
    before = ["0", "1", *["x"] * 6]
    after = ["0", "1", "2", "3", *["x"] * 4]
    found = _scored({"base": before, "adapter": after}, questions, AnswerConfig(4), 0)
    change = found["difference"]["exact_match"]
    assert change["mean"] == pytest.approx(2 / 8)
    assert 0 <= change["interval"][0] < 2 / 8 < change["interval"][1]
    assert found["base"]["exact_match"]["mean"] == pytest.approx(2 / 8)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(("right", "method"), [(6, "wilson"), (0, "wilson")])
def test_a_record_that_several_sites_ask_counts_once(times: int, right: int, method: str) -> None:
    questions = [Question(f"p {number}", f"a {number}") for number in range(20)] * times
    answers = [each.answer if int(each.answer[2:]) < right else "x" for each in questions]
    figure = _scored({"model": answers}, questions, AnswerConfig(4), 0)["model"]["exact_match"]
    assert (figure["mean"], figure["interval_by"]) == (right / 20, method)
    known = stats.binomtest(right, 20).proportion_ci(0.95, method="wilson")
    assert figure["interval"] == pytest.approx([known.low, known.high])
    assert interval_words(right / 20, 20) == f"{100 * known.low:.1f} - {100 * known.high:.1f} %"


def test_written_answers_have_their_letters() -> None:
    asked = [Question("Was ist das?", "Störung")]
    assert '"Störung"' in _lines({"model": ["Störung"]}, asked, [])


def test_unequal_counts_weigh_in_the_mean_and_its_interval() -> None:
    """The standard error of a ratio, by the formula of Cochran (1977, sec. 6.4)."""
    draw = np.random.default_rng(0)
    counts = draw.integers(1, 6, 400)
    values = draw.random(400)
    found = bootstrap(values.tolist(), 0, counts.tolist())
    assert found is not None
    mean = float(values @ counts / counts.sum())
    error = math.sqrt(((values - mean) * counts).var(ddof=1) * 400) / counts.sum()
    assert found.mean == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


@pytest.mark.parametrize(("word", "left_out"), [("river", {"rouge_2": NO_PAIRS}), ("a river", {})])
def test_rouge_2_is_left_out_where_no_reference_has_two_words(
    tiny_model: Path, tmp_path: Path, word: str, left_out: dict[str, str]
) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text(json.dumps({"prompt": "Name:", "completion": f" {word}"}) + "\n")
    command = ["evaluate", str(tiny_model), "--data", str(path), "--max-new-tokens", "2"]
    answers = _evaluate(*command[1:])["data"]["answers"]
    assert answers["left_out"] == left_out
    assert ("rouge_2" in answers["model"]) == (not left_out)
    words = " ".join(CliRunner().invoke(app, command).stdout.split())
    assert ("ROUGE-2 is left out: no reference has two words" in words) == bool(left_out)
    assert "95 % intervals: Wilson's, over all questions" in words


def test_the_sites_of_a_run_are_those_of_its_column(
    run_config: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    settings = {
        "source": str(data),
        "partition": {"by": "column", "column": "clinic"},
        "max_length": 64,
        "heldout_share": 0.5,
    }
    table = run_config | {"rounds": 1, "data": settings}
    run_table(table, tmp_path / "run")
    command = [tmp_path / "run", "--data", data, "--max-new-tokens", 2]
    found = _evaluate(*command)["data"]["answers"]
    assert set(found["by_site"]) == set(SITES)
    assert set(found["by_site"]["north"]) == {"questions", "base", "adapter", "difference"}

    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "Name:", "completion": " river"}) + "\n")
    assert "by_site" not in _evaluate(tmp_path / "run", "--data", other)["data"]["answers"]
    table_text = CliRunner().invoke(app, ["evaluate", *map(str, command)]).stdout
    assert "Generated answers by site" in table_text
    assert "north" in table_text


def test_a_run_and_evaluate_have_the_same_scores(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """On the same held-out records, which the base answers rightly, as `evaluate` reads them: all
    sites together, where a run reads each alone."""
    new_tokens = SHORT + 2
    model = run_config["model"] | {"dtype": "bfloat16"}
    pool = ModelPool(ModelConfig(**model, device="cpu"), None)
    records = _records()
    answers = pool.generate({}, [one["prompt"] for one in records], max_new_tokens=new_tokens)
    rows = [one | {"completion": text} for one, text in zip(records, answers, strict=True)]
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows if row["completion"].strip()))
    settings = {
        "source": str(data),
        "heldout_source": str(data),
        "partition": {"by": "column", "column": "clinic"},
        "max_length": 64,
    }
    table = run_config | {"model": model, "data": settings, "rounds": 1}
    table["evaluate"] = {"max_new_tokens": new_tokens}
    by_site = run_table(table, tmp_path / "run")["heldout_by_site"]
    found = _evaluate(tmp_path / "run", "--data", data)["data"]["answers"]["by_site"]
    for site, measured in by_site.items():
        assert measured["base"]["exact_match"] == 1
        for run_name, name in (("base", "base"), ("final", "adapter")):
            for key in ("exact_match", "f1", "rouge_l"):
                mean = found[site][name][key]["mean"]
                assert mean == pytest.approx(measured[run_name][key], abs=1e-6)


def test_what_is_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "The river carries water."}) + "\n")
    for words, why in (
        (["--data", text, "--generate"], "--generate: .* has no records with an answer"),
        (["--data", text, "--answers", "a.jsonl"], "--answers: .* has no records with an answer"),
        (["--data", data, "--answers", "gone/a.jsonl"], "--answers gone/a.jsonl: there is no fol"),
        (["--data", data, "--answers", data], "exists, and is no file of answers; name another"),
        (["--data", data, "--metrics", "meteor"], "--metrics meteor: unknown; known are"),
        (["--data", data, "--site-field", "ward"], "--site-field 'ward': .* has the columns"),
        (["--tasks", "x", "--max-new-tokens", 3], "--max-new-tokens: without effect"),
        (["--data", data, "--no-generate", "--metrics", "f1"], "--no-generate is given"),
    ):
        with pytest.raises(ConfigError, match=why):
            _evaluate(tiny_model, *words)
    assert "answers" not in _evaluate(tiny_model, "--data", data, "--no-generate")["data"]


def test_sacrebleu_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ConfigError, match=r"--metrics bleu: .*pip install 'fluvial\[evaluation\]'"):
        AnswerConfig(4, ("bleu",))
