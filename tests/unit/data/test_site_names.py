"""Names of sites from data, files and peers: refused where they could harm, in one line."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.data.site_names import fault_of, mixed_remarks, plain_fault_of, plain_name
from fluvial.errors import ConfigError, FluvialError
from fluvial.runs.config import parse
from fluvial.runs.run import execute
from fluvial.site_process.site_file import read_site_file

HARMFUL = [
    "\x1b[2Jgone",
    "a\nb",
    "a\rb",
    "a\tb",
    "a\0b",
    "\u202etxt.exe",
    "zero\u200bwidth",
    "\ufeffnorth",
    "a\u2028b",
    "\ud800",
    "x" * 65,
    "x" * 300,
    "",
    "   ",
    "\u00a0",
    "\x9b31m",
]
HARMLESS = [
    "north",
    "St. Mary's, ward 3",
    "a/b",
    "../../etc",
    "a[/nope]",
    "[red]",
    "NA",
    "01",
    "Zürich",
    "東京",
    "x" * 64,
]


@pytest.mark.parametrize("name", HARMFUL)
def test_a_name_that_could_harm_is_refused_and_shown_safely(name: str) -> None:
    fault = fault_of(name)
    assert fault is not None
    assert fault.isprintable()
    assert len(fault) < 250

    with pytest.raises(ConfigError, match="is no name of a site|no text may hold"):
        parse(
            {"fleet": {"sites": ["north", name]}} if name else {"fleet": {"sites": ["  "]}}, "test"
        )


def test_a_space_that_is_not_plain_is_named_with_its_place() -> None:
    assert "character 4 is a no-break space, which looks like" in str(fault_of("St.\u00a0Mary"))


def test_a_name_of_two_scripts_is_remarked() -> None:
    assert mixed_remarks(["north", "Zürich", "東京 ab"]) == []
    (remark,) = mixed_remarks(["north", "n\u043erth"])
    assert "'n\u043erth' mixes letters of scripts that look alike, Cyrillic and Latin" in remark


def test_a_name_of_letters_that_look_like_latin_ones_is_remarked() -> None:
    cyrillic = "\u0441\u043e\u0441\u043e"
    (remark,) = mixed_remarks(["north", f"{cyrillic} 1"])
    assert "has letters of Cyrillic that look like the Latin 'coco 1'" in remark
    (remark,) = mixed_remarks(["\u039a\u039f", "bern"])
    assert "has letters of Greek that look like the Latin 'KO'" in remark

    russian = "\u043c\u043e\u0441\u043a\u0432\u0430"
    assert not mixed_remarks([russian, cyrillic])  # whose owner writes Cyrillic
    assert len(mixed_remarks([russian, cyrillic, "coco"])) == 1
    assert not mixed_remarks([russian, "1", "\u6771\u4eac"])


@pytest.mark.parametrize("name", HARMLESS)
def test_other_names_are_names(name: str) -> None:
    assert fault_of(name) is None


@pytest.mark.parametrize(
    "name",
    [
        *HARMFUL,
        *("St. Mary's, ward 3", "a/b", "../../etc", "a[/nope]", "[red]", ".hidden", "-rf"),
        *(
            "\u0308oln",
            "\uff4eorth",
            "n\u043erth",
            "north\u115f",
            "north\ufe0f",
            "a" + "\u0316" * 4,
            "\u0440\u0430ris",
            "no\u200drth",
            "\U00020000" * 64,
        ),
    ],
)
def test_a_site_of_its_own_has_a_plain_name(name: str) -> None:
    """Neither a path, nor letters that look like those of another name."""
    with pytest.raises(ConfigError, match="--name: .* is no name of a site") as told:
        plain_name(name, "--name")
    assert str(told.value).isprintable()


@pytest.mark.parametrize(
    "name", ["north", "NA", "01", "x" * 64, "Zürich", "köln", "東京", "カフェ-1", "мир", "दिल्ली"]
)
def test_a_plain_name_has_letters_of_any_language(name: str) -> None:
    assert plain_name(unicodedata.normalize("NFD", name), "--name") == name
    assert plain_fault_of(name) is None
    apart = unicodedata.normalize("NFD", name)
    assert apart == name or plain_fault_of(apart) is not None


def _data(path: Path, *names: str) -> dict[str, Any]:
    lines = [
        json.dumps({"client": name, "text": f"{number} of the notes of a site"})
        for name in names
        for number in range(20)
    ]
    path.write_text("\n".join(lines) + "\n")
    return {
        "source": str(path),
        "form": "text",
        "max_length": 32,
        "partition": {"by": "column", "column": "client"},
    }


def test_a_run_over_sites_with_strange_names_is_shown_and_stored(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    names = ("a[/nope]", "../../out", "[red]ward[/red]", "x" * 64)
    table = run_config | {"rounds": 1, "data": _data(tmp_path / "data.jsonl", *names)}
    folder = tmp_path / "deep" / "run"
    *_, last = execute(parse(table, "test"), folder)
    assert sorted(last.values["heldout_by_site"]) == sorted(names)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "deep"}
    shown = CliRunner().invoke(app, ["show", str(folder)])
    assert shown.exit_code == 0, shown.output
    page = CliRunner().invoke(app, ["show", str(folder), "--html", str(tmp_path / "page.html")])
    assert page.exit_code == 0, page.output
    assert "[red]ward[/red]" in (tmp_path / "page.html").read_text()


def test_a_harmful_name_among_the_records_is_refused_by_check(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    table = run_config | {"data": _data(tmp_path / "data.jsonl", "north", "\x1b]0;owned\x07")}
    with pytest.raises(
        FluvialError, match=r"is no name of a site|holds a control character"
    ) as told:
        list(execute(parse(table, "test"), tmp_path / "run"))

    assert "\x1b" not in str(told.value)


@pytest.mark.flower
@pytest.mark.parametrize("name", ["../../x", "", "a[/nope]", "\x1b[2J", "x" * 300, "a b"])
def test_site_init_refuses_a_name_in_one_line_and_writes_nothing(name: str, tmp_path: Path) -> None:
    from fluvial.flower.site_operator import site_init

    with pytest.raises(ConfigError, match="--name: .* is no name of a site"):
        site_init(tmp_path / "site", name=name, server="127.0.0.1:8000", ca=None, insecure=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.flower
def test_the_name_of_a_site_goes_from_init_to_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With letters beyond ASCII, in files, in site.toml and in the server's names."""
    from fluvial.flower import names, server_operator
    from fluvial.flower.site_operator import site_init

    server_operator.server_init(tmp_path / "server", address="127.0.0.1:8000")
    ca = tmp_path / "server" / "ca.crt"
    site = tmp_path / "site"
    lines = site_init(site, name="ko\u0308ln", server="127.0.0.1:8000", ca=ca)
    assert "köln.pub" in lines[1]
    assert read_site_file(site / "site.toml").name == "köln"
    assert {path.name for path in site.iterdir()} >= {"köln.key", "köln.pub"}

    monkeypatch.setattr(server_operator, "_flwr_json", lambda *_: {"node-id": "7"})
    line = server_operator.register(tmp_path, site / "köln.pub")
    assert line == r"site köln, 'k\xf6ln', may join (node 7)"
    assert names.read(tmp_path / names.FILE)["sites"] == {"7": "köln"}
    load_ssh_public_key((site / "köln.pub").read_bytes())  # as Flower reads it
