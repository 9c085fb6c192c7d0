"""A run's folder: results, refusals, and what survives kill -9."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fluvial import cli
from fluvial.errors import CheckpointError, ClientError, ConfigError, DivergenceError, FluvialError
from fluvial.federation import sites
from fluvial.models.pool import ModelPool
from fluvial.models.states import base_state
from fluvial.report.round_lines import round_line, setup_lines
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from fluvial.runs.run import execute
from fluvial.wire.frame import OVERHEAD
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named
from tests.conftest import saved_model
from tests.support.runs import adapter_of, run_table


def test_the_base_is_measured_once_for_a_method_and_its_baselines(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its three sites, and all their records together, which "central" has."""
    measured = list[int]()

    def counted(layout: Layout) -> Named:
        measured.append(layout.numel)
        return base_state(layout)

    monkeypatch.setattr(sites, "base_state", counted)
    result = run_table(run_config | {"compare": ["local", "central"]}, tmp_path / "run")
    assert len(measured) == 3 + 1
    alone = run_table(run_config, tmp_path / "alone")
    assert result["heldout"]["base"] == alone["heldout"]["base"]


def test_the_folder_holds_everything(run_config: dict[str, Any], tmp_path: Path) -> None:
    result = run_table(run_config | {"compare": ["local", "central"]}, tmp_path / "run")
    assert {
        "method",
        "codec",
        "rounds",
        "sites",
        "heldout",
        "bytes",
        "amortised_ratio",
        "wall_s",
    } <= set(result)
    assert set(result["heldout"]) == {"base", "local", "fedavg", "central", "final"}
    assert {"up", "down", "setup", "up_raw"} <= set(result["bytes"])
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored == {key: value for key, value in result.items() if key != "folder"}
    files = {path.name for path in (tmp_path / "run" / "adapter").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "README.md",
    } <= files
    weights = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == result["adapter_sha256"]
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["round"] for line in lines] == [1, 2]
    assert sum(line["bytes_up"] for line in lines) == result["bytes"]["up"]
    assert sum(line["bytes_down"] for line in lines) == result["bytes"]["down"]
    per_site = [size for line in lines for row in line["bytes"].values() for size in row.values()]
    assert sum(per_site) == result["bytes"]["up"] + result["bytes"]["down"]
    assert result["peak_rss_bytes"] > 2**20


def test_bytes_are_the_frames_and_their_envelopes(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Two rounds, three sites: every byte is accounted for by formula."""
    config = parse(run_config, "test")
    layout = ModelPool(config.model, config.lora).layout
    result = run_table(run_config, tmp_path / "run")
    frames = 6 * (layout.raw_bytes + OVERHEAD)
    assert result["bytes"]["up_raw"] == 6 * layout.raw_bytes
    assert result["bytes"]["down_raw"] == 3 * layout.raw_bytes  # round 1 has no adapter
    assert 0 < result["bytes"]["up"] - frames < 6 * 50
    assert 0 < result["bytes"]["down"] - frames // 2 < 6 * 100
    assert result["bytes"]["setup"] == 0
    assert result["round_ratio"] == result["bytes"]["up"] / result["bytes"]["up_raw"]
    assert 1 < result["amortised_ratio"] < 1.1


def test_the_adapter_loads_with_peft_and_gives_the_measured_loss(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    from fluvial.data import SiteTexts
    from fluvial.training.evaluate import heldout

    result = run_table(run_config, tmp_path / "run")
    config = parse(run_config, "test")
    pool = ModelPool(config.model, config.lora)
    texts = SiteTexts(config.data, pool.tokenizer, seed=config.seed)
    model = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "run" / "adapter"))

    for site, row in result["heldout_by_site"].items():
        found = heldout(model, texts.load(site).heldout, pad_token_id=pool.tokenizer.pad_token_id)
        assert found.loss == pytest.approx(row["final"]["loss"], rel=1e-6)  # threads may differ


def refused(
    table: dict[str, Any],
    folder: Path,
    kind: type[FluvialError],
    text: str,
    *,
    resume: bool = False,
) -> None:
    with pytest.raises(kind, match=text):
        list(execute(parse(table, "test"), folder, resume=resume))


def test_a_used_folder_is_refused(run_config: dict[str, Any], tmp_path: Path) -> None:
    run_table(run_config, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    refused(run_config, tmp_path / "run", CheckpointError, "already holds a run; use --resume")
    other = run_config | {"rounds": 3}
    refused(
        other,
        tmp_path / "run",
        CheckpointError,
        r"another configuration \(differs in rounds\)",
        resume=True,
    )
    assert before == {path: path.read_bytes() for path in before}
    refused(run_config, tmp_path / "none", CheckpointError, "holds no run to resume", resume=True)


def test_two_runs_do_not_share_a_folder(run_config: dict[str, Any], tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run"):
        refused(run_config, tmp_path / "run", CheckpointError, "in use by another run")


def test_a_finished_run_resumes_to_its_result(run_config: dict[str, Any], tmp_path: Path) -> None:
    first = run_table(run_config, tmp_path / "run")
    *_, last = execute(parse(run_config, "test"), tmp_path / "run", resume=True)
    assert last.values["adapter_sha256"] == first["adapter_sha256"]


def test_a_damaged_checkpoint_is_named(run_config: dict[str, Any], tmp_path: Path) -> None:
    for event in execute(parse(run_config, "test"), tmp_path / "run"):
        if event.kind == "round":
            break

    newest = max((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-7])
    refused(
        run_config,
        tmp_path / "run",
        CheckpointError,
        "round-000001.safetensors is damaged",
        resume=True,
    )
    newest.unlink()
    *_, last = execute(parse(run_config, "test"), tmp_path / "run", resume=True)
    assert (
        last.values["adapter_sha256"]
        == run_table(run_config, tmp_path / "straight")["adapter_sha256"]
    )


def test_a_full_disk_keeps_the_last_checkpoint(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = execute(parse(run_config, "test"), tmp_path / "run")
    next(events)
    next(events)  # round 1 is done
    sync = os.fsync

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        next(events)
    monkeypatch.setattr("os.fsync", sync)
    *_, last = execute(parse(run_config, "test"), tmp_path / "run", resume=True)
    assert (
        last.values["adapter_sha256"]
        == run_table(run_config, tmp_path / "straight")["adapter_sha256"]
    )


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    (
        {"lora": {"target_modules": ["query"]}},
        "the model has no linear module 'query'; it has .*q_proj",
    ),
    ({"lora": {"r": 64}}, "lora.r=64 exceeds dimension 32 of 'q_proj'; choose at most 32"),
    ({"model": {"name_or_path": "./nowhere"}}, "there is no folder './nowhere'"),
    ({"data": {"max_length": 4096}}, "data.max_length=4096: the model reads at most 128 tokens"),
    (
        {"codec": {"name": "klt"}, "method": {"name": "fedavg", "tgap": {"source": "none"}}},
        "'klt' must be trained",
    ),
    (
        {"method": {"name": "fedavg", "tgap": {"rounds": 3}}},
        "tgap: without effect, because codec 'identity'",
    ),
    (
        {"method": {"name": "cgfedllm", "tgap": {"source": "none"}}},
        "codec 'resnet' must be trained",
    ),
    ({"method": {"name": "cgfedllm"}}, "canvas"),  # 32 is no multiple of 64
]


@pytest.mark.parametrize(("change", "text"), BAD_SETTINGS)
def test_settings_that_cannot_work_are_refused_before_training(
    change: dict[str, Any], text: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    table = {
        **run_config,
        **{key: {**run_config.get(key, {}), **value} for key, value in change.items()},
    }
    refused(table, tmp_path / "run", ConfigError, text)
    assert not (tmp_path / "run").exists()  # a folder into which nothing was written goes again


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        ({"by": "column", "column": "client"}, r" has no records of site 'south' \(2 sites lack"),
        ({"by": "iid", "sites": 3}, r": data.partition.sites=3: there are only 1 records"),
    ],
)
def test_a_site_without_heldout_records_is_told_by_check_and_before_weights_are_loaded(
    partition: dict[str, Any],
    words: str,
    run_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apart = tmp_path / "apart.jsonl"
    apart.write_text('{"text": "snow in the north", "client": "north"}\n')
    kept = {key: value for key, value in run_config["data"].items() if key != "heldout_share"}
    data = kept | {"heldout_source": str(apart), "partition": partition}
    config = parse(run_config | {"data": data}, "test")
    monkeypatch.setattr(ModelPool, "load", lambda *_: pytest.fail("the weights were loaded"))
    for begin in (lambda: plan(config), lambda: next(execute(config, tmp_path / "run"))):
        with pytest.raises(ConfigError, match=f"data.heldout_source{words}"):
            begin()


def test_missing_public_text_is_noticed_before_a_baseline_is_trained(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    data = run_config["data"] | {"public_source": str(tmp_path / "nope.jsonl")}
    method = {"name": "cgfedllm", "tgap": {"source": "public"}}
    table = run_config | {
        "data": data,
        "method": method,
        "codec": {"name": "klt"},
        "compare": ["local"],
    }
    refused(table, tmp_path / "run", ConfigError, "data.public_source: there is no file or folder")

    with pytest.raises(ConfigError, match="data.public_source"):
        plan(parse(table, "test"))


def test_a_gqa_model_does_not_fit_the_papers_canvas(
    run_config: dict[str, Any], tiny_gqa_model: Path, tmp_path: Path
) -> None:
    table = run_config | {
        "model": {"name_or_path": str(tiny_gqa_model)},
        "method": {"name": "cgfedllm"},
    }
    refused(table, tmp_path / "run", ConfigError, "grouped")


def test_training_that_diverges_stops_with_a_remedy(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    wild = run_config["train"] | {
        "learning_rate": 100.0,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "max_steps": 20,
    }
    loud = run_config["lora"] | {"lora_alpha": 1e6}
    with pytest.raises(ClientError, match="DivergenceError.*lower train.learning_rate"):
        run_table(run_config | {"train": wild, "lora": loud}, tmp_path / "run")


def test_an_exploding_aggregate_stops_the_run(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluvial.codecs.quantise import Identity

    decode = Identity.parse
    calls = [0]

    def explode(self: Identity, reader: Any) -> torch.Tensor:
        calls[0] += 1
        return decode(self, reader) * (1000.0 if calls[0] > 9 else 1.0)  # round 3

    monkeypatch.setattr(Identity, "parse", explode)
    method = {"name": "cgfedllm", "tgap": {"source": "none"}}
    table = run_config | {"rounds": 9, "method": method, "codec": {"name": "identity"}}

    with pytest.raises((DivergenceError, ClientError), match="times the longest before|Divergence"):
        run_table(table, tmp_path / "run")


def test_a_site_that_fails_is_skipped_and_named_in_the_metrics(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluvial.federation.sites import Site
    from fluvial.methods import fedavg

    whole = fedavg.METHOD.tasks["train"]

    def flaky(site: Site, message: Payload) -> Any:
        if site.name == "south" and message.values["round"] == 2:
            raise RuntimeError("power cut")
        return whole(site, message)

    monkeypatch.setitem(fedavg.METHOD.tasks, "train", flaky)
    table = run_config | {"rounds": 3, "fleet": {"on_failure": "skip", "quorum": 0.6}}
    run_table(table, tmp_path / "run")
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["sites"] for line in lines] == [3, 2, 3]
    (missing,) = lines[1]["missing"]
    assert (missing["site"], missing["task"]) == ("south", "train")
    assert missing["reason"].startswith("RuntimeError at ")
    assert "power cut" in (tmp_path / "run" / "sites" / "south" / "errors.log").read_text()


def test_a_site_that_answers_when_it_is_asked_again_is_not_missing(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluvial.federation.sites import Site
    from fluvial.methods import fedavg

    whole = fedavg.METHOD.tasks["train"]
    attempts = {"north": 0, "south": 0}

    def flaky(site: Site, message: Payload) -> Any:
        if site.name in attempts:
            attempts[site.name] += 1
            if site.name == "south" or attempts[site.name] == 1:
                raise RuntimeError("power cut")
        return whole(site, message)

    monkeypatch.setitem(fedavg.METHOD.tasks, "train", flaky)
    policy = {"on_failure": "retry", "retries": 2, "quorum": 0.6}
    run_table(run_config | {"rounds": 1, "fleet": policy}, tmp_path / "run")
    (record,) = RunFolder(tmp_path / "run").metrics()
    assert attempts == {"north": 2, "south": 3}
    assert record["sites"] == 2
    assert [row["site"] for row in record["missing"]] == ["south"]
    again = [row["site"] for row in record["asked_again"]]
    assert sorted(again) == ["north", "south", "south"]
    line = round_line(record)
    assert "  2/3  " in line
    assert "missing south[/]  [yellow]asked again north[/]" in line


def test_ratios_count_updates_that_were_sent_and_dropped(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    fleet = {"on_failure": "skip", "quorum": 0.6, "max_update_growth": 1.0001}
    result = run_table(run_config | {"fleet": fleet}, tmp_path / "run")
    records = RunFolder(tmp_path / "run").metrics()
    assert [record["sites"] for record in records] == [2, 2]
    assert result["bytes"]["up_raw"] % 6 == 0
    assert result["bytes"]["up"] > result["bytes"]["up_raw"]  # three sites, each with an envelope
    assert 1 < result["round_ratio"] < 1.1


def test_a_site_that_was_not_measured_took_part_in_the_round() -> None:
    record = {"round": 3, "loss": 1.5, "seconds": 2.0, "sites": 3, "bytes_up": 9, "bytes_down": 9}
    failure = {"site": "north", "task": "evaluate", "reason": "late"}
    line = round_line(record | {"missing": [failure]})
    assert "3/4" not in line
    assert "missing" not in line
    assert "not measured north" in line


@pytest.mark.parametrize("name", ["fedavg", "cgfedllm"])
def test_a_set_up_that_measures_nothing_reports_nothing(
    name: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    method = {"name": name} | ({"tgap": {"source": "none"}} if name == "cgfedllm" else {})
    table = run_config | {"method": method, "codec": {"name": "identity"}}
    first = next(iter(execute(parse(table, "test"), tmp_path / "run")))
    assert (first.kind, first.values) == ("setup", {})
    assert setup_lines(first.values) == []


# -- kill -9 -------------------------------------------------------------------------------------

CHILD = """
import json, os, signal, sys, threading, time
from pathlib import Path
from fluvial.runs.config import parse
from fluvial.runs.run import execute

table, folder, where = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if where == "second checkpoint":
    from fluvial.runs.checkpoint import RunFolder
    save = RunFolder.save
    RunFolder.save = lambda run, round, state: die() if round == 2 else save(run, round, state)
elif where == "half a file":
    import fluvial.federation.store
    fsync, calls = os.fsync, [0]
    def count(handle):
        calls[0] += 1
        return die() if calls[0] == 9 else fsync(handle)
    os.fsync = count
elif where == "after a site kept its state":
    from fluvial.federation.store import StateStore
    write = StateStore.write
    def once(self, site, slot, payload, round):
        write(self, site, slot, payload, round)
        if round == 2:
            die()
    StateStore.write = once
else:
    threading.Thread(target=lambda: (time.sleep(float(where)), die()), daemon=True).start()
for event in execute(parse(table, "test"), folder, resume=folder.exists()):
    print(event.kind, flush=True)
"""


@pytest.mark.parametrize(
    "where", ["second checkpoint", "half a file", "after a site kept its state"]
)
def test_kill_9_and_resume_gives_the_same_adapter(
    where: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Sites keep residuals, the server keeps a fitted codec: all of it must come back."""
    _kill_and_resume(run_config, tmp_path, where)


@pytest.mark.slow
def test_kill_9_at_any_moment(run_config: dict[str, Any], tmp_path: Path) -> None:
    for number in range(12):
        _kill_and_resume(run_config, tmp_path / str(number), str(3.0 + 0.35 * number))


def _kill_and_resume(run_config: dict[str, Any], folder: Path, where: str) -> None:
    method = {"name": "cgfedllm", "tgap": {"source": "public", "rounds": 4, "simulated_sites": 2}}
    codec = {"name": "klt", "rate": 8, "error_feedback": True}
    table = run_config | {"rounds": 3, "method": method, "codec": codec}
    straight = run_table(table, folder / "straight")
    command = [sys.executable, "-c", CHILD, json.dumps(table), str(folder / "killed"), where]
    died = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert died.returncode in (-signal.SIGKILL, 0), died.stderr

    if not where[0].isdigit():
        assert died.returncode == -signal.SIGKILL

    time.sleep(0.05)
    resume = (folder / "killed" / "config.json").exists()
    *_, last = execute(parse(table, "test"), folder / "killed", resume=resume)
    assert last.values["adapter_sha256"] == straight["adapter_sha256"]
    assert last.values["bytes"] == straight["bytes"]
    lines = (folder / "killed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3]


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def toml(run_config: dict[str, Any], tmp_path: Path) -> Path:
    """The same configuration as a file."""
    path = tmp_path / "my.toml"
    path.write_text(_toml(run_config))
    return path


def _toml(table: dict[str, Any]) -> str:
    def value(found: Any) -> str:
        if isinstance(found, dict):
            return "{" + ", ".join(f"{key} = {value(item)}" for key, item in found.items()) + "}"
        return json.dumps(found)

    return "".join(f"{key} = {value(item)}\n" for key, item in table.items())


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def test_run_check_preview_and_show_print_json(toml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outputs: dict[str, Callable[[], Any]] = {
        "check": lambda: invoke("check", str(toml), "--format", "json"),
        "preview": lambda: invoke("preview", str(toml), "--format", "json", "--count", "2"),
        "run": lambda: invoke("run", str(toml), "--out", str(folder), "--format", "json"),
        "show": lambda: invoke(
            "show", str(folder), "--format", "json", "--html", str(tmp_path / "page.html")
        ),
    }
    found = {}

    for name, call in outputs.items():
        result = call()
        assert result.exit_code == 0, (name, result.output, result.exception)
        found[name] = json.loads(result.stdout)

    assert found["check"]["bytes"]["raw"] * 6 == found["run"]["bytes"]["up_raw"]
    assert [site["name"] for site in found["check"]["sites"]] == ["north", "south", "west"]
    assert len(found["preview"]["sequences"]) == 2
    assert found["show"]["result"] == found["run"]
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_tables_are_for_people(toml: Path, tmp_path: Path) -> None:
    for arguments in (
        ["check", str(toml)],
        ["preview", str(toml)],
        ["run", str(toml), "--out", str(tmp_path / "run")],
    ):
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output

    assert "adapter" in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "none.toml"], "there is no configuration file 'none.toml'"),
        (["show", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_1(
    arguments: list[str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["fluvial", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device"), "a file cannot be written: No space left"),
        (OSError(27, "File too large"), "a file cannot be written: File too large; free some"),
        (OSError(28, "No space left on device", "a/b"), "a/b: No space left on device; free some"),
        (OSError(13, "Permission denied", "a/b"), "a/b: Permission denied"),
    ],
)
def test_a_full_disk_is_one_message_where_no_file_is_named(
    error: OSError,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def raising() -> None:
        raise error

    monkeypatch.setattr(cli, "app", raising)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert text in " ".join(capsys.readouterr().err.split())

    error.errno = 5000
    with pytest.raises(OSError, match="5000|left|large|denied"):
        cli.main()


def test_adapters_of_two_seeds_differ(run_config: dict[str, Any], tmp_path: Path) -> None:
    first, second = (
        adapter_of(run_table(run_config | {"seed": seed}, tmp_path / str(seed))) for seed in (1, 2)
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_the_global_adapter_is_measured_on_the_way(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    result = run_table(
        run_config | {"evaluate": {"every": 1, "sample_tokens": 2}}, tmp_path / "run"
    )
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(line["heldout_loss"] > 0 for line in lines)
    assert result["bytes"]["evaluate"] > 0
    assert result["bytes"]["up"] == sum(
        line["bytes_up"] for line in lines
    )  # measuring is counted apart


def test_exact_match_of_answers_is_reported(run_config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [
        {"client": "ab"[n % 2], "prompt": f"{n % 5} + 1 =", "completion": f" {n % 5 + 1}"}
        for n in range(40)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    data = {
        "source": str(path),
        "max_length": 32,
        "partition": {"by": "column", "column": "client"},
    }
    train = run_config["train"] | {"max_steps": 30, "learning_rate": 3e-2}
    table = run_config | {
        "data": data,
        "train": train,
        "evaluate": {"max_new_tokens": 3, "sample_tokens": 2},
    }
    result = run_table(table, tmp_path / "run")

    for row in result["heldout_by_site"].values():
        assert 0 <= row["base"]["exact_match"] <= row["final"]["exact_match"] <= 1
    assert result["samples"][0]["prompt"].endswith("+ 1 =")
    assert result["samples"][0]["prompt_from"] == "site"
    assert result["samples"][0]["right"] == f" {int(result['samples'][0]['prompt'][0]) + 1}"


# -- other architectures -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Qwen2", "Mistral", "Gemma"])
def test_other_families_run_unchanged(
    family: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{family}Config")(**sizes)
    folder = saved_model(getattr(transformers, f"{family}ForCausalLM"), config, tmp_path / "model")
    method = {"name": "cgfedllm", "tgap": {"source": "public", "rounds": 4, "simulated_sites": 2}}
    table = run_config | {
        "model": {"name_or_path": str(folder)},
        "method": method,
        "codec": {"name": "klt", "rate": 8},
    }
    result = run_table(table, tmp_path / "run")
    assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]


def test_gpt2_with_its_fused_attention_runs(
    run_config: dict[str, Any], tiny_gpt2_model: Path, tmp_path: Path
) -> None:
    table = run_config | {
        "model": {"name_or_path": str(tiny_gpt2_model)},
        "lora": {"r": 4, "target_modules": ["c_attn"]},
        "codec": {"name": "ternary", "rate": 16, "error_feedback": True},
    }
    result = run_table(table, tmp_path / "run")
    assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]


def test_the_papers_autoencoder_takes_narrow_keys_on_grouped_canvases(
    run_config: dict[str, Any], tiny_gqa_model: Path, tmp_path: Path
) -> None:
    table = run_config | {
        "model": {"name_or_path": str(tiny_gqa_model)},
        "method": {"name": "cgfedllm", "gate": "report", "tgap": {"rounds": 2}},
        "codec": {"name": "resnet", "canvas": "grouped", "iterations": 2, "batch_size": 2},
    }
    assert run_table(table, tmp_path / "run")["setup"]["gate"]["failed"]


def test_a_sample_s_prompt_leaves_room_for_its_answer(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    """Else both samples would be empty, without a word."""
    table = run_config | {"evaluate": {"sample_prompt": "snow " * 200}}
    with pytest.raises(ConfigError, match=r"evaluate.sample_prompt: has .* fills the model's"):
        next(execute(parse(table, "test"), tmp_path / "run"))
