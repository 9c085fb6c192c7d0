"""Faults of data: the same one is told once, with its places, and none is lost from the count."""

from pathlib import Path

import pytest

from fluvial.data.config import DataConfig
from fluvial.data.faults import PLACES, SHOWN, DataError, Faults
from fluvial.data.site_records import SiteRecords
from fluvial.errors import ConfigError

FILES = 30
LINES = 7


def lines_of(faults: Faults) -> list[str]:
    """Return the lines of the error."""
    with pytest.raises(DataError) as caught:
        faults.raise_any()
    return str(caught.value).splitlines()


def test_one_fault_in_many_files_is_one_line(tmp_path: Path) -> None:
    """A field that is missing in each line of each file, and another encoding in two files."""
    (tmp_path / "all").mkdir()
    for number in range(FILES):
        file = tmp_path / f"all/{number:02}.jsonl"
        file.write_text('{"prompt": "Who?", "completion": "It"}\n' + '{"prompt": "Who?"}\n' * LINES)
    for name in ("x", "y"):
        text = f"caf\u00e9 {name}" * len(name)
        (tmp_path / f"all/{name}.jsonl").write_bytes(f'{{"text": "{text}"}}\n'.encode("cp1252"))
    faults = Faults()
    config = DataConfig.model_validate(
        {"source": str(tmp_path / "all"), "partition": {"by": "file"}}
    )
    SiteRecords(config, 0, None).read(faults)

    head, missing, encoding = lines_of(faults)
    assert head == f"{FILES * LINES + 2} faults in the data:"
    assert missing.startswith(f"{FILES * LINES} times: field 'completion' is missing; ")
    assert missing.count(".jsonl, line") == 2
    assert missing.endswith(f"lines 2, 3, 4; and {FILES * LINES - PLACES} more")
    assert encoding.startswith('2 times: is no text of utf-8; set data.encoding, for instance to "')
    assert "x.jsonl, line 1 (byte 14 of the file is 0xe9: " in encoding


def test_one_fault_at_many_sites_names_their_tables(tmp_path: Path) -> None:
    sites = {}
    for name in ("bern", "oslo"):
        file = tmp_path / f"{name}.jsonl"
        file.write_bytes('{"text": "caf\u00e9"}\n'.encode("cp1252"))
        sites[name] = {"source": str(file)}
    faults = Faults()
    SiteRecords(DataConfig.model_validate({"by_site": sites}), 0, None).read(faults)
    _, line = lines_of(faults)
    assert "set data.by_site.NAME.encoding, for instance" in line
    assert f"data.by_site.bern: {tmp_path}/bern.jsonl, line 1 (byte" in line
    assert f"data.by_site.oslo: {tmp_path}/oslo.jsonl, line 1 (byte" in line


def test_every_fault_is_counted_however_the_lists_are_joined() -> None:
    """Of many kinds at many places, through an error and from several files."""
    files = []
    for name in ("a", "b", "c"):
        faults = Faults()
        for line in range(25):
            for kind in range(SHOWN + 5):
                faults.add(f"{name}, line {line}: is of kind {kind}", f"{name}, line {line}")
        assert faults.count == 25 * (SHOWN + 5)
        files.append(faults)

    evenly, by_error = Faults(), Faults()
    evenly.include_evenly(files)
    for each in files:
        by_error.include(DataError(each.groups, each.count))
    for together in (evenly, by_error):
        assert together.count == 3 * 25 * (SHOWN + 5)
        told = lines_of(together)
        assert len(told) == SHOWN + 2
        assert told[1].startswith("75 times: is of kind 0: a, lines 0, 1, ")
        assert told[1].endswith(f"; and {75 - PLACES} more")
        assert told[-1] == f"and {3 * 25 * 5} more"
    assert "; b, lines 0, 1, 2; c, lines 0, 1, 2; and" in lines_of(evenly)[1]


def test_a_list_that_is_read_twice_is_counted_once() -> None:
    faults, both = Faults(), Faults()
    for line in range(40):
        faults.include(ConfigError(f"a, line {line}: is wrong"), f"a, line {line}")
    both.include_all(faults)
    both.include_all(faults)
    assert both.count == 40
