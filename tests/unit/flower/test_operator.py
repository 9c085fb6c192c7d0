"""Folders, files and addresses that an operator gives: what is refused, in one line."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower'")

from fluvial.errors import ConfigError
from fluvial.flower.programs import split_address
from fluvial.flower.server_operator import logs, server_init
from fluvial.flower.site_operator import site_init

HOST = "127.0.0.1:8000"
SITE: dict[str, Any] = {"name": "north", "server": HOST}


@pytest.mark.parametrize(
    "text",
    ["h:80", "a-b.example.org:65535", "127.0.0.1:1", "[::1]:8000", "a_b:8000", "x." * 126 + "y:1"],
)
def test_an_address_is_read(text: str) -> None:
    host, port = split_address(text)
    assert f"{host}:{port}" == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "x",
            ":1",
            "h:",
            "h:0",
            "h:65536",
            "h:-1",
            "h:1e3",
            "h:80\n",
            "1:2:3",
            "::1",
            "a b:80",
        ),
        *(
            "http://h:80",
            "h\u00fc:80",
            "h:\uff18\uff10",
            "x" * 64 + ":80",
            "x." * 127 + "y:1",
            "-h:1",
        ),
        *("h..i:80", "[h]:80", "h/x:80", 'h":80'),
    ],
)
def test_what_is_no_address_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write HOST:PORT"):
        split_address(text)
    with pytest.raises(ConfigError, match="write HOST:PORT"):
        server_init(tmp_path / "server", address=text)
    assert not (tmp_path / "server").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write .*file: .*choose another folder"):
        server_init(tmp_path / "file", address=HOST)
    with pytest.raises(ConfigError, match="cannot write .*file/x: .*choose another folder"):
        site_init(tmp_path / "file" / "x", **SITE, ca=None, insecure=True)


@pytest.mark.parametrize("kind", ["folder", "empty", "text", "bytes"])
def test_files_that_are_no_certificates_are_refused(kind: str, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir() if kind == "folder" else wrong.write_bytes(
        {"empty": b"", "text": b"hello", "bytes": b"\xff\0"}[kind]
    )
    with pytest.raises(ConfigError, match="--ca: .*wrong is no file of certificates"):
        site_init(tmp_path / "site", **SITE, ca=wrong)
    with pytest.raises(ConfigError, match="expected PEM files"):
        server_init(tmp_path / "server", address=HOST, certificate=wrong, key=wrong, ca=wrong)
    assert sorted(tmp_path.iterdir()) == [wrong]


def test_logs_of_a_folder_without_a_server_touch_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluvial.flower.server_operator.subprocess.run", pytest.fail)
    with pytest.raises(ConfigError, match="holds no server"):
        logs(tmp_path, 1, follow=False)
    assert list(tmp_path.iterdir()) == []
