"""What is shown of a run: the lines, the tables and the page hold its numbers, and nothing that
models say runs."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console, RenderableType
from scipy.stats import binomtest

from fluvial.errors import CheckpointError, ConfigError
from fluvial.formatting import human_bytes, human_ratio, human_seconds
from fluvial.methods import METHODS
from fluvial.report import block_tables, figures, result_tables, round_lines, show
from fluvial.report.aggregation_tables import aggregation_by_module
from fluvial.report.damage import damage_reported
from fluvial.report.fairness_tables import fairness_by_round
from fluvial.report.page import write_page
from fluvial.report.plan_tables import plan_table, preview_text
from fluvial.runs.result import described
from fluvial.storage.run_files import DESCRIPTION, read_run

SITES = ("asyncio", "email", "[red]xml[/]")
RAW = 131072
SCRIPT = "<script>alert(1)</script>"


def errors(a: float, b: float) -> dict[str, float]:
    return {"a": a, "b": b, "all": (a + b) / 2, "aggregate": 0.9 * b}


def gate(failed: list[str]) -> dict[str, Any]:
    return {
        "snapshots": 8,
        "bytes_per_update": 2044.5,
        "raw_bytes": RAW,
        "errors": errors(0.8123, 0.7345),
        "predictors": {
            "zero": errors(1, 1),
            "training mean": errors(31.5, 1.7),
            "previous round": errors(1.4, 1.2),
        },
        "shuffled_error": 1.21,
        "product_error": 0.79,
        "cosine": 0.4391,
        "aggregate_cosine": 0.52,
        "contraction": 0.93,
        "snr_db": 1.12,
        "failed": failed,
        "reproduction": {
            "finite": True,
            "innovation cosine >= 0.90": False,
            "B norm ratio in [0.5, 2]": True,
        },
        "passed": not failed,
    }


def records(
    up: int, down: int, *, start: float, missing: bool = False, codec: bool = False
) -> list[dict[str, Any]]:
    found = []
    for number in range(1, 5):
        record: dict[str, Any] = {
            "round": number,
            "loss": start - 0.1 * number,
            "sites": 3,
            "seconds": 2.5,
        }
        record |= {"bytes_up": 3 * up, "bytes_down": 3 * down, "bytes": {}, "missing": []}
        record |= (
            {"heldout_loss": start - 0.08 * number, "heldout_accuracy": 0.3} if number == 2 else {}
        )
        record |= {"snr_db": 1.37} if codec else {}

        if missing and number == 3:
            record["sites"] = 2
            record["missing"] = [
                {"site": SITES[2], "task": "train", "reason": "TimeoutError: [bold]60 s\x1b[2J"}
            ]

        found.append(record)

    return found


def result(
    method: str, codec: str | None, final: float, up: int, down: int, **more: Any
) -> dict[str, Any]:
    sends = codec is not None
    return {
        "fluvial": "0.1.0",
        "method": method,
        **described(method, METHODS[method].traits, codec),
        "codec": codec,
        "rounds": 4,
        "sites": 3,
        "heldout": {
            "base": {"loss": 3.3241, "accuracy": 0.3012},
            "local": {"loss": 3.2871, "accuracy": 0.3077},
            "fedavg": {"loss": 3.2011, "accuracy": 0.3199},
            "central": None,
            "final": {"loss": final, "accuracy": 0.3155},
        },
        "heldout_by_site": {
            site: {
                "base": {"loss": 3.2 + 0.1 * n, "accuracy": 0.3},
                "final": {"loss": final - 0.1 + 0.1 * n, "accuracy": 0.31},
            }
            for n, site in enumerate(SITES)
        },
        "bytes": {
            "up": 12 * up,
            "down": 12 * down,
            "setup": 0,
            "setup_up": 0,
            "up_raw": 12 * RAW if sends else 0,
            "evaluate": 9000,
            "by_kind": {
                "down evaluate": 8000,
                "down train": 12 * down,
                "up evaluate": 1000,
                "up train": 12 * up,
            },
        },
        "round_ratio": up / RAW if sends else None,
        "amortised_ratio": (up + down) / (2 * RAW) if sends else None,
        "wall_s": 41.5,
        "peak_rss_bytes": 812_345_678,
        "adapter_sha256": "ab" * 32 if method != "local" else None,
        "samples": [],
        "setup": {},
        "versions": {"torch": "2.13.0"},
        "python": "3.11.7",
        **more,
    }


def write(folder: Path, metrics: list[dict[str, Any]], result: dict[str, Any] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    if result:
        (folder / "result.json").write_text(json.dumps(result))


def config(folder: Path, method: str) -> None:
    folder.mkdir()
    content = {
        "rounds": 4,
        "method": {"name": method},
        "model": {"name_or_path": "embedded"},
        DESCRIPTION: described(method, METHODS[method].traits, None),
    }
    (folder / "config.json").write_text(json.dumps(content))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """CG-FedLLM with two baselines, and a sample that tries to be markup."""
    folder = tmp_path / "finished"
    config(folder, "cgfedllm")
    sample = {
        "prompt": "def f",
        "base": f"(x):\n\n\n\n\n{SCRIPT}",
        "final": "[bold]x[/bold] [/nothing]\x1b[2J",
    }
    setup = {"snapshots": 24, "gate": gate([])}
    ours = result("cgfedllm", "klt", 3.2345, 2200, 131200, samples=[sample], setup=setup)
    write(folder, records(2200, 131200, start=3.3, missing=True, codec=True), ours)
    fedavg = result("fedavg", "identity", 3.2011, 131300, 131200)
    write(folder / "compare" / "fedavg", records(131300, 131200, start=3.28), fedavg)
    write(
        folder / "compare" / "local",
        records(9, 110, start=3.25),
        result("local", None, 3.2871, 9, 110),
    )

    return folder


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """Two rounds, the second line cut off by a crash."""
    folder = tmp_path / "unfinished"
    config(folder, "fedavg")
    write(folder, records(131300, 131200, start=3.3)[:1], None)

    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "lo')
    return folder


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Sites alone: no adapter, no ratio."""
    folder = tmp_path / "alone"
    config(folder, "local")
    write(folder, records(9, 110, start=3.3), result("local", None, 3.2871, 9, 110))
    return folder


def text_of(*content: RenderableType) -> str:
    console = Console(record=True, width=120, file=io.StringIO(), highlight=False)
    console.print(*content)
    return console.export_text()


def test_reading_is_plain_json_and_needs_a_run(
    finished: Path, unfinished: Path, tmp_path: Path
) -> None:
    found = read_run(finished)
    assert json.loads(json.dumps(found)) == found
    assert len(found["metrics"]) == 4
    assert sorted(found["compare"]) == ["fedavg", "local"]
    assert found["setup"] is None  # once, in the result
    assert len(read_run(unfinished)["metrics"]) == 1

    with pytest.raises(CheckpointError, match="holds no run"):
        read_run(tmp_path / "nowhere")
    (unfinished / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"result\.json is damaged"):
        read_run(unfinished)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (17552, "17.6 kB"),
        (999_600, "1.00 MB"),
        (1_049_552, "1.05 MB"),
    ],
)
def test_bytes_have_three_digits(count: int, words: str) -> None:
    assert human_bytes(count) == words


def test_ratios_are_fractions_where_something_is_saved() -> None:
    assert [human_ratio(ratio) for ratio in (1 / 57, 0.5, 1.0011, 0, None)] == [
        "1/57",
        "1/2.0",
        "1.001",
        "0.000",
        "-",
    ]


def test_round_lines_are_aligned_with_their_header(finished: Path) -> None:
    _, headings = text_of(round_lines.round_header("cgfedllm")).splitlines()
    metrics = read_run(finished)["metrics"]
    lines = [text_of(round_lines.round_line(record)).rstrip("\n") for record in metrics]

    for heading, value in (
        ("loss", "3.2000"),
        ("up", "6.60 kB"),
        ("down", "394 kB"),
        ("time", "2.5 s"),
    ):
        assert headings.index(heading) + len(heading) == lines[0].index(value) + len(value)

    assert "codec SNR 1.4 dB" in lines[0]
    assert "codec SNR 1.4 dB at 1/48.2" in round_lines.round_line({**metrics[0], "rate": 48.2})
    assert "held-out 3.1400" in lines[1]
    assert "2/3" in lines[2]
    assert "missing [red]xml[/]" in lines[2]
    assert "epsilon 3.21 at delta 1e-05" in round_lines.round_line(
        {**metrics[0], "epsilon": 3.2101, "delta": 1e-5}
    )
    assert "3 steps of late sites missed" in round_lines.round_line(
        {**metrics[0], "missed_steps": 3}
    )


def test_setup_lines_tell_what_decides() -> None:
    assert round_lines.setup_lines({}) == []
    words = text_of("\n".join(round_lines.setup_lines({"snapshots": 24, "gate": gate([])})))
    assert "passed on 8 held-out of 24 updates" in words
    assert "relative error 0.773; the best guess without a message (zero) has 1.000" in words
    assert "2.04 kB per update, 1/64 of 131 kB" in words
    assert "cosine" not in words  # not met, and decides nothing
    assert "failed: it is no contraction" in text_of(
        "\n".join(
            round_lines.setup_lines({"snapshots": 24, "gate": gate(["it is no contraction"])})
        )
    )


def test_tables_of_a_finished_run(finished: Path) -> None:
    words = text_of(show.run_tables(read_run(finished)))
    rows = {
        line.strip().split("  ")[0]: line.split() for line in words.splitlines() if line.strip()
    }
    assert rows["base model, untuned"][-7:] == ["3.3241", "30.12", "%", "-", "-", "-", "-"]
    assert rows["local only"][-8:] == ["3.2871", "30.77", "%", "36", "B", "-", "-", "-"]
    assert rows["federated, uncompressed"][-9:] == [
        "3.2011",
        "31.99",
        "%",
        "525",
        "kB",
        "1.002",
        "1.001",
        "0.4",
        "s",
    ]
    assert rows["federated, cgfedllm + klt"][-9:] == [
        "3.2345",
        "31.55",
        "%",
        "8.80",
        "kB",
        "1/60",
        "1/2.0",
        "0.2",
        "s",
    ]
    assert rows["asyncio"][1:4] == ["3.2000", "3.1871", "3.1345"]  # base, local, federated
    assert rows["up train"][-1] == "26,400"
    assert "TimeoutError: [bold]60 s" in words
    assert "AutoPeftModelForCausalLM" in words
    assert "[bold]x[/bold] [/nothing]" in words
    assert "[⏎ x 5]" in words
    assert "\x1b" not in words


def test_tables_of_an_unfinished_run(unfinished: Path) -> None:
    words = text_of(show.run_tables(read_run(unfinished)))
    assert "Not finished: 1 of 4 rounds of fedavg" in words
    assert "3.2000" in words


def test_tables_of_sites_alone(local: Path) -> None:
    words = text_of(show.run_tables(read_run(local)))
    assert "no global model" in words
    assert words.count("local only") == 1


def test_scores_of_answers_have_a_table_that_80_columns_hold() -> None:
    run = result("fedavg", "int8", 3.25, 8000, 131200)
    for number, name in enumerate(("exact_match", "f1", "rouge_1", "rouge_2", "rouge_l")):
        run["heldout"]["final"][name] = 0.1 + 0.1 * number

    headings, *_, ours = result_tables.result_rows(run)
    cells = dict(zip(headings, ours, strict=True))
    scores = [cells[heading] for heading in ("exact match", "token F1", "ROUGE-L")]
    assert scores == ["10.00 %", "20.00 %", "50.00 %"]

    stream = io.StringIO()
    Console(file=stream, width=80).print(result_tables.result_table(run, {}))
    lines = stream.getvalue().splitlines()
    assert any(
        line.split()[-7:] == ["10.00", "%", "-", "20.00", "%", "50.00", "%"] for line in lines
    )
    assert max(map(len, lines)) <= 80
    assert "Greedy answers" not in text_of(
        result_tables.result_table(result("fedavg", "int8", 3.25, 8000, 131200), {})
    )


@pytest.mark.parametrize(("hits", "questions"), [(225, 256), (0, 40), (40, 40), (13, 40)])
def test_the_interval_of_exact_match_is_wilsons(hits: int, questions: int) -> None:
    found = binomtest(hits, questions).proportion_ci(method="wilson")
    expected = f"{100 * found.low:.1f} - {100 * found.high:.1f} %"
    assert result_tables.interval_words(hits / questions, questions) == expected
    assert result_tables.interval_words(None, questions) == "-"


@pytest.mark.parametrize(
    ("overlap", "counted", "words"),
    [
        ({"overlap": {"distinct_questions": 30, "independent_questions": 30.0}}, 30, "together."),
        (
            {"overlap": {"distinct_questions": 10, "independent_questions": 10.0}},
            10,
            "each counted once: the 30 answers are to 10 distinct questions.",
        ),
        (
            {"overlap": {"distinct_questions": 20, "independent_questions": 18.0}},
            18,
            "30 answers to 20 distinct questions. Some were asked more often, so that it is as "
            "wide as for 18 questions asked once.",
        ),
        ({"overlap": None}, 30, "it assumes that no two sites share a question"),
        ({}, 30, "together."),
    ],
)
def test_the_interval_counts_a_shared_question_once(
    overlap: dict[str, Any], counted: int, words: str
) -> None:
    run = result("fedavg", "int8", 3.25, 8000, 131200) | {"questions": 30} | overlap
    run["heldout"]["final"]["exact_match"] = 0.5
    headings, *_, ours = result_tables.result_rows(run)
    found = binomtest(counted // 2, counted).proportion_ci(method="wilson")
    cells = dict(zip(headings, ours, strict=True))
    assert cells[result_tables.INTERVAL] == f"{100 * found.low:.1f} - {100 * found.high:.1f} %"
    assert words in result_tables.answers_caption(run)


def test_the_time_on_a_line_is_that_of_one_sites_bytes() -> None:
    run = result("fedavg", "int8", 3.25, 8000, 131200)
    headings, *_, ours = result_tables.result_rows(run)
    sent = run["bytes"]
    size = (sent["up"] + sent["down"] + sent["setup"]) / run["sites"]
    cell = dict(zip(headings, ours, strict=True))["at 20 Mbit/s"]
    assert cell == human_seconds(size * 8 / 20e6)


def test_the_page_has_exact_match_first_and_other_scores_apart(
    finished: Path, tmp_path: Path
) -> None:
    run = read_run(finished)
    run["result"]["questions"] = 200
    for table in filter(None, run["result"]["heldout"].values()):
        table |= {"exact_match": 0.5, "f1": 0.6, "rouge_l": 0.7}

    write_page(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    headings = re.findall(r"<th>(.*?)</th>", page)
    assert headings[:4] == ["", "exact match", "95 % interval", "held-out loss"]
    assert headings[4:8] == ["up per site", "round ratio", "amortised", "at 20 Mbit/s"]
    assert headings[8:12] == ["", "next-token accuracy", "token F1", "ROUGE-L"]
    assert "43.1 - 56.9 %" in page


def test_a_coded_baseline_is_not_called_uncompressed() -> None:
    compare = {"local": described("local", METHODS["local"].traits, None)}
    ours = result("fedavg", "ternary", 3.25, 8000, 131200, compare=compare)
    rows = result_tables.result_rows(ours)
    assert [row[0] for row in rows[1:]] == [
        "base model, untuned",
        "local only",
        "federated, fedavg + ternary",
    ]


def test_plan_and_preview() -> None:
    planned = {
        "model": {
            "name": "embedded",
            "parameters": 1_000_000,
            "trainable": 32768,
            "targets": ["q_proj"],
        },
        "sites": [
            {"name": "xml", "records": 100, "train_records": 88, "heldout_records": 12}
            | {"train": 90, "heldout": 10, "truncated_records": 7}
        ],
        "rows": [{"what": "bytes per update", "value": "131 kB"}],
        "notes": ["[see] the notes"],
    }
    words = text_of(plan_table(planned))
    assert "1,000,000 parameters, 32,768 trainable" in words
    assert re.search(r"bytes per update\s+131 kB", words)
    assert re.search(r"xml\s+88\s+90\s+12\s+10\s+7", words)
    assert "• [see] the notes" in words
    tokens = [{"text": "a [b]\n", "loss": False}, {"text": "c", "loss": True}]
    found = {
        "site": "xml",
        "sites": ["net", "xml"],
        "form": "text",
        "train_records": 88,
        "train": 90,
        "heldout_records": 12,
        "sequences": [{"tokens": tokens, "length": 2, "label_tokens": 1}],
        "heldout": [{"tokens": tokens[:1], "length": 1, "label_tokens": 0}],
    }
    words = text_of(preview_text(found))
    assert "2 tokens, 1 with loss\na [b]⏎\nc\n" in words
    assert "88 training records in 90 sequences, 12 held-out records; --site NAME" in words
    assert "shows another site: 'net'" in " ".join(words.split())
    assert "site xml: what is green is learned (it has loss), the rest is read only" in words
    assert "Held out, which is measured and not trained: 1 tokens, 0 with loss\na [b]⏎" in words
    assert "«what stands in these marks» is learned" in text_of(preview_text(found, marks=True))


def test_page_is_whole_safe_and_the_same_twice(finished: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.html"
    second = tmp_path / "second.html"
    for path in (first, second):
        write_page(read_run(finished), path)
    page = first.read_text()
    assert first.read_bytes() == second.read_bytes()
    assert not re.search(
        r"""(src|href)\s*=\s*["']?\s*(https?:|//)|url\(\s*["']?(https?:|//)|@import""", page
    )
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count('role="img"') == 4 * 2 + 5  # loss and score over four axes, and five more
    assert "\x1b" not in page

    for number in (
        "3.2345",
        "1/60",
        "1/2.0",
        "0.439",
        "31.50",
        "26.4 kB",
        ">2.1 min<",  # of the run and its two baselines, 41.5 s each
        "83.0 s of it for baselines; ",
        "TimeoutError: [bold]60 s",
    ):
        assert number in page

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "finished",
        "first.html",
        "second.html",
    ]


def test_a_rate_that_follows_the_noise_is_drawn() -> None:
    records = [{"round": 1, "snr_db": 3.0, "rate": 8.0}, {"round": 2, "snr_db": 4.0, "rate": 9.5}]
    assert "round 2: codec SNR 4.00 dB" in figures.snr_by_round(records)
    assert "round 2: 1/9.5" in figures.rate_by_round(records)
    assert figures.rate_by_round([{"round": 1, "snr_db": 3.0}]) == ""


def test_page_of_what_is_there(unfinished: Path, local: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(read_run(unfinished), page)
    assert '<h1 class="">Not finished: 1 of 4 rounds of fedavg</h1>' in page.read_text()
    write_page(read_run(local), page)
    assert "local only" in page.read_text()

    with pytest.raises(ConfigError, match="cannot write"):
        write_page(read_run(local), tmp_path / "nowhere" / "page.html")


# -- blocks --------------------------------------------------------------------------------------

SIZES = [("layers 0 to 3", 4000), ("layers 4 to 7", 4000), ("embeddings", 1500)]
BLOCKS = {
    "blocks": [{"name": name, "values": values} for name, values in SIZES],
    "gradient_cosines": {"layers 0 to 3": 0.8123, "layers 4 to 7": 0.9, "embeddings": 0.95},
}


def visit(site: str, block: str, share: float = 1.0) -> dict[str, Any]:
    return {
        "visit": "1/0",
        "site": site,
        "block": block,
        "loss": 3.0,
        "norm": 0.7,
        "bytes": 1000,
        "share": share,
    }


def cycles(count: int) -> list[dict[str, Any]]:
    """Three sites train two blocks; in the second cycle one step is refused and one halved twice,
    one site is away."""
    found = []
    for number in range(1, count + 1):
        second = number == 2
        visits = [visit(SITES[0], "layers 0 to 3", 0.0 if second else 1.0)]
        visits += [visit(SITES[1], "embeddings", 0.25 if second else 1.0)]
        visits += [] if second else [visit(SITES[2], "layers 0 to 3")]
        pair = {
            "block": "layers 0 to 3",
            "sites": [SITES[0], SITES[2]],
            "resolved": "one after the other",
        }
        record = {
            "round": number,
            "loss": 3.3,
            "sites": 2 if second else 3,
            "seconds": 2.5,
            "visits": visits,
        }
        record |= {"bytes_up": 3000, "bytes_down": 9000, "gradient_cosine": 0.8766}
        record["conflicts"] = [] if second else [{**pair, "cosine": 0.01 * number}]
        record["missing"] = (
            [{"site": SITES[2], "task": "visit", "reason": "TimeoutError: late"}] if second else []
        )
        found.append(record)

    return found


@pytest.fixture
def cyclic(tmp_path: Path) -> Path:
    """FedCyBGD, finished, with a model folder."""
    folder = tmp_path / "cyclic"
    config(folder, "fedcybgd")
    found = result(
        "fedcybgd",
        "int8",
        3.2,
        1000,
        3000,
        setup=BLOCKS,
        adapter_sha256=None,
        model_sha256="cd" * 32,
    )
    write(folder, cycles(4), found)

    return folder


def test_a_cycle_names_what_was_refused_and_what_the_download_leaves(cyclic: Path) -> None:
    lines = [text_of(round_lines.round_line(record)) for record in read_run(cyclic)["metrics"]]
    first, second, *_ = (line.replace("\n", "") for line in lines)
    assert "gradient cosine 0.877" in first
    assert "refused" not in first
    assert "refused asyncio (layers 0 to 3)" in second
    assert "missing [red]xml[/]" in second
    many = {**cycles(1)[0], "visits": [visit(f"site {number}", "head", 0.0) for number in range(7)]}
    assert "site 4 (head) and 2 more" in text_of(round_lines.round_line(many))


def test_set_up_tells_blocks_and_cosines() -> None:
    words = text_of("\n".join(round_lines.setup_lines(BLOCKS)))
    assert (
        "3 blocks: layers 0 to 3 ... layers 4 to 7 with 4,000 values; embeddings with 1,500 values"
        in words
    )
    assert (
        "gradients through the download: layers 0 to 3 0.812, layers 4 to 7 0.900, embeddings 0.950"
        in words
    )
    assert len(round_lines.setup_lines({"blocks": BLOCKS["blocks"]})) == 1


def aggregated() -> list[dict[str, Any]]:
    """Records of a run that measured its aggregates, and a site that changed nothing."""
    found = records(1, 1, start=3.0)
    for record in found:
        number = record["round"]
        record |= {
            "aggregation_error": 0.1 * number,
            "aggregation_error_by_module": {"a.q_proj": 0.05 * number, "[b]v_proj": 0.15 * number},
            "retained_energy_by_module": {"a.q_proj": 0.9, "[b]v_proj": 0.8},
            "unchanged": ["[red]xml[/]"],
        }
    return found


def test_the_aggregation_has_a_row_for_each_module() -> None:
    table = aggregation_by_module(aggregated(), modules=8)
    assert table is not None
    assert table.headings[1:3] == ["error, round 1", "error, round 4"]
    assert table.rows == [
        ["[b]v_proj", "15.00 %", "60.00 %", "80.00 %"],
        ["a.q_proj", "5.00 %", "20.00 %", "90.00 %"],
    ]
    short = aggregation_by_module(aggregated(), modules=1)
    assert short is not None
    assert len(short.rows) == 1
    assert "1 modules are not shown" in short.words
    assert aggregation_by_module(records(1, 1, start=3.0), modules=8) is None


def test_a_round_line_names_the_error_and_the_site_that_changed_nothing() -> None:
    line = round_lines.round_line(aggregated()[1])
    assert "aggregation error 20 %" in line
    assert r"unchanged \[red]xml" in line


def test_fairness_has_the_worst_site_and_the_spread_of_each_measured_round() -> None:
    found = records(1, 1, start=3.0)
    for record in found[1:]:
        record |= {
            "heldout_loss": 3.0,
            "heldout_worst_site": "[b]xml",
            "heldout_worst_loss": 3.0 + record["round"],
            "heldout_spread": 2.0,
        }
    table = fairness_by_round(found, rounds=1)
    assert table is not None
    assert table.rows == [
        ["2", "3.0000", "[b]xml", "5.0000", "2.0000"],
        ["4", "3.0000", "[b]xml", "7.0000", "2.0000"],
    ]
    assert "1 rounds are not shown" in table.words
    assert fairness_by_round(found[:1], rounds=9) is None
    assert r"held-out 3.0000, worst \[b]xml 5.0000" in round_lines.round_line(found[1])


def test_the_block_schedule_has_a_cell_for_every_site_and_cycle() -> None:
    schedule = block_tables.block_schedule(cycles(3), cycles=5, sites=5)
    assert schedule is not None
    assert schedule.headings == ["site", "1", "2", "3"]
    assert schedule.rows == [
        [SITES[2], "0-3", "-", "0-3"],
        [SITES[0], "0-3", "0-3 refused", "0-3"],
        [SITES[1], "embeddings", "embeddings (1/4)", "embeddings"],
    ]
    assert "8 visits: 1 refused, 1 scaled" in schedule.words
    assert block_tables.block_schedule(records(1, 1, start=3.0), cycles=5, sites=5) is None


def test_of_a_long_schedule_the_last_cycles_are_shown_and_all_are_counted() -> None:
    schedule = block_tables.block_schedule(cycles(40), cycles=2, sites=1)
    assert schedule is not None
    assert schedule.headings == ["site", "39", "40"]
    assert len(schedule.rows) == 1
    assert "119 visits: 1 refused, 1 scaled" in schedule.words
    assert schedule.words.endswith("Not shown: the first 38 cycles and 2 sites.")


def test_a_place_with_all_data_trains_many_blocks_in_a_cycle() -> None:
    visits = [visit("pooled", f"layer {number}") for number in range(32)]
    schedule = block_tables.block_schedule(
        [{"round": 1, "visits": visits[:4]}, {"round": 2, "visits": visits}], cycles=5, sites=5
    )
    assert schedule is not None
    assert schedule.rows == [["pooled", "0, 1, 2, 3", "0, 1, ..., 31"]]
    assert (
        result_tables.run_name(result("central_cyclic", None, 3.2, 0, 0))
        == "central, block after block"
    )


def test_the_conflict_log_has_the_last_pairs_and_the_mean_of_all() -> None:
    log = block_tables.conflict_log(cycles(5), last=2)
    assert log is not None
    sites = f"{SITES[0]} and {SITES[2]}"
    assert log.rows == [
        ["4", "layers 0 to 3", sites, "one after the other", "0.040"],
        ["5", "layers 0 to 3", sites, "one after the other", "0.050"],
    ]
    assert log.words.startswith("4 times")
    assert "mean cosine of what they sent 0.033. Shown: the last 2." in log.words
    assert block_tables.conflict_log(records(1, 1, start=3.0), last=2) is None


def test_tables_of_a_run_by_blocks(cyclic: Path) -> None:
    words = text_of(show.run_tables(read_run(cyclic)))
    rows = {
        line.strip().split("  ")[0]: line.split() for line in words.splitlines() if line.strip()
    }
    assert "Block schedule, by cycle" in words
    assert "0-3 refused" in words
    assert rows["4"][-1] == "0.040"
    assert "3 times two sites" in words
    assert "transformers.AutoModelForCausalLM" in words
    assert "dapter" not in words


def test_page_of_a_run_by_blocks(cyclic: Path, tmp_path: Path) -> None:
    write_page(read_run(cyclic), tmp_path / "page.html")
    page = tmp_path.joinpath("page.html").read_text()
    for heading in ("Blocks", "Block schedule, by cycle", "Conflict log", "Missing replies"):
        assert page.count(f"<h2>{heading}</h2>") == 1
    assert "email, cycle 2</tspan>" in page
    assert re.search(r"layers 0 to 3, refused, loss 3\.0000</tspan>", page)
    assert 'class="bad"' in page
    assert re.search(r">layers 0 to 3</td><td[^>]*>4,000</td><td[^>]*>0.812</td>", page)
    assert "[red]xml[/]" in page
    assert "cd" * 32 in page


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "[" * 100_000),
        ("result.json", "[]"),
        ("result.json", "{}"),
        ("refused.json", "[1]"),
        ("metrics.jsonl", '{"round": 1, "missing": 3}'),
        ("metrics.jsonl", None),
    ],
)
def test_a_damaged_folder_is_told_without_a_traceback(
    name: str, content: str | None, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / name).unlink(missing_ok=True)

    if content is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_text(content)

    told = f"{name} (is damaged|cannot be read)|run is damaged"
    with pytest.raises(CheckpointError, match=told), damage_reported(folder):
        text_of(show.run_tables(read_run(folder)))


@pytest.mark.parametrize("place", [".", "compare/local"])
def test_a_result_of_an_older_version_is_said_to_be_one(place: str, finished: Path) -> None:
    path = finished / place / "result.json"
    content = json.loads(path.read_text())
    del content["baseline"]
    path.write_text(json.dumps(content))
    words = r"result\.json was written by an older version of Fluvial, .* no 'baseline'"
    with pytest.raises(CheckpointError, match=words):
        read_run(finished)


@pytest.mark.parametrize(("method", "drawn"), [("fedavg", True), ("local", False)])
def test_an_unfinished_run_is_drawn_by_bytes_if_it_sends_updates(
    method: str, drawn: bool, tmp_path: Path
) -> None:
    config(tmp_path / "run", method)
    write(tmp_path / "run", records(131300, 131200, start=3.3)[:2], None)
    write_page(read_run(tmp_path / "run"), tmp_path / "page.html")
    assert ("By all bytes" in (tmp_path / "page.html").read_text()) == drawn


def test_a_run_is_shown_without_torch() -> None:
    code = (
        "import fluvial.report.show, fluvial.report.page, fluvial.storage.run_files, sys; "
        "print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_no_text_of_a_folder_drives_the_terminal(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    evil = "\x1b[2J\x07[/nope]"
    first = json.loads(lines[0]) | {"missing": [{"site": evil, "task": evil, "reason": evil}]}
    (folder / "metrics.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]))
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    console.print(show.run_tables(read_run(folder)))
    written = cast(io.StringIO, console.file).getvalue()
    assert "[2J" in written
    assert "\x1b[2J" not in written
    assert "\x07" not in written


def test_a_page_is_not_written_over_a_folder(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; choose another --html"):
        write_page(read_run(finished), tmp_path)
