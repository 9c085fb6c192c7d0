"""Held-out loss, multiple choice, and the command that measures an adapter."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

from fluvial.cli import app, main
from fluvial.data import DataError, Example
from fluvial.data.multiple_choice import Choice, language_of, render
from fluvial.errors import ConfigError
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.runs.evaluation import with_remedies
from fluvial.seeds import generator
from fluvial.training.choice_prompts import Sheet, prepare
from fluvial.training.choice_scores import Marks, bootstrap, score
from fluvial.training.choices import read_choices
from fluvial.training.evaluate import Heldout, has_effect, heldout
from fluvial.training.folders import kind_of, read_adapter_folder
from fluvial.wire.tensors import Named
from tests.support import SHARED
from tests.support.runs import run_table

LORA = LoraSettings(r=2, lora_alpha=4, lora_dropout=0.0)
WATER = Choice(
    "w", "What is water?", ("Wet", "Dry", "A stone", "A bird in the sky"), 0, "small_streams"
)
RIVER = Choice("r", "What is a river?", ("Sand", "Many streams", "Fire", "Air"), 1, "small_streams")
LETTERS_ONLY = "What is water?\nA. Wet\nB. Dry\nC. A stone\nD. A bird in the sky\nAnswer:"


@pytest.fixture(scope="module")
def pool(tiny_model: Path) -> ModelPool:
    return ModelPool(ModelConfig(name_or_path=str(tiny_model), device="cpu"), LORA)


@pytest.fixture(scope="module")
def changed(pool: ModelPool) -> Named:
    """An adapter that moves the logits a good deal."""
    start = initial_state(pool.layout, 0)
    return {name: torch.randn(t.shape, generator=generator(1, name)) for name, t in start.items()}


def _record(**changes: Any) -> dict[str, Any]:
    return {
        "id": "q7",
        "question": "Which?",
        "choices": ["a", "b", "c", "d"],
        "answer": "B",
        **changes,
    }


def _write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# -- held-out ------------------------------------------------------------------------------------


def test_heldout_sums_add_up() -> None:
    total = Heldout.sum([Heldout(1.0, 1, 2), Heldout(5.0, 2, 4)])
    assert (total.loss, total.accuracy, total.label_tokens) == (1.0, 0.5, 6)


def test_has_effect(pool: ModelPool, changed: Named) -> None:
    assert not has_effect(pool, initial_state(pool.layout, 3), [1, 20, 30])  # B is zero
    assert has_effect(pool, changed, [1, 20, 30])


# -- questions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"choices": ["a"]}, "must be a list of 2 to 10 texts, and is a list of 1"),
        ({"choices": ["a", "b", "c", " "]}, "choice D of 'choices' is blank"),
        ({"choices": "abcd"}, "must be a list of 2 to 10 texts, and is text"),
        ({"answer": 4}, "from A to D, .*, or 0 to 3, and is none of them: numbers count from 0"),
        ({"answer": "E"}, "and is none of them"),
        ({"answer": "AB"}, "and is none of them"),
        ({"answer": 1.0}, "and is none of them"),
        ({"answer": None}, "or 0 to 3, and is null"),
        ({"question": " "}, "must be text that is not blank, and is blank"),
        ({"question": "\ud800"}, "holds half of a surrogate pair"),
        ({"subject": 3}, "'subject' must be text"),
    ],
)
def test_malformed_record_is_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = _write(tmp_path / "q.jsonl", [_record(id="fine"), _record(**changes)])
    with pytest.raises(ConfigError, match=problem) as caught:
        read_choices(path)
    assert "line 2, id 'q7'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("\n\n", "holds no record .2 blank lines"),
        ("{\n", r"line 1 \(.*\) is not JSON"),
        ("[1]\n", "is one JSON document, not one record on each line"),
        ('{"a": 1}\n[1]\n', "line 2 holds a list"),
        ('{"id": "a", "id": "b"}\n', "line 1 has the field 'id' twice"),
        ('{"id": 4}\n', "line 1, id 4: field 'question' is missing"),
    ],
)
def test_malformed_file(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_choices(path)
    with pytest.raises(ConfigError, match="there is no file"):
        read_choices(tmp_path / "other.jsonl")


def test_no_remedy_for_records_stands_at_a_fault_of_questions(tmp_path: Path) -> None:
    path = _write(tmp_path / "q.jsonl", [_record(question="")])
    with pytest.raises(ConfigError, match="and is blank") as caught, with_remedies({}):
        read_choices(path)
    assert "--set" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        ("x.jsonl: is empty", ""),
        ("x.jsonl: field 'completion' must be text", ""),
        (
            "x.jsonl: fields ['a'] fit no form. Set data.form, or rename with data.columns",
            "columns",
        ),
        ('x.csv: set data.encoding = "utf-16"', """data.encoding="utf-16"'"""),
        ('x.csv: set data.encoding, for instance to "gb18030"', """data.encoding="gb18030"'"""),
        ('x.csv: set data.delimiter = "\\t"; if', """data.delimiter="\\t"'"""),
    ],
)
def test_a_command_adds_the_setting_that_a_fault_of_records_names(fault: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught, with_remedies({}):
        raise DataError([fault])
    assert ("With this command, add --set" in str(caught.value)) == bool(remedy)
    assert remedy in str(caught.value).partition("With this command")[2]


def test_questions_in_csv_are_refused_with_the_form_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("question,answer\nx,A\n")
    with pytest.raises(ConfigError, match=r"questions are read from JSON, one record a line"):
        read_choices(tmp_path / "q.csv")


@pytest.mark.parametrize(
    ("option", "also"),
    [
        ("--data", ()),
        ("--choices", ()),
        ("--shots-from", ("--choices", "pyproject.toml")),
        ("--superglue", ()),
        ("--include-path", ("--tasks", "mmlu")),
    ],
)
def test_a_path_that_is_missing_is_refused_before_weights_are_read(
    option: str, also: tuple[str, ...]
) -> None:
    result = CliRunner().invoke(app, ["evaluate", "no-such-weights", *also, option, "no.jsonl"])
    assert str(result.exception) == f"{option}: there is no file or folder 'no.jsonl'"


def test_a_batch_is_bounded() -> None:
    result = CliRunner().invoke(app, ["evaluate", "x", "--batch-size", "1025"])
    assert "1<=x<=1024" in result.output


@pytest.mark.parametrize(
    "words",
    [("evaluate", "x", "--limit"), ("chat", "x", "--temperature"), ("init", "x", "--uplink")],
)
@pytest.mark.parametrize("number", ["nan", "-nan", "inf"])
def test_numbers_are_finite(words: tuple[str, ...], number: str) -> None:
    """A range of click has nan in it."""
    result = CliRunner().invoke(app, [*words[:-1], f"{words[-1]}={number}"])
    assert result.exit_code == 2
    assert "no finite number" in result.output or "is not in the range" in result.output


def test_prompt_of_mmlu() -> None:
    assert render(WATER, [RIVER], "letter", "en") == (
        "The following are multiple choice questions (with answers) about small streams.\n\n"
        "What is a river?\nA. Sand\nB. Many streams\nC. Fire\nD. Air\nAnswer: B\n\n" + LETTERS_ONLY
    )
    assert render(WATER, [RIVER], "text", "en") == (
        "The following are questions (with answers) about small streams.\n\n"
        "Question: What is a river?\nAnswer: Many streams\n\nQuestion: What is water?\nAnswer:"
    )


def test_prompt_of_ceval() -> None:
    one = Choice("1", "水是____。", ("湿的", "干的", "石头", "鸟"), 0, "physics", "物理")
    assert language_of(one.question) == "zh"
    assert language_of("What is water?") == "en"
    assert render(one, [one], "letter", "zh") == (
        "以下是中国关于物理考试的单项选择题，请选出其中的正确答案。\n\n"  # noqa: RUF001 - Chinese punctuation
        "水是____。\nA. 湿的\nB. 干的\nC. 石头\nD. 鸟\n答案：A\n\n"  # noqa: RUF001 - Chinese punctuation
        "水是____。\nA. 湿的\nB. 干的\nC. 石头\nD. 鸟\n答案："  # noqa: RUF001 - Chinese punctuation
    )


# -- scores --------------------------------------------------------------------------------------


def _text_of(prefix: Sequence[int], tokenizer: Any) -> str:
    return cast(str, tokenizer.decode(prefix, skip_special_tokens=True))


class _Fond(torch.nn.Module):
    """Prefers one token everywhere."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = torch.nn.Parameter(torch.tensor(token), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 300)
        logits[..., int(self.token)] = 5.0
        return type("Output", (), {"logits": logits})()


def test_known_preference(pool: ModelPool) -> None:
    sheet = prepare([WATER, RIVER], pool.tokenizer, context=None)
    likes_b = _Fond(pool.tokenizer("B", add_special_tokens=False)["input_ids"][0])
    marks = Marks.of(sheet, score(likes_b, sheet.prompts, pad_token_id=0))
    assert marks.right == (False, True)
    assert marks.accuracy == 0.5
    assert marks.standard_error == pytest.approx(math.sqrt(0.125))
    assert marks.by_subject() == {"small_streams": (1, 2)}


def test_logits_that_are_no_numbers_are_refused(pool: ModelPool) -> None:
    sheet = prepare([WATER], pool.tokenizer, context=None)
    broken = {name: torch.full(shape, math.nan) for name, shape in pool.layout.shapes}
    with (
        pool.model(broken) as model,
        pytest.raises(ConfigError, match="w: the model's logits are not numbers"),
    ):
        score(model, sheet.prompts, pad_token_id=0)


# -- length and examples -------------------------------------------------------------------------


def _prepare(tokenizer: Any, context: int | None, **options: Any) -> Sheet:
    return prepare(
        [WATER],
        tokenizer,
        context=context,
        shots=2,
        examples=[RIVER, WATER, RIVER, RIVER],
        **options,
    )


def test_examples_go_first_and_then_the_beginning_of_the_question(pool: ModelPool) -> None:
    tokenizer = pool.tokenizer
    length = {
        n: len(tokenizer(render(WATER, [RIVER] * n, "letter", "en") + " A")["input_ids"])
        for n in range(3)
    }
    for kept in (2, 1, 0):
        sheet = _prepare(tokenizer, length[kept])
        assert (sheet.dropped_shots, sheet.cut_questions, sheet.cut_tokens) == (2 - kept, 0, 0)
        assert _text_of(sheet.prompts[0].prefix, tokenizer).count("a river?") == kept

    cut = _prepare(tokenizer, length[0] - 7)
    assert (cut.dropped_shots, cut.cut_questions, cut.cut_tokens) == (2, 1, 7)
    whole = _prepare(tokenizer, length[0]).prompts[0]
    assert cut.prompts[0].prefix == (tokenizer.bos_token_id, *whole.prefix[8:])
    assert cut.prompts[0].endings == whole.endings

    with pytest.raises(ConfigError, match="w: its longest choice has"):
        _prepare(tokenizer, 4, scoring="text")


def test_a_question_is_never_its_own_example(pool: ModelPool) -> None:
    sheet = prepare([WATER, RIVER], pool.tokenizer, context=None, shots=1, examples=[WATER])
    assert sheet.short_of_shots == 1
    assert _text_of(sheet.prompts[0].prefix, pool.tokenizer).count("What is water?") == 1

    with pytest.raises(ConfigError, match="choose 0 to 5"):
        prepare([WATER], pool.tokenizer, context=None, shots=6, examples=[RIVER])
    for shots, examples in ((1, []), (0, [RIVER])):
        with pytest.raises(ConfigError, match="solved examples need --shots and --shots-from"):
            prepare([WATER], pool.tokenizer, context=None, shots=shots, examples=examples)


# -- intervals -----------------------------------------------------------------------------------


def test_bootstrap_is_seeded_and_like_the_normal_interval() -> None:
    values = [1] * 120 + [0] * 280
    found = bootstrap(values, 7)
    assert found is not None
    assert found == bootstrap(values, 7)
    assert found != bootstrap(values, 8)
    reach = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert found.mean == 0.3
    assert found.low == pytest.approx(0.3 - reach, abs=0.01)  # 2000 resamples
    assert found.high == pytest.approx(0.3 + reach, abs=0.01)


def test_bootstrap_covers_a_known_proportion() -> None:
    draws = torch.rand((40, 200), generator=torch.Generator().manual_seed(5)) < 0.4
    spans = [bootstrap(row.long().tolist(), 0) for row in draws]
    covered = sum(span is not None and span.low <= 0.4 <= span.high for span in spans)
    assert covered >= 34  # of 40 at 95 %: fewer than that has probability 0.001


def test_equal_answers_have_the_exact_interval() -> None:
    assert bootstrap([1, 1, 1], 0) is None
    span = Marks((True, True, True), (None, None, None)).interval(0)
    assert (span.mean, span.high) == (1.0, 1.0)
    assert span.low == pytest.approx(0.025 ** (1 / 3))


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, pool: ModelPool, changed: Named) -> Path:
    """A run's adapter."""
    run = {
        "fluvial": "0",
        "model": {"name_or_path": "gone", "dtype": "float32"},
        "data": {"max_length": 64},
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(run))
    pool.save(changed, tmp_path / "run" / "adapter")

    return tmp_path / "run" / "adapter"


def _evaluate(*arguments: Any) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--format", "json"])
    if result.exception is not None:
        raise result.exception
    return cast(dict[str, Any], json.loads(result.stdout))


def test_command(folder: Path, pool: ModelPool, changed: Named, tmp_path: Path) -> None:
    data = _write(
        tmp_path / "d.jsonl", [{"prompt": f"What is {n}? ", "completion": f"{n}"} for n in range(9)]
    )
    choices = _write(
        tmp_path / "q.jsonl",
        [_record(id=n, question=f"Which {n}?", answer="ABCD"[n % 4]) for n in range(8)],
    )
    limits = ["--set", "evaluate.max_new_tokens=3", "--set", "model.device='cpu'"]
    found = _evaluate(
        folder, "--data", data, "--choices", choices, "--shots", 1, "--shots-from", choices, *limits
    )
    records = found["data"]
    assert (
        records["records"],
        records["questions"],
        records["max_length"],
        records["max_new_tokens"],
    ) == (9, 9, 64, 3)

    for name, adapter in (("base", pool.base_state()), ("adapter", changed)):
        tokens = [
            (
                pool.tokenizer(f"What is {n}? ")["input_ids"],
                pool.tokenizer(f"{n}</s>")["input_ids"][1:],
            )
            for n in range(9)
        ]
        examples = [
            Example([*before, *after], [-100] * len(before) + after) for before, after in tokens
        ]
        with pool.model(adapter) as model:
            assert records[name]["loss"] == pytest.approx(
                heldout(model, examples, pad_token_id=0).loss
            )

        assert records[name]["perplexity"] == math.exp(records[name]["loss"])
        assert records[name]["exact_match"] == 0
        low, high = found["choices"][name]["interval"]
        assert low <= found["choices"][name]["accuracy"] <= high

    assert found["choices"]["chance"] == 0.25
    assert found["choices"]["by_subject"][""]["questions"] == 8
    alone = _evaluate(folder, "--choices", choices, "--no-base", "--scoring", "text")
    assert "data" not in alone
    assert "base" not in alone["choices"]
    table = CliRunner().invoke(
        app, ["evaluate", str(folder), "--choices", str(choices), "--data", str(data), *limits]
    )
    assert table.exit_code == 0
    assert "95 % interval" in table.stdout
    assert "perplexity" in table.stdout


def test_exit_code_of_an_adapter_without_effect(
    pool: ModelPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pool.save(initial_state(pool.layout, 0), tmp_path / "zero")
    choices = _write(tmp_path / "q.jsonl", [_record()])
    monkeypatch.setattr(
        "sys.argv", ["fluvial", "evaluate", str(tmp_path / "zero"), "--choices", str(choices)]
    )

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "ConfigError" in capsys.readouterr().err


def test_command_refuses(folder: Path, pool: ModelPool, tmp_path: Path) -> None:
    data = _write(tmp_path / "d.jsonl", [{"text": "The river carries the water."}])
    with pytest.raises(ConfigError, match="nothing to measure"):
        _evaluate(folder)
    with pytest.raises(ConfigError, match=f"did you mean {folder}"):
        kind_of(str(folder.parent))
    with pytest.raises(ConfigError, match=r"rounds: without effect"):
        _evaluate(folder, "--data", data, "--set", "rounds=3")
    for option, value in {
        "--shots": 2,
        "--scoring": "text",
        "--language": "zh",
        "--benchmark": "mmlu",
        "--subject-field": "topic",
    }.items():
        with pytest.raises(
            ConfigError, match=f"{option}: without effect, because no questions are named"
        ):
            _evaluate(folder, "--data", data, option, value)

    with pytest.raises(ConfigError, match="reads at most 128"):
        _evaluate(folder, "--data", data, "--set", "data.max_length=129")
    pool.save(initial_state(pool.layout, 0), tmp_path / "zero")
    with pytest.raises(ConfigError, match="exactly the base"):
        _evaluate(tmp_path / "zero", "--data", data)


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_base_of_a_moved_installation(folder: Path, tiny_model: Path) -> None:
    assert read_adapter_folder(folder).base == str(tiny_model)
    _edit(folder, base_model_name_or_path="/gone/fluvial/assets/tiny")
    assert read_adapter_folder(folder).base == "gone"  # what the run's config.json names
    (folder.parent / "config.json").unlink()
    assert read_adapter_folder(folder).base == "/gone/fluvial/assets/tiny"
    _edit(folder, base_model_name_or_path=None)

    with pytest.raises(ConfigError, match="base_model_name_or_path is None"):
        read_adapter_folder(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": []},
        {"r": None},
    ],
)
def test_other_adapters_are_refused(folder: Path, changes: dict[str, Any]) -> None:
    _edit(folder, **changes)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        read_adapter_folder(folder)


def test_adapter_of_another_model(folder: Path, tiny_gqa_model: Path, tmp_path: Path) -> None:
    data = _write(tmp_path / "d.jsonl", [{"text": "The river carries the water."}])
    with pytest.raises(ConfigError, match="does not fit"):
        _evaluate(folder, "--data", data, "--set", f"model.name_or_path='{tiny_gqa_model}'")


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside this checkout")
@pytest.mark.parametrize(("name", "dev"), [("mmlu/test", "mmlu/dev"), ("ceval/val", "ceval/dev")])
def test_shared_questions(pool: ModelPool, changed: Named, name: str, dev: str) -> None:
    questions = read_choices(SHARED / f"{name}.jsonl")[:8]
    examples = read_choices(SHARED / f"{dev}.jsonl")
    sheet = prepare(questions, pool.tokenizer, context=128, shots=2, examples=examples)
    assert sheet.short_of_shots == 0
    assert sheet.dropped_shots > 0
    assert {language_of(question.question) for question in questions} == {
        "zh" if "ceval" in name else "en"
    }

    with pool.model(changed) as model:
        marks = Marks.of(sheet, score(model, sheet.prompts, pad_token_id=0))
    assert len(marks.right) == 8


def test_an_answer_may_be_a_number(tmp_path: Path) -> None:
    """As in the hub's copies of MMLU."""
    path = _write(tmp_path / "q.jsonl", [_record(answer=2)])
    assert (
        read_choices(path)[0].answer
        == read_choices(_write(tmp_path / "l.jsonl", [_record(answer="C")]))[0].answer
    )


def test_a_tuned_model_beside_its_base(
    run_config: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """The folder that a run with tune = "full" writes."""
    table = {key: value for key, value in run_config.items() if key != "lora"} | {
        "tune": "full",
        "rounds": 1,
    }
    folder = Path(run_table(table, tmp_path / "run")["folder"]) / "model"
    data = _write(
        tmp_path / "d.jsonl", [{"text": "The river carries the water of many small streams."}]
    )
    found = _evaluate(folder, "--data", data)
    assert found["base_model"] == str(tiny_model)
    whole = ModelPool(ModelConfig(name_or_path=str(folder), device="cpu"), None)
    weights = {name: whole.base.get(name) for name in whole.layout.names}
    assert all(
        torch.equal(weights[name], tensor)
        for name, tensor in read_adapter_folder(folder).tensors.items()
    )
    assert found["data"]["adapter"]["loss"] != pytest.approx(
        found["data"]["base"]["loss"], rel=1e-3
    )
    assert (
        "tuned model"
        in CliRunner().invoke(app, ["evaluate", str(folder), "--data", str(data)]).stdout
    )
    shutil.copytree(folder, tmp_path / "alone")
    assert _evaluate(tmp_path / "alone", "--data", data)["data"] == found["data"]
    (tmp_path / "alone" / "fluvial.json").unlink()  # a model as any other, whose base nothing names
    settings = ["--set", "data.max_length=32", "--set", "data.form='text'"]
    alone = _evaluate(tmp_path / "alone", "--data", data, *settings)
    assert alone["data"]["model"] == pytest.approx(found["data"]["adapter"], rel=1e-5)
    assert _evaluate(folder, "--data", data, "--no-base")["data"]["model"] == alone["data"]["model"]
