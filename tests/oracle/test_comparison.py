"""The figures of a comparison are those that numpy and scipy make of its run folders, and its runs
are those of `fluvial run`."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fluvial.cli.comparison_progress import ComparisonProgress
from fluvial.report.comparison_tables import cost_rows, measure_rows
from fluvial.runs.comparison.child import Message, RunFailedError, in_own_process
from fluvial.runs.comparison.contenders import Comparison, Contender
from fluvial.runs.comparison.execute import execute_comparison
from fluvial.runs.comparison.gathering import gather
from fluvial.runs.comparison.result import Compared
from fluvial.runs.comparison.statistics import holm, interval, p_value
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.run import Event
from tests.support.comparison import compare_here, launch_here
from tests.support.runs import run_table, small_table, write_toml

SEEDS = (0, 1, 2)
CODECS: dict[str, dict[str, Any]] = {
    "exact": {"name": "identity"},
    "int8": {"name": "int8"},
    "coarse": {"name": "trellis", "rate": 64},
}
EXACTNESS = 1e-12
"""Relative difference of sums in another order."""


def table_of(tiny_model: Path, three_sites: Path, **changes: Any) -> dict[str, Any]:
    table = small_table(tiny_model, three_sites) | {
        "rounds": 1,
        "train": {"learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 2},
        "evaluate": {"sample_tokens": 1},
    }
    return table | changes


def contender(name: str, table: dict[str, Any], seeds: tuple[int, ...] = SEEDS) -> Contender:
    return Contender(name, {seed: parse(table | {"seed": seed}, name) for seed in seeds})


@pytest.fixture(scope="module")
def made(
    tiny_model: Path, three_sites: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Comparison, Path, Compared]:
    """Three codecs and the central baseline on three seeds: what was compared, where, and the
    figures."""
    tables = {
        name: table_of(tiny_model, three_sites, codec=codec) for name, codec in CODECS.items()
    }
    tables["central"] = table_of(tiny_model, three_sites, method={"name": "central"})
    contenders = tuple(contender(name, table) for name, table in tables.items())
    comparison = Comparison(contenders, SEEDS, "exact")
    out = tmp_path_factory.mktemp("compare")
    return comparison, out, compare_here(comparison, out)


def result_of(out: Path, name: str, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / name / f"seed-{seed}" / "result.json").read_text())
    return found


def site_values(out: Path, name: str, measure: str, seeds: tuple[int, ...] = SEEDS) -> Any:
    """The measure of every seed (rows) and site (columns)."""
    rows = [result_of(out, name, seed)["heldout_by_site"] for seed in seeds]
    return np.array([[row[site]["final"][measure] for site in sorted(row)] for row in rows])


@pytest.mark.parametrize("measure", ["loss", "accuracy"])
def test_scores_and_tests_over_seeds(made: tuple[Comparison, Path, Compared], measure: str) -> None:
    _, out, compared = made
    base = site_values(out, "exact", measure)
    raw = {}

    for name in CODECS:
        values = site_values(out, name, measure)
        means = values.mean(axis=1)
        low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
        score = compared.contender(name).scores[measure]
        assert [score.mean, score.low, score.high] == pytest.approx(
            [means.mean(), low, high], rel=EXACTNESS
        )
        assert list(score.by_seed.values()) == pytest.approx(list(means), rel=EXACTNESS)
        if name == "exact":
            continue

        found = compared.contender(name).differences[measure]
        assert (found.over, found.pairs) == ("seeds", 3)
        assert found.mean == pytest.approx((values - base).mean(), rel=1e-9)
        gains = (values - base) * (1 if measure == "loss" else -1) < 0
        assert (found.better, found.cells) == (gains.sum(), 9)
        if found.p is not None:
            tested = stats.ttest_rel(means, base.mean(axis=1))
            # The difference of two means against the mean of differences, which is far smaller.
            assert found.p == pytest.approx(tested.pvalue, rel=1e-6)
            assert (found.low, found.high) == pytest.approx(
                tuple(tested.confidence_interval(0.95)), rel=1e-6
            )
            raw[name] = found.p

    assert measure != "loss" or len(raw) == 2
    for name, p in raw.items():
        pooled = compared.contender("central").differences.get(measure)
        assert pooled is None
        larger = [other for other in raw.values() if other <= p]
        steps = [min(1, (len(raw) - place) * each) for place, each in enumerate(sorted(larger))]
        assert compared.contender(name).differences[measure].p_holm == max(steps)


def test_a_central_run_is_compared_over_all_sites_together(
    made: tuple[Comparison, Path, Compared],
) -> None:
    _, out, compared = made
    central = compared.contender("central")
    assert "loss" not in central.scores
    pairs = [
        [
            result_of(out, name, seed)["heldout_pooled"]["final"]["loss"]
            for name in ("central", "exact")
        ]
        for seed in SEEDS
    ]
    ours, theirs = zip(*pairs, strict=True)
    found = central.differences["loss_pooled"]
    assert found.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-6)
    assert (found.pairs, found.cells) == (3, 3)


def of_one_seed(comparison: Comparison) -> Comparison:
    contenders = [Contender(each.name, {1: each.configs[1]}) for each in comparison.contenders]
    return Comparison(tuple(contenders), (1,), "exact")


def test_sites_that_share_a_heldout_set_are_one_observation(
    made: tuple[Comparison, Path, Compared], tmp_path: Path
) -> None:
    comparison, out, _ = made
    for name in (*CODECS, "central"):
        result = result_of(out, name, 1)
        rows = result["heldout_by_site"] or {}
        one = next(iter(rows.values()), None)
        shared = {"overlap": {"one_set": True}, "heldout_by_site": dict.fromkeys(rows, one)}
        folder = tmp_path / name / "seed-1"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result | shared))
    compared = gather(of_one_seed(comparison), tmp_path)
    found = compared.contender("coarse").differences["loss"]
    assert (found.low, found.high, found.p, found.pairs, found.cells) == (None, None, None, 1, 1)
    assert found.mean != 0
    assert any("all sites share one held-out set" in note for note in compared.notes)


def test_one_seed_is_tested_over_sites(made: tuple[Comparison, Path, Compared]) -> None:
    comparison, out, _ = made
    compared = gather(of_one_seed(comparison), out)
    values, base = (site_values(out, name, "loss", (1,))[0] for name in ("coarse", "exact"))
    found = compared.contender("coarse").differences["loss"]
    tested = stats.ttest_rel(values, base)
    assert (found.over, found.pairs) == ("sites", 3)
    assert found.p == pytest.approx(tested.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(tested.confidence_interval(0.95)))
    assert compared.contender("coarse").scores["loss"].low is None
    pooled = compared.contender("central").differences["loss_pooled"]
    assert (pooled.over, pooled.p, pooled.low) == (None, None, None)


def test_costs_are_those_of_the_results(made: tuple[Comparison, Path, Compared]) -> None:
    _, out, compared = made
    for name in (*CODECS, "central"):
        results = [result_of(out, name, seed) for seed in SEEDS]
        found = compared.contender(name)
        sizes = [each["bytes"] for each in results]
        assert found.bytes_total == np.mean([s["up"] + s["down"] + s["setup"] for s in sizes])
        assert found.up_bytes_per_site == pytest.approx(
            np.mean([s["up"] + s["setup_up"] for s in sizes]) / results[0]["sites"]
        )
        assert found.wall_s == pytest.approx(np.mean([each["wall_s"] for each in results]))
        assert found.peak_rss_bytes == max(each["peak_rss_bytes"] for each in results)
        if name != "central":
            ratios = [each["amortised_ratio"] for each in results]
            assert found.amortised_ratio == pytest.approx(np.mean(ratios))

    steps = {each.name: each.optimizer_steps for each in compared.contenders}
    assert steps == dict.fromkeys((*CODECS, "central"), 6)  # 2 of three sites, in one round


def test_the_tables_show_these_figures(made: tuple[Comparison, Path, Compared]) -> None:
    _, _, compared = made
    headings, *rows = measure_rows(compared, "loss")
    assert headings[:3] == ["", "held-out loss", "less the baseline"]
    row = next(row for row in rows if row[0] == "coarse")
    score = compared.contender("coarse").scores["loss"]
    found = compared.contender("coarse").differences["loss"]
    assert score.high is not None
    assert row[1] == f"{score.mean:.4f} ±{score.high - score.mean:.4f}"
    assert row[2] == f"{found.mean:+.4f}"
    assert row[4] == f"{found.better}/9"
    assert [row[0] for row in cost_rows(compared)[1:]] == [*CODECS, "central"]
    assert compared.verdict.startswith("Against exact: ")
    assert Compared.model_validate_json(compared.model_dump_json()) == compared


def test_statistics_without_a_spread() -> None:
    assert interval([2.0]) == (2.0, None, None)
    assert interval([2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert p_value([0.0, 0.0]) is None
    assert p_value([1.0]) is None
    # The example of R's p.adjust with method "holm".
    assert holm({"a": 0.01, "b": 0.02, "c": 0.03, "d": None}) == {
        "a": 0.03,
        "b": 0.04,
        "c": 0.04,
        "d": None,
    }


def test_a_finished_comparison_makes_nothing_again(
    made: tuple[Comparison, Path, Compared],
) -> None:
    comparison, out, compared = made

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a finished run was launched")

    steps = list(execute_comparison(comparison, out, launch=never))
    assert {step.kind for step in steps} == {"finished"}
    assert gather(comparison, out) == compared


def test_equal_baselines_are_trained_once_for_each_seed(
    tiny_model: Path, three_sites: Path, tmp_path: Path
) -> None:
    """Contenders differ in the codec, which a baseline has not; one with other steps shares none.
    The run that borrowed a baseline is the run alone."""
    changes: dict[str, dict[str, Any]] = {
        "a": {"codec": {"name": "int8"}},
        "b": {"codec": {"name": "identity"}},
        "c": {"codec": {"name": "int8"}, "train": {"max_steps": 2}},
    }
    base = table_of(tiny_model, three_sites, rounds=1) | {"compare": ["local"]}
    base["method"] = {"name": "cgfedllm", "tgap": {"source": "none"}}
    tables = {name: base | changed for name, changed in changes.items()}
    comparison = Comparison(
        tuple(contender(name, table, (0,)) for name, table in tables.items()), (0,), "a"
    )
    trained = [
        step.contender
        for step in execute_comparison(comparison, tmp_path, launch=launch_here)
        if isinstance(step.message, Event)
        and (step.message.method, step.message.kind) == ("local", "round")
    ]
    assert trained == ["a", "c"]
    alone = run_table(tables["b"], tmp_path / "alone")
    made = json.loads((tmp_path / "b" / "seed-0" / "result.json").read_text())
    assert made["adapter_sha256"] == alone["adapter_sha256"]
    assert made["heldout"] == alone["heldout"]


@pytest.mark.slow
def test_a_run_in_its_own_process_goes_on_and_is_the_run_itself(
    tiny_model: Path, three_sites: Path, tmp_path: Path
) -> None:
    """Stopped after its first round, and gone on with: the weights are those of `execute`."""
    table = table_of(tiny_model, three_sites, rounds=2, seed=3)
    straight = run_table(table, tmp_path / "straight")
    config = parse(table, "test")

    messages = in_own_process(config, tmp_path / "own", resume=False)
    for message in messages:
        if isinstance(message, Event) and message.kind == "round":
            break
    messages.close()  # type: ignore[attr-defined]

    *_, last = in_own_process(config, tmp_path / "own", resume=True)
    assert isinstance(last, Event)
    assert last.values["adapter_sha256"] == straight["adapter_sha256"]
    assert last.values["heldout"] == straight["heldout"]


@pytest.mark.slow
def test_a_killed_comparison_goes_on(tiny_model: Path, three_sites: Path, tmp_path: Path) -> None:
    """Killed in its first run, with no chance to say anything: its processes end, the same command
    goes on, and every run has the weights of `fluvial run`."""
    codecs = {name: CODECS[name] for name in ("exact", "int8")}
    tables = {
        name: table_of(tiny_model, three_sites, rounds=3, codec=codec)
        for name, codec in codecs.items()
    }
    files = [str(write_toml(tmp_path / f"{name}.toml", table)) for name, table in tables.items()]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fluvial.cli", "compare", *files, "--out", str(out)]
    command += ["--seeds", "0", "1", "--format", "json"]
    first = out / "exact" / "seed-0" / "checkpoints"

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 300
    while not list(first.glob("round-000001*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the comparison never came so far"
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (out / "exact" / "seed-0" / "result.json").exists()

    done = subprocess.run(command, capture_output=True, text=True, check=True)
    compared = Compared.model_validate_json(done.stdout)
    assert compared == Compared.model_validate_json((out / "compare.json").read_text())
    assert compared.complete
    assert "<h1" in (out / "compare.html").read_text()
    for each in compared.contenders:
        for run in each.runs:
            straight = run_table(
                tables[each.name] | {"seed": run.seed}, tmp_path / each.name / str(run.seed)
            )
            assert run.weights_sha256 == straight["adapter_sha256"]


def test_a_run_that_fails_does_not_stop_the_others(
    tiny_model: Path, three_sites: Path, tmp_path: Path
) -> None:
    contenders = tuple(
        contender(name, table_of(tiny_model, three_sites), (0,)) for name in ("a", "b")
    )
    comparison = Comparison(contenders, (0,), "b")

    def launch(config: RunConfig, folder: Path, **further: Any) -> Iterator[Message]:
        if "a" in folder.parts:
            raise RunFailedError("GateError: refused")
        return launch_here(config, folder, **further)

    steps = list(execute_comparison(comparison, tmp_path, launch=launch))
    ends = [(step.contender, step.kind, step.reason) for step in steps if step.kind != "message"]
    assert ends == [("a", "failed", "GateError: refused"), ("b", "finished", "")]
    compared = gather(comparison, tmp_path, {("a", 0): "GateError: refused"})
    assert compared.contender("a").runs[0].failed == "GateError: refused"
    assert compared.verdict.endswith("1 of 2 runs not finished")
    progress = ComparisonProgress(comparison, quiet=False)
    for step in steps:
        progress.show(step)
    assert progress.bar.tasks[0].completed == progress.total == 2
