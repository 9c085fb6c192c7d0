"""Tasks of lm-eval: what the command refuses, in one line that names the task and the remedy."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.data.templates import NAMED, with_template
from fluvial.errors import ConfigError
from fluvial.training.folders import weights_in
from fluvial.training.harness import Harness, HarnessConfig
from tests.support.harness import QUESTIONS, write_tasks
from tests.support.runs import run_table
from tests.support.tokenizer_kinds import byte_level


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "own")


def _evaluate(*words: object) -> Any:
    command = ["evaluate", *map(str, words), "--format", "json"]
    return json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)


def test_a_data_set_that_is_not_here_is_named_with_the_remedy(own: Path) -> None:
    """As the data of MMLU on a machine without network."""
    content = json.loads((own / "letters.yaml").read_text())
    content |= {"task": "far", "dataset_path": "cais/mmlu", "dataset_name": "anatomy"}
    del content["dataset_kwargs"]
    (own / "far.yaml").write_text(json.dumps(content))
    with pytest.raises(ConfigError) as refused:
        Harness(HarnessConfig(("far",), include_path=own))

    text = str(refused.value)
    assert "\n" not in text
    assert text.startswith("--tasks far: its data set is not in this machine's cache")
    assert "cais/mmlu" in text
    assert "--dataset far=FOLDER" in text


def test_a_fault_of_the_task_s_own_file_is_not_the_network_s(own: Path) -> None:
    content = json.loads((own / "letters.yaml").read_text())
    for name, change, words in (
        ("kind", {"output_type": "none"}, "lm-eval cannot load it"),
        ("file", {"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}, "cannot be read: .*no"),
    ):
        (own / f"{name}.yaml").write_text(json.dumps(content | {"task": name} | change))
        with pytest.raises(ConfigError, match=words) as refused:
            Harness(HarnessConfig((name,), include_path=own))
        assert "hub" not in str(refused.value)


def test_a_folder_takes_the_place_of_the_data_set(own: Path, tiny_model: Path) -> None:
    content = json.loads((own / "letters.yaml").read_text())
    content |= {"task": "far", "dataset_path": "cais/mmlu"}
    del content["dataset_kwargs"]
    (own / "far.yaml").write_text(json.dumps(content))
    copy = own.parent / "copy"
    copy.mkdir()
    (copy / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    command = [tiny_model, "--tasks", "far,letters", "--include-path", own]
    measured = _evaluate(*command, "--dataset", f"far={copy}")["tasks"]
    far, letters = measured["rows"]
    assert far["model"] == letters["model"]
    assert far["documents"] == len(QUESTIONS)

    empty = own.parent / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"--dataset far=.*empty: its data cannot be read"):
        _evaluate(*command, "--dataset", f"far={empty}")
    with pytest.raises(ConfigError, match="there is no folder"):
        _evaluate(*command, "--dataset", "far=nowhere")
    with pytest.raises(ConfigError, match="TASK=FOLDER"):
        _evaluate(*command, "--dataset", "far")
    with pytest.raises(ConfigError, match="--dataset texts: this is none of the tasks"):
        _evaluate(*command, "--dataset", f"texts={copy}")


def test_options_of_tasks_are_refused_without_tasks(own: Path, tiny_model: Path) -> None:
    for words in (
        ["--limit", 3],
        ["--num-fewshot", 0],
        ["--include-path", own],
        ["--dataset", "a=b"],
        ["--apply-chat-template"],
        ["--batch-size", 2],
        ["--out", "x"],
    ):
        with pytest.raises(ConfigError, match=f"{words[0]}: without effect, because no .*tasks"):
            _evaluate(tiny_model, "--choices", "x.jsonl", *words)

    with pytest.raises(ConfigError, match="names no task"):
        _evaluate(tiny_model, "--tasks", ",")
    with pytest.raises(ConfigError, match="--limit 0"):
        _evaluate(tiny_model, "--tasks", "texts", "--limit", 0)
    with pytest.raises(ConfigError, match="--include-path: there is no file or folder 'nowhere'"):
        _evaluate(tiny_model, "--tasks", "texts", "--include-path", "nowhere")


def test_lm_eval_is_asked_for_where_it_is_missing(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    monkeypatch.delitem(sys.modules, "fluvial.training.harness_model", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'fluvial\[evaluation\]'"):
        Harness(HarnessConfig(("texts",), include_path=own))


def test_the_end_of_lm_eval_is_one_line(own: Path, tiny_model: Path) -> None:
    """A longer answer than the model's context, which lm-eval asserts."""
    content = json.loads((own / "written.yaml").read_text())
    content["generation_kwargs"]["max_gen_toks"] = 10**4
    (own / "written.yaml").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"--tasks written: lm-eval stopped: .*10000"):
        _evaluate(tiny_model, "--tasks", "written", "--include-path", own, "--limit", 2)


def test_prompts_that_are_cut_are_counted(own: Path, tiny_model: Path) -> None:
    content = json.loads((own / "texts.yaml").read_text())
    content |= {"description": "water " * 200}
    (own / "texts.yaml").write_text(json.dumps(content))
    command = [tiny_model, "--tasks", "texts", "--include-path", own, "--limit", 3]
    assert _evaluate(*command)["tasks"]["cut_prompts"] == 3 * 4
    table = CliRunner().invoke(app, ["evaluate", *map(str, command)], catch_exceptions=False)
    assert "12 prompts cut on the left" in " ".join(table.stdout.split())


def test_the_folder_of_a_run_stands_for_its_weights(
    run_config: dict[str, Any], own: Path, tmp_path: Path
) -> None:
    run_table(run_config | {"rounds": 1}, tmp_path / "run")
    assert weights_in(str(tmp_path / "run")) == str(tmp_path / "run" / "adapter")
    assert weights_in(str(tmp_path / "run" / "adapter")) == str(tmp_path / "run" / "adapter")
    assert weights_in("embedded") == "embedded"
    command = ["--tasks", "texts", "--include-path", own, "--limit", 4]
    whole = _evaluate(tmp_path / "run", *command)
    inner = _evaluate(tmp_path / "run" / "adapter", *command)
    assert whole["tasks"]["rows"] == inner["tasks"]["rows"]
    assert set(whole["tasks"]["results"]) == {"base", "adapter"}


@pytest.mark.slow
def test_tasks_that_come_with_lm_eval(own: Path, tmp_path: Path, tiny_model: Path) -> None:
    """A task of MMLU from a folder, beside one of our own; and the nearest name for a wrong one."""
    copy = tmp_path / "mmlu"
    for split in ("test", "dev"):
        path = copy / "anatomy" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS[:12]))
    (copy / "README.md").write_text(
        "---\nconfigs:\n- config_name: anatomy\n  data_files:\n"
        "  - split: test\n    path: anatomy/test.jsonl\n"
        "  - split: dev\n    path: anatomy/dev.jsonl\n---\n"
    )
    command = [tiny_model, "--tasks", "mmlu_anatomy,texts", "--include-path", own]
    measured = _evaluate(*command, "--dataset", f"mmlu_anatomy={copy}", "--num-fewshot", 2)
    anatomy, *_ = measured["tasks"]["rows"]
    assert (anatomy["task"], anatomy["documents"], anatomy["n_shot"]) == ("mmlu_anatomy", 12, 2)

    with pytest.raises(ConfigError, match=r"--tasks mmul: .*did you mean 'mmlu'"):
        _evaluate(tiny_model, "--tasks", "mmul", "--include-path", own)
    with pytest.raises(ConfigError, match=r"--tasks mmlu: its data set .*--dataset mmlu=FOLDER"):
        _evaluate(tiny_model, "--tasks", "mmlu", "--include-path", own)


def test_a_template_writes_the_date_that_training_has(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from fluvial.training.harness_model import LoadedModel

    template = "{{ strftime_now(format='%Y') }}" + NAMED["plain"][1]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    asked = LoadedModel(model, with_template(byte_level(), template), batch_size=1, context=64)
    turn = {"role": "user", "content": "hello"}
    assert asked.apply_chat_template([turn]).startswith("2024")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 'x' * 3000000000 }}", "more work"),
        (
            "{% for m in messages %}{{ raise_exception('no such role') }}{% endfor %}",
            "no such role",
        ),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_is_bounded_where_lm_eval_renders_it(
    template: str, why: str, tiny_model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from fluvial.training.harness_model import LoadedModel

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]
    asked = LoadedModel(model, with_template(byte_level(), template), batch_size=1, context=64)
    with pytest.raises(ConfigError, match=rf"--apply-chat-template: .*{why}"):
        asked.apply_chat_template(turns)

    strict = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
    strict += "{% endif %}{{ m.content }}{% endfor %}"
    without = LoadedModel(model, with_template(byte_level(), strict), batch_size=1, context=64)
    assert without.apply_chat_template(turns) == "hello"
