"""Every command of docs/howto/ runs, in its order, and prints the lines that the page shows."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.cli.console import out
from fluvial.errors import FluvialError
from fluvial.federation.fleet import Fleet
from fluvial.federation.sites import adapter_message
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.runs.config import RunConfig, load, parse
from fluvial.runs.run import Event, execute
from fluvial.site_process.journal import Header
from fluvial.site_process.process import JOIN, SiteProcess
from fluvial.site_process.site_file import Allowed, SiteFile, read_site_file
from fluvial.wire.payload import Payload
from tests.docs.test_docs import blocks
from tests.support import ROOT
from tests.support.site_process import header

FOLDER = ROOT / "docs" / "howto"
PAGES = sorted(FOLDER.glob("*.md"))
BLOCK = re.compile(r"^```(bash|toml|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COLUMNS = 96
"""Width of the terminal of the pages."""
RECORDS = "mkdir -p records\n"
"""Beginning of the block that writes the records, which is the same on all pages."""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, with the programs of the tests, on a terminal of a width."""
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("python", ""), ("fluvial", "-m fluvial.cli")):
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setattr(out, "width", COLUMNS)


def run(block: str, *, apart: bool) -> str:
    """Return what a block prints; unless `apart`, commands of Fluvial run in this process."""
    lines = block.splitlines()
    if apart or not all(line.startswith("fluvial ") for line in lines):
        command = ["bash", "-euo", "pipefail", "-c", block]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    printed = ""
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, (line, result.output, result.exception)
        printed += result.output

    return printed


def masked(text: str) -> str:
    """Return a text with one blank between words and one mark in the place of each figure."""
    return " ".join(re.sub(r"\b[0-9a-f]{16}\b|\d[\d.,:TZ-]*", "#", text).split())


def walk(page: Path, *, whole: bool = True, apart: bool = False) -> None:
    """Run the blocks of a page in their order, and compare what they print, but for figures.

    Without `whole`, a line is compared up to its first figure: plans of sites depend on the
    machine. A text that follows no output is no output.
    """
    printed = ""
    wrong = []
    for language, block in BLOCK.findall(page.read_text()):
        if language == "toml":
            name = re.match(r"# ([\w-]+\.toml)", block)
            assert name, f"{page.name}: the first line names the file: {block[:40]!r}"
            Path(name[1]).write_text(block)
            printed = ""
        elif language == "bash":
            printed = run(block, apart=apart)
        elif printed:
            shown = [masked(line) for line in printed.splitlines()]
            lines = [line if whole else re.split(r"\d", line)[0] for line in block.splitlines()]
            wrong += [
                (line, printed) for line in lines if not any(masked(line) in each for each in shown)
            ]

    assert not wrong, "\n".join(f"not printed: {line}\n{printed}" for line, printed in wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_when_not_to_use_it_and_begins_with_the_same_records(page: Path) -> None:
    assert "\n**When not to use it.** " in page.read_text()
    (first, *_) = blocks(page, "bash")
    assert first.startswith(RECORDS)
    assert first == blocks(PAGES[0], "bash")[0]


@pytest.mark.slow
def test_slow_links() -> None:
    walk(FOLDER / "slow-links.md")
    Path("both.toml").write_text(Path("slow.toml").read_text() + Path("fleet.toml").read_text())
    assert load(Path("both.toml")).fleet.deadline_s == 600.0


@pytest.mark.slow
def test_unequal_gpus() -> None:
    walk(FOLDER / "unequal-gpus.md", whole=False)
    assert read_site_file(Path("site.toml")).memory_mb == 8000


@pytest.mark.slow
def test_privacy() -> None:
    walk(FOLDER / "privacy.md")
    norms = [record["update_norm"] for record in rounds("private")]
    assert all(83 < norm < 89 for norm in norms), "the page says 86"


def test_the_site_of_the_privacy_page_refuses_what_it_says() -> None:
    """A run that spends more than the site allows, and one that promises nothing."""
    page = {block.split()[1]: block for block in blocks(FOLDER / "privacy.md", "toml")}
    Path("site.toml").write_text(page["site.toml"])
    asked = tomllib.loads(page["private.toml"]) | {"data": {"max_length": 16}}
    spends = asked["method"]["privacy"] | {"epsilon": 10.5}
    promises_nothing = {key: value for key, value in asked["method"].items() if key != "privacy"}

    for method, words in (
        (asked["method"] | {"privacy": spends}, "would spend epsilon 10.5"),
        (promises_nothing, "only in runs that add noise at the site"),
    ):
        with pytest.raises(FluvialError, match=words):
            join(SiteProcess(read_site_file(Path("site.toml"))), asked | {"method": method})


def simulate(config: RunConfig, folder: Path, *, resume: bool = False) -> Iterator[Event]:
    """Yield the events of a run as Flower's simulation does, without Ray's processes."""
    from flwr.app import RecordDict
    from flwr.serverapp import Grid

    from fluvial.flower.envelope import pack
    from fluvial.flower.transport import flower_fleet
    from tests.flower.test_flower import NAMES, FakeGrid

    allow = Allowed(run_paths=("*",))
    sites = {
        name: SiteProcess(
            SiteFile(name=name, folder=folder / "site_processes" / name, device="cpu", allow=allow)
        )
        for name in NAMES
    }

    def answer(site: str, header: Header, wire: bytes) -> RecordDict:
        found = sites[site].answer(header, wire)
        return pack(found.data, {"error": "", "kept": found.kept})

    def assemble(each: RunConfig, _: object, pool: ModelPool, texts: Any) -> Fleet:
        grid = cast(Grid, FakeGrid(answer, {}, dict(enumerate(NAMES, 1)), whole=True))
        return flower_fleet(
            grid, each, folder.name, texts.names, pool, join_timeout_s=30, poll_s=0.001
        )

    return execute(config, folder, resume=resume, assemble=assemble)


def test_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of the sites are this one; `test_audit_over_flower` has processes."""
    pytest.importorskip("flwr", reason="needs the extra 'flower'")
    from flwr.supercore.task_identity import TaskIdentity

    for identity in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, identity, 1)
    monkeypatch.setattr("fluvial.flower.simulate.simulate", simulate)
    walk(FOLDER / "audit.md")


@pytest.mark.flower
def test_audit_over_flower() -> None:
    """Ray leaves files of its own open, and so has a process of its own."""
    pytest.importorskip("flwr", reason="needs the extra 'flower'")
    walk(FOLDER / "audit.md", apart=True)


def join(site: SiteProcess, table: dict[str, Any]) -> None:
    """Have a site join a run."""
    site.answer(header(task=JOIN, round=0), Payload(values={"config": table}).to_bytes())


def test_the_limits_of_the_audit_page_refuse_what_it_says() -> None:
    page = (FOLDER / "audit.md").read_text()
    *_, (_, limits), (_, refusals) = (
        found for found in BLOCK.findall(page) if found[0] in ("toml", "text")
    )
    Path("site.toml").write_text(limits)
    site = SiteProcess(read_site_file(Path("site.toml")))
    table: dict[str, Any] = {
        "data": {"sites": ["email", "web"], "max_length": 16},
        "train": {"max_steps": 1, "per_device_train_batch_size": 1},
    }
    joined = site.site.model_copy(update={"name": "email"})
    with pytest.raises(FluvialError) as method:
        join(site, table | {"method": {"name": "fedpipe"}})

    site.site = joined
    join(site, table)
    config = parse(table, "test")
    pool = ModelPool(config.model, config.adapter)
    message = adapter_message(initial_state(pool.layout, 1), round=1)
    with pytest.raises(FluvialError) as bytes_up:
        site.answer(header(), message.to_bytes())

    told = (str(method.value), str(bytes_up.value).replace("'email'", "'north'"))
    for line, words in zip(refusals.splitlines(), told, strict=True):
        assert words.startswith(line)


def rounds(name: str) -> list[dict[str, Any]]:
    """Return the records of the rounds of a run."""
    lines = Path("runs", name, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
