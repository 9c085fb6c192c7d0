"""Tables, arrays and objects that lie too deep in each other: one line, whoever wrote them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluvial.errors import ConfigError
from fluvial.models.stored import stored_tensors
from fluvial.runs.config import override, parse
from fluvial.site_process.outgoing import OutgoingLog
from fluvial.storage import toml
from fluvial.storage.files import read_object

DEPTHS = (60, 600, 5000)
TEXTS: dict[str, Callable[[int], str]] = {
    "arrays": lambda depth: "x = " + "[" * depth + "]" * depth,
    "inline tables": lambda depth: "x = " + "{a = " * depth + "1" + "}" * depth,
    "dotted keys": lambda depth: ".".join("a" * depth) + " = 1",
}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", TEXTS)
def test_toml_is_refused(kind: str, depth: int, tmp_path: Path) -> None:
    text = TEXTS[kind](depth)
    with pytest.raises(ConfigError, match="lie too deep in each other"):
        override(text)
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.toml: cannot be read: .* too deep"):
        toml.load(tmp_path / "run.toml", "missing")


def test_a_configuration_from_outside_is_refused() -> None:
    for outer in (lambda inner: [inner], lambda inner: {"a": inner}):
        table: Any = {"rounds": 2}
        for _ in range(400):
            table = outer(table)
        with pytest.raises(ConfigError, match="the run's configuration: .* too deep"):
            parse({"lora": table}, "the run's configuration")


def test_an_integer_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(ConfigError, match="an integer has thousands of digits"):
        override("rounds = " + "9" * 5000)


@pytest.mark.parametrize("depth", [1500, 100_000])
def test_json_of_a_model_s_folder_is_refused(depth: int, tmp_path: Path) -> None:
    deep = "[" * depth + "]" * depth
    (tmp_path / "config.json").write_text(deep)
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_object(tmp_path / "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(deep)
    with pytest.raises(ConfigError, match="has no 'weight_map'"):
        stored_tensors(tmp_path)
    head = deep.encode()
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(ConfigError, match="damaged"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "[1]", '{"runs": 3}', "[" * 5000])
def test_damaged_names_of_a_server_are_told(text: str, tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="needs the extra 'flower'")
    from fluvial.flower import names

    (tmp_path / names.FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"names\.json: is damaged"):
        names.read(tmp_path / names.FILE)


def test_a_line_of_a_log_that_is_no_entry_counts_nothing(tmp_path: Path) -> None:
    log = OutgoingLog(tmp_path)
    for line in (b"[1]", b"3", b"[" * 5000, b"{}"):
        log._add(line)
    assert log._bytes == {}
