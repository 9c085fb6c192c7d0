"""Sites of one run whose files differ in kind, columns and encoding."""

import json
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import Overlap, SiteTexts
from fluvial.data.config import DataConfig
from fluvial.data.faults import Faults
from fluvial.data.records import Answered
from fluvial.data.site_records import SiteRecords
from fluvial.errors import ConfigError
from fluvial.runs.config import load, parse
from fluvial.seeds import numpy_generator
from fluvial.site_process.local_config import at_site
from fluvial.site_process.site_file import Allowed, SiteFile


@pytest.fixture
def by_site(tmp_path: Path) -> dict[str, Any]:
    """A spreadsheet, JSON lines, and a folder of two files."""
    rows = [(f"question {number}", f"answer {number}") for number in range(20)]
    lines = "".join(f"{question};{answer}\n" for question, answer in rows)
    (tmp_path / "north.csv").write_text(f"Frage;Antwort\n{lines}")
    objects = [{"instruction": question, "output": answer} for question, answer in rows]
    (tmp_path / "south.jsonl").write_text("".join(json.dumps(each) + "\n" for each in objects))
    (tmp_path / "west").mkdir()
    for name, part in (("a", rows[:10]), ("b", rows[10:])):
        text = "".join(f"{question},{answer}\n" for question, answer in part)
        (tmp_path / "west" / f"{name}.csv").write_text(f"prompt,completion\n{text}")
    columns = {"prompt": "Frage", "completion": "Antwort"}
    return {
        "north": {"source": str(tmp_path / "north.csv"), "delimiter": ";", "columns": columns},
        "south": {"source": str(tmp_path / "south.jsonl")},
        "west": {"source": str(tmp_path / "west")},
    }


def test_each_site_is_read_by_its_own_settings(by_site: dict[str, Any]) -> None:
    """With the share that is held out of a site that has its records alone."""
    reader = SiteRecords(DataConfig(by_site=by_site, heldout_share=0.2), 3, None)
    faults = Faults()
    parts = reader.read(faults)
    assert not faults.count
    assert sorted(parts) == ["north", "south", "west"]
    assert reader.forms == {"prompt_completion", "alpaca"}
    for name, (train, heldout) in parts.items():
        assert (len(train), len(heldout)) == (16, 4)
        order = numpy_generator(3, "heldout", name).permutation(20)
        answers = [each.content.answer for each in heldout if isinstance(each.content, Answered)]
        assert answers == [f"answer {number}" for number in sorted(order[:4])]

    alone = SiteRecords(DataConfig(**by_site["north"], heldout_share=0.2), 3, "north")
    assert alone.read(Faults())["north"] == parts["north"]
    some = DataConfig(by_site=by_site, sites=("south",))
    assert list(SiteRecords(some, 3, None).read(Faults())) == ["south"]


def test_faults_name_site_file_and_line(by_site: dict[str, Any], tmp_path: Path) -> None:
    with (tmp_path / "north.csv").open("a") as file:
        file.write("a;b;c\n")
    by_site["south"]["source"] = str(tmp_path / "gone.jsonl")
    faults = Faults()
    assert SiteRecords(DataConfig(by_site=by_site), 0, None).read(faults) == {}
    north, south = faults.first
    assert north.startswith("data.by_site.north: ")
    assert "north.csv, line 22: has 3 cells, the header has 2; " in north
    assert south.startswith("data.by_site.south.source: there is no file or folder")


@pytest.mark.parametrize(
    ("shared", "one_set", "distinct", "independent"),
    [
        ("north south west", True, 20, 20),
        ("north south", False, 22, 42**2 / (20 * 4 + 2)),
        ("", False, 6, 6),
    ],
)
def test_a_heldout_record_of_several_sites_is_known_as_one(
    by_site: dict[str, Any],
    tmp_path: Path,
    tokenizer: Any,
    shared: str,
    one_set: bool,
    distinct: int,
    independent: float,
) -> None:
    common = [{"prompt": f"asked {number}", "completion": "x"} for number in range(20)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(each) + "\n" for each in common))
    for name in shared.split():
        source = str(tmp_path / "all.jsonl")
        by_site[name] |= {"heldout_source": source, "heldout": {"columns": {}}}
    texts = SiteTexts(DataConfig(by_site=by_site, max_length=256), tokenizer, seed=0)
    found = Overlap.of(map(texts.load, texts.names))
    assert (found.one_set, found.distinct_questions) == (one_set, distinct)
    assert found.independent_questions == pytest.approx(independent)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "x.jsonl"}, "source: without effect beside data.by_site"),
        ({"partition": {"by": "file"}}, "partition: without effect beside data.by_site"),
        ({"by_site": {"a": {"source": "stdlib"}}}, "by_site.a.source='stdlib': brings sites of"),
        ({"by_site": {"a": {"source": "x", "heldout": {}}}}, "by_site.a.heldout: without effect"),
        ({"by_site": {"a": {"file": "x"}}}, "by_site"),
    ],
)
def test_what_has_no_effect_is_refused(
    by_site: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        parse({"data": {"by_site": by_site} | changes}, "test")


def test_paths_are_relative_to_the_file_that_names_them(
    by_site: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[data.by_site.north]\nsource = "north.csv"\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(file).data.by_site["north"].source == by_site["north"]["source"]


def test_a_site_of_a_deployment_reads_its_own_table(by_site: dict[str, Any]) -> None:
    config = parse({"data": {"by_site": by_site}}, "test")
    site = SiteFile(name="south", allow=Allowed(run_paths=("*",)))
    assert list(at_site(config, site).data.by_site) == ["south"]
    with pytest.raises(Exception, match="data.by_site has tables for other sites alone"):
        at_site(config, SiteFile(name="east", allow=Allowed(run_paths=("*",))))


@pytest.mark.parametrize("name", ["north", "south", "west"])
def test_a_table_holds_at_the_site_as_in_one_process(by_site: dict[str, Any], name: str) -> None:
    """Also in a resolved configuration, whose tables have what is unset as None."""
    by_site["west"] |= {"heldout_source": by_site["south"]["source"], "heldout": {"columns": {}}}
    common = {"columns": {"prompt": "Q"}, "delimiter": "|"}
    run = parse({"data": {"by_site": by_site, **common}}, "test")
    resolved = parse({"data": run.data.model_dump(mode="json")}, "test")
    site = SiteFile(name=name, allow=Allowed(run_paths=("*",)))
    assert at_site(resolved, site).data.of_site(name) == run.data.of_site(name)


def test_a_remedy_names_the_table_of_the_site(by_site: dict[str, Any]) -> None:
    faults = Faults()
    reader = SiteRecords(DataConfig(by_site=by_site, columns={"text": "gone"}), 0, None)
    assert reader.read(faults) == {}
    assert faults.first
    for fault in faults.first:
        assert "set data.by_site." in fault
        assert "data.columns" not in fault


def test_a_split_that_no_site_has_is_refused(by_site: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="data.split='other': without effect"):
        SiteRecords(DataConfig(by_site=by_site, split="other"), 0, None).read(Faults())


@pytest.mark.parametrize(
    ("kind", "own", "asked"),
    [
        ("jsonl", {}, "\u00fc"),
        ("jsonl", {"encoding": "cp1252"}, "\u00c3\u00bc"),
        ("csv", {}, "\u00c3\u00bc"),
        ("csv", {"encoding": "utf-8"}, "\u00fc"),
    ],
)
@pytest.mark.parametrize("of_all", [False, True])
def test_an_encoding_holds_for_files_of_one_kind(
    tmp_path: Path, kind: str, own: dict[str, Any], asked: str, of_all: bool
) -> None:
    """UTF-8 in a held-out file beside a spreadsheet in another encoding, also where [data] names
    the encoding for all sites."""
    (tmp_path / "a.csv").write_text("prompt;completion\n\u00fc;c\n\u00fc;c\n", encoding="cp1252")
    text = {
        "csv": "prompt;completion\n\u00fc;c\n",
        "jsonl": '{"prompt": "\u00fc", "completion": "c"}\n',
    }
    held = tmp_path / f"held.{kind}"
    held.write_text(text[kind], encoding="utf-8")
    reading = {"encoding": "cp1252", "delimiter": ";"}
    table = {"source": str(tmp_path / "a.csv"), "heldout_source": str(held), "heldout": own}
    south = {"source": str(tmp_path / "south.jsonl")}
    (tmp_path / "south.jsonl").write_text(text["jsonl"] * 2, encoding="utf-8")
    sites: dict[str, Any] = {"north": table if of_all else table | reading, "south": south}
    shared: dict[str, Any] = {"heldout_share": 0.5, **(reading if of_all else {})}
    config = DataConfig(**shared, by_site=sites)
    faults = Faults()
    parts = SiteRecords(config, 0, None).read(faults)
    assert not faults.count
    prompts = [
        each.content.prompt for each in parts["north"][1] if isinstance(each.content, Answered)
    ]
    assert prompts == [asked]
    assert all(
        isinstance(each.content, Answered) and each.content.prompt == "\u00fc"
        for each in (*parts["south"][0], *parts["south"][1], *parts["north"][0])
    )


def test_a_remedy_names_the_heldout_table(by_site: dict[str, Any], tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "\u00fc", "completion": "c"}\n', encoding="cp1252")
    by_site["north"] |= {"heldout_source": str(held), "encoding": "cp1252"}
    faults = Faults()
    assert SiteRecords(DataConfig(by_site=by_site), 0, None).read(faults) == {}
    assert "set data.by_site.north.heldout.encoding, for instance" in faults.first[0]


def test_a_site_without_questions_is_named(
    by_site: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    turns = [{"role": "assistant", "content": "good day"}, {"role": "user", "content": "bye"}]
    line = json.dumps({"messages": turns}) + "\n"
    (tmp_path / "east.jsonl").write_text(line * 20)
    by_site["east"] = {"source": str(tmp_path / "east.jsonl")}
    config = DataConfig(by_site=by_site, chat_template="chatml", max_length=512)
    remarks = SiteTexts(config, tokenizer, seed=0).check()
    assert any("held-out records of 'east' have no question" in remark for remark in remarks)
