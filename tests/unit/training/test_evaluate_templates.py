"""What holds for some records alone, in a written folder that is measured away from its run."""

import json
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import DataConfig
from fluvial.errors import ConfigError
from fluvial.runs.evaluation import own_reading

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("record", "templates", "words"),
    [
        ({"messages": CHAT}, ["plain", "chatml"], "add --set 'data.chat_template=\"plain\"', or"),
        ({"messages": CHAT}, ["plain", "{{ x }}"], "or --set 'data.chat_template=\"FILE\"'"),
        ({"messages": CHAT}, ["plain", "plain"], None),
        ({"prompt": "a", "completion": "b"}, ["plain", None], None),
    ],
)
def test_a_conversation_is_read_with_the_template_of_its_site(
    record: dict[str, Any], templates: list[str | None], words: str | None, tmp_path: Path
) -> None:
    """Other records have no template, so that the templates of sites make no two ways of them."""
    file = tmp_path / "new.jsonl"
    file.write_text(json.dumps(record) + "\n")
    sources = {"north": "n.jsonl", "south": "s.jsonl"}
    by_site = {
        name: {"source": source, **({"chat_template": template} if template else {})}
        for (name, source), template in zip(sources.items(), templates, strict=True)
    }
    readings = DataConfig.model_validate({"by_site": by_site}).readings()
    run = {"data": {"max_length": 32}, "suffix": "", "readings": readings}
    if words is None:
        found = own_reading(tmp_path, run, file, None)["data"].get("chat_template")
        assert found == ("plain" if "messages" in record else None)
        return

    with pytest.raises(ConfigError) as error:
        own_reading(tmp_path, run, file, None)
    assert words in str(error.value)
    given = own_reading(tmp_path, run, file, None, ['data.chat_template="plain"'])
    assert given["data"]["chat_template"] == "plain"


@pytest.mark.parametrize("around", [True, False])
@pytest.mark.parametrize(
    ("read_as", "record", "words"),
    [
        ("prompt_completion", {"prompt": "a", "completion": "b"}, None),
        ("messages", {"prompt": "a", "completion": "b"}, "in different ways"),
        ("prompt_completion", {"prompt": "a", "completion": 0}, None),
        (None, {"messages": CHAT}, "in different ways"),
    ],
)
def test_ways_that_give_the_same_records_are_one_way(
    around: bool, read_as: str | None, record: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    """A held-out file that sites share was refused, though no setting changed its records."""
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps(record) + "\n")
    asked = {"heldout_source": str(file), "heldout": {"columns": {}}, "numbers": "text"}
    by_site = {
        "bern": {"source": "b.jsonl", "columns": {"prompt": "Frage", "completion": "Amt"}, **asked},
        "rome": {"source": "r.jsonl", "chat_template": "plain", "read_as": read_as, **asked},
    }
    data = DataConfig.model_validate({"by_site": by_site})
    folder, run = tmp_path / "adapter", {"data": {}, "suffix": "", "readings": data.readings()}
    folder.mkdir()
    if around:
        config = {"fluvial": "0", "data": data.model_dump(mode="json")}
        (tmp_path / "config.json").write_text(json.dumps(config))
        run = {}
    if words is None:
        told = own_reading(folder, run, file, None)
        assert told["data"]["columns"] == {}
        assert told.get("as_site") == ("bern, rome" if around else None)
        return
    with pytest.raises(ConfigError, match=words) as error:
        own_reading(folder, run, file, None)
    if read_as == "messages" and not around:
        assert "--set 'data.read_as=\"messages\"'" in str(error.value)


def test_plain_text_has_no_columns_so_that_sites_read_it_in_one_way(tmp_path: Path) -> None:
    file = tmp_path / "new.txt"
    file.write_text("The river carries water.\n")
    sites = {name: {"source": f"{name}.jsonl"} for name in ("north", "south")}
    by_site = {name: {**site, "columns": {"completion": name}} for name, site in sites.items()}
    data = DataConfig.model_validate({"by_site": {**by_site, "west": {"source": "w.txt"}}})
    run = {"data": {"max_length": 32}, "suffix": "", "readings": data.readings()}
    assert own_reading(tmp_path, run, file, None)["data"]["columns"] == {}

    config = {"fluvial": "0", "data": data.model_dump(mode="json")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "adapter").mkdir()
    assert not own_reading(tmp_path / "adapter", {}, file, None)["data"].get("columns")
