"""`fluvial evaluate` measures as the run did, a copied folder too, and any model by itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.errors import ConfigError
from fluvial.runs.evaluation import evaluation_settings, own_reading
from fluvial.runs.export import export_run
from fluvial.training.folders import kind_of, measured_as
from tests.support.runs import run_table


def _evaluate(*arguments: Any, text: bool = False) -> Any:
    result = CliRunner().invoke(
        app, ["evaluate", *map(str, arguments), *([] if text else ["--format", "json"])]
    )
    if result.exception is not None:
        raise result.exception
    return result.stdout if text else json.loads(result.stdout)


def _records(path: Path, count: int) -> Path:
    """Records whose prompt stands under `text` and whose answer stands under `label`, of two
    sites."""
    rows = [
        {"who": "ab"[n % 2], "text": f"What does the river {n} carry? ", "label": f"water {n % 3}"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    return path


@pytest.fixture
def trained(run_config: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A run whose columns have names of their own, with a baseline; and its held-out file."""
    heldout = _records(tmp_path / "heldout.jsonl", 7)
    data = {
        "source": str(_records(tmp_path / "train.jsonl", 24)),
        "heldout_source": str(heldout),
        "columns": {"prompt": "text", "completion": "label"},
        "partition": {"by": "column", "column": "who"},
        "max_length": 40,
    }
    table = run_config | {"data": data, "compare": ["fedavg"], "rounds": 1}
    table |= {
        "method": {"name": "cgfedllm", "tgap": {"source": "sites", "rounds": 3}},
        "codec": {"name": "int8"},
    }
    table["evaluate"] = {"max_new_tokens": 3, "sample_tokens": 2}

    return run_table(table, tmp_path / "run"), heldout


def test_the_runs_own_columns_also_in_a_copied_folder(
    trained: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    result, heldout = trained
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "elsewhere")
    for folder in (tmp_path / "run" / "adapter", tmp_path / "elsewhere"):
        found = _evaluate(folder, "--data", heldout)
        # The same sums as the sites sent, in other batches.
        for ours, theirs in (("base", "base"), ("adapter", "final")):
            pooled = result["heldout_pooled"][theirs]
            assert found["data"][ours]["loss"] == pytest.approx(pooled["loss"], rel=1e-5)
            assert found["data"][ours]["accuracy"] == pooled["accuracy"]

        assert (found["data"]["questions"], found["data"]["max_new_tokens"]) == (7, 3)
        assert found["records"]["columns"] == {"prompt": "text", "completion": "label"}
        assert found["records"]["from_run"]
        known = folder.parent.name == "run"
        assert found["records"]["trained_on"] == (7 if known else None)

    words = _evaluate(tmp_path / "elsewhere", "--data", heldout, text=True)
    assert "as the run that wrote the folder" in " ".join(words.split())
    assert "prompt = 'text', completion = 'label'" in " ".join(words.split())
    assert "trained on" not in words
    words = _evaluate(tmp_path / "run", "--data", heldout, "--no-generate", text=True)
    assert "The run trained on all 7 records, so the scores" in " ".join(words.split())


def test_a_baselines_adapter_is_measured_as_the_run(
    trained: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    result, heldout = trained
    found = _evaluate(tmp_path / "run" / "compare" / "fedavg" / "adapter", "--data", heldout)
    assert found["data"]["adapter"]["loss"] == pytest.approx(
        result["heldout_pooled"]["fedavg"]["loss"], rel=1e-5
    )


def test_the_revision_of_a_hub_id_is_not_that_of_a_folder(tmp_path: Path) -> None:
    """A model whose weights were tuned lies in a folder, and so may another base."""
    run = {"model": {"name_or_path": "org/base", "revision": "v1", "dtype": "float32"}}
    assert measured_as(run, str(tmp_path), None)["model"] == {
        "dtype": "float32",
        "name_or_path": str(tmp_path),
    }
    table = measured_as(run, "org/base", None)
    assert table["model"]["revision"] == "v1"

    other = [f'model.name_or_path = "{tmp_path}"']
    assert evaluation_settings(table, None, other).model.revision is None
    pinned = [*other, 'model.revision = "v2"']
    assert evaluation_settings(table, None, pinned).model.revision == "v2"


def test_what_is_set_goes_before_what_the_run_had(
    trained: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    _, heldout = trained
    adapter = tmp_path / "run" / "adapter"
    own = _evaluate(adapter, "--data", heldout)
    as_text = _evaluate(
        adapter, "--data", heldout, "--set", 'data.form="text"', "--set", "data.columns={}"
    )
    assert (
        as_text["data"]["label_tokens"] > own["data"]["label_tokens"]
    )  # prompts are scored and answers are not there
    assert as_text["records"]["set_here"] == ["columns", "form"]
    assert as_text["data"]["max_length"] == 40
    rows = [json.loads(line) for line in heldout.read_text().splitlines()]
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text(
        "".join(json.dumps({"prompt": r["text"], "completion": r["label"]}) + "\n" for r in rows)
    )

    with pytest.raises(ConfigError, match=r"other columns, add --set 'data\.columns=\{\}'$"):
        _evaluate(adapter, "--data", renamed)
    with pytest.raises(ConfigError, match="--site a: without effect, because the run reads all"):
        _evaluate(adapter, "--data", renamed, "--site", "a")
    same = _evaluate(adapter, "--data", renamed, "--set", "data.columns={}")
    assert same["data"]["adapter"] == own["data"]["adapter"]


@pytest.fixture
def unlike(run_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The result of a run over a spreadsheet in Latin-1 and over JSON lines, each with a held-out
    file that is read in another way."""
    rows = [(f"Größe {number}?", f" {number} Äpfel") for number in range(12)]
    sheet = "".join(f"{ask};{answer}\n" for ask, answer in rows)
    (tmp_path / "north.csv").write_text(f"Frage;Antwort\n{sheet}", encoding="latin-1")
    for name, ours, theirs in (("south", "prompt", "completion"), ("held", "ask", "reply")):
        lines = [{ours: ask, theirs: answer} for ask, answer in rows[:9]]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    held = {"columns": {"prompt": "ask", "completion": "reply"}}
    north = {
        "source": str(tmp_path / "north.csv"),
        "delimiter": ";",
        "encoding": "cp1252",
        "columns": {"prompt": "Frage", "completion": "Antwort"},
    }
    south = {"source": str(tmp_path / "south.jsonl")}
    own = {"heldout_source": str(tmp_path / "held.jsonl"), "heldout": held}
    data = {"by_site": {"north": north | own, "south": south | own}, "max_length": 96}
    table = run_config | {"data": data, "rounds": 1, "evaluate": {"max_new_tokens": 2}}
    return run_table(table, tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "options", "site"),
    [
        ("north.csv", (), "north"),
        ("north.csv", ("--site", "north"), "north"),
        ("south.jsonl", (), "south"),
        ("held.jsonl", (), "north, south"),
        ("copy.csv", (), "north"),
        ("copy.csv", ("--site", "north"), "north"),
        ("copy.csv", ("--site", "north", "--set", 'data.encoding="latin-1"'), "north"),
    ],
)
def test_a_file_is_read_as_the_site_reads_its_own(
    unlike: dict[str, Any], tmp_path: Path, file: str, options: tuple[str, ...], site: str
) -> None:
    shutil.copy(tmp_path / "north.csv", tmp_path / "copy.csv")
    found = _evaluate(tmp_path / "run", "--data", tmp_path / file, *options)
    assert found["records"]["as_site"] == site
    assert f"reads those of {site}: " in found["records"]["line"]
    assert found["data"]["questions"] == (12 if file.endswith(".csv") else 9)
    if file == "held.jsonl":
        loss = unlike["heldout_by_site"]["south"]["final"]["loss"]
        assert found["data"]["adapter"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_file_that_two_sites_read_in_two_ways_asks_for_the_site(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"prompt": "a", "completion": "b", "ask": "c"}] * 4
    file = tmp_path / "both.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    south = {"source": str(file), "columns": {"prompt": "ask"}}
    data = {"by_site": {"north": {"source": str(file)}, "south": south}}
    resolved = {"fluvial": "0", **run_config, "data": data}
    (tmp_path / "config.json").write_text(json.dumps(resolved))
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ConfigError, match="of north, south in data.by_site .* with --site NAME"):
        own_reading(tmp_path / "adapter", {}, file, None)
    assert own_reading(tmp_path / "adapter", {}, file, "south")["data"]["columns"]


def test_a_written_folder_reads_the_files_of_all_sites(
    unlike: dict[str, Any], tmp_path: Path
) -> None:
    """Away from its run, it holds columns, encoding and delimiter of each site, and no names."""
    away = tmp_path / "away"
    away.mkdir()
    copied = shutil.copytree(tmp_path / "run" / "adapter", away / "copied")
    (away / "exported").mkdir()
    export_run(tmp_path / "run", away / "exported", form="merged")
    north = shutil.copy(tmp_path / "north.csv", away / "new.csv")
    for folder in (copied, away / "exported"):
        found = _evaluate(folder, "--data", north)
        assert found["records"]["columns"] == {"prompt": "Frage", "completion": "Antwort"}
        assert found["data"]["questions"] == 12
        loss = unlike["heldout_by_site"]["south"]["final"]["loss"]
        asked = _evaluate(folder, "--data", tmp_path / "held.jsonl")
        tuned = asked["data"]["adapter" if folder == copied else "model"]
        assert tuned["loss"] == pytest.approx(loss, rel=1e-5)
        told = (folder / "fluvial.json").read_text()
        assert len(json.loads(told)["readings"]) == 3
        if folder != copied:  # a run's own folder names its base, which lies on this machine
            assert not [word for word in (str(tmp_path), "north", "south", "held.") if word in told]

    with pytest.raises(ConfigError, match=r"a written folder names no sites; remove it"):
        _evaluate(copied, "--data", north, "--site", "north")
    broken = json.loads(told) | {"readings": ["north"]}
    (copied / "fluvial.json").write_text(json.dumps(broken))
    with pytest.raises(ConfigError, match="'readings.0' must be an object; copy it again"):
        _evaluate(copied, "--data", north)


@pytest.mark.parametrize(
    ("readings", "suffix", "words"),
    [
        ([{"columns": {"prompt": "a"}}, {"columns": {"prompt": "b"}}], "", "different ways; add "),
        ([{"columns": {"prompt": "b"}}, {"columns": {"prompt": "a"}}], ".csv", "b"),
        ([{"columns": {"prompt": "x"}}, {"columns": {"prompt": "a"}}], "", "a"),
        (
            [{"columns": {"prompt": "a"}, "encoding": "cp1252"}, {"columns": {"prompt": "a"}}],
            "",
            "é",
        ),
    ],
)
def test_a_file_is_read_in_the_only_way_of_the_run_that_fits(
    readings: list[dict[str, Any]], suffix: str, words: str, tmp_path: Path
) -> None:
    """The way of a source for all sites goes before others, and UTF-8 before another encoding."""
    file = tmp_path / "new.csv"
    file.write_text("a,b,completion\né,f,g\n", encoding="utf-8")
    ways = [{"form": "auto", "encoding": "utf-8", "suffix": ".csv", **each} for each in readings]
    run = {"data": {"max_length": 32}, "suffix": suffix, "readings": ways}
    if "add" in words:
        with pytest.raises(ConfigError, match=words) as error:
            own_reading(tmp_path, run, file, None)
        remedy = 'data.columns={ prompt = "a" }'
        assert f"--set '{remedy}', or --set" in str(error.value)
        told = own_reading(tmp_path, run, file, None, [remedy])
        assert told["data"]["columns"] == {"prompt": "a"}
        return
    data = own_reading(tmp_path, run, file, None)["data"]
    if words == "é":
        assert data["encoding"] == "utf-8"
    else:
        assert data["columns"] == {"prompt": words}
    assert data["max_length"] == 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), r"is no text of utf-8; .* add --set 'data\.encoding=\"cp1252\"'$"),
        (
            ("--site", "south"),
            "is no text of utf-8; .* add --site north, whose table fits the file",
        ),
        (("--site", "east"), "of the run has no such table; name one of north, south"),
    ],
)
def test_the_remedy_for_a_file_of_another_kind_is_an_option(
    unlike: dict[str, Any], tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    copy = shutil.copy(tmp_path / "north.csv", tmp_path / "copy.csv")
    if not options:  # a file that no site reads
        text = "Question;Reply\nGröße?;Äpfel\n"
        Path(copy).write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=words):
        _evaluate(tmp_path / "run", "--data", copy, *options)


def test_a_folder_of_another_origin_says_that_no_run_is_known(
    trained: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    foreign = shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "foreign")
    (foreign / "fluvial.json").unlink()
    data = tmp_path / "plain.jsonl"
    data.write_text(json.dumps({"text": "The river carries water."}) + "\n")
    found = _evaluate(foreign, "--data", data)
    assert not found["records"]["from_run"]
    assert "no run is known" in found["records"]["line"]
    assert "no chat template, which conversations alone have" in found["records"]["line"]
    (foreign / "fluvial.json").write_text("{")

    with pytest.raises(ConfigError, match=r"fluvial\.json: cannot be read as JSON"):
        _evaluate(foreign, "--data", data)


def test_a_template_goes_with_the_folder(run_config: dict[str, Any], tmp_path: Path) -> None:
    """Conversations, scored on all turns, with a template that the base does not have."""
    template = "{% for turn in messages %}[{{ turn['role'] }}] {{ turn['content'] }}\n{% endfor %}"
    rows = [
        {
            "who": "ab"[n % 2],
            "talk": [
                {"role": "user", "content": f"Land {n}?"},
                {"role": "assistant", "content": "No."},
            ],
        }
        for n in range(16)
    ]
    files = [tmp_path / "t.jsonl", tmp_path / "h.jsonl"]

    for path, part in zip(files, (rows[:12], rows[12:]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    data = {
        "source": str(files[0]),
        "heldout_source": str(files[1]),
        "columns": {"messages": "talk"},
    }
    data |= {
        "chat_template": template,
        "loss_on": "all",
        "partition": {"by": "column", "column": "who"},
    }
    table = run_config | {"rounds": 1, "data": data | {"max_length": 64}}
    result = run_table(table, tmp_path / "run")
    copied = shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "elsewhere")
    found = _evaluate(copied, "--data", files[1])
    assert found["data"]["adapter"]["loss"] == pytest.approx(
        result["heldout_pooled"]["final"]["loss"], rel=1e-5
    )
    assert (found["records"]["form"], found["records"]["detected"]) == ("messages", True)
    (tmp_path / "other.jinja").write_text(
        "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    )
    other = _evaluate(
        copied, "--data", files[1], "--set", f"data.chat_template='{tmp_path / 'other.jinja'}'"
    )
    assert other["data"]["label_tokens"] < found["data"]["label_tokens"]


# -- a model by itself ---------------------------------------------------------------------------


def test_the_embedded_model_and_choices(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    choices = tmp_path / "q.jsonl"
    data.write_text(json.dumps({"text": "def mean(values):"}) + "\n")
    record = {
        "question": "Which?",
        "choices": ["a", "b", "c", "d"],
        "answer": "B",
        "subject": "astronomy",
    }
    choices.write_text(
        "".join(json.dumps(record | {"question": f"Which {n}?"}) + "\n" for n in range(3))
    )
    words = _evaluate("embedded", "--data", data, "--choices", choices, text=True)
    assert words.splitlines()[0] == "embedded"
    assert "By group of MMLU" in words
    assert "perplexity" in words


def test_neither_model_nor_adapter_is_said(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for name, words in (
        (tmp_path / "notes", "is neither a PEFT adapter .* nor a model of transformers"),
        (tmp_path / "gone", "there is no folder"),
        ("./nothing", "there is no folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            kind_of(str(name))

    assert kind_of("owner/model-1.5") == "model"
    assert kind_of("embedded") == "model"
