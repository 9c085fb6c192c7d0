"""A site as a process of its own: headers, what is pending, what it takes part in, what leaves
it."""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fluvial.federation.store
import fluvial.models.fingerprints
import fluvial.site_process.journal
import fluvial.site_process.process
import fluvial.storage.files
from fluvial.codecs import CodecSettings, coding_time
from fluvial.data import SiteTexts
from fluvial.errors import ConfigError, FluvialError, RefusalError, WireError
from fluvial.federation.sites import Site, adapter_message
from fluvial.federation.talk import Talk
from fluvial.flower.site_operator import site_init
from fluvial.models.fingerprints import fingerprints
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.runs.config import RunConfig
from fluvial.site_process.journal import Header, Journal
from fluvial.site_process.process import JOIN, UNKNOWN_RUN, SiteProcess
from fluvial.site_process.site_file import read_site_file
from fluvial.wire.payload import Limits, Payload
from fluvial.wire.tensors import Layout
from tests.support.site_process import SITE, Killed, header, site_file

DEPLOY = Path(__file__).parents[3] / "docs" / "deploy.md"

# -- header --------------------------------------------------------------------------------------


def test_a_header_survives_the_wire() -> None:
    assert Header.read(header().values() | {"more": 1}) == header()


@pytest.mark.parametrize("name", list(header().values()))
@pytest.mark.parametrize(
    "value", [None, True, 1.0, "", "x" * 201, b"x", [1], "missing", "other kind"]
)
def test_a_header_that_is_wrong_is_refused(name: str, value: Any) -> None:
    values = header().values()
    if value == "missing":
        del values[name]
    else:
        values[name] = (
            (7 if isinstance(values[name], str) else "7") if value == "other kind" else value
        )

    with pytest.raises(WireError, match=f"header: {name}="):
        Header.read(values)


# -- the site's file -----------------------------------------------------------------------------


def test_a_site_file_is_read_with_its_own_places(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(
        'name = "north"\nfolder = "state"\nca = "ca.crt"\nkey = "/keys/north.key"\n'
    )
    found = read_site_file(tmp_path / "site.toml")
    assert (found.folder, found.ca, found.key) == (
        tmp_path / "state",
        tmp_path / "ca.crt",
        Path("/keys/north.key"),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('name = "a"\nmodels = "x"', r"site\.toml: models: unknown key; did you mean 'model'"),
        (
            'name = "a"\n[allow]\nmethod = ["fedavg"]',
            r"allow\.method: unknown key; did you mean 'methods'",
        ),
        (
            'name = "a"\n[allow]\nmax_bytes_up_per_round = 0',
            r"allow\.max_bytes_up_per_round = 0: must be an integer from 1",
        ),
        ('name = "a"\n[data]\nform = "text"', r"data\.source: missing"),
        ('name = "../a"', "name: .* is no name of a site"),
        ('name = ""', 'name = "": the string is empty'),
        ('name = ".hidden"', "name: .* is no name of a site"),
        (f'name = "{"a" * 65}"', "name: 'a+' is no name of a site: 1 to 64 letters"),
        ("folder = 'x'", "name: missing"),
        ("name = ", r"site\.toml: not valid TOML"),
    ],
)
def test_a_site_file_that_is_wrong_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_site_file(tmp_path / "site.toml")


def test_the_example_in_a_site_file_holds_once_it_is_uncommented(tmp_path: Path) -> None:
    site_init(tmp_path, name="north", server="127.0.0.1:8000", ca=None, insecure=True)
    path = tmp_path / "site.toml"
    path.write_text(re.sub("^# ", "", path.read_text(), flags=re.MULTILINE))
    found = read_site_file(path)
    assert found.data is not None
    shown = {"source", "heldout_source", "encoding", "delimiter", "columns", "numbers"}
    shown |= {"chat_template", "read_as"}
    assert found.data.model_fields_set == shown
    assert found.allow.model_fields_set == {
        "methods",
        "tensors",
        "run_paths",
        "max_bytes_up_per_round",
    }


def test_a_missing_site_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no site file .*`fluvial site init` makes one"):
        read_site_file(tmp_path / "site.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml: is not UTF-8 at byte 0"):
        read_site_file(tmp_path / "binary.toml")


def join(process: SiteProcess, table: dict[str, Any], **changes: Any) -> Payload:
    wire = Payload(values={"config": table}).to_bytes()
    return Payload.from_bytes(process.answer(header(task=JOIN, round=0, **changes), wire).data)


def training(pool: ModelPool, round: int = 1) -> bytes:
    """What the server of FedAvg sends."""
    adapter = initial_state(pool.layout, 1)
    return adapter_message(adapter, round=round).to_bytes()


def answers(
    open_process: Callable[[], SiteProcess], table: dict[str, Any], pool: ModelPool
) -> list[bytes]:
    join(open_process(), table)
    return [
        open_process().answer(header(round=n, seq=n, ack=n - 1), training(pool, n)).data
        for n in range(1, 4)
    ]


def test_cold_and_warm_answers_are_the_same(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    """A new process for every message, or one for all: what a site keeps is on its disk."""
    warm = SiteProcess(site_file(tmp_path / "warm"))
    found = answers(lambda: warm, table, pool)
    assert found == answers(lambda: SiteProcess(site_file(tmp_path / "cold")), table, pool)
    assert len(set(found)) == 3
    prepared = SiteProcess(site_file(tmp_path / "warm"))
    prepared.prepare()
    last = header(round=4, seq=4, ack=3)
    cold = SiteProcess(site_file(tmp_path / "cold"))
    assert prepared.answer(last, training(pool, 4)) == cold.answer(last, training(pool, 4))


@pytest.mark.parametrize(
    ("codec", "names"),
    [
        ({"name": "trellis", "rate": 8}, ["trellis", "hadamard"]),
        ({"name": "auto"}, ["trellis", "hadamard"]),
        ({"name": "klt", "rate": 8}, ["hadamard"]),
    ],
)
def test_forks_find_the_codecs_loaded(
    codec: dict[str, Any],
    names: list[str],
    table: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process that forks codes a small update, once; a codec that learns has nothing yet."""
    found: list[str] = []
    load = coding_time.loaded

    def noted(settings: CodecSettings, layout: Layout) -> None:
        found.append(settings.name)
        load(settings, layout)

    monkeypatch.setattr(fluvial.site_process.process, "loaded", noted)
    process = SiteProcess(site_file(tmp_path))
    both = {"codec": codec, "downlink": {"name": "hadamard", "rate": 8}}
    join(process, table | {"method": {"name": "fedavg"}} | both)
    process.prepare()
    process.prepare()
    assert found == names


def test_an_answer_has_the_seconds_of_its_parts_and_the_log_too(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    process = SiteProcess(site_file(tmp_path))
    assert join(process, table)
    times = process.answer(header(), training(pool)).times
    assert times is not None
    assert times.keys() == {"training", "coding"}
    assert all(seconds > 0 for seconds in times.values())
    joined, trained = log_of(tmp_path)
    assert "seconds" not in joined
    assert trained["seconds"] == {part: round(seconds, 3) for part, seconds in times.items()}


def test_an_answer_that_did_not_count_is_as_if_it_had_not_been_given(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    process = SiteProcess(site_file(tmp_path))
    join(process, table)
    first = process.answer(header(seq=1), training(pool))
    assert process.answer(header(seq=2), training(pool)) == first
    second = process.answer(header(round=2, seq=3, ack=2), training(pool, 2))
    process.answer(header(round=3, seq=4, ack=3), training(pool, 3))
    assert (
        process.answer(header(session="other", round=2, seq=3, ack=2, base=1), training(pool, 2))
        == second
    )


def test_a_run_that_was_not_met_is_unknown(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    process = SiteProcess(site_file(tmp_path))
    assert Payload.from_bytes(process.answer(header(), training(pool)).data) == UNKNOWN_RUN
    assert [(line["task"], line["values"]) for line in log_of(tmp_path)] == [("train", ["unknown"])]
    join(process, table)
    assert Payload.from_bytes(process.answer(header(), training(pool)).data) != UNKNOWN_RUN
    assert (
        Payload.from_bytes(process.answer(header(run="another"), training(pool)).data)
        == UNKNOWN_RUN
    )


def test_a_task_that_there_is_not_is_refused(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    process = SiteProcess(site_file(tmp_path))
    join(process, table)
    with pytest.raises(WireError, match="unknown task 'os.system'"):
        process.answer(header(task="os.system"), training(pool))


def test_a_task_that_talks_is_refused_with_the_remedy(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def talking(site: Site, message: Payload) -> Talk:
        site.keep("slot", message)
        yield Payload()
        return Payload()

    process = SiteProcess(site_file(tmp_path))
    join(process, table)
    monkeypatch.setattr(fluvial.site_process.process, "tasks_of", lambda _: {"train": talking})
    with pytest.raises(RefusalError, match="asked for one answer only.*Fleet.converse") as refused:
        process.answer(header(), training(pool))
    assert process.refusal(header(), refused.value) == f"RefusalError: {refused.value}"


def test_garbled_messages_are_refused_and_nothing_worse(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    """Bytes of a message, changed anywhere: a reason, or an answer where only a number changed."""
    process = SiteProcess(site_file(tmp_path))
    join(process, table)
    wires = {JOIN: Payload(values={"config": table}).to_bytes(), "train": training(pool)}
    chance = random.Random(3)
    refused = 0

    for number in range(400):
        task = JOIN if number % 2 else "train"
        data = bytearray(wires[task])
        place = chance.randrange(200 if task == JOIN or chance.random() < 0.8 else len(data))

        if number % 3:
            data[place] ^= 1 << chance.randrange(8)
        else:
            data = data[:place]

        try:
            process.answer(
                header(task=task, run=f"{number}" if task == JOIN else "a run"), bytes(data)
            )
        except FluvialError:
            refused += 1

    assert refused > 200
    with pytest.raises(WireError, match="exceeds the limit"):
        SiteProcess(site_file(tmp_path), limits=Limits(max_bytes=100)).answer(
            header(), training(pool)
        )


# -- what a site takes part in -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allow", "said"),
    [
        (
            {"methods": ["cgfedllm", "fedcybgd"]},
            "takes no part in runs with this method.name: allow.methods leaves out 'fedavg'; the "
            "baselines of compare are methods too; its operator can change site.toml and then "
            "start the site again$",
        ),
        (
            {"models": ["meta/llama"]},
            "takes no part in runs with this model.name_or_path: allow.models leaves it out; its "
            "operator can change site.toml and then start the site again$",
        ),
        ({"tensors": ["*.q_proj.*"]}, r"does not let '.*k_proj.*' leave \(nor 11 more\)$"),
    ],
)
def test_a_site_takes_no_part_in_what_its_file_does_not_name(
    allow: dict[str, Any], said: str, table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    process = SiteProcess(site_file(tmp_path, allow=allow))
    with pytest.raises(ConfigError, match=f"site 'south' {said}"):
        join(process, table)
    assert Payload.from_bytes(process.answer(header(), training(pool)).data) == UNKNOWN_RUN


def test_a_site_takes_part_in_what_its_file_names(table: dict[str, Any], tmp_path: Path) -> None:
    allow = {
        "methods": ["fedavg"],
        "models": [table["model"]["name_or_path"]],
        "tensors": ["*.lora_[AB].*"],
    }
    assert join(SiteProcess(site_file(tmp_path, allow=allow)), table).values["site"] == SITE


def test_no_more_leaves_in_a_round_than_the_file_says(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    free = SiteProcess(site_file(tmp_path / "free"))
    join(free, table)
    size = len(free.answer(header(), training(pool)).data)
    process = SiteProcess(site_file(tmp_path, allow={"max_bytes_up_per_round": size + 20}))
    join(process, table)
    answer = process.answer(header(), training(pool)).data
    again = process.answer(header(seq=2), training(pool)).data
    assert again == answer  # as after a stop; it tells nothing new

    other = adapter_message(initial_state(pool.layout, 2), round=1).to_bytes()
    with pytest.raises(
        ConfigError,
        match=f"lets {size + 20} bytes leave in a round; this answer of {size} after {size} of "
        "round 1 exceeds it",
    ):
        process.answer(header(seq=3), other)

    assert [line["task"] for line in log_of(tmp_path)] == ["join", "train", "train"]
    process.answer(header(round=2, seq=4), training(pool, 2))  # the next round has its own


def test_the_limit_holds_after_a_line_that_was_cut_off(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    process = SiteProcess(site_file(tmp_path, allow={"max_bytes_up_per_round": 10**6}))
    join(process, table)
    process.answer(header(), training(pool))
    log = tmp_path / "site" / "outgoing.jsonl"

    with log.open("a") as file:
        file.write('{"run": "a run", "ro')  # killed, or the disk was full
    process.answer(header(seq=2), training(pool))
    lines = log.read_text().splitlines()
    assert len(lines) == 4  # the joined, an answer, half a line, an answer
    assert json.loads(lines[3])["bytes"] > 0


# -- what leaves ---------------------------------------------------------------------------------


def log_of(tmp_path: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (tmp_path / "site" / "outgoing.jsonl").read_text().splitlines()
    ]


def test_what_leaves_is_logged(table: dict[str, Any], pool: ModelPool, tmp_path: Path) -> None:
    process = SiteProcess(site_file(tmp_path))
    join(process, table)
    first = process.answer(header(seq=1), training(pool)).data
    before = (tmp_path / "site" / "outgoing.jsonl").read_bytes()
    second = process.answer(header(round=2, seq=2, ack=1), training(pool, 2)).data
    assert (tmp_path / "site" / "outgoing.jsonl").read_bytes().startswith(before)
    joined, *lines = log_of(tmp_path)
    assert (joined["task"], joined["values"]) == ("join", ["known", "prints", "site"])
    (example,) = re.findall(r"^```json\n(.*?)^```$", DEPLOY.read_text(), flags=re.S | re.M)
    assert [*lines[0]] == [*json.loads(example)]

    for line, answer, round in zip(lines, (first, second), (1, 2), strict=True):
        sent = Payload.from_bytes(answer)
        assert line["bytes"] == len(answer)
        assert line["sha256"] == hashlib.sha256(answer).hexdigest()
        assert line["tensors"] == {
            name: list(tensor.shape) for name, tensor in sent.tensors.items()
        }
        assert line["values"] == sorted(sent.values)
        assert (line["run"], line["round"], line["task"]) == ("a run", round, "train")
        assert (line["method"], line["codec"]) == ("fedavg", "top_k")
        assert line["time"].endswith("Z")


def test_it_is_logged_before_it_leaves(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = SiteProcess(site_file(tmp_path))
    join(process, table)

    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(Journal, "post", killed)
    with pytest.raises(Killed):
        process.answer(header(), training(pool))
    assert [line["task"] for line in log_of(tmp_path)] == ["join", "train"]


def test_a_refusal_is_logged_and_quotes_no_error_that_was_not_made_for_it(tmp_path: Path) -> None:
    process = SiteProcess(site_file(tmp_path))

    def told(error: Exception, header: Header | None = None) -> str:
        with pytest.raises(type(error)) as raised:
            raise error
        return process.refusal(header, raised.value)

    text = told(KeyError("patient 17"), header())
    assert text.startswith("KeyError at ")
    assert "patient" not in text
    assert "column 17" not in told(ConfigError("no such column 17"))
    assert told(RefusalError("not this method")) == "RefusalError: not this method"
    assert "No space left on device" in told(OSError(28, "No space left on device", "/secret"))
    logged = log_of(tmp_path)
    assert logged[0]["error"] == text
    assert [line["bytes"] for line in logged[::2][:2]] == [
        len(text),
        len("RefusalError: not this method"),
    ]
    assert "/secret" not in logged[3]["error"]
    own = (tmp_path / "site" / "errors.log").read_text()

    for whole in ("patient 17", "no such column 17", "/secret"):
        assert whole in own
    for line in logged[:2]:
        assert line["error"].partition("reference ")[2][:8] in own


def test_paths_of_the_site_file_are_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "records.jsonl").write_text("")
    path = tmp_path / "site.toml"
    path.write_text(
        'name = "a"\nmodel = "base"\n[data]\nsource = "records.jsonl"\nheldout_source = "hub/id"\n'
    )
    found = read_site_file(path)
    assert found.data is not None
    here = tmp_path.resolve()
    assert (found.model, found.data.source) == (str(here / "base"), str(here / "records.jsonl"))
    assert found.data.heldout_source == "hub/id"


# -- what must be equal --------------------------------------------------------------------------


def test_equal_ends_have_equal_prints(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    found = join(SiteProcess(site_file(tmp_path)), table)
    assert found.values["prints"] == fingerprints(pool)


def test_a_copy_of_the_model_at_the_site_has_the_same_prints(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    shutil.copytree(table["model"]["name_or_path"], tmp_path / "copy")
    found = join(SiteProcess(site_file(tmp_path, model=str(tmp_path / "copy"))), table)
    assert found.values["prints"] == fingerprints(pool)


@pytest.mark.parametrize(
    "what", ["base", "tokenizer", "template", "layout", "fluvial", "transformers"]
)
def test_what_differs_has_another_print(
    what: str, config: RunConfig, pool: ModelPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = fingerprints(pool)
    folder = tmp_path / "other"
    shutil.copytree(str(config.model.name_or_path), folder)
    adapter = config.adapter

    if what == "base":
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    elif what == "layout":
        assert isinstance(adapter, LoraSettings)
        adapter = adapter.model_copy(update={"r": 8})
    elif what == "fluvial":
        monkeypatch.setattr(fluvial.models.fingerprints, "__version__", "0.0.1")
    elif what == "transformers":
        monkeypatch.setattr(
            fluvial.models.fingerprints,
            "version",
            lambda name: "9" if name == what else ours[name],
        )

    other = ModelPool(config.model.model_copy(update={"name_or_path": str(folder)}), adapter)
    if what == "tokenizer":
        other.tokenizer.add_tokens(["river"])
    elif what == "template":
        other.tokenizer.chat_template += "\n"

    theirs = fingerprints(other)
    assert {name for name in ours if ours[name] != theirs[name]} == {what}


# -- the site's own data -------------------------------------------------------------------------


def test_a_file_of_the_sites_own_gives_the_split_of_the_common_file(
    table: dict[str, Any], config: RunConfig, pool: ModelPool, three_sites: Path, tmp_path: Path
) -> None:
    """Three sites that each have only their own records are the run over one file that was split by
    column."""
    records = [json.loads(line) for line in three_sites.read_text().splitlines()]
    common = SiteTexts(config.data, pool.tokenizer, seed=config.seed)

    for name in common.names:
        own = tmp_path / f"{name}.jsonl"
        mine = [record for record in records if record["client"] == name]
        own.write_text("".join(json.dumps({"text": record["text"]}) + "\n" for record in mine))
        data = config.data.model_copy(update={"source": str(own)})
        alone = SiteTexts(data, pool.tokenizer, seed=config.seed, owner=name)
        assert alone.names == (name,)
        assert alone.load(name) == common.load(name)
        processes = [
            SiteProcess(site_file(tmp_path / kind / name, name=name, **given))
            for kind, given in (("own", {"data": {"source": str(own)}}), ("common", {}))
        ]

        for process in processes:
            join(process, table)
        first, second = (process.answer(header(), training(pool)) for process in processes)
        assert first == second


def test_a_site_that_has_no_records_says_so_at_the_start(
    table: dict[str, Any], tmp_path: Path
) -> None:
    process = SiteProcess(site_file(tmp_path, data={"source": str(tmp_path / "none.jsonl")}))
    with pytest.raises(ConfigError, match=r"none\.jsonl"):
        join(process, table)


def test_the_log_of_a_site_says_that_its_model_cannot_end_an_answer(
    table: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("fluvial.models.end_token.NEAR", 100.0)  # as if all rows were alike
    join(SiteProcess(site_file(tmp_path)), table)
    assert caplog.text.count("the end of an answer was never trained in this model") == 1


def test_threads_are_those_of_the_run(
    table: dict[str, Any], pool: ModelPool, tmp_path: Path
) -> None:
    process = SiteProcess(site_file(tmp_path))
    join(process, table)
    torch.set_num_threads(2)
    process.answer(header(), training(pool))
    assert torch.get_num_threads() == 1
