"""What the documents say is run: their examples, their links, their commands, their lists of
files."""

import json
import operator
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args

import numpy as np
import pytest
import torch
import typer
from pydantic import Field, TypeAdapter, create_model

from fluvial.cli import app
from fluvial.codecs import CODECS, CodecConfig
from fluvial.methods import METHODS, MethodConfig
from fluvial.methods.fedavg import FedAvgConfig
from fluvial.runs import config
from fluvial.settings import Settings
from fluvial.wire.payload import frame_payload
from fluvial.wire.tensors import norm, subtract
from tests.contract import test_codecs
from tests.support import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
COMMAND_BLOCKS = ("", "sh", "bash", "console")


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


def module(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`code` as a module that can be imported as `name` until the test ends."""
    made = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(code, f"<{name}>", "exec"), made.__dict__)
    return made


def examples(made: ModuleType) -> Iterator[Callable[..., None]]:
    """Its test functions."""
    return (value for name, value in vars(made).items() if name.startswith("test_"))


def widened(union: Any, settings: type[Settings]) -> Any:
    """What the union of a `__init__` is after the edit that the page shows."""
    members = get_args(get_args(union)[0])
    return Annotated[reduce(operator.or_, members, settings), Field(discriminator="name")]


@pytest.fixture
def method_example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tests on docs/adding-a-method.md, once its method is listed as the page says."""
    code, tests = blocks(ROOT / "docs" / "adding-a-method.md", "python")
    made = module("fluvial.methods.fedavgm", code, monkeypatch)
    monkeypatch.setitem(METHODS, "fedavgm", made.METHOD)
    union = widened(MethodConfig, made.FedAvgMConfig)
    extended = create_model("RunConfig", __base__=config.RunConfig, method=(union, FedAvgConfig()))
    monkeypatch.setattr(config, "RunConfig", extended)

    return module("tests.test_fedavgm", tests, monkeypatch)


@pytest.fixture
def codec_example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tests on docs/adding-a-codec.md, once its codec is listed as the page says."""
    code, tests = blocks(ROOT / "docs" / "adding-a-codec.md", "python")
    made = module("fluvial.codecs.two_bits", code, monkeypatch)
    assert made.Int2.code not in {codec.code for codec in CODECS.values()}
    monkeypatch.setitem(CODECS, "int2", made.Int2)
    union = widened(CodecConfig, made.Int2Settings)
    monkeypatch.setattr(test_codecs, "CONFIG", TypeAdapter(union))
    extended = create_model("RunConfig", __base__=config.RunConfig, codec=(union | None, None))
    monkeypatch.setattr(config, "RunConfig", extended)

    return module("tests.test_two_bits", tests, monkeypatch)


def test_the_method_on_the_page_runs(
    method_example: ModuleType, run_config: dict[str, Any], tmp_path: Path
) -> None:
    found = list(examples(method_example))
    assert len(found) == 2
    for number, test in enumerate(found):
        test(run_config, tmp_path / str(number))


def test_the_codec_on_the_page_runs(
    codec_example: ModuleType, run_config: dict[str, Any], tmp_path: Path
) -> None:
    codec_example.test_it_loses_twelve_per_cent_of_gaussian_values()
    codec_example.test_a_run_sends_a_twelfth(run_config, tmp_path)


def test_the_codec_on_the_page_meets_the_contract(codec_example: ModuleType) -> None:
    for update in (test_codecs.gaussian(), test_codecs.heavy_tailed()):
        test_codecs.test_decodes_to_the_layout_and_shrinks_the_error("int2", update)
    for seed in (0, 2**64 - 1):
        test_codecs.test_zero_decodes_to_zero("int2", seed)
    for size in (1, 2, 3, 63, 65):
        test_codecs.test_tiny_layouts("int2", size)
    test_codecs.test_same_seed_gives_same_bytes("int2")
    test_codecs.test_a_tensor_of_zeros_among_others_decodes_to_zero("int2")
    test_codecs.test_codes_are_distinct_and_frames_of_others_are_refused("int2")
    test_codecs.test_empty_tensors_and_extreme_values("int2")
    test_codecs.test_any_layout_and_any_values(name="int2")
    test_codecs.test_bytes_are_those_of_the_table("int2", 1 / 4)
    test_codecs.test_malformed_frames_are_refused_or_harmless("int2")
    test_codecs.test_malformed_frames_do_not_allocate_more_than_a_few_updates("int2")


def test_the_codec_on_the_page_contracts_whatever_the_scale_is_rounded_to(
    codec_example: ModuleType,
) -> None:
    """The largest numbers, where three scales would pass fp32, included."""
    for values in (np.full(8, np.finfo(np.float32).max), np.array([3.4e38, 1e-45, -1.0, 0.0])):
        update = {"w": torch.from_numpy(values.astype(np.float32))}
        codec = test_codecs.make("int2", update)
        decoded = codec.decode(codec.encode(update))
        assert norm(subtract(update, decoded)) <= norm(update)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), target


def commands(page: Path) -> list[list[str]]:
    """Every `fluvial ...` of the page's code blocks, in words."""
    lines = "\n".join(blocks(page, *COMMAND_BLOCKS)).replace("\\\n", " ").splitlines()
    words = [
        shlex.split(line.removeprefix("$ "), comments=True) for line in lines if "fluvial " in line
    ]
    programs = [(line, Path(line[0]).name) for line in words if line]

    return [line[1:] for line, program in programs if program == "fluvial"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_their_options(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for words in commands(page):
        command = group
        if words and words[0] in group.commands:
            command = group.commands[words[0]]
            while hasattr(command, "commands"):
                words = words[1:]
                command = command.commands[words[0]]
        else:
            assert words
            assert words[0].startswith("-"), f"fluvial has no command {words[0]!r}"

        known = {
            name for option in command.params for name in [*option.opts, *option.secondary_opts]
        } | {"--help"}
        used = {word.split("=")[0] for word in words if word.startswith("-")}
        assert used <= known, f"fluvial {' '.join(words)}: {sorted(used - known)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_commands_are_settings(
    page: Path, method_example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        if words[0] in ("run", "check", "preview") and Path(words[1]).exists():
            config.load(
                Path(words[1]), [value for flag, value in pairwise(words) if flag == "--set"]
            )


def test_figures_of_the_embedded_model_are_those_of_its_record() -> None:
    made = json.loads((ROOT / "src" / "fluvial" / "assets" / "tiny" / "TRAINING.json").read_text())
    page = (ROOT / "docs" / "decisions" / "0004-embedded-default.md").read_text()
    figures = (
        made["parameters"],
        made["text"]["characters"],
        made["text"]["tokens"],
        made["label_tokens_seen"],
    )
    steps = made["training"]["max_steps"]
    seconds = made["wall_s"]
    words = [f"{figure:,}" for figure in (*figures, steps, seconds)]
    words += [str(made["seed"]), made["python"], f"{made['public_text_loss']:.3f}"]
    words += [f"{made['public_text_accuracy']:.1%}".replace("%", " %")]
    assert [word for word in words if word not in page] == []


def test_bytes_of_the_envelope_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "decisions" / "0001-wire-format.md").read_text()
    frame = bytes(100_000)
    down = frame_payload(frame, round=12)
    up = frame_payload(frame, n=1234, loss=2.34568)

    for message, name in ((down, "down"), (up, "up")):
        assert f"{len(message.to_bytes()) - len(frame)} B {name} " in page


def test_every_setting_is_on_its_page() -> None:
    pytest.importorskip("flwr", reason="needs the extra 'flower'")
    script = [sys.executable, str(ROOT / "scripts" / "write_settings.py"), "--check"]
    assert subprocess.run(script, check=False).returncode == 0, "run scripts/write_settings.py"


def test_the_reference_is_that_of_the_commands_and_names() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "write_reference.py"), "--check"]
    assert subprocess.run(script, check=False).returncode == 0, "run scripts/write_reference.py"


def test_an_array_of_tables_has_its_keys_on_the_page_of_settings() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    _, heading, rest = page.partition("### `[[method.budgets]]`")
    assert heading
    assert "| `memory_mb` | number" in rest.partition("###")[0]


def undescribed(root: type[Settings]) -> list[str]:
    """Return the settings without a description.

    A table may have its class's docstring instead, and the key that chooses between tables needs
    none.
    """
    schema = root.model_json_schema()
    tables = {root.__name__: schema, **schema.get("$defs", {})}

    return [
        f"{name}.{key}"
        for name, table in tables.items()
        for key, field in table.get("properties", {}).items()
        if "const" not in field
        and not field.get("description")
        and not ("$ref" in field and tables[field["$ref"].rpartition("/")[2]].get("description"))
    ]


def test_every_setting_has_a_description() -> None:
    """In a process of its own, since descriptions are read only where the page is written."""
    pytest.importorskip("flwr", reason="needs the extra 'flower'")
    code = """
from fluvial.settings import Settings
Settings.model_config["use_attribute_docstrings"] = True
from fluvial.runs.config import RunConfig
from fluvial.site_process.site_file import SiteFile
from tests.docs.test_docs import undescribed
from fluvial.flower.server_operator import ServerFile
print([name for root in (RunConfig, SiteFile, ServerFile) for name in undescribed(root)])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n", "write a docstring below each of these fields"


def test_a_setting_without_a_description_is_found() -> None:
    class Silent(Settings, use_attribute_docstrings=True):
        described: int = 0
        """Number of sites."""
        bare: int = 0

    assert undescribed(Silent) == ["Silent.bare"]


def test_tables_of_files_and_layers_are_up_to_date() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "write_files.py"), "--check"]
    assert subprocess.run(script, check=False).returncode == 0, "run scripts/write_files.py"


def test_every_test_that_a_page_names_exists() -> None:
    """Files by path or by name, functions by name."""
    files = {path.relative_to(ROOT).as_posix(): path for path in ROOT.glob("tests/**/*.py")}
    names = {path.name for path in files.values()}
    functions = {
        name
        for path in files.values()
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), flags=re.MULTILINE)
    }

    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for path in re.findall(r"tests/[\w/]+\.py", prose):
            assert path in files, f"{page.name}: {path}"
        for name in re.findall(r"`(test_\w+(?:\.py)?)`", prose):
            assert name in names | functions, f"{page.name}: {name}"
