"""Tables of a comparison: losses with their differences, further measures, and costs."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text
from scipy import stats

from fluvial.formatting import figure, human_bytes, human_ratio, human_seconds, safe_text
from fluvial.report.result_tables import ANSWER_SCORES, COUNTED
from fluvial.report.tables import table
from fluvial.runs.comparison.gathering import is_loss
from fluvial.runs.comparison.judging import (
    answer,
    answer_about,
    p_words,
    primary,
    test_words,
    tested_together,
)
from fluvial.runs.comparison.result import Compared, ComparedContender, Difference

POOLED = "_pooled"
NAMES = {
    "loss": "held-out loss",
    "accuracy": "next-token accuracy",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    **ANSWER_SCORES,
}
"""Names of measures in tables."""
COSTS_CAPTION = (
    f"Means over the seeds. Up and down of one site: {COUNTED}. Amortised: these bytes in both "
    "directions, against an uncompressed run of the same rounds. Time: the "
    "method with its set-up and measures, without its baselines. Peak memory: the largest of the "
    "runs, each in a process of its own, baselines included."
)
STEPS_CAPTION = (
    " Optimizer steps: of all sites in the whole run, as [train] and the cohort set them; a method "
    "that plans the steps of its sites may take others."
)
Rows = list[list[str]]
"""Cells of a table, the headings first."""


def measure_name(measure: str) -> str:
    """Return the name of a measure for people."""
    plain = measure.removesuffix(POOLED)
    name = NAMES.get(plain, plain.replace("_", " "))
    return f"pooled {name.removeprefix('held-out ')}" if measure.endswith(POOLED) else name


def measure_rows(compared: Compared, measure: str) -> Rows:
    """Return the table of one measure: a row for each contender."""
    losing = measure.removesuffix(POOLED) == "loss"
    headings = ["", measure_name(measure), "less the baseline", "95 % interval"]
    rows = [[*headings, "better", "p"]]

    for each in compared.contenders:
        score = each.scores.get(measure)
        found = each.differences.get(measure)
        value = "-" if score is None else _value(score.mean, score.high, losing=losing)
        rows.append([safe_text(each.name), value, *_difference_cells(found, losing=losing)])

    return rows


def told_apart(compared: Compared) -> tuple[str, ...]:
    """Return the measures that have a table: the one that decides, and those not equal at all
    contenders, the first of several with the same values."""
    left_out = {*_equal(compared), *_twins(compared)}
    return tuple(name for name in compared.measures if name not in left_out)


def equal_words(compared: Compared) -> str:
    """Return the measures that have no table, with their value or the measure that they equal; ""
    without any."""
    shown = []
    for name in _equal(compared):
        score = next(each.scores[name] for each in compared.contenders if name in each.scores)
        shown.append(f"{measure_name(name)} {_value(score.mean, None, losing=is_loss(name))}")
    lines = [f"Equal at all contenders, without a table: {', '.join(shown)}."] if shown else []
    twins: dict[str, list[str]] = {}
    for name, first in _twins(compared).items():
        twins.setdefault(first, []).append(measure_name(name))
    for first, names in twins.items():
        lines.append(f"Equal to {measure_name(first)} in all rows: {', '.join(names)}.")
    return " ".join(lines)


def _twins(compared: Compared) -> dict[str, str]:
    """Return the measures, but for losses, whose rows are those of an earlier one, with that
    one."""
    equal = _equal(compared)
    firsts: dict[str, str] = {}
    found = {}
    for name in compared.measures:
        if is_loss(name) or name in equal:
            continue
        first = firsts.setdefault(str(measure_rows(compared, name)[1:]), name)
        if first != name:
            found[name] = first
    return found


def _equal(compared: Compared) -> list[str]:
    """Return the measures, but for losses, that no site under no seed tells apart.

    No cell is better, and the mean of the differences is 0, so that none is worse either.
    """
    found = []
    for name in compared.measures:
        differences = [each.differences.get(name) for each in compared.contenders]
        known = [each for each in differences if each is not None]
        if known and not is_loss(name) and all(each.mean == each.better == 0 for each in known):
            found.append(name)
    return found


def coding_words(compared: Compared) -> str:
    """Return the method and the codec of each contender whose name does not say both."""
    shown = []
    for each in compared.contenders:
        values = [each.method, *([each.codec] if each.codec else [])]
        if not all(value in each.name for value in values):
            shown.append(f"{each.name}: {' + '.join(values)}")
    return f"Method and codec: {'; '.join(shown)}." if shown else ""


def cost_rows(compared: Compared) -> Rows:
    """Return the table of costs; optimizer steps only where they are not equal."""
    unequal = len({each.optimizer_steps for each in compared.contenders}) > 1
    unfinished = any(each.finished < len(compared.seeds) for each in compared.contenders)
    headings = ["", *(["runs"] if unfinished else []), *(["optimizer steps"] if unequal else [])]
    rows = [[*headings, "up per site", "down per site", "amortised", "time", "peak memory"]]

    for each in compared.contenders:
        row = [safe_text(each.name)]
        row += [f"{each.finished} of {len(compared.seeds)}"] if unfinished else []
        row += [_or_dash(each.optimizer_steps, ",.0f")] if unequal else []
        row += [_bytes(each, each.up_bytes_per_site), _bytes(each, each.down_bytes_per_site)]
        row += ["-" if each.pooled else human_ratio(each.amortised_ratio)]
        row += ["-" if each.wall_s is None else human_seconds(each.wall_s)]
        row += ["-" if each.peak_rss_bytes is None else human_bytes(each.peak_rss_bytes)]
        rows.append(row)

    return rows


def costs_caption(compared: Compared) -> str:
    """Return the meaning of the columns of `cost_rows`."""
    unequal = len({each.optimizer_steps for each in compared.contenders}) > 1
    return COSTS_CAPTION + (STEPS_CAPTION if unequal else "")


def measures_caption(compared: Compared) -> str:
    """Return the meaning of the columns of `measure_rows`."""
    counts = [each.finished for each in compared.contenders if each.finished]
    count = max(counts, default=0)
    some = f"{min(counts)} to {count}" if counts and min(counts) < count else str(count)
    tested = next((found for each in compared.contenders if (found := primary(each))), None)
    if count > 1:
        first = f"Mean over {some} seeds, and half of its 95 % t-interval"
    else:
        first = "One seed, so that a value has no interval"

    words = [f"{first}; a value of a run is the mean over its sites."]
    if tested is not None:
        difference = tested[1]
        others = tested_together(compared.contenders)
        words.append(
            f"Less the baseline: the difference to {compared.baseline}, site by site under the "
            f"same seed, with its 95 % interval and p, {_tests(compared)}"
            + (f", corrected for {others} contenders (Holm)" if others > 1 else "")
            + "."
        )
        if any(not is_loss(name) for name in compared.measures):
            words.append("Differences of shares are percentage points.")
        words.append("Better: cells, each a site under a seed, in which the contender is better.")
        if any(each.over == "sites" for each in _decisive(compared).values()):
            words.append("A test over sites tells nothing about other seeds.")
        if difference.over == "seeds" and _few_seeds(compared):
            wide = stats.t.ppf(0.975, difference.pairs - 1)
            words.append(
                f"The test compares the means of {difference.pairs} seeds, not the cells: its "
                f"interval reaches {wide:.1f} standard errors to each side, so that no difference "
                "may be shown where every cell is better. More seeds narrow it."
            )
    pairs = [
        each.scores["rouge_2"].mean for each in compared.contenders if "rouge_2" in each.scores
    ]
    if pairs and not any(pairs):
        words.append("ROUGE-2 counts pairs of words, and is 0 where no answer has two.")
    return " ".join(words)


def _decisive(compared: Compared) -> dict[str, Difference]:
    """Return the difference that decides about each contender that is compared, by name."""
    return {each.name: found[1] for each in compared.contenders if (found := primary(each))}


def _tests(compared: Compared) -> str:
    """Return the tests of all contenders; with their names where the tests have other pairs, as
    while some runs are not finished."""
    names: dict[str, list[str]] = {}
    for name, difference in _decisive(compared).items():
        names.setdefault(test_words(difference), []).append(name)
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{words} ({', '.join(those)})" for words, those in names.items())


def _few_seeds(compared: Compared) -> bool:
    """Return whether all cells of a contender agree, and its test shows no difference."""
    found = [each[1] for one in compared.contenders if (each := primary(one))]
    return any(
        answer(each) == "no difference shown" and each.better in (0, each.cells) for each in found
    )


def comparison_tables(compared: Compared) -> RenderableType:
    """Return all tables of a comparison, and its verdict."""
    parts: list[RenderableType] = []
    measures = told_apart(compared)
    for number, measure in enumerate(measures):
        headings, *rows = measure_rows(compared, measure)
        title = "Comparison" if number == 0 else ""
        parts.append(table(_two_lines(headings), rows, title, whole=True))

    lines = (measures_caption(compared), equal_words(compared), coding_words(compared))
    parts += [Text(safe_text(line), style="table.caption") for line in lines if line]

    headings, *rows = cost_rows(compared)
    parts += [
        table(_two_lines(headings), rows, "Costs", whole=True),
        Text(costs_caption(compared), style="table.caption"),
    ]
    parts += [Text(f"Note: {safe_text(note)}") for note in compared.notes]
    parts += [
        Text(safe_text(f"Failed: {each.name}, seed {run.seed}: {run.failed}"), style="red")
        for each in compared.contenders
        for run in each.runs
        if run.failed
    ]
    return Group(*parts, Text(safe_text(compared.verdict), style=f"bold {colour(compared)}"))


def colour(compared: Compared) -> str:
    """Return the colour of the verdict: green or red only where losses and exact match agree."""
    found = [said for each in compared.contenders if (said := answer_about(each)) is not None]
    if found and all(each in ("better", "equal") for each in found):
        return "green"
    return "red" if found and all(each == "worse" for each in found) else "yellow"


def _two_lines(headings: Sequence[str]) -> list[str]:
    """Return headings that are broken at their last space."""
    return ["\n".join(heading.rsplit(" ", 1)) for heading in headings]


def _value(mean: float, high: float | None, *, losing: bool) -> str:
    """Return a mean and half of its interval."""
    half = "" if high is None else f" ±{_number(high - mean, losing)}"
    return f"{_number(mean, losing)}{half}{'' if losing else ' %'}"


def _number(value: float, losing: bool, sign: str = "") -> str:
    """Return a loss in nats, or a share in per cent without its sign."""
    return figure(value, f"{sign}z.4f") if losing else figure(100 * value, f"{sign}z.2f")


def _difference_cells(found: Difference | None, *, losing: bool) -> list[str]:
    if found is None:
        return ["-"] * 4
    interval = (
        "-"
        if found.low is None or found.high is None
        else f"{_number(found.low, losing, '+')}, {_number(found.high, losing, '+')}"
    )
    return [
        _number(found.mean, losing, "+"),
        interval,
        f"{found.better}/{found.cells}",
        p_words(found.p_holm),
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _bytes(contender: ComparedContender, value: float | None) -> str:
    """Return bytes of a site; data in one place cross no line."""
    return "-" if value is None or contender.pooled else human_bytes(value)
