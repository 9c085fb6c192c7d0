"""The sentences that say whether a run helped, from made-up losses whose answer is known by
hand."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fluvial.methods import METHODS
from fluvial.report import result_tables, show
from fluvial.report.page import write_page
from fluvial.runs.result import described
from fluvial.runs.site_comparison import correlation_of, losses, mean_interval
from fluvial.runs.verdict import judge
from fluvial.storage.run_files import read_run
from fluvial.training.wilson import correlation, share_difference
from tests.support.runs import run_table
from tests.unit.report.test_show import config, gate, records, result, text_of, write

SITES = tuple("abcdefgh")


def made(final: Sequence[float | None], base: float | None = 3.0, **more: Any) -> dict[str, Any]:
    """A result with these losses, one a site."""
    rows = {
        site: {"base": {"loss": base, "accuracy": 0.3}, "final": {"loss": loss, "accuracy": 0.3}}
        for site, loss in zip(SITES, final, strict=False)
    }
    return {
        "method": "cgfedllm",
        "codec": "int8",
        "baseline": None,
        "sites": len(rows),
        "heldout_by_site": rows,
        **more,
    }


def test_a_run_that_helped_at_most_sites() -> None:
    ours = made([2.90, 2.90, 2.90, 2.94])
    local = made([3.00, 3.02, 3.01, 2.93])
    verdict = judge(ours, {"local": local, "fedavg": made([2.90, 2.91, 2.90, 2.89])})
    assert verdict.helped == "partly"
    assert verdict.local is not None
    assert (verdict.local.sites, verdict.local.better) == (4, 3)
    assert verdict.local.difference == pytest.approx((-0.10 - 0.12 - 0.11 + 0.01) / 4)
    assert verdict.sentences() == [
        "No clear difference from local training, with no clear difference from the uncompressed "
        "run.",
        "Loss against local training: 0.0800 nats lower, better at 3 of 4 sites (95 % interval "
        "-0.1764 to +0.0164).",
        "Against the uncompressed run: 0.0100 nats higher, better at 1 of 4 sites (95 % interval "
        "-0.0331 to +0.0531).",
        "Against the base model: 0.0900 nats lower, better at 4 of 4 sites.",
        "No lower loss than local training at 'd'.",
    ]
    assert verdict.to_json()["line"] == verdict.line() == " ".join(verdict.sentences())
    assert json.loads(json.dumps(verdict.to_json())) == verdict.to_json()
    clear = judge(ours, {"local": made([3.00, 3.02, 3.01, 3.03])})
    assert clear.helped == "yes"
    assert clear.line().startswith("Helped against local training. Loss against local training: ")


def test_an_interval_is_students_t_over_the_sites() -> None:
    """Gains of 1, 2 and 3: mean 2, standard error 1 / sqrt(3), quantile 4.3027."""
    low, high = mean_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert mean_interval([1.0, 2.0]) is None
    assert mean_interval([1.0] * 8) is None


@pytest.mark.parametrize(("sites", "clear"), [(5, False), (6, True)])
def test_enough_sites_that_all_move_one_way_are_clear(sites: int, clear: bool) -> None:
    """One site's large gain widens the interval of the mean over 0; six of one sign tell enough."""
    ours = made([2.0, *[2.99] * (sites - 1)])
    verdict = judge(ours, {"local": made([3.0] * sites)})
    assert verdict.local is not None
    assert verdict.local.high is not None
    assert verdict.local.high > 0
    assert verdict.local.clear is clear


@pytest.mark.parametrize(
    ("fedavg", "words"),
    [
        ([2.80, 2.81, 2.80], ", and better than the uncompressed run"),
        ([2.60, 2.62, 2.60], ", but worse than the uncompressed run"),
        ([2.69, 2.72, 2.70], ", with no clear difference from the uncompressed run"),
        ([2.70, 2.71, 2.70], ", level with the uncompressed run"),
    ],
)
def test_the_conclusion_names_the_uncompressed_run(fedavg: list[float | None], words: str) -> None:
    ours = made([2.70, 2.71, 2.70])
    local = made([3.00, 3.02, 3.01])
    first = judge(ours, {"local": local, "fedavg": made(fedavg)}).sentences()[0]
    assert first == f"Helped against local training{words}."


def test_sites_without_a_gain_are_named_up_to_five() -> None:
    worse = made([3.1] * 7 + [2.9])
    line = judge(worse, {"local": made([3.0] * 8)}).line()
    assert "No lower loss than local training at 'a', 'b', 'c', 'd', 'e' and 2 more." in line
    helped = made([2.9] * 3)
    assert "No lower loss" not in judge(helped, {"local": made([3.0] * 3)}).line()


@pytest.mark.parametrize(
    ("final", "words"),
    [
        (
            [3.1] * 4,
            "Did not help against local training. Loss against local training: 0.1000 nats "
            "higher, better at 0 of 4 sites.",
        ),
        (
            [3.0] * 4,
            "Did not help against local training. Loss against local training: level, better at "
            "0 of 4 sites.",
        ),
        (
            [2.0, 3.1],
            "Helped at 1 of 2 sites only against local training, with a lower mean loss. Loss "
            "against local training: 0.4500 nats lower, better at 1 of 2 sites.",
        ),
        (
            [2.9, 2.9, 2.9, 4.0],
            "No clear difference from local training. Loss against local training: 0.1750 nats "
            "higher, better at 3 of 4 sites (95 % interval -0.7002 to +1.0502).",
        ),
    ],
)
def test_the_lead_says_both_sites_and_mean(final: list[float | None], words: str) -> None:
    assert judge(made(final), {"local": made([3.0] * 4)}).line().startswith(words)


@pytest.mark.parametrize(
    ("local", "words"),
    [
        (
            [2.9, 2.9, 2.7],
            "No clear difference from local training. Loss against local training: 0.0333 nats "
            "lower, better at 2 of 3 sites (95 % interval -0.3202 to +0.2535). Against the base "
            "model: 0.2000 nats lower. No lower loss than local training at 'c'. All 3 sites share "
            "one held-out set. Not measured: the uncompressed run.",
        ),
        (
            None,
            "Helped against the base model. Loss against the base model: 0.2000 nats lower. All 3 "
            "sites share one held-out set. Not measured: local training and the uncompressed run.",
        ),
    ],
)
def test_two_models_on_a_set_that_all_sites_share_are_one_comparison(
    local: list[float | None] | None, words: str
) -> None:
    shared = made([2.8] * 3, overlap={"one_set": True})
    assert judge(shared, {"local": made(local) if local else None}).line() == words


def test_a_difference_without_an_interval_is_not_called_lower_alone() -> None:
    """Two models on one held-out set differ by one number, which may be noise."""
    shared = made([2.8] * 3, overlap={"one_set": True})
    line = judge(shared, {"local": made([2.9, 2.95, 3.0]), "fedavg": made([2.83] * 3)}).line()
    assert line.startswith(
        "Helped against local training; loss 0.0300 nats lower than the uncompressed run, "
        "without an interval, because all sites share one held-out set."
    )
    two = judge(made([2.8] * 2), {"local": made([2.9] * 2), "fedavg": made([2.7] * 2)}).line()
    higher = "; loss 0.1000 nats higher than the uncompressed run, without an interval, because"
    assert f"{higher} it takes 3 sites." in two
    same = judge(made([2.8] * 4), {"local": made([2.9] * 4), "fedavg": made([2.7] * 4)}).line()
    assert f"{higher} the difference is the same at all sites." in same


def scored(score: float, base: float, loss: float = 2.9) -> dict[str, Any]:
    """A result with this loss at four sites, and this mean exact match."""
    found = made([loss] * 4)
    for number, row in enumerate(found["heldout_by_site"].values()):
        row["base"]["exact_match"] = base
        row["final"]["exact_match"] = score + 0.1 * (-1) ** number
    return found


def test_a_run_with_answers_tells_their_score() -> None:
    verdict = judge(scored(0.8, 0.1), {"local": scored(0.25, 0.1), "fedavg": None})
    assert verdict.exact_match == pytest.approx({"final": 0.8, "base": 0.1, "local": 0.25})
    assert verdict.line().startswith(
        "Loss and exact match disagree: no lower loss than local training at 4 of 4 sites, but "
        "more right answers. Exact match 80.0 % against 25.0 % of local training, 10.0 % of the "
        "base model. Loss against local training: level, better at 0 of 4 sites. "
    )
    without = judge(made([2.9] * 4), {"local": scored(0.25, 0.1)})
    assert without.exact_match == {}
    assert "Exact match" not in without.line()
    some = scored(0.8, 0.1)
    del some["heldout_by_site"]["a"]["final"]["exact_match"]
    assert "Exact match" not in judge(some, {"local": scored(0.25, 0.1)}).line()


@pytest.mark.parametrize(
    ("loss", "score", "helped"),
    [(2.8, 0.2, "partly"), (2.8, 0.4, "yes"), (3.0, 0.4, "partly"), (3.0, 0.2, "no")],
)
def test_a_loss_and_a_score_that_disagree_are_no_clear_answer(
    loss: float, score: float, helped: str
) -> None:
    verdict = judge(scored(score, 0.1, loss), {"local": scored(0.3, 0.1)})
    assert verdict.helped == helped
    line = verdict.line()
    lower, more = ("lower", "fewer") if loss < 2.9 else ("no lower", "more")
    which = f"{lower} loss than local training at 4 of 4 sites, but {more} right answers."
    first = {"yes": "Helped against local training.", "no": "Did not help against local training."}
    assert line.startswith(first.get(helped, f"Loss and exact match disagree: {which}"))
    unscored = judge(scored(score, 0.1, loss), {"local": made([2.9] * 4)})
    assert unscored.helped == ("yes" if loss < 2.9 else "no")


def test_sites_without_more_right_answers_are_named() -> None:
    """At one of four sites the exact match did not move; where losses agree, it is one sentence."""
    ours, local = scored(0.4, 0.1, 2.8), scored(0.3, 0.1)
    rows = local["heldout_by_site"]
    rows["a"]["final"] |= {"exact_match": ours["heldout_by_site"]["a"]["final"]["exact_match"]}
    verdict = judge(ours, {"local": local})
    assert verdict.answered == (3, 1, 0)
    assert "No more right answers than local training at 'a'." in verdict.sentences()
    rows["a"]["final"]["loss"] = 2.7
    both = "Neither a lower loss nor more right answers than local training at 'a'."
    assert both in judge(ours, {"local": local}).sentences()
    assert "right answers" not in judge(ours, {"local": scored(0.3, 0.1)}).line()


@pytest.mark.parametrize(
    ("questions", "ours", "loss", "words"),
    [
        (40, 0.35, 2.8, "Helped against local training in loss, with no clear difference in exact"),
        (4000, 0.35, 2.8, "Helped against local training"),
        (4000, 0.25, 2.8, "Loss and exact match disagree: lower loss than local training"),
        (40, 0.25, 2.8, "Lower loss than local training, with no clear difference in exact match"),
        (4000, 0.35, None, "More right answers than local training, with no clear difference in"),
        (4000, 0.25, None, "Fewer right answers than local training, with no clear difference in"),
        (40, 0.35, None, "No clear difference from local training."),
    ],
)
def test_right_answers_are_clear_by_the_number_of_questions(
    questions: int, ours: float, loss: float | None, words: str
) -> None:
    """Without a `loss`, those of the sites go both ways."""
    found, local = scored(ours, 0.1, loss or 2.9), scored(0.3, 0.1)
    for made_up, share in ((found, ours), (local, 0.3)):
        made_up |= {
            "questions": questions,
            "heldout_pooled": {"base": {"exact_match": 0.1}, "final": {"exact_match": share}},
        }
    if loss is None:
        for site, own in zip("abcd", (2.8, 3.1, 2.7, 2.95), strict=True):
            found["heldout_by_site"][site]["final"]["loss"] = own
    verdict = judge(found, {"local": local})
    assert verdict.line().startswith(words)
    clear = verdict.answers["local"].clear
    assert f"local training{'' if clear else ' (no clear difference)'}," in verdict.sentences()[1]


def test_the_interval_of_two_shares_is_newcombes() -> None:
    """56 of 70 and 48 of 80 in his paper have other numbers of questions; here both have 100, and
    the ends follow from Wilson's intervals by hand: 0.3 (0.2189, 0.3958), 0.2 (0.1334, 0.2888)."""
    low, high = share_difference(0.3, 0.2, 100)
    assert low == pytest.approx(0.1 - (0.0811**2 + 0.0888**2) ** 0.5, abs=2e-4)
    assert high == pytest.approx(0.1 + (0.0958**2 + 0.0666**2) ** 0.5, abs=2e-4)


def paired(share: float, marks: str) -> dict[str, Any]:
    """A result whose 40 questions, 10 of each site, were answered as `marks` say."""
    by_site = {site: marks[10 * n : 10 * n + 10] for n, site in enumerate("abcd")}
    return scored(share, 0.1, 2.8) | {
        "questions": 40,
        "heldout_pooled": {"base": {"exact_match": 0.1}, "final": {"exact_match": share}},
        "right_answers": {"base": dict.fromkeys("abcd", "1" + 9 * "0"), "final": by_site},
    }


def test_two_runs_that_answer_the_same_questions_are_paired() -> None:
    """Six more of 40 answers are clear where the 20 others are right for both, and else not."""
    ours = paired(26 / 40, 26 * "1" + 14 * "0")
    for theirs, clear in (
        (paired(20 / 40, 20 * "1" + 20 * "0"), True),
        (paired(20 / 40, 20 * "0" + 20 * "1"), False),
        (paired(20 / 40, 20 * "1" + 20 * "0") | {"right_answers": None}, False),
    ):
        found = judge(ours, {"local": theirs}).answers["local"]
        assert found.clear == clear
        assert found.low is not None
    other = paired(20 / 40, 20 * "1" + 20 * "0")
    other["right_answers"]["final"]["a"] += "1"
    assert correlation_of(ours, other, 40) == 0, "other questions are no pairs"
    ours["right_answers"]["base"] = ours["right_answers"]["final"]
    assert correlation_of(ours, None, 40) > 0.9, "the base model answers them too"


def test_intervals_of_paired_shares_are_narrower_and_hold_what_they_say() -> None:
    """Of 2,000 draws of 60 questions, on most of which two runs agree."""
    draw = random.Random(0)
    held, widths = 0, [0.0, 0.0]
    for _ in range(2000):
        hard = [draw.random() for _ in range(60)]
        ours = "".join("01"[h < 0.55 or draw.random() < 0.05] for h in hard)
        theirs = "".join("01"[h < 0.45 or draw.random() < 0.05] for h in hard)
        shares = ours.count("1") / 60, theirs.count("1") / 60
        for number, phi in enumerate((correlation(ours, theirs, 60), 0.0)):
            low, high = share_difference(*shares, 60, phi)
            widths[number] += high - low
            if not number:
                held += low <= 0.095 <= high
    assert 0.94 < held / 2000 < 0.985
    assert widths[0] < 0.75 * widths[1]


@pytest.mark.parametrize(
    ("ours", "theirs", "phi"),
    [
        ("1100", "1100", (0.25 - 1 / 8) / 0.25),
        ("1100", "0011", -1.0),
        ("1111", "1100", 0.0),
        ("1010", "1100", 0.0),
    ],
)
def test_the_correlation_of_marks_by_hand(ours: str, theirs: str, phi: float) -> None:
    assert correlation(ours, theirs, 4) == pytest.approx(phi)


def test_a_mean_of_answers_that_one_site_raised_is_no_clear_gain() -> None:
    """Losses and the mean exact match are better, but most sites have fewer right answers."""
    ours, local = scored(0.5, 0.1, 2.8), scored(0.5, 0.1)
    for site, gain in zip("abcd", (0.3, 0.0, -0.04, -0.08), strict=True):
        ours["heldout_by_site"][site]["final"]["exact_match"] += gain
    verdict = judge(ours, {"local": local})
    assert verdict.exact_match["final"] > verdict.exact_match["local"]
    assert verdict.helped == "partly"
    assert verdict.answered == (1, 1, 2)
    assert "No more right answers than local training at 'b', 'c', 'd'." in verdict.sentences()


def test_better_than_the_base_is_no_help_where_local_training_is_better_still() -> None:
    """The mean of the base alone would look like a gain."""
    verdict = judge(made([2.9] * 8), {"local": made([2.8] * 8)})
    assert verdict.helped == "no"
    assert "Did not help against local training" in verdict.line()
    better = "Against the base model: 0.1000 nats lower, better at 8 of 8 sites."
    assert better in verdict.sentences()


def test_what_is_unknown_is_said_to_be_not_measured() -> None:
    line = judge(made([2.9, 2.8]), {}).line()
    assert line == (
        "Helped against the base model. Loss against the base model: 0.1500 nats lower, better "
        "at 2 of 2 sites. 2 sites give no interval: a small difference may be noise. Not measured: "
        "local training and the uncompressed run."
    )
    nothing = judge(made([None, None], base=None), {"local": made([3.0, 3.0])})
    assert (nothing.helped, nothing.tile()) == ("not measured", "not measured")
    assert nothing.line().startswith("Not measured")
    assert judge({"heldout_by_site": None, "sites": 3}, {"local": None}).helped == "not measured"


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_site_without_a_finite_loss_counts_nowhere(missing: float | None) -> None:
    verdict = judge(made([2.9, missing, 2.9]), {"local": made([3.0, 3.0, 3.0])})
    assert verdict.local is not None
    assert (verdict.local.sites, verdict.local.better) == (2, 2)
    assert verdict.line().endswith("1 of 3 sites not measured.")
    assert losses(made([missing]), "final") == {}


@pytest.mark.parametrize(
    ("method", "codec", "name"), [("local", None, "local"), ("fedavg", "identity", "fedavg")]
)
def test_a_baseline_is_not_compared_with_itself(method: str, codec: str | None, name: str) -> None:
    ours = made([2.9], codec=codec, **described(method, METHODS[method].traits, codec))
    verdict = judge(ours, {name: made([2.0])})
    assert verdict.itself == name
    assert getattr(verdict, name) is None
    assert {"local": "local training", "fedavg": "uncompressed"}[name] not in verdict.line()


@pytest.mark.parametrize(
    ("method", "codec", "name", "label"),
    [
        ("local", None, "local", "local only"),
        ("central", None, "central", "central, all data at one place"),
        ("central_cyclic", None, "central_cyclic", "central, block after block"),
        ("fedavg", "identity", "fedavg", "federated, uncompressed"),
        ("fedavg", "int8", None, "FedAvg"),
        ("cgfedllm", "identity", None, "CG-FedLLM"),
        ("flasc", None, None, "FLASC"),
    ],
)
def test_a_run_says_which_baseline_it_is(
    method: str, codec: str | None, name: str | None, label: str
) -> None:
    words = described(method, METHODS[method].traits, codec)
    assert (words["baseline"], words["label"]) == (name, label)
    assert words["pooled"] == method.startswith("central")
    assert words["sends_updates"] == (method != "local" and not words["pooled"])


def test_a_run_writes_its_verdict(run_config: dict[str, Any], tmp_path: Path) -> None:
    """The run and its baseline on disk give the same numbers by hand."""
    found = run_table(
        run_config | {"compare": ["local"], "codec": {"name": "int8"}}, tmp_path / "run"
    )
    local = json.loads((tmp_path / "run" / "compare" / "local" / "result.json").read_text())
    rows = found["heldout_by_site"]
    gains = [rows[s]["final"]["loss"] - local["heldout_by_site"][s]["final"]["loss"] for s in rows]
    verdict = found["verdict"]
    assert verdict["local"]["better"] == sum(gain < 0 for gain in gains)
    assert verdict["local"]["difference"] == pytest.approx(sum(gains) / 3)
    assert verdict["fedavg"] is None
    shown = result_tables.verdict_line(read_run(tmp_path / "run")).plain
    assert shown == verdict["line"]
    # Means over the sites and over all label tokens are two numbers, each under its name.
    means = [sum(rows[s][which]["loss"] for s in rows) / 3 for which in ("base", "final")]
    assert [found["heldout"][which]["loss"] for which in ("base", "final")] == pytest.approx(means)
    assert found["heldout_pooled"]["final"]["loss"] != found["heldout"]["final"]["loss"]


def unmeasured(folder: Path) -> Path:
    """A finished run whose sites sent no held-out measures."""
    config(folder, "cgfedllm")
    found = result("cgfedllm", "int8", 3.2, 2200, 131200)
    found["heldout"] = dict.fromkeys(found["heldout"])
    found["heldout_by_site"] = {
        site: {"base": None, "final": None} for site in found["heldout_by_site"]
    }
    write(folder, records(2200, 131200, start=3.3), found)

    return folder


def test_a_run_without_measures_is_shown_as_such(tmp_path: Path) -> None:
    found = read_run(unmeasured(tmp_path / "run"))
    words = text_of(show.run_tables(found))
    assert "Not measured: no site sent held-out measures" in words
    assert words.count("not measured") >= 2 + 3 * 3
    write_page(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert '<h1 class="">Not measured: no site sent held-out measures of this run</h1>' in page
    assert page.count("<b>not measured</b>") == 2
    found["result"]["heldout_by_site"] = {}
    assert "Not measured" in text_of(show.run_tables(found))


def test_the_first_line_is_the_verdict_and_the_gate_is_the_codecs(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config(folder, "cgfedllm")
    ours = result("cgfedllm", "klt", 3.4, 2200, 131200, setup={"snapshots": 24, "gate": gate([])})
    write(folder, records(2200, 131200, start=3.3, codec=True), ours)
    write(
        folder / "compare" / "local", records(9, 110, start=3.2), result("local", None, 3.2, 9, 110)
    )
    write_page(read_run(folder), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert '<h1 class="no">Did not help against local training</h1>' in page
    assert "0.2000 nats higher, better at 0 of 3 sites." in page
    assert "Verdict" not in page
    assert "<h2>Codec gate:" in page


def test_a_pooled_difference_against_that_of_the_sites_is_not_clear() -> None:
    """Three questions at one site and 200 at the other: the mean over the sites is better, and the
    answers to all questions are worse."""
    ours, local = made([2.8, 2.8]), made([2.9, 2.9])
    for found, shares, pooled in ((ours, (1.0, 0.5), 0.507), (local, (0.0, 0.75), 0.739)):
        found |= {"questions": 203, "heldout_pooled": {"final": {"exact_match": pooled}}}
        for row, share in zip(found["heldout_by_site"].values(), shares, strict=True):
            row["final"]["exact_match"] = share
    right = judge(ours, {"local": local}).right
    assert right is not None
    assert right.low is not None
    assert right.high is not None
    assert right.low < right.difference < right.high < 0
    assert right.clear is False
