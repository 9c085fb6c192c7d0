"""Conversations with a tuned model and its base: the text, the draws, and the terminal."""

import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.cli.chat import _answer, _beside
from fluvial.data.config import DataConfig
from fluvial.data.templates import template_of
from fluvial.errors import ConfigError
from fluvial.formatting import safe_text
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import initial_state
from fluvial.models.streaming import Sampling, _SeededDraws, stream
from fluvial.models.targets import LoraSettings
from fluvial.runs.chat import Chat, _template
from fluvial.seeds import generator
from fluvial.storage import exported

RUNNER = CliRunner()
TEXT = "The river carries"
PATIENCE_S = 240


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter whose answers are not the base's, as a run would have it."""
    folder = tmp_path_factory.mktemp("run")
    pool = ModelPool(
        ModelConfig(name_or_path=str(tiny_model), device="cpu"),
        LoraSettings(r=2, lora_alpha=4, target_modules="attention"),
    )
    start = initial_state(pool.layout, 0)
    state = {name: torch.randn(t.shape, generator=generator(1, name)) for name, t in start.items()}
    pool.save(state, folder / "adapter")
    (folder / "config.json").write_text(json.dumps({"fluvial": "test"}))
    return folder


def answers(chat: Chat, text: str, **sampling: Any) -> dict[str, str]:
    return {
        speaker.name: "".join(speaker.answer(text, Sampling(**sampling)))
        for speaker in chat.speakers
    }


def plain_answer(model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int) -> str:
    """Greedy text of transformers' own `generate`."""
    found = model.eval().generate(
        torch.tensor([ids]), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
    )
    text: str = tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)
    return text


def test_answers_are_those_of_plain_transformers(run: Path, tiny_model: Path) -> None:
    """Over two turns by the tokenizer's chat template, and for the bare text without it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    models = {
        "base": AutoModelForCausalLM.from_pretrained(tiny_model),
        "tuned": AutoPeftModelForCausalLM.from_pretrained(str(run / "adapter")),
    }
    with Chat(str(run)) as chat:
        assert chat.chats
        first = answers(chat, TEXT, max_new_tokens=6)
        second = answers(chat, "Why?", max_new_tokens=6)

    assert first["base"] != first["tuned"]
    for name, model in models.items():
        turns = [{"role": "user", "content": TEXT}]
        for said, question in ((first[name], "Why?"), (second[name], "")):
            rendered = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            assert said == plain_answer(model, tokenizer, ids, 6)
            turns += [
                {"role": "assistant", "content": said},
                {"role": "user", "content": question},
            ]

    with Chat(str(run / "adapter"), template="none", only="tuned") as chat:
        ids = tokenizer(TEXT)["input_ids"]
        expected = plain_answer(models["tuned"], tokenizer, ids, 6)
        assert answers(chat, TEXT, max_new_tokens=6) == {"tuned": expected}
        assert answers(chat, TEXT, max_new_tokens=6) == {"tuned": expected}  # nothing is remembered


def test_a_small_model_answers_on_the_number_of_threads_that_is_faster(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("fluvial.runs.chat.faster_threads", lambda _: before + 1)
    with Chat(str(run), template="none"):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_draws_are_repeated_by_their_seed_and_side_by_side(run: Path) -> None:
    with Chat(str(run), template="none") as chat:
        alone = answers(chat, TEXT, max_new_tokens=12, temperature=1.0, seed=3)
        other = answers(chat, TEXT, max_new_tokens=12, temperature=1.0, seed=4)
        both: dict[str, str] = {}

        def ask(speaker: Any) -> None:
            both[speaker.name] = "".join(
                speaker.answer(TEXT, Sampling(max_new_tokens=12, temperature=1.0, seed=3))
            )

        threads = [threading.Thread(target=ask, args=(each,)) for each in chat.speakers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert both == alone != other


def test_draws_follow_the_softmax() -> None:
    """The shares of 20,000 draws lie within five standard errors of the probabilities."""
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    expected = torch.softmax(scores / 0.7, -1)[0].double()
    draws = _SeededDraws(Sampling(temperature=0.7, seed=1))
    drawn = draws(torch.empty(0), scores.expand(20_000, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4).double() / 20_000
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert bool(((shares - expected).abs() < 5 * error).all())


def test_a_stream_that_is_closed_ends_its_thread(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    before = set(threading.enumerate())
    pieces = stream(model, tokenizer, [1, 50, 60], Sampling(max_new_tokens=100))
    next(pieces)
    pieces.close()
    assert set(threading.enumerate()) <= before
    assert "".join(stream(model, tokenizer, [1] * 9, Sampling(), context=9)) == ""

    model.forward = None
    with pytest.raises(TypeError):
        list(stream(model, tokenizer, [1, 50, 60], Sampling()))


def test_prompts_come_from_an_option_or_from_lines(run: Path, tiny_model: Path) -> None:
    command = ["chat", str(run), "--max-new-tokens", "4"]
    said = RUNNER.invoke(app, [*command, "--prompt", TEXT, "--format", "json"])
    found = json.loads(said.stdout)
    assert found.keys() == {"prompt", "base", "tuned"}

    every = RUNNER.invoke(app, [*command, "--format", "json"], input=f"{TEXT}\n/new\n{TEXT}\n")
    assert [json.loads(line) for line in every.stdout.splitlines()] == [found, found]

    lines = RUNNER.invoke(app, command, input=f"{TEXT}\n\n/new\n{TEXT}\n")
    assert lines.exit_code == 0, lines.output
    assert lines.stdout.count("base\n") == lines.stdout.count("tuned\n") == 2
    assert lines.stdout.count(safe_text(found["tuned"])) == 2
    assert lines.stdout.startswith(f"prompt\n{TEXT}\n\nbase\n")

    one = RUNNER.invoke(app, ["chat", str(tiny_model), "--prompt", TEXT, "--max-new-tokens", "4"])
    assert one.stdout.startswith("model\n")
    assert one.stderr == "loading the models ...\nwith its chat template\n"
    assert found["base"] in one.stdout


@pytest.mark.parametrize(
    ("of_run", "overrides", "expected"),
    [(0, [], 128), (3, [], 3), (3, ["evaluate.max_new_tokens = 5"], 5)],
)
def test_answers_are_as_long_as_those_of_the_run(
    run: Path, tmp_path: Path, of_run: int, overrides: list[str], expected: int
) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = {"fluvial": "test", "evaluate": {"max_new_tokens": of_run}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with Chat(str(tmp_path / "run"), overrides=overrides) as chat:
        assert chat.max_new_tokens == expected


@pytest.mark.parametrize(
    ("mostly", "template", "chats"),
    [
        ("conversation", "auto", True),
        ("prompt and completion", "auto", False),
        ("plain text", "chat", True),
        ("conversation", "none", False),
    ],
)
def test_prompts_have_the_form_of_most_records_of_the_run(
    run: Path, tmp_path: Path, mostly: str, template: Any, chats: bool
) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = {"fluvial": "test", "run": {"records_are_mostly": mostly}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with Chat(str(tmp_path / "run"), template=template) as chat:
        assert chat.chats == chats
        assert (f"as most records of the run were: {mostly}" in chat.way) == (template == "auto")


def test_the_template_of_a_site_is_chosen_where_they_differ(run: Path, tmp_path: Path) -> None:
    """The template of the tokenizer is that of a site without one of its own."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)

    def template(sites: dict[str, str | None], site: str | None = None, own: bool = True) -> Any:
        tables = {name: {"chat_template": text} for name, text in sites.items()}
        config = {"fluvial": "test", "data": {"by_site": tables}}
        (folder / "config.json").write_text(json.dumps(config))
        return _template(str(folder / "adapter"), exported.read(folder / "adapter"), site, own=own)

    def words(site: str, others: str) -> str:
        return f"the chat template of site '{site}' (--site NAME for that of {others})"

    three: dict[str, str | None] = {"bern": "plain", "oslo": "zephyr", "rome": None}
    assert template(three) == ("plain", words("bern", "'oslo', 'rome'"))
    assert template(three, "rome") == (None, words("rome", "'bern', 'oslo'"))
    assert template({"bern": None, "oslo": "gemma"}) == ("gemma", words("oslo", "'bern'"))
    only = ("gemma", "the chat template of site 'oslo'")
    assert template({"bern": None, "oslo": "gemma"}, own=False) == only
    assert template({"bern": "gemma", "oslo": "gemma"}) == ("gemma", "its chat template")
    tables = {"bern": {"chat_template": "plain"}, "oslo": {"chat_template": "zephyr"}}
    config = {"fluvial": "test", "data": {"chat_template": "gemma", "by_site": tables}}
    (folder / "config.json").write_text(json.dumps(config))
    known = exported.read(folder / "adapter")
    assert _template(str(folder / "adapter"), known, None, own=True)[0] == "plain"
    with pytest.raises(ConfigError, match="without effect, because all sites of the run have one"):
        template({"bern": "gemma", "oslo": "gemma"}, "bern")
    for unknown, own in (("lima", True), ("rome", False)):
        with pytest.raises(ConfigError, match=f"--site {unknown}: no site .*'bern', 'oslo'"):
            template(three, unknown, own)
    with pytest.raises(ConfigError, match="--site oslo: without effect beside --template none"):
        Chat(str(folder), site="oslo", template="none")

    template(three)
    options = ["--site", "oslo", "--only", "tuned", "--max-new-tokens", "1"]
    said = RUNNER.invoke(app, ["chat", str(folder), *options, "--prompt", TEXT])
    assert said.stderr.splitlines()[1] == "with " + words("oslo", "'bern', 'rome'")
    with Chat(str(folder), site="oslo", only="tuned") as chat:
        assert chat.speakers[0]._tokenizer.chat_template == template_of("zephyr")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="without effect, because .* has one chat template"):
        Chat(str(folder / "adapter"), site="oslo")


def test_a_folder_without_its_run_has_the_templates_of_sites_by_number(
    run: Path, tmp_path: Path
) -> None:
    """Those of `readings` in its fluvial.json, which names no sites."""
    folder = tmp_path / "adapter"
    shutil.copytree(run / "adapter", folder)
    text = "{{ messages[0].content }}"
    sites = {
        name: {"source": f"{name}.jsonl", "chat_template": template}
        for name, template in (("bern", None), ("oslo", "zephyr"), ("rome", text))
    }
    readings = DataConfig.model_validate({"by_site": sites}).readings()
    told = {"fluvial": "test", exported.READINGS: readings}
    (folder / exported.FILE).write_text(json.dumps(told))

    def template(site: str | None, own: bool = True) -> tuple[str | None, str]:
        return _template(str(folder), exported.read(folder), site, own=own)

    which = "chat template 2 of 3 (zephyr) of the run's sites (--site NUMBER for another)"
    assert template(None) == template("2") == ("zephyr", which)
    assert template("1")[0] is None
    assert template("3")[0] == text
    assert template("2", own=False)[0] == text, "a tokenizer without a template adds none"
    listed = r"by its number: 1 \(the tokenizer's\), 2 \(zephyr\), 3 \(a text of 25 characters\)"
    with pytest.raises(ConfigError, match=f"--site oslo: .* without their names; .*{listed}"):
        template("oslo")
    with Chat(str(folder), site="2", only="tuned") as chat:
        assert chat.way == f"with {which}"


def test_the_weights_of_a_site_are_written_with_its_template() -> None:
    tables = {"bern": {"chat_template": "plain"}, "oslo": {"chat_template": None}}
    config: dict[str, Any] = {"rounds": 1, "data": {"by_site": tables}}
    assert exported.chat_template(exported.of_site(config, "bern")["data"]) == "plain"
    assert exported.chat_template(exported.of_site(config, "oslo")["data"]) is None
    assert exported.of_site(config, "lima") == config
    assert exported.of_site(config, "oslo")["rounds"] == 1


def test_an_empty_answer_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Where a model writes the end token alone, on a terminal or not."""
    asked = [SimpleNamespace(name=name, answer=lambda *_: iter(())) for name in ("base", "tuned")]
    chat = cast("Chat", SimpleNamespace(speakers=asked))
    _answer(chat, TEXT, Sampling(), "table")
    assert capsys.readouterr().out.count("(empty answer)") == 2
    _beside(chat, TEXT, Sampling())
    assert capsys.readouterr().out.count("(empty answer)") == 2


def test_what_cannot_be_asked_is_refused(run: Path, tiny_model: Path) -> None:
    with Chat(str(run)) as chat, pytest.raises(ConfigError, match=r"fills the model's context of"):
        answers(chat, "river " * 200)
    with pytest.raises(ConfigError, match="without effect, because .* has no base"):
        Chat(str(tiny_model), only="base")
    with pytest.raises(ConfigError, match="has no chat template"):
        Chat("embedded", template="chat")
    with pytest.raises(ConfigError, match="neither a PEFT adapter"):
        Chat(str(run.parent))


def test_a_template_that_fails_names_the_way_without_it(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "M")
    for path in (tmp_path / "M").glob("chat_template*"):
        path.unlink()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% broken"
    tokenizer.save_pretrained(tmp_path / "M")
    with Chat(str(tmp_path / "M")) as chat, pytest.raises(ConfigError, match="--template none"):
        answers(chat, "Hello")


def test_a_model_whose_weights_are_no_numbers_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="norm.weight holds values that are not finite"):
        Chat(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        (b"\xff\n", [], "standard input: byte 0xff is no utf-8; write the prompts in utf-8"),
        (b"", ["--prompt", " "], "--prompt: is blank"),
    ],
)
def test_what_is_no_prompt_is_refused(
    run: Path, given: bytes, options: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        RUNNER.invoke(app, ["chat", str(run), *options], input=given, catch_exceptions=False)
    assert RUNNER.invoke(app, ["chat", str(run), "--seed", str(2**63)]).exit_code == 2


def test_a_terminal_shows_both_in_columns_and_ctrl_c_ends_with_130(run: Path) -> None:
    """A real terminal: a question, two columns, a question that is too long, which does not end the
    conversation, and Ctrl-C, which shows the cursor again."""
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fluvial.cli", "chat", str(run), "--max-new-tokens", "8"],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env={**os.environ, "COLUMNS": "100", "TERM": "xterm"},
    )
    os.close(inner)

    def shown_until(text: str) -> str:
        shown = ""
        end = time.monotonic() + PATIENCE_S
        while text not in shown:
            assert process.poll() is None, shown
            assert time.monotonic() < end, shown
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
        return shown

    try:
        shown_until("> ")
        os.write(terminal, f"{TEXT}\n".encode())
        shown = shown_until("> ")
        assert re.search(r"base +tuned", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)), shown
        os.write(terminal, f"{'river ' * 200}\n{TEXT}\n".encode())
        shown_until("fills the model's context")
        shown_until("tuned")
        shown_until("> ")
        time.sleep(1)  # a signal that comes just as `input` begins waits for a key
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
        assert b"\x1b[?25h" in os.read(terminal, 4096)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
