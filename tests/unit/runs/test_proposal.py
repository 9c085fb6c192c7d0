"""Configurations that `fluvial init` proposes: each passes check, and says why."""

import json
import random
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from pydantic import BaseModel
from typer.testing import CliRunner

from fluvial.cli import app, interview
from fluvial.data.records import Answered
from fluvial.data.rows import Place, Row, columns_of
from fluvial.errors import ConfigError, MissingWeightsError
from fluvial.models import cpu_types
from fluvial.runs.config import RunConfig, load, parse
from fluvial.runs.plan import plan, preview
from fluvial.runs.proposal import aims, duration, models
from fluvial.runs.proposal.columns import form_of, guessed_columns, owner_columns
from fluvial.runs.proposal.document import Section, Setting, document
from fluvial.runs.proposal.lengths import Lengths, proposed_length
from fluvial.runs.proposal.limits import LIMITS, limits_of, method_for
from fluvial.runs.proposal.proposing import path_from
from fluvial.runs.proposal.records import facts_about, read_records
from fluvial.runs.proposal.sites import Sites
from tests.support.models import shared_four_layers

WORDS = {"north": "snow ice wind", "south": "sun sand heat", "west": "rain sea wave"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answers(number: int = 20, prompt: str = "What is case {}?") -> list[dict[str, str]]:
    """Records of three sites, with questions and answers."""
    draw = random.Random(0)
    return [
        {
            "hospital": site,
            "question": prompt.format(case),
            "answer": " ".join(draw.choices(words.split(), k=4)),
        }
        for site, words in WORDS.items()
        for case in range(number)
    ]


def written(rows: list[dict[str, Any]], name: str = "records.jsonl") -> str:
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


def run_init(*options: str, typed: str = "") -> Result:
    """Call `fluvial init`, and raise what it raises; no step is timed, which takes long here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duration, "SMALL", 0)
        result = CliRunner().invoke(app, ["init", "q.toml", *options], input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def proposed(*options: str) -> RunConfig:
    run_init("--yes", *options)
    return load(Path("q.toml"))


def test_a_file_with_a_column_of_owners(tiny_model: Path) -> None:
    data = written(answers())
    options = ("--model", str(tiny_model), "--data", data, "--limit", "slow-links")
    result = run_init("--yes", *options, "--uplink", "0.1")
    config = load(Path("q.toml"))
    assert config.data.partition.model_dump()["column"] == "hospital"
    assert config.data.columns == {"prompt": "question", "completion": "answer"}
    assert config.coding.name == "trellis"
    assert config.coding.error_feedback
    assert config.compare == ("local", "fedavg")
    assert config.fleet.line is not None
    assert config.fleet.line.up_mbit_s == 0.1
    assert "3 sites ('north' 20, 'south' 20, 'west' 20)" in result.output
    assert " preview q.toml" in result.output.partition("Next:")[2]


@pytest.mark.parametrize(("limit", "next_commands"), [("unequal-sites", 4), ("none", 3)])
def test_the_plan_is_among_the_next_commands_where_sites_are_planned(
    limit: str, next_commands: int, tiny_model: Path
) -> None:
    given = ["--model", str(tiny_model), "--data", written(answers()), "--limit", limit]
    after = run_init("--yes", *given).output.partition("Next:")[2].split("\n")
    assert len([line for line in after if "q.toml" in line]) == next_commands
    assert any(" plan q.toml" in line for line in after) == (limit == "unequal-sites")
    assert any(" check q.toml --time" in line for line in after)


def test_a_small_model_gets_many_short_rounds(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger one gets longer rounds; one whose rounds cost noise gets fewer of them."""
    options = ("--force", "--model", str(tiny_model), "--data", written(answers(100)))
    small = proposed(*options)
    assert (small.rounds, small.train.max_steps) == (60, 4)

    private = proposed(*options, "--limit", "privacy")
    assert private.rounds < 20
    monkeypatch.setattr(aims, "SMALL", 0)
    large = proposed(*options)
    assert (large.rounds, large.train.max_steps) == (6, 11)


def test_much_data_gets_longer_rounds_and_no_more_of_them(tiny_model: Path) -> None:
    config = proposed("--model", str(tiny_model), "--data", written(answers(1500)))
    assert (config.rounds, config.train.max_steps) == (57, 9)  # three passes over 1,350 records


def test_an_uplink_that_is_not_known_is_said(tiny_model: Path) -> None:
    options = ("--model", str(tiny_model), "--data", written(answers()), "--limit", "slow-links")
    output = " ".join(run_init("--yes", *options).output.split())
    assert "assumed: no uplink is known, so updates are sent at 1/64 of fp32" in output
    assert "with --uplink, or change codec.rate" in output
    assert "assumed, since no uplink is known" in Path("q.toml").read_text().replace("\n# ", " ")
    assert "assumed" not in run_init("--force", "--yes", *options, "--uplink", "1").output


def test_several_sources_are_a_site_each_with_its_own_columns(tiny_model: Path) -> None:
    """A spreadsheet, JSON lines and a folder."""
    lines = "".join(f"Fall {n}: für wen?;Haus {n}\n" for n in range(12))
    Path("lisbon.csv").write_text(f"Frage;Antwort\n{lines}", encoding="cp1252")
    written([{"instruction": f"Case {n}", "output": f"Room {n}"} for n in range(14)], "oslo.jsonl")
    Path("rome").mkdir()
    for name in ("a", "b"):
        written(answers(2), f"rome/{name}.jsonl")
    sources = [word for name in ("lisbon.csv", "oslo.jsonl", "rome") for word in ("--data", name)]
    config = proposed("--model", str(tiny_model), *sources)
    assert list(config.data.by_site) == ["lisbon", "oslo", "rome"]
    own = config.data.by_site
    assert (own["lisbon"].delimiter, own["lisbon"].encoding) == (";", "cp1252")
    assert own["lisbon"].columns == {"prompt": "Frage", "completion": "Antwort"}
    assert own["oslo"].columns is None
    assert own["rome"].columns == {"prompt": "question", "completion": "answer"}
    head = Path("q.toml").read_text().splitlines()[0]
    assert head.startswith("# `fluvial init` wrote this file for ")  # true after changes, too
    comments = [line for line in Path("q.toml").read_text().splitlines() if "not used" in line]
    assert comments == ["# not used at 'rome': 'hospital'"]

    renamed = ("--column", "prompt=Frage", "--column", "completion=Antwort")
    with pytest.raises(ConfigError, match="--data 'oslo.jsonl': --column.*--column oslo:prompt="):
        run_init("--force", "--yes", *sources, *renamed, "--model", str(tiny_model))
    with pytest.raises(ConfigError, match="--site-column: without effect beside several --data"):
        run_init("--force", "--yes", *sources, "--site-column", "x", "--model", str(tiny_model))
    again = ["--data", "oslo.jsonl", "--data", "oslo.jsonl"]
    with pytest.raises(ConfigError, match="another source makes the site 'oslo' too"):
        run_init("--force", "--yes", *again, "--model", str(tiny_model))


def test_a_site_is_named_after_the_folder_that_a_relative_path_means(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("oslo.x/inner").mkdir(parents=True)
    Path("rome").mkdir()
    for place in ("oslo.x", "rome"):
        written(answers(4), f"{place}/a.jsonl")
    monkeypatch.chdir("rome")
    above = "../oslo.x/inner/.."
    config = proposed("--model", str(tiny_model), "--data", ".", "--data", above)
    assert sorted(config.data.by_site) == ["oslo.x", "rome"]
    with pytest.raises(
        ConfigError, match="--data '/': its site would be named after it, but '' is"
    ):
        run_init("--force", "--yes", "--model", str(tiny_model), "--data", ".", "--data", "/")


def test_columns_of_one_of_several_sources(tiny_model: Path) -> None:
    """A text whose answer stands beside it is no plain text; each site names its own columns."""
    rows = answers(12)
    texts = [{"text": row["question"], "team": row["answer"]} for row in rows]
    codes = [{"ticket": f"W-{n:04}", "shift": "ab"[n % 2]} for n in range(len(texts))]
    written([code | text for code, text in zip(codes, texts, strict=True)], "rome.jsonl")
    written([{"q": row["question"], "a": row["answer"]} for row in rows], "oslo.jsonl")
    sources = ("--model", str(tiny_model), "--data", "rome.jsonl", "--data", "oslo.jsonl")
    oslo = ("--column", "oslo:prompt=q", "--column", "oslo:completion=a")
    words = "'shift' or 'team' may be the answer.*--column rome:prompt=text"
    with pytest.raises(ConfigError, match=words):
        run_init("--force", "--yes", *sources, *oslo)
    missing = "--heldout: there is no file"
    every = f"(?s)3 faults.*{words}.*'oslo.jsonl': which of the columns q, a are .*{missing}"
    with pytest.raises(ConfigError, match=every):
        run_init("--force", "--yes", *sources, "--heldout", "held.jsonl")
    with pytest.raises(ConfigError, match="--column bern:...: no --data makes a site 'bern'"):
        run_init("--force", "--yes", *sources, "--column", "bern:prompt=q")
    with pytest.raises(ConfigError, match="a site before the field is for several --data"):
        run_init("--force", "--yes", *sources[:4], "--column", "rome:prompt=text")

    rome = ("--column", "rome:prompt=text", "--column", "rome:completion=team")
    own = proposed(*sources, *oslo, *rome).data.by_site
    assert own["oslo"].columns == {"prompt": "q", "completion": "a"}
    assert own["rome"].columns == {"prompt": "text", "completion": "team"}


def test_everything_that_is_set_differs_from_the_defaults(tiny_model: Path) -> None:
    run_init("--yes", "--model", str(tiny_model), "--data", written(answers()))
    table = tomllib.loads(Path("q.toml").read_text())

    def same(given: dict[str, Any], settings: BaseModel, where: str) -> Iterator[str]:
        for key, value in given.items():
            default = getattr(settings, key)
            if isinstance(value, dict) and isinstance(default, BaseModel) and "by" not in value:
                yield from same(value, default, f"{where}{key}.")
            elif value == default:
                yield where + key

    assert list(same(table, RunConfig(), "")) == []


def test_each_setting_says_why() -> None:
    run_init("--yes", "--model", "embedded", "--data", written(answers()), "--limit", "slow-links")
    lines = Path("q.toml").read_text().splitlines()
    settings = [number for number, line in enumerate(lines) if " = " in line and line[0] != "#"]
    without = [
        lines[number]
        for number in settings
        if "#" not in lines[number] and not lines[number - 1].startswith("#")
    ]
    assert without == ['name = "trellis"', "rate = 16"]  # their table says why
    assert all(len(line) <= 100 for line in lines)


def test_a_folder_with_a_spreadsheet_for_each_site(tiny_model: Path) -> None:
    """Semicolons, an encoding of Windows, and German headings."""
    for site, words in WORDS.items():
        rows = "".join(f"Fall {n}: für wen?;{words}\n" for n in range(12))
        Path("csv").mkdir(exist_ok=True)
        Path("csv", f"{site}.csv").write_text(f"Frage;Antwort\n{rows}", encoding="cp1252")

    config = proposed("--model", str(tiny_model), "--data", "csv")
    assert config.data.partition.by == "file"
    assert (config.data.delimiter, config.data.encoding) == (";", "cp1252")
    assert config.data.columns == {"prompt": "Frage", "completion": "Antwort"}


def test_conversations_for_a_base_without_a_chat_template() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day"}]
    rows = [{"client": site, "messages": turns} for site in WORDS for _ in range(4)]
    config = proposed("--model", "embedded", "--data", written(rows))
    assert config.data.chat_template is not None
    assert config.data.heldout_share == 0.2  # a tenth of four records is none


def test_sites_with_several_forms_are_read_in_one() -> None:
    """Conversations of one question without a template; else all questions as conversations."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day"}]
    pairs = written(
        [{"prompt": f"Case {n}?", "completion": "yes"} for n in range(12)], "pairs.jsonl"
    )
    tasks = written(
        [{"instruction": f"Is {n} odd?", "output": "no"} for n in range(12)], "tasks.jsonl"
    )
    for rounds, others, form, template in (
        (1, [pairs], "prompt_completion", None),
        (2, [pairs], "messages", "plain"),
        (1, [tasks], "messages", "plain"),
        (2, [pairs, tasks], "messages", "plain"),
    ):
        talks = written([{"messages": rounds * turns} for _ in range(12)], "talks.jsonl")
        sources = [word for path in (talks, *others) for word in ("--data", path)]
        config = proposed("--force", "--model", "embedded", *sources)
        tables = load(Path("q.toml"), as_written=True).data.by_site
        assert {own.chat_template for own in tables.values()} == {template}
        read = {name: tables[name].read_as for name in tables}
        read.pop("talks" if form == "messages" else "pairs")
        assert set(read.values()) == {form}
        for site in tables:
            assert ("User: " in plan_text(config, site)) == (form == "messages")


def test_a_template_without_effect_at_a_site_is_refused() -> None:
    pairs = [{"prompt": f"Case {n}?", "completion": "yes"} for n in range(12)]
    sources = [word for name in ("a", "b") for word in ("--data", written(pairs, f"{name}.jsonl"))]
    idle = proposed("--model", "embedded", *sources).model_dump(exclude_unset=True)
    idle["data"]["by_site"]["a"]["chat_template"] = "plain"
    with pytest.raises(ConfigError, match=r"data\.by_site\.a\.chat_template: without effect"):
        plan(parse(idle, "test"))


def plan_text(config: RunConfig, site: str) -> str:
    """The first training sequence of a site as text."""
    return "".join(token["text"] for token in preview(config, site, 1)["sequences"][0]["tokens"])


def test_records_longer_than_the_context(tiny_model: Path) -> None:
    """The answer stays whole; the model reads 128 tokens, the default of `max_length`."""
    data = written(answers(prompt="word " * 100 + "{}?"))
    config = proposed("--model", str(tiny_model), "--data", data)
    assert config.data.max_length == 128
    assert config.data.overlong == "shorten_prompt"


@pytest.mark.parametrize("limit", LIMITS)
def test_each_limit_gives_a_run_that_passes_check(limit: str) -> None:
    model = str(shared_four_layers())
    data = written(answers(10))
    config = proposed("--model", model, "--data", data, "--limit", limit, "--limit", "slow-links")
    assert config.method.name == method_for(limits_of([limit, "slow-links"]))
    if limit == "small-memory":
        assert config.model.quantization == "nf4"
        assert config.train.gradient_checkpointing
    if limit == "privacy":
        assert config.promise is not None


@pytest.mark.parametrize("ratio", [5.4, 1.0])
def test_a_base_is_held_in_float32_where_the_cpu_is_slow_in_its_type(
    ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_types, "times_slower", lambda _: ratio)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ("--model", "embedded", "--data", written(answers()), "--force")
    config = proposed(*options)
    assert config.model.dtype == ("float32" if ratio > 2 else "auto")
    assert ("# quicker than bfloat16 on the CPU" in Path("q.toml").read_text()) == (ratio > 2)
    assert not any("model.dtype" in note for note in plan(config)["notes"])

    auto = parse(config.model_dump(exclude_unset=True) | {"model": {}}, "test")
    warned = [note for note in plan(auto)["notes"] if note.startswith("model.dtype: this CPU")]
    assert len(warned) == (ratio > 2)
    under = {"model": {"dtype": "float32"}, "train": {"bf16": True}}
    autocast = parse(config.model_dump(exclude_unset=True) | under, "test")
    assert any(n.startswith("train.bf16: this") for n in plan(autocast)["notes"]) == (ratio > 2)

    monkeypatch.setattr(models, "_memory_bytes", lambda: 10**6)
    assert proposed(*options).model.dtype == "auto"  # four bytes a value would be too many


def test_the_longest_record_is_not_cut_where_it_is_no_exception() -> None:
    usual = (*range(20, 40), *[40] * 180)
    assert proposed_length(Lengths((*usual, 49), (4,)), 256, text=False) == 64
    assert proposed_length(Lengths((*usual, 200), (4,)), 256, text=False) == 48
    assert proposed_length(Lengths((*usual, 49, 200), (4,)), 256, text=False) == 64
    assert proposed_length(Lengths((*usual, 49), (4,)), 48, text=False) == 48
    assert proposed_length(Lengths((*usual, 70), (4,)), 256, text=True) == 48  # cut into windows


def test_one_record_that_is_longer_is_named_in_the_singular(tiny_model: Path) -> None:
    rows = [*answers(100), {"hospital": "north", "question": "ice wind " * 99, "answer": "snow"}]
    assert proposed("--model", str(tiny_model), "--data", written(rows)).data.max_length < 99
    text = Path("q.toml").read_text().replace("\n# ", " ")
    assert "1 record is longer: the beginning" in text, text


def test_private_updates_over_quick_links_need_no_codec_that_learns(tiny_model: Path) -> None:
    data = written(answers(10))
    config = proposed("--model", str(tiny_model), "--data", data, "--limit", "privacy")
    assert config.promise is not None
    assert config.codec is not None
    assert config.codec.name == "identity"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", ""], "--data: .*the string is empty"),
        (["--model", ""], "--model: .*the string is empty"),
        (["--limit", "none", "--limit", "privacy"], "--limit none: names no limit"),
        (["--public", "records.jsonl"], "--public: without effect on the method of these limits"),
        (["--limit", "slow-links", "--public", "no.txt"], "--public: there is no file or folder"),
        (["--data", "~nobody-here/a.jsonl"], "--data: there is no file or folder '~nobody-here"),
        (["--model", "~nobody-here/m"], "there is no folder '~nobody-here/m'"),
    ],
)
def test_wrong_options_are_named(options: list[str], words: str, tiny_model: Path) -> None:
    data = [] if "--data" in options else ["--data", written(answers())]
    with pytest.raises(ConfigError, match=words):
        run_init("--yes", "--model", str(tiny_model), *data, *options)


def test_equal_shares_where_no_record_names_its_owner(tiny_model: Path) -> None:
    rows = [{"text": f"{number} small words"} for number in range(30)]
    options = ("--model", str(tiny_model), "--data", written(rows))
    with pytest.raises(ConfigError, match="--site-column: no column"):
        run_init("--yes", *options)

    assert proposed(*options, "--sites", "3").data.partition.model_dump()["sites"] == 3


def test_questions_are_asked_on_a_terminal(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong answer is asked for again; an empty one takes the proposal."""
    monkeypatch.setattr(interview, "on_terminal", lambda: True)
    data = written(answers())
    typed = f"nowhere/model\n{tiny_model}\n{data}\n\nsnow\nslow-links\nfast\n0.5\n"
    output = run_init(typed=typed).output
    assert "nowhere/model" in output
    assert "choose among slow-links" in output
    assert "a number of megabits a second" in output
    assert load(Path("q.toml")).coding.name == "trellis"


def test_a_column_that_names_no_owners_is_refused_or_confirmed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of most records is none; the answers are one only where the user says so."""
    rows = [row | {"answer": row["answer"].split()[0]} for row in answers()]
    data = written([{**row, "question": f"{n % 55}"} for n, row in enumerate(rows)])
    options = ("--model", str(tiny_model), "--data", data, "--limit", "none")
    reason = "has 55 values in 60 records, 50 of them in one record only.*perhaps hospital"
    with pytest.raises(ConfigError, match=reason):
        run_init("--yes", *options, "--site-column", "question")

    monkeypatch.setattr(interview, "on_terminal", lambda: True)
    output = run_init(*options, typed="question\nanswer\nn\nhospital\n").output
    output = " ".join(output.split())
    assert "50 of them in one record only" in output
    assert "hospital: 3 sites ('north' 20, 'south' 20, 'west' 20)" in output
    assert "'answer' would make" in output
    assert load(Path("q.toml")).data.partition.model_dump()["column"] == "hospital"
    run_init("--force", *options, typed="answer\ny\n")
    assert load(Path("q.toml")).data.partition.model_dump()["column"] == "answer"


def test_columns_of_several_sources_are_asked_for(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interview, "on_terminal", lambda: True)
    rows = answers(12)
    written([{"text": row["question"], "team": row["answer"]} for row in rows], "rome.jsonl")
    written([{"q": row["question"], "a": row["answer"]} for row in rows], "oslo.jsonl")
    sources = ("--model", str(tiny_model), "--data", "rome.jsonl", "--data", "oslo.jsonl")
    run_init(*sources, "--limit", "none", typed="text\nteam\nq\na\n")
    tables = load(Path("q.toml")).data.by_site
    assert tables["rome"].columns == {"prompt": "text", "completion": "team"}
    assert tables["oslo"].columns == {"prompt": "q", "completion": "a"}


def within(row: dict[str, str]) -> dict[str, Any]:
    """Return a record with its question and answer in one object and its owner in another."""
    dialog = {"question": row["question"], "answer": row["answer"]}
    return {"id": 1, "dialog": dialog, "meta": {"hospital": row["hospital"]}}


def test_columns_within_an_object_are_guessed_and_may_be_named(tiny_model: Path) -> None:
    data = written(list(map(within, answers())))
    options = ("--model", str(tiny_model), "--data", data)
    result = run_init("--yes", *options)
    config = load(Path("q.toml"))
    assert config.data.columns == {"prompt": "dialog.question", "completion": "dialog.answer"}
    assert config.data.partition.model_dump()["column"] == "meta.hospital"
    assert "columns id, dialog.question, dialog.answer, meta.hospital" in " ".join(
        result.output.split()
    )

    turned = ("--column", "prompt=dialog.answer", "--column", "completion=dialog.question")
    config = proposed("--force", *options, *turned, "--site-column", "meta.hospital")
    assert config.data.columns == {"prompt": "dialog.answer", "completion": "dialog.question"}
    with pytest.raises(ConfigError, match="the records have the columns id, dialog.question, dia"):
        run_init("--yes", "--force", *options, "--column", "text=dialog.query")
    with pytest.raises(ConfigError, match="has the columns id, dialog.question, dialog.answer, me"):
        run_init("--yes", "--force", *options, "--site-column", "meta.town")


def test_a_guess_looks_into_objects_where_the_columns_fit_no_form() -> None:
    def guess(*records: dict[str, Any]) -> object:
        rows = [Row(fields, Place("a", "line", 1)) for fields in records]
        return guessed_columns(columns_of(rows), rows)

    dialog = {"question": "q", "answer": "a"}
    both = {"prompt": "dialog.question", "completion": "dialog.answer"}
    assert guess({"id": "1", "dialog": dialog}) == ("prompt_completion", both)
    assert guess({"text": "t", "dialog": dialog}) == ("text", {})
    turns = [{"role": "user", "content": "q"}]
    assert guess({"x": {"turns": turns}}) == ("messages", {"messages": "x.turns"})
    alpaca = {"instruction": "i", "input": "", "output": "o"}
    names = {field: f"x.{field}" for field in ("instruction", "output", "input")}
    assert guess({"x": alpaca}) == ("alpaca", names)
    assert guess({"id": "a-1", "x": {"text": "a text"}}) == ("text", {"text": "x.text"})

    def answers(question: str, column: str) -> object:
        names = {"prompt": question, "completion": column, "references": column}
        return "prompt_completion", names

    squad = {"question": "Why?", "context": "c", "answers": {"text": ["a", "b"], "start": [1, 2]}}
    about = {"instruction": "question", "input": "context", "output": "answers.text"}
    assert guess(squad) == ("alpaca", {**about, "references": "answers.text"})
    assert guess({"question": "q", "answers": ["a"]}) == answers("question", "answers")
    assert guess({"qa": {"question": "q", "answers": ["a"]}, "n": 1}) == answers(
        "qa.question", "qa.answers"
    )
    assert guess({"question": "q", "answer": ["a"]}) == answers("question", "answer")
    own = {"completion": "completion", "references": "completion"}
    assert guess({"prompt": "p", "completion": ["a"]}) == ("prompt_completion", own)
    trivia = {"question": "q", "answer": {"value": "a", "aliases": ["a", "b"]}}
    pair = {"prompt": "question", "completion": "answer.value"}
    assert guess(trivia) == ("prompt_completion", pair)

    for unsure in (
        {"dialog": dialog, "first": dialog},  # two objects fit
        {"question": "Why?", "answers": [{"text": "a"}]},  # objects are no texts
        {"question": "Why?", "answers": []},
        {"abstract": "a long text", "meta": {"note": "n"}},  # another text is beside it
        {"x": {"turns": "a text"}},
    ):
        assert guess(unsure) is None


def test_a_message_lists_no_more_than_twenty_columns() -> None:
    names = [f"c{n}" for n in range(23)]
    with pytest.raises(ConfigError, match="the columns c0, c1, .*c19 and 3 more$"):
        form_of(names, {"text": "d"})


def test_the_speed_of_a_type_is_measured_on_one_thread() -> None:
    """Other programs on the machine do not change it, and the threads of this one stay."""
    threads = torch.get_num_threads()
    before = time.thread_time()
    seconds = cpu_types._seconds(torch.float32)
    assert 0 < seconds <= time.thread_time() - before
    assert torch.get_num_threads() == threads


def test_columns_that_fit_no_form_are_asked_for(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interview, "on_terminal", lambda: True)
    rows = [{"site": "ab"[n % 2], "a1": f"question {n}", "a2": "yes"} for n in range(40)]
    options = ("--model", str(tiny_model), "--data", written(rows), "--limit", "none")
    with pytest.raises(ConfigError, match="--column prompt=a3: the records have the columns"):
        run_init(*options, typed="a3\na2\n")

    run_init(*options, typed="a1\na2\n\n")
    assert load(Path("q.toml")).data.columns == {"prompt": "a1", "completion": "a2"}


def test_a_column_with_a_conversation_is_asked_for(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interview, "on_terminal", lambda: True)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day"}]
    rows = [{"site": "ab"[n % 2], "topic": f"talk {n}", "chosen": turns} for n in range(40)]
    options = ("--model", str(tiny_model), "--data", written(rows), "--limit", "none")
    run_init(*options, typed="\n\n")
    assert load(Path("q.toml")).data.columns == {"messages": "chosen"}
    run_init(*options, "--force", typed="none\ntopic\nnone\n\n")
    assert load(Path("q.toml")).data.columns == {"text": "topic"}


def notes() -> list[dict[str, str]]:
    """Notes of two hospitals with a code beside each, which is a likely answer."""
    return [
        {"id": str(n), "hospital": "NS"[n % 2], "note": f"case {n} was seen", "icd": f"A{n % 5}"}
        for n in range(40)
    ]


def test_a_column_that_may_be_the_answer_is_not_dropped(tiny_model: Path) -> None:
    options = ("--model", str(tiny_model), "--data", written(notes()))
    both = "--column prompt=note --column completion=icd"
    with pytest.raises(ConfigError, match=f"{both}. To learn the text alone: --column text=note"):
        run_init("--yes", *options)
    assert not Path("q.toml").exists()

    result = run_init("--yes", *options, "--column", "text=note")
    assert f"not used: 'id', 'icd'; for note -> icd: {both}" in " ".join(result.output.split())
    comment = Path("q.toml").read_text().replace("\n# ", " ")
    assert """not used: 'id', 'icd'; for note -> icd: columns = { prompt = "note", """ in comment

    Path("q.toml").unlink()
    result = run_init("--yes", *options, *both.split())
    assert load(Path("q.toml")).data.columns == {"prompt": "note", "completion": "icd"}
    assert "not used: 'id'\n" in result.output


def test_a_column_that_may_be_the_answer_is_asked_for(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interview, "on_terminal", lambda: True)
    options = ("--model", str(tiny_model), "--data", written(notes()), "--limit", "none")
    assert "perhaps 'icd'" in run_init(*options, typed="\n\n").output
    assert load(Path("q.toml")).data.columns == {"text": "note"}
    run_init(*options, "--force", typed="\nicd\n")
    assert load(Path("q.toml")).data.columns == {"prompt": "note", "completion": "icd"}


def test_columns_about_a_text_are_named_and_no_answers(tiny_model: Path) -> None:
    rows = [{**row, "date": "2024", "ward": "w" * (2 * n)} for n, row in enumerate(notes())]
    for row in rows:
        del row["icd"]
    result = run_init("--yes", "--model", str(tiny_model), "--data", written(rows))
    assert "not used: 'id', 'date', 'ward'\n" in result.output
    assert "# not used: 'id', 'date', 'ward'\n" in Path("q.toml").read_text()


def test_an_empty_answer_is_refused_with_its_remedy(tiny_model: Path) -> None:
    rows = answers()
    rows[3]["answer"] = " "
    with pytest.raises(ConfigError) as caught:
        run_init("--yes", "--model", str(tiny_model), "--data", written(rows))
    assert "line 4: the answer is empty" in str(caught.value)
    assert "write the answer, or remove the record" in str(caught.value)
    assert "q.toml: not written; mend these records" in str(caught.value)


@pytest.mark.parametrize(("mbps", "rate"), [("0.1", 5.3), ("0.01", 26.2), ("0.0002", 256)])
def test_the_rate_and_its_comment_agree_with_check(mbps: str, rate: float) -> None:
    options = ("--model", "embedded", "--data", written(answers()), "--limit", "slow-links")
    config = proposed(*options, "--uplink", mbps)
    assert config.coding.model_dump()["rate"] == rate
    sizes = plan(config)["bytes"]
    assert sizes["raw"] / sizes["frame"] == pytest.approx(rate, rel=0.01)
    upload_s = 8 * sizes["frame"] / (1e6 * float(mbps))
    comment = f"bits a value: {upload_s:.2g} s at {float(mbps):g} Mbit/s"
    text = Path("q.toml").read_text().replace("\n# ", " ")
    assert comment in text
    assert "an upload may take 10 s" in text or upload_s > 10.5


def test_names_of_sites_are_apart_where_they_have_commas_and_numbers() -> None:
    counts = {"Nord, Haus 3": 50, "St. Mary's": 49}
    assert Sites({}, counts, "").words() == "2 sites ('Nord, Haus 3' 50, \"St. Mary's\" 49)"


def test_the_side_of_a_renamed_column_is_named() -> None:
    with pytest.raises(ConfigError, match="write FIELD=YOUR_COLUMN, where FIELD is text, prompt"):
        run_init("--yes", "--column", "reply=completion")


def test_a_missing_option_is_refused_without_a_terminal(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="--model: missing, and there is no terminal"):
        run_init()
    with pytest.raises(ConfigError, match="--data: missing, and there is no terminal"):
        run_init("--model", str(tiny_model))
    assert not Path("q.toml").exists()


def test_a_file_is_not_replaced() -> None:
    Path("q.toml").write_text("seed = 1")
    with pytest.raises(ConfigError, match="add --force"):
        run_init("--yes")
    assert Path("q.toml").read_text() == "seed = 1"


def test_models_that_cannot_be_tuned_are_named(tiny_model: Path) -> None:
    data = written(answers())
    Path("encoder").mkdir()
    for file in tiny_model.iterdir():
        Path("encoder", file.name).write_bytes(file.read_bytes())
    Path("encoder", "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="is_decoder"):
        run_init("--yes", "--model", "encoder", "--data", data)

    Path("encoder", "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    Path("encoder", "model.safetensors").unlink()
    with pytest.raises(MissingWeightsError, match="no weights"):
        run_init("--yes", "--model", "encoder", "--data", data)


@pytest.mark.parametrize(
    ("columns", "form", "renamed"),
    [
        (["text", "site"], "text", {}),
        (["Note", "ward"], "text", {"text": "Note"}),
        (
            ["instruction", "context", "response", "category"],
            "alpaca",
            {"input": "context", "output": "response"},
        ),
        (["document", "summary", "id"], "prompt_completion", None),
        (
            ["site", "source_text", "target_text"],
            "prompt_completion",
            {"prompt": "source_text", "completion": "target_text"},
        ),
        (["conversation"], "sharegpt", {"conversations": "conversation"}),
    ],
)
def test_columns_are_guessed(columns: list[str], form: str, renamed: dict[str, str] | None) -> None:
    found, rename = guessed_columns(columns) or ("", {})
    assert found == form
    assert renamed is None or rename == renamed


def test_columns_that_fit_no_form_are_refused() -> None:
    assert guessed_columns(["a", "b"]) is None
    with pytest.raises(ConfigError, match="--column prompt=COLUMN"):
        facts_about(read_records(written([{"a": "1", "b": "2"}])), {})


def test_an_owner_is_named_in_each_record() -> None:
    rows = [{"text": "x", "site": "ab"[n % 2], "id": str(n), "hospital": "a"} for n in range(6)]
    rows[0] |= {"ward": "1"}
    facts = facts_about(read_records(written(rows)), {})
    assert owner_columns(facts.rows, facts.other_columns) == ["site"]


def test_an_owner_may_have_the_name_of_another_language() -> None:
    rows = [{"text": "x", "Klinik": "ab"[n % 2], "Monat": "cd"[n % 2]} for n in range(6)]
    facts = facts_about(read_records(written(rows)), {})
    assert owner_columns(facts.rows, facts.other_columns) == ["Klinik"]


def test_text_of_the_machine_is_a_recipe() -> None:
    with pytest.raises(ConfigError, match="recipe:stdlib"):
        read_records("stdlib")


def test_labels_that_are_numbers_are_texts() -> None:
    rows = [
        {"site": "ab"[number % 2], "prompt": "p", "completion": number % 2} for number in range(6)
    ]
    facts = facts_about(read_records(written(rows)), {})
    assert facts.numbers
    assert [record.content for record in facts.sample()][1] == Answered("p", "1")


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    assert path_from(Path("sub/q.toml"), "sub/records.csv") == "records.csv"
    assert path_from(Path("sub/q.toml"), "records.csv") == str(tmp_path / "records.csv")


def test_limits_that_ask_for_two_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="each asks for a method of its own"):
        limits_of(["privacy, base-stays"])
    with pytest.raises(ConfigError, match="choose among slow-links"):
        limits_of(["slow"])
    assert limits_of(["none"]) == frozenset()


def test_the_document_is_toml_with_its_values() -> None:
    values: dict[str, Any] = {
        "name": 'a "quoted" \\ path/é/' + "long/" * 40,
        "many": list(range(100)),
        "table": {"by": "column", "column": "x"},
        "flag": True,
        "rate": 5e-4,
    }
    sections = [Section("[t]", [Setting(key, value, "why") for key, value in values.items()])]
    assert tomllib.loads(document(["head"], sections))["t"] == values
