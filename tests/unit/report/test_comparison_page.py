"""The page of a comparison: its tables and curves, and nothing in a name or a message runs."""

import math
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from fluvial import __version__
from fluvial.report.comparison_figures import mean_series
from fluvial.report.comparison_page import comparison_page
from fluvial.report.comparison_tables import (
    colour,
    comparison_tables,
    cost_rows,
    equal_words,
    measure_rows,
    measures_caption,
    told_apart,
)
from fluvial.report.figures import Run
from fluvial.runs.comparison.judging import verdict_line
from fluvial.runs.comparison.result import (
    Compared,
    ComparedContender,
    ComparedRun,
    Difference,
    Score,
)
from fluvial.runs.comparison.statistics import interval
from tests.unit.report.test_page_in_browser import CHROMIUM, opened, served
from tests.unit.report.test_show import SCRIPT, records, result, text_of, write

__all__ = ["served"]
LOSSES = {"fedavg": (3.2, 3.3), "cgfedllm": (3.1, 3.16)}


def difference(mean: float, p: float | None = 0.0123) -> Difference:
    return Difference(
        mean=mean,
        low=mean - 0.05,
        high=mean + 0.05,
        over="seeds",
        pairs=2,
        p=p,
        p_holm=p,
        better=5,
        cells=6,
    )


def contender(name: str, folder: str, losses: tuple[float, ...], **more: Any) -> ComparedContender:
    mean, low, high = interval(losses) if losses else (math.nan, None, None)
    values: dict[str, Any] = {
        "name": name,
        "method": "fedavg",
        "codec": "int8",
        "pooled": False,
        "trained_parameters": 32768,
        "optimizer_steps": 96.0,
        "runs": [
            ComparedRun(
                seed=seed,
                folder=f"{folder}/seed-{seed}",
                finished=True,
                failed=None,
                weights_sha256="0" * 64,
                wall_s=2.5,
                peak_rss_bytes=5 * 10**8,
            )
            for seed in range(len(losses))
        ],
        "scores": {"loss": Score(mean=mean, low=low, high=high, by_seed=dict(enumerate(losses)))},
        "differences": {},
        "up_bytes_per_site": 2200.0,
        "down_bytes_per_site": 131200.0,
        "bytes_total": 3 * 133400.0,
        "amortised_ratio": 0.25,
        "wall_s": 2.5,
        "peak_rss_bytes": 5 * 10**8,
    }
    return ComparedContender(**(values | more))


def compared(*contenders: ComparedContender, **more: Any) -> Compared:
    values = {
        "fluvial": __version__,
        "seeds": (0, 1),
        "baseline": contenders[0].name,
        "verdict": "",
        "measures": ("loss",),
        "notes": (),
        "differing": {"codec.name": {each.name: "int8" for each in contenders}},
        "contenders": contenders,
    }
    made = Compared.model_validate(values | more)
    return made.model_copy(update={"verdict": verdict_line(made)})


@pytest.fixture
def two(tmp_path: Path) -> Compared:
    """Two contenders on two seeds, with the folders of their runs."""
    for number, (name, losses) in enumerate(LOSSES.items()):
        for seed, loss in enumerate(losses):
            rows = records(2200, 131200, start=3.4 - 0.1 * number + 0.02 * seed)
            write(tmp_path / name / f"seed-{seed}", rows, result(name, "int8", loss, 2200, 131200))
    base = contender("fedavg", "fedavg", LOSSES["fedavg"])
    ours = contender(
        "cgfedllm", "cgfedllm", LOSSES["cgfedllm"], differences={"loss": difference(-0.12)}
    )
    return compared(base, ours)


def test_the_page_has_the_verdict_the_tables_and_the_curves(two: Compared, tmp_path: Path) -> None:
    page = comparison_page(two, tmp_path).decode()
    assert f'<h1 class="yes">{two.verdict}</h1>' in page
    for rows in (measure_rows(two, "loss"), cost_rows(two)):
        for row in rows:
            assert all(f">{cell}</t" in page for cell in row)
    assert page.count("fill-opacity:.14") == 4 * 2 * 2  # axes, measures, contenders
    assert "cgfedllm\nround 4: training loss 2.9100" in re.sub(r"</tspan><tspan[^>]*>", "\n", page)
    assert "refresh" not in page


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_opens_whole(
    width: int, two: Compared, served: tuple[Path, str], tmp_path: Path
) -> None:
    found, console = opened(comparison_page(two, tmp_path), width, served, tmp_path / "profile")
    assert found["wide"] <= width
    assert found["requests"] == []
    assert {"Comparison", "Costs", "Loss and score", "Runs"} <= {*found["headings"]}
    assert found["charts"]
    assert all(chart["tips"] and not chart["outside"] for chart in found["charts"]), found["charts"]
    assert found["hidden"]
    assert found["shown"] == 1
    assert console == []


def test_an_open_page_follows_the_comparison(two: Compared, tmp_path: Path) -> None:
    unmade = two.contenders[1].runs[1].model_copy(update={"finished": False})
    runs = (two.contenders[1].runs[0], unmade)
    ours = two.contenders[1].model_copy(update={"runs": runs})
    page = comparison_page(compared(two.contenders[0], ours), tmp_path).decode()
    assert '<meta http-equiv="refresh"' in page
    assert "1 of 4 runs not finished" in page


def test_nothing_that_a_name_or_a_failure_says_runs(two: Compared, tmp_path: Path) -> None:
    failed = two.contenders[1].runs[1].model_copy(update={"finished": False, "failed": SCRIPT})
    ours = two.contenders[1].model_copy(
        update={"name": SCRIPT, "runs": (two.contenders[1].runs[0], failed)}
    )
    page = comparison_page(compared(two.contenders[0], ours), tmp_path).decode()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 2
    assert "Failed runs" in page


def test_a_measure_that_is_equal_at_all_has_a_line_in_place_of_a_table(tmp_path: Path) -> None:
    zero = difference(0.0, None).model_copy(update={"low": 0.0, "high": 0.0, "better": 0})
    crossed = zero.model_copy(update={"better": 3})  # two cells that cancel
    score = Score(mean=0.0, low=0.0, high=0.0, by_seed={0: 0.0, 1: 0.0})
    losses = Score(mean=3.2, low=None, high=None, by_seed={0: 3.2, 1: 3.2})
    scores = {"loss": losses, "exact_match": score, "f1": score}
    differences = {"loss": zero, "exact_match": zero, "f1": crossed}
    both = compared(
        contender("a", "a", (3.2, 3.2), scores=scores),
        contender("b", "b", (3.2, 3.2), scores=scores, differences=differences),
        measures=("loss", "exact_match", "f1"),
    )
    assert told_apart(both) == ("loss", "f1")
    line = "Equal at all contenders, without a table: exact match 0.00 %."
    assert line in text_of(comparison_tables(both))
    page = comparison_page(both, tmp_path).decode()
    assert line in page
    assert "<th>exact match</th>" not in page
    assert "<th>token F1</th>" in page


def test_method_and_codec_stand_beside_names_that_do_not_say_them(two: Compared) -> None:
    first = two.contenders[0].model_copy(update={"name": "fedavg-int8"})
    both = compared(first, two.contenders[1])
    assert "Method and codec: cgfedllm: fedavg + int8." in text_of(comparison_tables(both))


def test_the_caption_says_why_all_cells_may_be_better_and_nothing_be_shown() -> None:
    base = contender("a", "a", (3.2, 3.3))
    words = "interval reaches 12.7 standard errors to each side"
    for p, better, said in ((0.4, 6, True), (0.4, 5, False), (0.01, 6, False)):
        found = difference(-0.12, p).model_copy(update={"better": better})
        ours = contender("b", "b", (3.1, 3.2), differences={"loss": found})
        assert (words in measures_caption(compared(base, ours))) == said


@pytest.mark.parametrize("score", [0.0, 0.1])
def test_the_caption_says_why_rouge_2_is_0(score: float) -> None:
    found = Score(mean=score, low=None, high=None, by_seed={0: score})
    base = contender("a", "a", (3.2,), scores={"rouge_2": found})
    said = "ROUGE-2 counts pairs of words" in measures_caption(compared(base))
    assert said == (score == 0)


def test_the_caption_counts_what_is_finished() -> None:
    """While runs are missing, as after one that failed: neither their seeds nor their tests."""
    base = contender("a", "a", (3.2, 3.3))
    over_sites = difference(-0.1).model_copy(update={"over": "sites", "pairs": 3})
    ours = contender("b", "b", (3.1, 3.2), differences={"loss": difference(-0.12)})
    late = contender("c", "c", (3.1,), differences={"loss": over_sites})
    failed = contender("d", "d", (), scores={})
    words = measures_caption(compared(base, ours, late, failed))
    assert "Mean over 1 to 2 seeds" in words
    assert "paired t over 2 seeds (b); paired t over 3 sites (c)" in words
    assert "corrected for 2 contenders (Holm)" in words
    assert "tells nothing about other seeds" in words
    assert "corrected" not in measures_caption(compared(base, ours, failed))
    assert compared(contender("a", "a", (3.2,))).verdict == "a: held-out loss 3.2000, one seed"


def test_a_curve_is_the_mean_of_its_seeds() -> None:
    runs = [Run("a", "own", records(10, 20, start=start), None, True) for start in (3.0, 3.1, 3.5)]
    series = mean_series(runs, "both", "loss")
    losses = [[run.metrics[number]["loss"] for run in runs] for number in range(4)]
    assert [y for _, y in series.line] == [fmean(values) for values in losses]
    assert [(low, high) for _, low, high in series.band] == [
        (min(values), max(values)) for values in losses
    ]
    assert [x for x, _ in series.line] == [90.0, 180.0, 270.0, 360.0]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (difference(-0.12), "b is better than a: held-out loss 0.1200 nats lower"),
        (difference(0.12), "b is worse than a: held-out loss 0.1200 nats higher"),
        (difference(-0.12, 0.05), "No difference shown between b and a"),
        (difference(0.0, None), "b and a have equal losses"),
        (
            difference(-0.12, None).model_copy(update={"over": None, "low": None, "high": None}),
            "b and a are not tested: held-out loss 0.1200 nats lower (no test, one pair only)",
        ),
    ],
)
def test_the_verdict_on_two(found: Difference, words: str) -> None:
    base = contender("a", "a", (3.2, 3.3))
    ours = contender("b", "b", (3.1, 3.2), differences={"loss": found}, bytes_total=20010.0)
    line = compared(base, ours).verdict
    assert line.startswith(words)
    assert line.endswith("b at 1/20 of the bytes of a")
    ours = ours.model_copy(update={"bytes_total": 9.099 * 400200.0})
    assert compared(base, ours).verdict.endswith("b at 9.1 times the bytes of a")


def test_a_verdict_that_exact_match_contradicts_is_no_success() -> None:
    base = contender("a", "a", (3.2, 3.3))
    for points, said, shade in (
        (
            0.05,
            "exact match 5.0 points higher (95 % interval +0.0 to +10.0, paired t over 2",
            "green",
        ),
        (
            -0.05,
            "exact match 5.0 points lower (95 % interval -10.0 to +0.0, paired t over 2",
            "yellow",
        ),
    ):
        found = {"loss": difference(-0.12), "exact_match": difference(points)}
        both = compared(base, contender("b", "b", (3.1, 3.2), differences=found))
        lead = "b is better than a" if points > 0 else "Losses and exact match of b and a disagree"
        interval_of_loss = "95 % interval -0.1700 to -0.0700, paired t over 2 seeds, p = "
        assert both.verdict.startswith(
            f"{lead}: held-out loss 0.1200 nats lower ({interval_of_loss}"
        )
        assert said in both.verdict
        assert "not shown" not in both.verdict
        assert colour(both) == shade
        other = contender("c", "c", (3.1, 3.2), differences={"loss": difference(-0.12)})
        third = compared(base, *both.contenders[1:], other)
        assert ("losses and exact match disagree: b" in third.verdict) == (points < 0)


def test_an_interval_of_exact_match_with_0_shows_nothing() -> None:
    found = {"loss": difference(0.12), "exact_match": difference(-0.02, 0.19)}
    both = compared(
        contender("a", "a", (3.2, 3.3)), contender("b", "b", (3.1, 3.2), differences=found)
    )
    words = "exact match 2.0 points lower (95 % interval -7.0 to +3.0, paired t over 2 seeds, "
    assert f"{words}p = 0.19, not shown)" in both.verdict


def test_scores_with_the_values_of_another_have_no_table() -> None:
    found = {"loss": difference(0.12), "exact_match": difference(-0.02), "f1": difference(-0.02)}
    base = contender("a", "a", (3.2, 3.3))
    both = compared(base, contender("b", "b", (3.1, 3.2), differences=found))
    both = both.model_copy(update={"measures": ("loss", "exact_match", "f1")})
    assert told_apart(both) == ("loss", "exact_match")
    assert equal_words(both) == "Equal to exact match in all rows: token F1."
    assert measure_rows(both, "exact_match")[2][2] == "-2.00"
    other = contender("b", "b", (3.1, 3.2), differences=found | {"f1": difference(-0.03)})
    apart = compared(base, other).model_copy(update={"measures": ("loss", "exact_match", "f1")})
    assert told_apart(apart) == ("loss", "exact_match", "f1")


def test_the_verdict_on_several_and_on_one() -> None:
    base = contender("a", "a", (3.2, 3.3))
    others = [
        contender(name, name, (loss, loss), differences={"loss": difference(loss - 3.25, p)})
        for name, loss, p in (("b", 3.0, 0.001), ("c", 3.4, 0.002), ("d", 3.2, 0.4))
    ]
    assert compared(base, *others).verdict == (
        "Against a: better: b; no difference shown: d; worse: c; lowest held-out loss: b (3.0000)"
    )
    _, low, high = interval((3.2, 3.3))
    assert compared(base).verdict == (
        f"a: held-out loss 3.2500, 95 % interval {low:.4f} to {high:.4f}, 2 seeds"
    )
