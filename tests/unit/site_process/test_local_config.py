"""What a run may name on a site's disk is decided by the site's own file alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import DataConfig
from fluvial.data.config import SiteDataSettings
from fluvial.errors import ConfigError, RefusalError
from fluvial.runs.config import RunConfig, parse
from fluvial.site_process.local_config import INDEPENDENT, SOURCES, at_site
from fluvial.site_process.process import JOIN, SiteProcess
from fluvial.site_process.site_file import Allowed, SiteFile
from fluvial.wire.payload import Payload
from tests.support.site_process import header

WORDS = "south' does not read what a run names as"


def site(tmp_path: Path, *patterns: str, **settings: Any) -> SiteFile:
    return SiteFile(
        name="south",
        folder=tmp_path / "site",
        device="cpu",
        allow=Allowed(run_paths=patterns),
        **settings,
    )


def records(path: Path, count: int = 20) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(
            json.dumps({"text": f"note {number} of the clinic"}) + "\n" for number in range(count)
        )
    )
    return str(path)


def asked(**data: Any) -> RunConfig:
    return parse({"data": {"form": "text", **data}}, "test")


def test_the_sites_own_data_take_the_place_of_all_sources_of_the_run(tmp_path: Path) -> None:
    own = records(tmp_path / "own.jsonl")
    foreign = records(tmp_path / "foreign.jsonl")
    config = asked(source=foreign, heldout_source=foreign, public_source=foreign, max_length=64)
    found = at_site(config, site(tmp_path, data=SiteDataSettings(source=own)))
    assert (found.data.source, found.data.heldout_source, found.data.public_source) == (
        own,
        None,
        None,
    )
    assert (found.data.max_length, found.data.form) == (64, "text")
    assert foreign not in found.model_dump_json()


def test_how_a_run_puts_a_sites_texts_holds_for_its_own_records_too(tmp_path: Path) -> None:
    """Its chat template was dropped with the source, and its conversations were refused."""
    own = records(tmp_path / "own.jsonl")
    table = {"source": "/no.jsonl", "encoding": "cp1252", "chat_template": "plain"}
    config = parse({"data": {"by_site": {"south": table | {"read_as": "messages"}}}}, "test")
    given = SiteDataSettings(source=own, read_as="prompt_completion")
    found = at_site(config, site(tmp_path, data=given)).data
    assert (found.chat_template, found.read_as) == ("plain", "prompt_completion")
    assert (found.source, found.encoding, found.by_site) == (own, "utf-8", {})
    others = parse({"data": {"by_site": {"north": table}}}, "test")
    assert at_site(others, site(tmp_path, data=given)).data.chat_template is None


def test_a_new_setting_of_data_is_the_sites_until_it_is_known_to_name_no_source() -> None:
    """Whoever adds a setting to [data] decides here whether it can name a place on a site's
    disk."""
    of_the_site = {
        "source",
        "split",
        "heldout_source",
        "heldout_split",
        "heldout",
        "public_source",
        "public",
    }
    kept_out = {"by_site", "partition", "sites"}
    assert set(DataConfig.model_fields) == {*INDEPENDENT, *of_the_site, *kept_out}
    assert set(SOURCES) < of_the_site


@pytest.mark.parametrize("setting", ["source", "heldout_source"])
def test_a_refusal_tells_nothing_of_what_lies_there(setting: str, tmp_path: Path) -> None:
    """Present, absent, a folder, a link, another format, not readable: the same words."""
    present = records(tmp_path / "present.jsonl")
    (tmp_path / "link").symlink_to(present)
    (tmp_path / "binary.parquet").write_bytes(b"\0\1")
    names = [
        present,
        str(tmp_path / "absent.jsonl"),
        str(tmp_path),
        str(tmp_path / "link"),
        "/etc/passwd",
    ]
    names += [
        str(tmp_path / "binary.parquet"),
        f"{tmp_path}/x/../present.jsonl",
        "~/.ssh/id_rsa",
        "user/dataset",
    ]
    texts = set()

    for name in names:
        change = (
            {setting: name}
            if setting == "source"
            else {"source": records(tmp_path / "a" / "s.jsonl"), setting: name}
        )
        patterns = () if setting == "source" else (str(tmp_path / "a"),)
        with pytest.raises(RefusalError, match=WORDS) as told:
            at_site(asked(**change), site(tmp_path, *patterns))
        texts.add(str(told.value))
        assert name not in str(told.value)

    assert len(texts) == 1


def test_what_the_sites_file_covers_is_read_and_nothing_beside_it(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    inside = records(shared / "inside.jsonl")
    outside = records(tmp_path / "outside.jsonl")
    own = site(tmp_path, f"{shared}/*")
    assert at_site(asked(source=inside), own).data.source == inside
    assert at_site(asked(source=str(shared / "deep" / ".." / "inside.jsonl")), own)
    (shared / "out").symlink_to(outside)

    for name in (
        outside,
        str(shared / "out"),
        f"{shared}/../outside.jsonl",
        str(tmp_path),
        str(shared) + "2",
    ):
        with pytest.raises(RefusalError, match=WORDS):
            at_site(asked(source=name), own)

    with pytest.raises(RefusalError, match=WORDS):  # the folder holds a link out of it
        at_site(asked(source=str(shared)), site(tmp_path, str(shared)))
    (shared / "out").unlink()
    assert at_site(asked(source=str(shared)), site(tmp_path, str(shared)))


def test_the_base_model_is_the_sites_or_no_place_on_its_disk(
    tmp_path: Path, tiny_model: Path
) -> None:
    def named(name: str) -> RunConfig:
        return parse({"model": {"name_or_path": name}}, "test")

    assert (
        at_site(named(str(tiny_model)), site(tmp_path, model="/models/own")).model.name_or_path
        == "/models/own"
    )
    assert at_site(named(str(tiny_model)), site(tmp_path, str(tiny_model)))
    assert at_site(named("embedded"), site(tmp_path))
    assert at_site(named("meta-llama/Llama-3.2-1B"), site(tmp_path))
    texts = set()

    for name in (
        str(tiny_model),
        str(tmp_path / "absent"),
        "../models",
        "~/models",
        "a/../../etc",
        "/",
        ".",
    ):
        with pytest.raises(RefusalError, match=WORDS) as told:
            at_site(named(name), site(tmp_path))
        texts.add(str(told.value))

    assert len(texts) == 1


def test_a_run_that_names_a_file_gets_no_records_and_no_reason(tmp_path: Path) -> None:
    """Over the process: what leaves, for a file that is there and one that is not."""
    present = records(tmp_path / "present.jsonl")
    process = SiteProcess(site(tmp_path))
    told = []

    for name in (present, str(tmp_path / "absent.jsonl")):
        wire = Payload(values={"config": {"data": {"source": name, "form": "text"}}}).to_bytes()
        with pytest.raises(RefusalError) as raised:
            process.answer(header(task=JOIN, round=0), wire)
        told.append(process.refusal(header(task=JOIN), raised.value))

    assert told[0] == told[1]
    assert "present" not in told[0]


def joined(config: dict[str, Any], own: SiteFile) -> Payload:
    """The answer of a site to the message that brings it a run."""
    wire = Payload(values={"config": config}).to_bytes()
    return Payload.from_bytes(SiteProcess(own).answer(header(task=JOIN, round=0), wire).data)


@pytest.mark.parametrize(
    "settings",
    [{}, {"heldout_share": 0.2}, {"sites": ["south", "west"]}, {"split": "train[:50%]"}],
)
def test_a_site_without_records_joins_with_the_table_of_its_name(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Also where settings hold for the tables of other sites only."""
    south = {"source": records(tmp_path / "south.jsonl")}
    if "heldout_share" in settings:
        south["heldout_source"] = records(tmp_path / "test.jsonl")
    tables = {"south": south, "west": {"source": "hub/set" if settings else south["source"]}}
    run = {"data": {"form": "text", "by_site": tables, **settings}}
    assert joined(run, site(tmp_path, f"{tmp_path}/*")).value("site", str) == "south"
    with pytest.raises(RefusalError, match=r"names as data\.by_site\.south\.source: its file sets"):
        joined(run, site(tmp_path))


def test_faults_of_a_table_name_its_settings(tmp_path: Path) -> None:
    absent = {"source": str(tmp_path / "absent.jsonl")}
    with pytest.raises(ConfigError, match=r"data\.by_site\.south\.source: there is no file or"):
        joined({"data": {"by_site": {"south": absent}}}, site(tmp_path, f"{tmp_path}/*"))


@pytest.mark.parametrize("bundled", [True, False])
def test_a_run_whose_data_lack_the_site_is_refused(bundled: bool, tmp_path: Path) -> None:
    source = "stdlib" if bundled else records(tmp_path / "notes.jsonl", 160)
    told = "'south': the run's \\[data\\] has no site of this name; set \\[data\\] in its own file"
    with pytest.raises(RefusalError, match=told):
        joined({"data": {"source": source}}, site(tmp_path, "*"))
