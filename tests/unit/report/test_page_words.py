"""Words of a run's tables and page that depend on the run: the line, the caption, the sample, the
axis of time."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fluvial.formatting import human_seconds
from fluvial.report import result_tables
from fluvial.report.axes import chart_of
from fluvial.report.charts import Series
from fluvial.report.harness_table import run_tasks
from fluvial.report.line_rates import Rates
from fluvial.report.page import page_of
from fluvial.storage.run_files import read_run
from tests.unit.report.test_show import config, records, result, text_of, write

TASKS = {
    "lm_eval": "0.4.13",
    "tasks": ["mmlu"],
    "limit": 100.0,
    "num_fewshot": 5,
    "cut_prompts": 3,
    "rows": [
        {
            "task": "mmlu_anatomy",
            "metric": "acc",
            "filter": "none",
            "n_shot": 5,
            "documents": 100,
            "base": {"value": 0.25, "stderr": 0.0435},
            "adapter": {"value": 0.31, "stderr": 0.0465},
            "difference": {"value": 0.06, "stderr": 0.0239},
        },
        {
            "task": "<mmlu>",
            "metric": "exact_match",
            "filter": "strict",
            "n_shot": None,
            "documents": None,
            "base": {"value": 0.2, "stderr": None},
            "adapter": {"value": 0.1, "stderr": None},
            "difference": {"value": -0.1, "stderr": None},
        },
    ],
}
LINE = {"up_mbit_s": 2.0, "down_mbit_s": 16.0, "rtt_ms": 40.0, "loss": 0.0, "shared": False}


def run_of(folder: Path, **more: Any) -> dict[str, Any]:
    """Return a finished run as `read_run` reads it, with more in its result."""
    config(folder, "fedavg")
    ours = result("fedavg", "int8", 3.2, 8000, 131200, **more)
    write(folder, records(8000, 131200, start=3.3), ours)
    return read_run(folder)


@pytest.mark.parametrize(
    ("settings", "up", "down", "words"),
    [
        ({}, 20, 20, "At 20 Mbit/s: these bytes"),
        ({"codec": {"uplink_mbps": 0.5}}, 0.5, 0.5, "At 0.5 Mbit/s (codec.uplink_mbps): these"),
        (
            {"fleet": {"line": LINE}, "codec": {"uplink_mbps": 0.5}},
            2,
            16,
            "At 2 Mbit/s, 16 Mbit/s down (fleet.line): these bytes",
        ),
    ],
)
def test_the_time_is_that_on_the_users_own_line(
    settings: dict[str, Any], up: float, down: float, words: str, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run")
    run["config"] |= settings
    headings, *_, ours = result_tables.result_rows(run["result"], Rates.of(run["config"]))
    sent = run["result"]["bytes"]
    seconds = 8 * (sent["up"] / up + sent["down"] / down) / 1e6 / run["result"]["sites"]
    assert headings[-1] == f"at {up:g} Mbit/s"
    assert ours[-1] == human_seconds(seconds)

    page = page_of(run).decode()
    assert f"<th>at {up:g} Mbit/s</th>" in page
    assert f"<td>{human_seconds(seconds)}</td>" in page
    assert words in page
    shown = " ".join(text_of(result_tables.result_table(run["result"], run["config"])).split())
    assert words in shown


def test_the_page_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    """Files and folders stand by their last part: a page is passed on."""
    run = run_of(tmp_path / "run")
    by_site = {"oslo": {"source": "/srv/data/oslo.jsonl", "heldout_source": "~/asked.jsonl"}}
    given: dict[str, Any] = {
        "model": {"name_or_path": "/srv/models/tiny"},
        "data": {"by_site": by_site},
    }
    run["config"] |= given
    run["description"] = {**(run["description"] or {}), "set": given}
    page = page_of(run | {"folder": "/home/ann/runs/first"}).decode()
    assert not [part for part in ("/srv", "/home", "~/", str(tmp_path)) if part in page]
    for name in ("tiny", "oslo.jsonl", "asked.jsonl", "first"):
        assert name in page
    assert "runs/first" in page_of(run | {"folder": "runs/first"}).decode()


def test_pooled_is_explained_where_there_is_such_a_column(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    assert "pooled:" not in page_of(run).decode()
    assert "pooled:" not in text_of(result_tables.result_table(run["result"], run["config"]))

    central = {"label": "central", "pooled": True}
    run["result"]["compare"] = {"central": central}
    assert "pooled: over all their label tokens" in page_of(run).decode()


@pytest.mark.parametrize("origin", ["site", "setting", "public"])
def test_a_prompt_that_is_a_record_of_a_site_is_said(origin: str, tmp_path: Path) -> None:
    sample = {"prompt": "Mrs Li, ", "prompt_from": origin, "base": "a", "final": "b"}
    run = run_of(tmp_path / "run", samples=[sample])
    words = "The prompt is a held-out record of a site; set evaluate.sample_prompt"
    shown = text_of(result_tables.closing_words(run["result"], tmp_path))
    assert (words in shown) == (words in page_of(run).decode()) == (origin == "site")


def test_the_right_answer_stands_beside_the_others(tmp_path: Path) -> None:
    sample = {"prompt": "2 + 1 =", "prompt_from": "site", "base": "9", "final": "4"}
    run = run_of(tmp_path / "run", samples=[sample])
    assert "\n  right" not in text_of(result_tables.closing_words(run["result"], tmp_path))
    assert "Right answer" not in page_of(run).decode()

    run = run_of(tmp_path / "known", samples=[sample | {"right": " 3"}])
    shown = text_of(result_tables.closing_words(run["result"], tmp_path))
    assert re.search(r"Sample +2 \+ 1 = *\n +before +9 *\n +after +4 *\n +right +3 *\n", shown)
    page = page_of(run).decode()
    assert "<h3>Right answer</h3><pre> 3</pre>" in page
    words = "The prompt with the right answer is a held-out record of a site"
    assert words in " ".join(shown.split())
    assert words in page


def test_an_empty_answer_is_said(tmp_path: Path) -> None:
    sample = {"prompt": "Why?", "prompt_from": "setting", "base": "Because", "final": "\n "}
    run = run_of(tmp_path / "run", samples=[sample])
    shown = text_of(result_tables.closing_words(run["result"], tmp_path))
    assert re.search(r"Sample +Why\? *\n +before +Because *\n +after +\(empty answer\)", shown)
    page = page_of(run).decode()
    assert "<i>Why?</i></pre>" in page
    assert page.count("(empty answer)") == 1
    assert json.dumps(sample["final"]) not in page


@pytest.mark.parametrize(
    ("last", "labels"),
    [
        (0.05, ["0", "10 ms", "20 ms", "30 ms", "40 ms", "50 ms"]),
        (150.0, ["0", "50 s", "100 s", "150 s"]),
        (299.0, ["0", "100 s", "200 s"]),
        (480.0, ["0", "2 min", "4 min", "6 min", "8 min"]),
        (21600.0, ["0", "2 h", "4 h", "6 h"]),
    ],
)
def test_ticks_of_time_are_round_and_none_has_the_words_of_another(
    last: float, labels: list[str]
) -> None:
    line = [(last * n / 10, 3.0 - 0.1 * n) for n in range(11)]
    chart = chart_of([Series("ours", "own", line, tips=[""] * 11)], "seconds", "loss")
    found = re.findall(r'text-anchor="middle">([^<]*)</text>', chart)
    assert found == [*labels, "time of the rounds"]


def test_tasks_of_lm_eval_stand_on_the_page_as_in_the_table(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", tasks=TASKS)
    page = page_of(run).decode()
    table = " ".join(text_of(*run_tasks(run["result"])).split())
    cells = ["mmlu_anatomy", "acc", "5", "100", "0.2500 ± 0.0435", "0.3100 ± 0.0465"]
    for cell in [*cells, "+0.0600 ± 0.0239", "exact_match, strict", "-0.1000"]:
        assert f">{cell}</td>" in page
        assert cell in table
    assert ">&lt;mmlu&gt;</td>" in page

    for words in ("lm-eval 0.4.13", "limit 100", "3 prompts cut on the left to fit the context"):
        assert words in page
        assert words in table


def test_tasks_that_failed_say_why_on_the_page(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", tasks={"why": "lm-eval stopped: no <data>"})
    page = page_of(run).decode()
    assert "Tasks of lm-eval</h2><p" in page
    assert "Not measured, because lm-eval stopped: no &lt;data&gt;" in page
    assert "Tasks of lm-eval" not in page_of(run_of(tmp_path / "other")).decode()
