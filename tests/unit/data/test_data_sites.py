"""Data of all sites: names as written, counts over all sites, settings of each source, chat
templates."""

import copy
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from fluvial.cli import app
from fluvial.data import IGNORE_INDEX, DataConfig, DataError, Question, SiteTexts, tokenize
from fluvial.data.chat import chat_prompt
from fluvial.data.templates import NAMED, with_template
from fluvial.errors import ConfigError
from fluvial.runs.config import load, parse
from fluvial.runs.plan import plan, preview
from fluvial.runs.proposal.records import read_records
from fluvial.storage.files import read_object
from fluvial.training.choices import read_choices
from tests.support.tokenizer_kinds import byte_level, characters, prefix_space

BY_SITE = {"by": "column", "column": "site"}
TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "farewell"},
]


def jsonl(path: Path, *rows: dict[str, Any], times: int = 1) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows for _ in range(times)))
    return str(path)


def texts(source: str, tokenizer: Any, **settings: Any) -> SiteTexts:
    table: dict[str, Any] = {
        "source": source,
        "max_length": 64,
        "heldout_share": 0.5,
        "partition": BY_SITE,
    } | settings
    if "heldout_source" in settings:
        del table["heldout_share"]

    return SiteTexts(DataConfig(**table), tokenizer, seed=0)


# -- names ---------------------------------------------------------------------------------------


def test_sites_are_named_as_the_file_writes_them(tmp_path: Path, tokenizer: Any) -> None:
    names = ["NA", "None", "null", "01", "1", "2021-03-01", "pooled", "TRUE"]
    path = tmp_path / "a.csv"
    path.write_text("site,prompt,completion\n" + "".join(f"{name},p,NA\n" * 2 for name in names))
    sites = texts(str(path), tokenizer)
    assert sites.names == tuple(sorted(names))
    assert sites.load("NA").questions == [Question("p", "NA")]
    numbers = tmp_path / "b.jsonl"
    numbers.write_text(
        "".join(f'{{"site": {site}, "text": "x"}}\n' * 2 for site in ("1", "1.0", "true", '"01"'))
    )
    assert texts(str(numbers), tokenizer).names == ("01", "1", "1.0", "true")


def test_a_site_called_pooled_is_one_of_many(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"site": site, "text": f"{site} one two"} for site in ("pooled", "north", "south")]
    data = {
        "source": jsonl(tmp_path / "a.jsonl", *rows, times=4),
        "partition": BY_SITE,
        "max_length": 32,
    }
    table = {"model": {"name_or_path": str(tiny_model)}, "data": data | {"heldout_share": 0.5}}
    sites = plan(parse(table, "test"))["sites"]
    counts = [(each["name"], each["train_records"], each["heldout_records"]) for each in sites]
    assert counts == [("north", 2, 2), ("pooled", 2, 2), ("south", 2, 2)]
    (central,) = plan(parse(table | {"method": {"name": "central"}}, "test"))["sites"]
    assert (central["records"], central["heldout_records"]) == (12, 6)


def test_the_central_baseline_has_all_records_whatever_the_sites_are_called(
    tmp_path: Path, run_config: dict[str, Any]
) -> None:
    from fluvial.runs.run import execute

    digests = set()
    for name in (
        "pooled",
        "pooler",
    ):  # the same place in the order of sites, so the same order of records
        rows = [
            {"site": site, "text": f"{word} one two"}
            for site, word in (("a", "x"), (name, "y"), ("z", "w"))
        ]
        source = jsonl(tmp_path / f"{name}.jsonl", *rows, times=4)
        data = {"source": source, "heldout_source": source, "partition": BY_SITE, "max_length": 32}
        config = parse(
            run_config | {"data": data, "rounds": 1, "method": {"name": "central"}}, "test"
        )
        digests.add(list(execute(config, tmp_path / name))[-1].values["adapter_sha256"])

    assert len(digests) == 1


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ('"site": null, ', "must be text or a number, and is null"),
        ('"site": NaN, ', "must be text or a number, and is NaN"),
        ('"site": " ", ', "is empty; write the site's name"),
        ("", "the record has no such field"),
        ('"site": ["a"], ', "must be text or a number, and is a list"),
        ('"site": "a\\u001b[31m", ', "holds a control character"),
    ],
)
def test_a_record_without_a_site_is_named(
    field: str, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"site": "a", "text": "x"}\n{' + field + '"text": "x"}\n')
    with pytest.raises(
        DataError, match=f"a.jsonl, line 2: data.partition.column='site': {message}"
    ):
        texts(str(path), tokenizer)


def test_names_that_look_alike_are_warned_of(
    tmp_path: Path, run_config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    from fluvial.runs.run import execute

    rows = [
        {"site": name, "text": "one two three"}
        for name in ("north", "North ", "e\u0301", "\u00e9", "west")
    ]
    data = {
        "source": jsonl(tmp_path / "a.jsonl", *rows, times=4),
        "partition": BY_SITE,
        "max_length": 32,
    }
    config = parse(run_config | {"data": data | {"heldout_share": 0.5}, "rounds": 1}, "test")
    notes = [note for note in plan(config)["notes"] if "differ only in" in note]
    assert len(notes) == 2
    assert "'North ' (4 records) and 'north' (4 records)" in notes[0]

    with caplog.at_level(logging.WARNING):
        list(execute(config, tmp_path / "run"))
    assert [message for message in caplog.messages if "differ only in" in message] == notes


# -- values --------------------------------------------------------------------------------------


def test_numbers_are_refused_or_taken_as_written(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "completion": 1.50}\n{"prompt": 7, "completion": true}\n')
    settings = {"partition": {"by": "iid", "sites": 1}}

    with pytest.raises(DataError) as caught:
        texts(str(path), tokenizer, **settings)
    assert str(caught.value).count('set data.numbers = "text"') == 2
    taken = texts(str(path), tokenizer, numbers="text", heldout_source=str(path), **settings).load(
        "site-0"
    )
    assert taken.questions == [Question("p", "1.50"), Question("7", "true")]


@pytest.mark.parametrize("given", [None, "", ...])
def test_alpaca_without_input_is_null_absent_or_empty_and_nothing_else(
    given: Any, tokenizer: Any
) -> None:
    bare = {"instruction": "a", "output": "b"}
    record = bare if given is ... else bare | {"input": given}
    made = tokenize([("r", record)], "alpaca", tokenizer, max_length=512)
    assert "### Input" not in made.questions[0].prompt
    made = tokenize([("r", bare | {"input": "null"})], "alpaca", tokenizer, max_length=512)
    assert "### Input:\nnull\n" in made.questions[0].prompt


def test_faults_of_all_files_and_sources_are_told_together(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"prompt": "secret", "completion": null}\n')
    (folder / "b.jsonl").write_text("{secret\n")
    (tmp_path / "held.csv").write_text("prompt,completion\nsecret\n")
    (tmp_path / "public.txt").write_bytes(b"secret\xff\n")

    with pytest.raises(DataError) as caught:
        texts(
            str(folder),
            tokenizer,
            heldout_source=str(tmp_path / "held.csv"),
            public_source=str(tmp_path / "public.txt"),
            partition={"by": "iid", "sites": 1},
        )

    told = str(caught.value)
    for place in ("a.jsonl, line 1", "b.jsonl, line 1", "held.csv, line 2", "public.txt, line 1"):
        assert place in told
    assert "secret" not in told


def test_empty_texts_and_blank_lines_are_left_out_and_told(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n\n{"text": " "}\n{"text": "y"}\n')
    sites = texts(str(path), tokenizer, partition={"by": "iid", "sites": 1})
    assert sites.load("site-0").records == 2
    assert [note.partition(": ")[2] for note in sites.check()] == [
        "1 blank line was skipped",
        "1 records with an empty text were left out",
    ]


def test_a_fault_of_a_file_that_is_read_twice_is_told_once(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"text": None}, {"text": "x"})
    with pytest.raises(DataError) as caught:
        texts(source, tokenizer, heldout_source=source, partition={"by": "file"})
    assert caught.value.faults == (
        f"{source}, line 1: field 'text' must be text, and is null; write a text, or remove the "
        "record",
    )


@pytest.mark.parametrize("which", ["source", "public_source"])
def test_a_file_of_empty_texts_is_no_data(which: str, tmp_path: Path, tokenizer: Any) -> None:
    good = jsonl(tmp_path / "a.jsonl", {"text": "x"}, times=4)
    bad = jsonl(tmp_path / "b.jsonl", {"text": " "})
    settings: dict[str, Any] = {
        "source": good,
        "public_source": good,
        "partition": {"by": "iid", "sites": 1},
    }

    with pytest.raises(DataError, match=f"data.{which}: .*b.jsonl' holds no record with a text"):
        texts(tokenizer=tokenizer, **(settings | {which: bad})).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"columns": {"reply": "completion"}},
            r"columns: 'reply' is no field .*first: \{completion = 'reply'\}",
        ),
        (
            {"columns": {"prompt": "prompt", "completion": "prompt"}},
            "columns: prompt and completion name one column, 'prompt'; name a column of its own",
        ),
        (
            {"heldout_source": "a", "heldout": {"columns": {"text": "x", "output": "x"}}},
            "columns: text and output name one column, 'x'",
        ),
        ({"columns": {"id": "text"}}, r"columns: 'id' is no field .*first: \{text = 'id'\}"),
        (
            {"columns": {"id": "a"}},
            "columns: 'id' is no field of a record; fields are text, prompt",
        ),
        ({"encoding": "base64"}, "encoding='base64': no known encoding of text"),
        ({"delimiter": ";;"}, "delimiter=';;': must be one character"),
        ({"delimiter": ""}, "the string is empty"),
        ({"public": {"form": "text"}}, "public: without effect, because no public_source"),
        ({"heldout": {"form": "text"}}, "heldout: without effect, because no heldout_source"),
        (
            {"heldout": {"encoding": "x"}, "heldout_source": "b.csv"},
            "encoding='x': no known encoding",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(source="a.csv", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delimiter": ";"}, "data.delimiter: without effect, because .*a.jsonl' is no CSV"),
        ({"columns": {"input": "extra"}}, "data.columns: input is without effect"),
        (
            {"columns": {"completion": "answer"}},
            r"a.jsonl .data.source.: data.columns: completion = 'answer', but",
        ),
        (
            {"form": "alpaca"},
            r"a.jsonl .data.source.: form 'alpaca' needs the field 'instruction'; found 'site', "
            r"'prompt'",
        ),
        (
            {"chat_template": "{% for m in messages %}\n{{ m.role "},
            "data.chat_template: line 2 of the template is no Jinja",
        ),
        (
            {"chat_template": "nosuch"},
            "data.chat_template = 'nosuch': neither a file .* choose one of chatml",
        ),
    ],
)
def test_settings_that_do_not_fit_the_file_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    source = jsonl(
        tmp_path / "a.jsonl", {"site": "x", "prompt": "a", "completion": "b", "extra": "c"}, times=4
    )
    with pytest.raises(ConfigError, match=message):
        texts(source, tokenizer, **settings)


def test_a_folder_with_a_spreadsheet_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    jsonl(tmp_path / "a.jsonl", {"text": "x"}, times=4)
    (tmp_path / "more.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(
        ConfigError, match="holds 'more.xlsx', which cannot be read; write it as CSV"
    ):
        texts(str(tmp_path), tokenizer)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("b.jsonl", "dangling", "holds 'b.jsonl', a link that leads to no file"),
        ("b.jsonl", "loop", "holds 'b.jsonl', a link that leads to no file"),
        ("b.jsonl", "pipe", "holds 'b.jsonl', which is no regular file but a pipe"),
        ("more", "folder", "holds the folder 'more' with 'c.jsonl', and a folder within it"),
        ("b.jsonl.1", "file", "holds 'b.jsonl.1', whose name does not end in one of .jsonl"),
        ("b.JSONL~", "file", "holds 'b.JSONL~', whose name does not end"),
        ("b.tar", "file", "holds 'b.tar', which cannot be read"),
    ],
)
@pytest.mark.parametrize("partition", [{"by": "iid", "sites": 1}, {"by": "file"}])
def test_what_a_folder_has_and_is_not_read_is_refused_by_name(
    name: str, kind: str, message: str, partition: Any, tmp_path: Path, tokenizer: Any
) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    jsonl(folder / "a.jsonl", {"text": "x"}, times=4)
    strange = folder / name
    if kind in ("dangling", "loop"):
        strange.symlink_to(strange if kind == "loop" else tmp_path / "gone")
    elif kind == "pipe":
        os.mkfifo(strange)
    elif kind == "file":
        jsonl(strange, {"text": "x"})
    else:
        (strange / "deeper").mkdir(parents=True)
        jsonl(strange / "deeper" / "c.jsonl", {"text": "x"})

    with pytest.raises(ConfigError, match=message):
        texts(str(folder), tokenizer, partition=partition)


def test_a_folder_may_hold_links_and_what_is_no_data(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "records"
    (folder / "empty").mkdir(parents=True)
    jsonl(tmp_path / "elsewhere.jsonl", {"text": "x"}, times=4)
    (folder / "a.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    for name in ("README.md", ".hidden.jsonl", "a.jsonl.sha256", "empty/notes.md"):
        (folder / name).write_text("x")
    made = texts(str(folder), tokenizer, partition={"by": "iid", "sites": 1})
    assert made.load(made.names[0]).records == 4


@pytest.mark.parametrize(
    "setting", ["source", "heldout_source", "public_source", "chat_template", "by_site"]
)
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(
    setting: str, tmp_path: Path, tiny_model: Path
) -> None:
    pipe = tmp_path / "p.jsonl"
    os.mkfifo(pipe)
    data: dict[str, Any] = {"source": jsonl(tmp_path / "a.jsonl", {"text": "x"}, times=4)}
    data[setting] = str(pipe)
    if setting == "by_site":
        data = {"by_site": {"a": {"source": str(pipe)}}}
    (tmp_path / "run.toml").write_text(
        f'model.name_or_path = "{tiny_model}"\n'
        + "".join(f"data.{key} = {_toml(value)}\n" for key, value in data.items())
    )
    with pytest.raises(ConfigError, match=r"p.jsonl: is no regular file but a pipe"):
        plan(load(tmp_path / "run.toml"))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def test_a_configuration_or_questions_in_a_pipe_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.json")
    for read in (load, read_choices, read_object):
        with pytest.raises(ConfigError, match=r"p.json: is no regular file but a pipe"):
            read(tmp_path / "p.json")


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "x" * 5000 + "/a.csv", "./" + "x" * 300])
@pytest.mark.parametrize("setting", ["source", "heldout_source", "public_source"])
def test_a_name_that_the_system_refuses_is_told_with_its_setting(
    name: str, setting: str, tmp_path: Path, tokenizer: Any
) -> None:
    settings = {"source": jsonl(tmp_path / "a.jsonl", {"site": "x", "text": "x"}, times=4)}
    settings[setting] = name
    with pytest.raises(ConfigError, match=rf"data.{setting}: '.*\.\.\.' cannot be read: File name"):
        texts(**settings, tokenizer=tokenizer).check()
    with pytest.raises(ConfigError, match="--data: '.*' cannot be read: File name too long"):
        read_records(name)


@pytest.mark.parametrize("option", ["--choices", "--superglue"])
def test_a_name_that_the_system_refuses_is_no_file_of_evaluate(
    option: str, tiny_model: Path
) -> None:
    found = CliRunner().invoke(app, ["evaluate", str(tiny_model), option, "x" * 300])
    assert isinstance(found.exception, ConfigError)
    assert str(found.exception).startswith(f"{option}: there is no file or folder 'xxx")
    found = CliRunner().invoke(app, ["evaluate", "/" + "x" * 300, option, __file__])
    assert isinstance(found.exception, ConfigError)
    assert str(found.exception).startswith("there is no folder '/xxx")


def test_a_model_whose_name_the_system_refuses_is_told_with_its_setting() -> None:
    config = parse({"model": {"name_or_path": "/" + "x" * 300}, "data": {"source": "stdlib"}}, "t")
    with pytest.raises(ConfigError, match="model.name_or_path"):
        plan(config)


def test_a_long_name_of_the_hub_is_told_with_its_setting(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="^data.source: 'xxx"):
        texts("x" * 300, tokenizer)


# -- what is too long ----------------------------------------------------------------------------

LONG = {"prompt": "x" * 70, "completion": "yes"}
SHORT = {"prompt": "x", "completion": "yes"}


def long_records(path: Path) -> str:
    rows = [
        {"site": site} | record
        for site, record in (("a", LONG), ("a", SHORT), ("b", LONG), ("c", SHORT))
    ]
    return jsonl(path, *rows, times=2)


def test_records_without_an_answer_left_are_counted_over_all_sites(tmp_path: Path) -> None:
    source = long_records(tmp_path / "a.jsonl")
    with pytest.raises(DataError) as caught:
        texts(source, characters(), heldout_source=source).check()
    told = str(caught.value)
    # Train and held-out records are the same file here, so each record counts twice.
    assert told.startswith(
        "8 of 16 records are longer than data.max_length=64, and of their answer no token is "
        "left (by site: 'a' 4, "
        f"'b' 4): {source}, line 1 (74 tokens), {source}, line 2 (74 tokens), "
    )
    assert 'set data.overlong to "shorten_prompt"' in told


@pytest.mark.parametrize("overlong", ["drop", "shorten_prompt"])
def test_records_that_are_too_long_are_treated_as_set(overlong: str, tmp_path: Path) -> None:
    source = long_records(tmp_path / "a.jsonl")
    tokenizer = characters("<s> $A </s>")
    sites = texts(
        source,
        tokenizer,
        overlong=overlong,
        heldout_source=source,
        partition={"by": "iid", "sites": 1},
    )
    data = sites.load("site-0")
    assert (data.records, data.truncated_records) == (16, 8)
    learned = [
        [label for label in example.labels if label != IGNORE_INDEX] for example in data.train
    ]

    if overlong == "drop":
        assert (data.dropped_records, len(data.train), len(data.questions)) == (8, 4, 4)
    else:
        assert (data.dropped_records, len(data.train), data.truncated_tokens) == (0, 8, 8 * 11)
        cut = max(data.train, key=lambda example: len(example.input_ids))
        names = tokenizer.convert_ids_to_tokens(cut.input_ids)
        assert (len(names), names[:2], names[-5:]) == (
            64,
            ["<s>", "x"],
            ["x", "y", "e", "s", "</s>"],
        )

    assert {tuple(tokenizer.convert_ids_to_tokens(each)) for each in learned} == {
        ("y", "e", "s", "</s>")
    }
    notes = [
        note
        for note in sites.check()
        if note.startswith("8 of 16 records are longer than data.max_length=64")
    ]
    assert len(notes) == 1


def test_an_answer_that_alone_is_too_long_is_cut_at_its_end() -> None:
    tokenizer = characters()
    record = {"prompt": "abc", "completion": "y" * 30}
    (example,) = tokenize(
        [("r", record)], "prompt_completion", tokenizer, max_length=16, overlong="shorten_prompt"
    ).examples
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == ["c"] + ["y"] * 15

    with pytest.raises(DataError, match='and data.overlong = "refuse" allows none: r .34 tokens.'):
        tokenize([("r", record)], "prompt_completion", tokenizer, max_length=16, overlong="refuse")


# -- settings of each source ---------------------------------------------------------------------


def test_each_source_is_read_by_its_own_settings(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"site;frage;antwort\n" + "a;stra\u00dfe;\u00fc\n".encode("cp1252") * 4)
    held = jsonl(tmp_path / "held.jsonl", {"site": "a", "prompt": "\u00fc", "completion": "c"})
    (tmp_path / "public.txt").write_text("one line\n" * 8)
    sites = texts(
        str(path),
        tokenizer,
        columns={"prompt": "frage", "completion": "antwort"},
        encoding="cp1252",
        delimiter=";",
        heldout_source=held,
        heldout={"columns": {}},
        public_source=str(tmp_path / "public.txt"),
    )
    assert sites.load("a").questions == [Question("\u00fc", "c")]
    assert len(sites.public()) == 8
    assert sites.check() == []


def test_a_source_that_does_not_fit_is_named(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"site": "a", "text": "q", "label": "c"}, times=4)
    columns = {"prompt": "text", "completion": "label"}
    public = jsonl(tmp_path / "public.jsonl", {"text": "x"}, times=9)
    sites = texts(source, tokenizer, columns=columns, public_source=public)

    with pytest.raises(
        ConfigError,
        match=r"public.jsonl \(data.public_source\): data.columns: completion = 'label', .* set "
        r"data.public = \{ col",
    ):
        sites.check()

    sites = texts(source, tokenizer, columns=columns, public_source=public, public={"columns": {}})
    assert sum(len(examples) for examples in sites.public().values()) == 9


# -- chat templates ------------------------------------------------------------------------------


def chat(tokenizer: Any, messages: Sequence[dict[str, Any]], **options: Any) -> tuple[str, str]:
    """The whole text and what is learned of it."""
    record = {"messages": messages}
    (example,) = tokenize(
        [("record 1", record)], "messages", tokenizer, max_length=4096, **options
    ).examples
    learned = [label for label in example.labels if label != IGNORE_INDEX]

    return tokenizer.decode(list(example.input_ids)), tokenizer.decode(learned)


WRITTEN_OUT = {
    "chatml": (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\ngood day<|im_end|></s>\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\nfarewell<|im_end|></s>\n",
        "good day<|im_end|></s>\nfarewell<|im_end|></s>\n",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ngood day<|eot_id|></s>"
        "<|start_header_id|>user<|end_header_id|>\n\nbye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nfarewell<|eot_id|></s>",
        "good day<|eot_id|></s>farewell<|eot_id|></s>",
    ),
    "zephyr": (
        "<|user|>\nhello</s>\n<|assistant|>\n"
        "good day</s>\n<|user|>\nbye</s>\n<|assistant|>\nfarewell</s>\n",
        "good day</s>\nfarewell</s>\n",
    ),
    "gemma": (
        "<s><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n"
        "good day<end_of_turn></s>\n"
        "<start_of_turn>user\nbye<end_of_turn>\n<start_of_turn>model\nfarewell<end_of_turn></s>\n",
        "good day<end_of_turn></s>\nfarewell<end_of_turn></s>\n",
    ),
    "mistral": (
        "<s>[INST] hello [/INST] good day</s>[INST] bye [/INST] farewell</s>",
        " good day</s> farewell</s>",
    ),
    "plain": (
        "<s>User: hello\nAssistant: good day</s>\nUser: bye\nAssistant: farewell</s>\n",
        " good day</s>\n farewell</s>\n",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_templates_render_what_is_written_out(name: str) -> None:
    assert chat(with_template(byte_level(), name), TURNS) == WRITTEN_OUT[name]


@pytest.mark.parametrize("name", NAMED)
def test_a_refused_role_is_answered_with_the_templates_that_write_any(name: str) -> None:
    turns = [TURNS[0], {"role": "tool", "content": "4"}, TURNS[1]]
    tokenizer = with_template(byte_level(), name)
    if name in ("chatml", "llama3"):
        assert "4" in chat(tokenizer, turns)[0]
    else:
        with pytest.raises(DataError, match="of which 'chatml' and 'llama3' write any role"):
            chat(tokenizer, turns)


@pytest.mark.parametrize("kind", [byte_level, prefix_space])
def test_a_template_with_bos_gets_no_second_one(kind: Any) -> None:
    tokenizer = with_template(kind("<s> $A </s>"), "llama3")
    record = {"messages": TURNS}
    (example,) = tokenize([("r", record)], "messages", tokenizer, max_length=4096).examples
    names = tokenizer.convert_ids_to_tokens(list(example.input_ids))
    assert names.count("<s>") == 1
    assert names[0] == "<s>"
    assert names.count("</s>") == 2


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            "mistral",
            [{"role": "system", "content": "s"}, *TURNS],
            "refuses the conversation: this template knows",
        ),
        ("gemma", TURNS[1:], "refuses the conversation: turns must alternate"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            None,
            "leaves out or changes turn",
        ),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
            [{"role": "system", "content": "a"}, {"role": "user", "content": "an a"}, TURNS[-1]],
            r"leaves out or changes turn 1 \(role system\)",
        ),
        (
            "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
            [TURNS[0], {"role": "assistant", "content": "<think>three</think>4"}],
            r"leaves out or changes turn 2 \(role assistant\)",
        ),
        ("{{ messages + 1 }}", TURNS, "record 1: the chat template refuses the conversation"),
    ],
)
def test_what_a_template_cannot_show_is_refused(template: str, messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"record 1: .*{message}|{message}"):
        chat(
            with_template(byte_level(), template),
            messages or [{"role": "system", "content": "s"}, *TURNS],
        )


@pytest.mark.parametrize("name", ["chatml", "llama3", "zephyr", "plain"])
@pytest.mark.parametrize("content", ["a", "s", "|", "A long answer."])
def test_a_first_turn_of_the_assistant_is_learned_from_its_content_on(
    name: str, content: str
) -> None:
    """The header of a turn holds the letters of the word "assistant" too."""
    tokenizer = with_template(byte_level(), name)
    turn = {"role": "assistant", "content": content}
    (example,) = tokenize(
        [("r", {"messages": [turn]})], "messages", tokenizer, max_length=4096
    ).examples
    marked = tokenizer.apply_chat_template([turn | {"content": "0123456789"}], tokenize=False)
    header, end = marked.split("0123456789")
    learned = [token for token in example.labels if token != IGNORE_INDEX]
    assert tokenizer.decode(learned) == content + end
    assert tokenizer.decode(example.input_ids) == header + content + end


def test_text_parts_are_joined_and_a_day_is_always_the_same() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    tokenizer = with_template(byte_level(), "zephyr")
    assert (
        chat(tokenizer, [{"role": "user", "content": parts}, *TURNS[1:]]) == WRITTEN_OUT["zephyr"]
    )


@pytest.mark.parametrize(
    ("call", "written"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{{ strftime_now(format='%d %b %Y') }}", "26 Jul 2024"),
        ("{% set f = '%d %b %Y' %}{{ strftime_now(f) }}", "26 Jul 2024"),
        ("{% set today = strftime_now %}{{ today('%-d.%-m.%y %H:%M:%S.%f') }}", "26.7.24 00:00:00"),
        ("{% macro day() %}{{ strftime_now('%A, %B') }}{% endmacro %}{{ day() }}", "Friday, July"),
        ("{% if strftime_now is defined %}{{ strftime_now('%%d %j %') }}{% endif %}", "%d 208 %"),
    ],
)
@pytest.mark.parametrize("begin", ["", "\n", " \n  "])
def test_a_template_writes_the_same_date_on_each_day(call: str, written: str, begin: str) -> None:
    """The text before the call stays as transformers writes it."""
    tokenizer = byte_level()
    before = chat(with_template(tokenizer, f"{begin}@{NAMED['zephyr'][1]}"), TURNS)[0]
    made = chat(with_template(tokenizer, f"{begin}@{call}{NAMED['zephyr'][1]}"), TURNS)[0]
    assert made.startswith(before[: before.index("@") + 1] + written)

    dated = with_template(tokenizer, begin + call + NAMED["zephyr"][1])
    named = copy.copy(tokenizer)
    named.chat_template = {"default": dated.chat_template, "tool_use": "{{ 1 }}"}
    assert chat(named, TURNS) == chat(dated, TURNS)
    turns = [{"role": "user", "content": "hello"}]
    prompt = tokenizer.decode(chat_prompt(turns, named, ""))
    assert prompt == chat(dated, TURNS)[0][: len(prompt)]
    assert "strftime" not in prompt


def test_a_template_of_a_file_is_carried_by_the_configuration(
    tmp_path: Path, tiny_model: Path
) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"messages": TURNS}, times=4)
    (tmp_path / "mine.jinja").write_text(NAMED["zephyr"][1])
    (tmp_path / "run.toml").write_text(
        f'[model]\nname_or_path = "{tiny_model}"\n[data]\nsource = "{source}"\n'
        'partition = {by = "iid", sites = 1}\n'
        f'heldout_share = 0.5\nchat_template = "{tmp_path / "mine.jinja"}"\n'
    )
    config = load(tmp_path / "run.toml")
    assert config.data.chat_template == NAMED["zephyr"][1]
    tokens = preview(config, None, 1)["sequences"][0]["tokens"]
    assert "".join(token["text"] for token in tokens) == WRITTEN_OUT["zephyr"][0]
    assert "".join(token["text"] for token in tokens if token["loss"]) == WRITTEN_OUT["zephyr"][1]


def test_a_character_of_several_tokens_is_shown_whole(tmp_path: Path) -> None:
    """So that the preview of a file in another encoding tells whether it was read rightly."""
    text = "Größe für wen? 病房 \N{GRINNING FACE} \N{REPLACEMENT CHARACTER} ok"
    source = jsonl(tmp_path / "a.jsonl", {"prompt": text, "completion": "für Übung"}, times=4)
    data = {"source": source, "partition": {"by": "iid", "sites": 1}, "heldout_share": 0.5}
    config = parse({"model": {"name_or_path": "embedded"}, "data": data}, "test")
    shown = preview(config, None, 1)
    assert shown["sites"] == ["site-0"]
    for kind in ("sequences", "heldout"):
        (sequence,) = shown[kind]
        whole = "".join(token["text"] for token in sequence["tokens"])
        assert whole == f"<s>{text}für Übung</s>"


def test_the_written_tokenizer_has_the_template_of_the_run(
    tmp_path: Path, run_config: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    from fluvial.runs.run import execute

    source = jsonl(tmp_path / "a.jsonl", {"messages": TURNS}, times=4)
    data = {
        "source": source,
        "partition": {"by": "iid", "sites": 1},
        "heldout_share": 0.5,
        "chat_template": "chatml",
    }
    list(execute(parse(run_config | {"data": data, "rounds": 1}, "test"), tmp_path / "run"))
    written = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    assert written.chat_template == NAMED["chatml"][1]


def test_a_token_that_the_model_does_not_embed_is_named_with_its_site(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"site": "a", "text": f"word {number}"} for number in range(20)]
    source = tmp_path / "records.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig.model_validate(
        {"source": str(source), "partition": {"by": "column", "column": "site"}}
    )
    ids = tokenizer("word")["input_ids"]
    texts = SiteTexts(config, tokenizer, seed=0, num_embeddings=max(ids))

    with pytest.raises(ConfigError, match="site 'a': the text has a token of id"):
        texts.check()
    with pytest.raises(ConfigError, match="resize_token_embeddings"):
        texts.load("a")
