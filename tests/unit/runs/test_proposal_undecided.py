"""Questions that records leave open: `fluvial init` prints the command that answers them."""

import json
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.cli.console import print_error
from fluvial.cli.interview import Interview, Options
from fluvial.data.rows import Place, Row, columns_of
from fluvial.errors import ConfigError
from fluvial.runs.config import load
from fluvial.runs.proposal.undecided import likely_fields


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def likely(**fields: str) -> dict[str, str]:
    """Return the likeliest fields of ten records with these texts, where {} is a number."""
    given = [
        {name.replace("_", " "): text.format(n) for name, text in fields.items()}
        for n in "0123456789"
    ]
    rows = [Row(cells, Place("a", "line", 1)) for cells in given]
    return likely_fields(columns_of(rows), rows)


def test_the_likeliest_columns() -> None:
    """Codes, dates and owners are no texts; a label is the answer to the only text."""
    found = likely(Case_nr="C-{}", Finding_of_the_day="case {} was seen", Verdict="home {}")
    assert found == {"prompt": "Finding of the day", "completion": "Verdict"}
    assert likely(
        Ward_name="ward {} of us", Seen="case {} was seen", code="A{}", Verdict="ill"
    ) == {"text": "Seen"}
    assert likely(Seen="病例发烧", Verdict="A{}Z") == {"text": "Seen"}
    assert likely(short="a {}", A="long answer {}", Q="much longer question {}") == {
        "prompt": "A",
        "completion": "Q",
    }
    assert likely(a="x{}", b="1") == {}


def test_a_label_is_likelier_than_few_words_that_are_no_classes() -> None:
    rows = [
        Row(
            {"Seen": f"case {n} was seen", "Place": f"Ward {n}", "Team": team},
            Place("a", "line", 1),
        )
        for n, team in enumerate(["A and B", "C"] * 4)
    ]
    names = columns_of(rows)
    assert likely_fields(names, rows) == {"prompt": "Seen", "completion": "Team"}
    some = [
        Row({**row.fields, "Place": f"{row.fields['Place']} at night"}, row.place) for row in rows
    ]
    assert likely_fields(names, some) == {"prompt": "Seen", "completion": "Place"}
    assert likely(Seen="case {} was seen", Street="Main street {}", b="yes") == {"text": "Seen"}


def written(name: str, *rows: dict[str, Any]) -> str:
    Path(name).write_text("\n".join(json.dumps(row) for row in rows))
    return name


def refused(monkeypatch: pytest.MonkeyPatch, data: list[str], *given: str) -> list[str]:
    """Return the words of the command that a call with these options is told."""
    words = ["q.toml", "--yes", *(word for path in data for word in ("--data", path)), *given]
    monkeypatch.setattr(sys, "argv", ["fluvial", "init", *words])
    columns = [value for option, value in pairwise(given) if option == "--column"]
    options = Options("embedded", data, columns, None, None, None, None, None, [], None, asks=False)
    with pytest.raises(ConfigError) as caught:
        Interview(options).answers()
    lead, command = str(caught.value).splitlines()[-2:]
    assert lead == "The command with the likeliest answers:"
    told = shlex.split(command)
    assert Path(told[0]).name == "fluvial"
    assert told[1 : 2 + len(words)] == ["init", *words]
    return told[2 + len(words) :]


def test_the_whole_command_names_the_columns_of_each_site(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"My question": f"Is it {n} or less?", "My answer": f"it is {n}"} for n in range(4)]
    notes = [{"text": f"case {n} was seen", "code": "ab"[n % 2]} for n in range(4)]
    oslo = written("os lo.jsonl", *rows)
    rome = written("rome.jsonl", *notes)
    chats = written("bern.jsonl", *({"prompt": "Who?", "completion": "It"} for _ in rows))
    own = ["--column", "os lo:prompt=My question", "--column", "os lo:completion=My answer"]
    text = ["--column", "rome:prompt=text", "--column", "rome:completion=code"]
    assert refused(monkeypatch, [oslo, rome, chats]) == [*own, *text]
    assert refused(monkeypatch, [oslo, rome, chats], *text) == own

    other = written("riga.jsonl", *rows)
    for_all = ["--column", "prompt=My question", "--column", "completion=My answer"]
    assert refused(monkeypatch, [oslo, other]) == for_all
    assert refused(monkeypatch, [oslo]) == for_all


def test_the_whole_command_names_the_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"Is it {n}?", "completion": f"it is {n}"} for n in range(8)]
    assert refused(monkeypatch, [written("a.jsonl", *rows)]) == ["--sites", "4"]
    rows = [row | {"team x": "ab"[n % 2]} for n, row in enumerate(rows)]
    assert refused(monkeypatch, [written("b.jsonl", *rows)]) == ["--site-column", "team x"]


def test_a_command_in_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    command = "  fluvial init " + "--column a=b " * 30 + "--column c=d"
    print_error("DataError", f"two words\nto copy:\n{command}")
    assert capsys.readouterr().err == f"DataError: two words\nto copy:\n{command}\n"


TURNS = {"system": "Be short.", "user": "Who is {}?", "tool": "found", "assistant": "It"}


def conversations(name: str, *roles: str) -> str:
    """Write four conversations with turns of these roles."""
    given = [
        {"messages": [{"role": role, "content": TURNS[role].format(n)} for role in roles]}
        for n in range(4)
    ]
    return written(name, *given)


def test_a_role_that_the_template_refuses_is_told_with_another_template(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the first call beside other questions, and where it is the only fault."""
    bern = conversations("bern.jsonl", "user", "tool", "assistant")
    oslo = conversations("oslo.jsonl", "user", "assistant")
    rows = [{"My question": f"Is it {n} or less?", "My answer": f"it is {n}"} for n in range(4)]
    told = refused(monkeypatch, [bern, written("rome.jsonl", *rows)])
    assert told[-2:] == ["--chat-template", "chatml"]
    assert told[:2] == ["--column", "rome:prompt=My question"]

    words = ["q.toml", "--yes", "--model", "embedded", "--data", bern, "--data", oslo]
    monkeypatch.setattr(sys, "argv", ["fluvial", "init", *words])
    found = CliRunner().invoke(app, ["init", *words]).exception
    assert "or add --chat-template with another template, of which 'chatml'" in str(found)
    told = shlex.split(str(found).splitlines()[-1])[1:]
    assert told == ["init", *words, "--chat-template", "chatml"]
    assert CliRunner().invoke(app, told).exit_code == 0
    config = load(Path("q.toml"))
    assert {own.chat_template for own in config.data.by_site.values()} == {"chatml"}


def test_a_template_is_a_file_or_a_known_name_and_is_for_conversations() -> None:
    folder = Path("below")
    folder.mkdir()
    Path("own.jinja").write_text(
        "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{{ eos_token }}{% endfor %}"
    )
    chats = conversations("chats.jsonl", "system", "user", "tool", "assistant")
    plain = written("plain.jsonl", *({"prompt": "Who?", "completion": "It"} for _ in range(4)))
    words = ["init", "below/q.toml", "--yes", "--force", "--model", "embedded", "--sites", "2"]
    cases = [
        (chats, "own.jinja", None),
        (chats, "none.jinja", "--chat-template = 'none.jinja': neither a file"),
        (plain, "chatml", "--chat-template: without effect, because no records are conversations"),
    ]
    for data, template, message in cases:
        options = ["--data", data, "--chat-template", template]
        result = CliRunner().invoke(app, [*words, *options])
        if message is None:
            assert result.exit_code == 0, result.output
            assert 'chat_template = "' in (folder / "q.toml").read_text()
            assert load(folder / "q.toml").data.chat_template == Path("own.jinja").read_text()
        else:
            assert message in str(result.exception)
