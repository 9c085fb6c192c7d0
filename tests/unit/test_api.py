"""Mistakes of a caller from Python: each error names the argument, the key or the path."""

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fluvial
from examples.own_method import MOMENTUM, MomentumServer
from fluvial import caller
from fluvial.errors import CheckpointError, RefusalError
from fluvial.exchange import shared
from fluvial.methods.fedavg import terms
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import override, parse
from fluvial.runs.run import execute
from fluvial.storage.run_files import CONFIG, METRICS, RESULT
from tests.support import ROOT


def test_a_file_is_no_folder_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text("{}")

    with pytest.raises(fluvial.FluvialError, match="result.json is a file; give the folder"):
        fluvial.load_result(file)


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({3: 4}, "the table: 3: the key is of type int; write it as a str"),
        ({"train": {3: 4}}, "the table: train.3: the key is of type int"),
        ({"data": {"columns": {3: "text"}}}, "the table: data.columns.3: the key is of type int"),
    ],
)
def test_a_key_that_is_no_text_is_named(wrong: dict[Any, Any], place: str) -> None:
    with pytest.raises(fluvial.ConfigError, match=place):
        fluvial.check(wrong)


def test_a_key_that_is_no_text_hides_no_other_fault() -> None:
    wrong: dict[Any, Any] = {"train": {3: 4, "rate": 1}, "rounds": 0}

    with pytest.raises(fluvial.ConfigError) as raised:
        fluvial.check(wrong)

    places = {line.split(": ")[1] for line in str(raised.value).splitlines()}
    assert places == {"train.3", "train.rate", "rounds = 0"}


def test_a_table_may_hold_paths(run_config: dict[str, Any]) -> None:
    model = run_config["model"] | {"name_or_path": Path(run_config["model"]["name_or_path"])}
    data = run_config["data"] | {"source": Path(run_config["data"]["source"])}

    assert fluvial.load_config(run_config | {"model": model, "data": data}) == fluvial.load_config(
        run_config
    )


OPTION = re.compile(r"--(set|out|resume|fleet)\b")
"""An option of the command that is an argument of a call from Python."""


@pytest.fixture
def finished(one_site: dict[str, Any], tmp_path: Path) -> Path:
    """The folder of a run over one site."""
    fluvial.run(one_site | {"rounds": 1}, tmp_path / "run", progress=False)
    return tmp_path / "run"


def test_errors_about_a_folder_name_the_arguments_of_the_call(
    finished: Path, one_site: dict[str, Any], tmp_path: Path
) -> None:
    one_round = one_site | {"rounds": 1}

    def text_of(config: dict[str, Any], folder: Path, **arguments: Any) -> str:
        with pytest.raises(CheckpointError) as raised:
            fluvial.run(config, folder, progress=False, **arguments)
        return str(raised.value)

    texts = {
        "use resume=True to go on with it, out= for another": text_of(one_round, finished),
        "start it without resume=True": text_of(one_round, tmp_path / "no", resume=True),
        "another folder with out=": text_of(one_site, finished, resume=True),
    }
    with RunFolder(finished):
        texts["wait for it, or start again in another folder with out="] = text_of(
            one_round, finished, resume=True
        )

    for name in (RESULT, CONFIG):
        (finished / name).write_text("[]")
        texts[f"{name} is damaged: it holds no JSON object; restore"] = text_of(
            one_round, finished, resume=True
        )
        (finished / name).unlink()
        (finished / METRICS).touch()

    texts["restore it from a copy, or start again in another folder with out="] = text_of(
        one_round, finished, resume=True
    )
    for expected, text in texts.items():
        assert expected in text
        assert not OPTION.search(text)


@pytest.mark.parametrize("line", ["rounds", "seed = abc", "rounds = 0"])
def test_errors_about_an_override_name_the_argument(line: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("rounds = 1")

    with pytest.raises(fluvial.ConfigError, match="overrides") as raised:
        fluvial.load_config(file, [line])

    assert not OPTION.search(str(raised.value))


def test_the_same_errors_name_the_options_of_the_command(
    finished: Path, one_site: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match="use --resume to go on with it, --out for another"):
        list(execute(parse(one_site | {"rounds": 1}, "test"), finished))
    with pytest.raises(fluvial.ConfigError, match="--set 'seed = abc': .* --set 'seed=\"abc\"'"):
        override("seed = abc")


def test_an_error_of_a_thread_of_a_site_names_the_argument(
    one_site: dict[str, Any], tmp_path: Path
) -> None:
    def train(site: fluvial.Site, message: fluvial.Payload) -> fluvial.Payload:
        raise RefusalError(f"seen with {caller.resume()}")

    method = replace(MOMENTUM, tasks={**MOMENTUM.tasks, "train": train})
    table = one_site | {"method": {"name": "momentum"}}
    with pytest.raises(fluvial.FluvialError, match="seen with resume=True"):
        fluvial.run(table, tmp_path / "run", methods=[method], progress=False)


class NarrowServer(MomentumServer):
    """A server half whose round takes too few arguments."""

    def round(self, number: int) -> Any:  # type: ignore[override] # the mistake
        """Return nothing."""


def narrow(site: fluvial.Site) -> fluvial.Payload:
    """Return nothing to the server."""
    return fluvial.Payload()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"traits": {"receives": "dwnlink"}}, "traits.receives: got 'dwnlink'.*'downlink'"),
        ({"traits": {"pooled": "no"}}, "traits.pooled: got 'no' of type str"),
        ({"traits": {"tunes": ("lora", "all")}}, r"traits.tunes.1: got 'all'"),
        ({"traits": {"codec": "int8"}}, "traits.codec: got 'int8'"),
        (
            {"tasks": {"train": narrow}},
            r"tasks\['train'\] \(test_api.py:\d+\) is called with \(site, message\)",
        ),
        ({"server": narrow}, r"server \(test_api.py:\d+\) is called with \(config, context\)"),
        ({"plan": lambda: None}, r"plan \(test_api.py:\d+\) is called with \(config, given\)"),
    ],
)
def test_a_wrong_method_is_refused_when_it_is_entered(wrong: dict[str, Any], message: str) -> None:
    if "traits" in wrong:
        wrong = {"traits": replace(MOMENTUM.traits, **wrong["traits"])}

    with pytest.raises(fluvial.ConfigError, match=message):
        fluvial.load_config({"rounds": 1}, methods=[replace(MOMENTUM, **wrong)])


def test_a_training_with_other_arguments_is_refused_when_its_task_is_made() -> None:
    with pytest.raises(
        fluvial.ConfigError, match=r"\(test_api.py:\d+\) is called with \(site, rec"
    ):
        shared(narrow, terms)  # type: ignore[arg-type]


def test_a_server_half_with_other_arguments_is_named(
    one_site: dict[str, Any], tmp_path: Path
) -> None:
    method = replace(MOMENTUM, server=NarrowServer)  # type: ignore[arg-type] # the mistake
    table = one_site | {"method": {"name": "momentum"}}
    with pytest.raises(
        fluvial.ConfigError, match=r"round of method 'momentum' \(test_api.py:\d+\) is called"
    ):
        fluvial.run(table, tmp_path / "run", methods=[method], progress=False)


COMMANDS_ONLY = {
    "caller.py": "has the options",
    "runs/evaluation.py": "`fluvial evaluate`, which is no function of Python",
    "training/assess.py": "`fluvial evaluate`",
    "training/record_result.py": "`fluvial evaluate`",
    "training/harness.py": "`fluvial evaluate`",
    "runs/export.py": "`fluvial export`, which is no function of Python",
    "data/sources.py": "the option --data of `fluvial evaluate`",
    "report/show.py": "`fluvial show`",
    "federation/in_process.py": "submit --resume, a command",
    "flower/transport.py": "submit --resume, a command",
    "flower/server_operator.py": "`fluvial submit`",
}
"""Modules outside the commands that may name an option, and why."""


def test_messages_leave_the_names_of_arguments_to_one_module() -> None:
    package = ROOT / "src" / "fluvial"
    named = set()

    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        constants = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and id(node) not in docstrings
        ]
        if any(isinstance(value, str) and OPTION.search(value) for value in constants):
            named.add(path.relative_to(package).as_posix())

    assert {path for path in named if not path.startswith("cli/")} <= COMMANDS_ONLY.keys()
