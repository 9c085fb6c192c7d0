"""Names of sites that `fluvial init --data NAME=PATH` is given."""

from pathlib import Path

import pytest

from fluvial.errors import ConfigError
from fluvial.runs.proposal.columns import renamed_columns
from fluvial.runs.proposal.given import read_given
from fluvial.runs.proposal.separate import named_sources, site_names
from tests.unit.runs.test_proposal import proposed, run_init, written


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(word: str) -> list[dict[str, str]]:
    return [{"prompt": f"{word} {n}?", "completion": f"House {n}"} for n in range(6)]


def test_a_name_before_the_path_is_that_of_the_site(tiny_model: Path) -> None:
    """Columns and held-out records of one site are named by it too."""
    for name in ("a=b.jsonl", "north.jsonl", "asked.jsonl"):
        written(rows(name), name)
    replies = [{"ask": row["prompt"], "reply": row["completion"]} for row in rows("b")]
    Path("b").mkdir()
    written(replies, "b/north.jsonl")
    data = proposed(
        *("--model", str(tiny_model), "--data", "a=b.jsonl", "--data", "north.jsonl"),
        *("--data", "Site B=b/north.jsonl", "--heldout", "Site B=asked.jsonl"),
        *("--column", "Site B:prompt=ask", "--column", "Site B:completion=reply"),
    ).data
    assert sorted(data.by_site) == ["Site B", "a=b", "north"]
    assert {Path(own.source).name for own in data.by_site.values()} == {"a=b.jsonl", "north.jsonl"}
    assert data.by_site["Site B"].columns == {"prompt": "ask", "completion": "reply"}
    assert data.by_site["Site B"].heldout_source == str(Path("asked.jsonl").resolve())


def test_names_with_the_marks_of_the_options_are_known_sites() -> None:
    """The longest known name is the site; one that nothing makes is told with its whole name."""
    for name in ("a.jsonl", "a=b.jsonl", "one.jsonl", "x=y.jsonl"):
        written(rows(name), name)
    data = ["a.jsonl", "a=b.jsonl"]
    assert site_names(data) == ["a", "a=b"]
    assert site_names(["a=b.jsonl"]) == []
    pairs = ["a=b:prompt=ask:x=1", "a:completion=y", "text=a:text=b", "c=d:text=z"]
    assert renamed_columns(pairs, site_names(data)) == {
        "a=b": {"prompt": "ask:x=1"},
        "a": {"completion": "y"},
        "": {"text": "a:text=b"},
        "c=d": {"text": "z"},
    }
    held = read_given(data, ["a=b=one.jsonl", "a=x=y.jsonl"], None).heldout
    assert {site: files.source for site, files in held.items()} == {
        "a=b": "one.jsonl",
        "a": "x=y.jsonl",
    }


def test_a_column_may_have_any_name(tiny_model: Path) -> None:
    """Also that of a number of shares, or of the choice of a site for each file."""
    table = [{**row, "3": "ab"[n % 2], "file": "cd"[n % 2]} for n, row in enumerate(rows("a") * 2)]
    options = ("--model", str(tiny_model), "--data", written(table), "--force")
    for column in ("3", "file"):
        partition = proposed(*options, "--site-column", column).data.partition
        assert partition.model_dump() | {"column": column} == partition.model_dump()
    with pytest.raises(ConfigError, match="--site-column '4': .* has the columns"):
        run_init("--yes", *options, "--site-column", "4")

    assert renamed_columns(["prompt=two\nlines"]) == {"": {"prompt": "two\nlines"}}
    with pytest.raises(ConfigError, match="prompt is 'a' already; drop one"):
        renamed_columns(["prompt=a", "prompt=b"])


def test_a_held_out_file_of_either_of_two_sites_is_refused() -> None:
    for name in ("a.jsonl", "a=b.jsonl", "one.jsonl", "b=one.jsonl"):
        written(rows(name), name)
    faults = read_given(["a.jsonl", "a=b.jsonl"], ["a=b=one.jsonl"], None).faults[""]
    assert faults.count == 1
    assert "a file of each of the sites a=b and a; name one of them otherwise" in faults.first[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["=a.jsonl", "b.jsonl"], "'=a.jsonl': '' is no name of a site; it needs a character"),
        (["a=", "b.jsonl"], "'a=': names no file or folder"),
        (["x=a.jsonl", "x=b.jsonl"], "'x=b.jsonl': site 'x' is named again"),
        (["x\t=a.jsonl", "b.jsonl"], "holds a control or format character"),
        ([f"{'x' * 65}=a.jsonl", "b.jsonl"], "65 characters, at most 64"),
        (["x=a.jsonl"], "a name is for one of several --data, .*; write --data a.jsonl"),
    ],
)
def test_a_wrong_name_is_one_error(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        named_sources(options)


def test_all_wrong_names_are_told(tiny_model: Path) -> None:
    wrong = ("--data", "=a.jsonl", "--data", "b=", "--data", "c.jsonl")
    with pytest.raises(ConfigError, match=r"(?s)'=a.jsonl'.*'b='"):
        run_init("--yes", "--model", str(tiny_model), *wrong)


def test_two_sources_of_one_name_are_told_how_to_name_them(tiny_model: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        written(rows(name), name)
    same = ("--data", "a.jsonl", "--data", "a=b.jsonl")
    with pytest.raises(ConfigError, match="makes the site 'a' too; name one with --data NAME=PATH"):
        run_init("--yes", "--model", str(tiny_model), *same)
    named = read_given(["a.jsonl", "x=b.jsonl"], [], None)
    assert [files.site for files in named.data] == [None, "x"]
