"""A site is sent its own tables of a run's settings, and nothing of another site's."""

import json
from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import RefusalError
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.runs.config import parse
from fluvial.site_process.local_config import at_site
from fluvial.site_process.sent_config import for_site
from fluvial.site_process.site_file import SiteFile

SITES = ("north", "south")


def _table(folder: Path) -> dict[str, Any]:
    by_site = {
        name: {"source": str(folder / f"{name}.csv"), "columns": {"completion": f"of {name}"}}
        for name in SITES
    }
    budgets = [{"site": name, "memory_mb": 4000.0} for name in SITES]
    return {
        "data": {"max_length": 32, "by_site": by_site},
        "fleet": {"sites": list(SITES)},
        "method": {"name": "fedpipe", "budgets": budgets},
    }


def _site(name: str, **settings: Any) -> SiteFile:
    allowed = {"run_paths": ["*"]}
    return SiteFile.model_validate({"name": name, "server": "a:1", "allow": allowed, **settings})


@pytest.mark.parametrize("name", SITES)
def test_a_site_runs_by_its_own_tables_as_by_all(name: str, tmp_path: Path) -> None:
    config = parse(_table(tmp_path), "test")
    whole = config.model_dump(mode="json", exclude_unset=True)
    sent = for_site(whole, name)
    other = next(each for each in SITES if each != name)
    assert other in json.dumps(whole)
    assert other not in json.dumps(sent)

    ours, theirs = (at_site(parse(each, "test"), _site(name)) for each in (sent, whole))
    assert ours.data == theirs.data
    assert isinstance(ours.method, FedPipeConfig)
    assert isinstance(theirs.method, FedPipeConfig)
    assert ours.method.budget(name) == theirs.method.budget(name)
    assert ours.fleet.sites == (name,)


def test_a_site_without_a_table_refuses_and_one_with_records_takes_part(tmp_path: Path) -> None:
    sent = for_site(
        parse(_table(tmp_path), "test").model_dump(mode="json", exclude_unset=True), "w"
    )
    assert not [name for name in SITES if name in json.dumps(sent)]
    config = parse(sent, "test")
    with pytest.raises(RefusalError, match="has tables for other sites alone"):
        at_site(config, _site("w"))

    own = {"source": str(tmp_path / "w.jsonl")}
    assert at_site(config, _site("w", data=own)).data.source == own["source"]


def test_settings_without_tables_by_site_are_sent_as_they_are() -> None:
    table = {"data": {"max_length": 32}, "fleet": {"deadline_s": 5.0}, "rounds": 2}
    assert for_site(table, "north") == table
