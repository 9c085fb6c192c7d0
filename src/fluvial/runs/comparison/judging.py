"""The verdict of a comparison: one line that says which contender is better than the baseline."""

from collections.abc import Sequence

from fluvial.formatting import figure, human_ratio
from fluvial.runs.comparison.result import Compared, ComparedContender, Difference

ALPHA = 0.05
"""Level of a test below which a difference counts as shown."""
PRIMARY = ("loss", "loss_pooled")
"""Measures that decide, the first that a contender and the baseline have in common."""
SCORES = ("exact_match", "exact_match_pooled")
"""Scores that a verdict must not contradict, likewise."""
DISAGREE = "losses and exact match disagree"


def verdict_line(compared: Compared) -> str:
    """Return the verdict as one line for people."""
    base = compared.contender(compared.baseline)
    others = [each for each in compared.contenders if each.name != base.name]
    parts = _alone(base) if not others else _against(base, others)

    runs = [run for each in compared.contenders for run in each.runs]
    missing = sum(not run.finished for run in runs)
    return "; ".join(
        [*parts, *([f"{missing} of {len(runs)} runs not finished"] if missing else [])]
    )


def primary(contender: ComparedContender) -> tuple[str, Difference] | None:
    """Return the measure that decides about a contender, and its difference; None without any."""
    names = [name for name in PRIMARY if name in contender.differences]
    return (names[0], contender.differences[names[0]]) if names else None


def score(contender: ComparedContender) -> Difference | None:
    """Return the difference of exact match; None where it was not measured."""
    names = (name for name in SCORES if name in contender.differences)
    return next((contender.differences[name] for name in names), None)


def answer_about(contender: ComparedContender) -> str | None:
    """Return the `answer` on the losses of a contender, or `DISAGREE` where they are better and
    exact match is worse, or the other way round; None without any measure."""
    found = primary(contender)
    if found is None:
        return None
    said = answer(found[1])
    right = score(contender)
    gain = 0.0 if right is None else right.mean
    contradicted = (said == "better" and gain < 0) or (said == "worse" and gain > 0)
    return DISAGREE if contradicted else said


def answer(difference: Difference) -> str:
    """Return "better", "worse", "no difference shown" or "not tested" for a difference of
    losses."""
    if difference.p_holm is None:
        return "equal" if difference.over and difference.mean == 0 else "not tested"
    if difference.p_holm >= ALPHA:
        return "no difference shown"
    return "better" if difference.mean < 0 else "worse"


def tested_together(contenders: Sequence[ComparedContender]) -> int:
    """Return the number of contenders whose p-values were corrected for each other."""
    found = [each[1] for one in contenders if (each := primary(one)) is not None]
    return sum(difference.p is not None for difference in found)


def test_words(difference: Difference) -> str:
    """Return the name of a test and its pairs."""
    if difference.over is None:
        return "no test, one pair only"
    return f"paired t over {difference.pairs} {difference.over}"


def _alone(base: ComparedContender) -> list[str]:
    score = next((base.scores[name] for name in PRIMARY if name in base.scores), None)
    if score is None:
        return ["Not measured: no run is finished"]

    interval = ""
    if score.low is not None:
        interval = f", 95 % interval {figure(score.low)} to {figure(score.high)}"
    return [f"{base.name}: held-out loss {figure(score.mean)}{interval}, {_seeds(base)}"]


def _seeds(contender: ComparedContender) -> str:
    return f"{contender.finished} seeds" if contender.finished > 1 else "one seed"


def _against(base: ComparedContender, others: Sequence[ComparedContender]) -> list[str]:
    known = {each.name: said for each in others if (said := answer_about(each)) is not None}
    if not known:
        return [f"Not measured: no contender can be compared with {base.name} yet"]
    if len(others) == 1:
        found = primary(others[0])
        assert found is not None, "it has an answer"
        return [_sentence(others[0], base, found[1])]

    groups: dict[str, list[str]] = {}
    for name, said in known.items():
        groups.setdefault(said, []).append(name)

    order = ("better", "equal", "no difference shown", "not tested", DISAGREE, "worse")
    words = "; ".join(f"{what}: {', '.join(groups[what])}" for what in order if what in groups)
    parts = [f"Against {base.name}: {words}"]
    losses = {
        each.name: each.scores["loss"].mean for each in (base, *others) if "loss" in each.scores
    }
    if losses:
        best = min(losses, key=lambda name: losses[name])
        parts.append(f"lowest held-out loss: {best} ({figure(losses[best])})")

    return parts


def _sentence(contender: ComparedContender, base: ComparedContender, found: Difference) -> str:
    """Return the verdict on the only other contender."""
    both = f"{contender.name} and {base.name}"
    words = {
        "better": f"{contender.name} is better than {base.name}",
        "worse": f"{contender.name} is worse than {base.name}",
        "equal": f"{both} have equal losses",
        "no difference shown": f"No difference shown between {both}",
        "not tested": f"{both} are not tested",
        DISAGREE: f"Losses and exact match of {both} disagree",
    }[answer_about(contender) or answer(found)]
    way = "lower" if found.mean < 0 else "higher"
    apart = f": held-out loss {figure(abs(found.mean))} nats {way}" if found.mean else ""
    parts = [f"{words}{apart} ({_tested(found, 1, '+.4f')})"]
    right = score(contender)
    if right is not None and round(100 * right.mean, 1):
        more = "higher" if right.mean > 0 else "lower"
        points = f"exact match {figure(100 * abs(right.mean), '.1f')} points {more}"
        unsure = right.low is not None and right.high is not None and right.low < 0 < right.high
        shown = ", not shown" if unsure else ""
        parts.append(f"{points} ({_tested(right, 100, '+.1f')}{shown})")
    if contender.bytes_total and base.bytes_total:
        times = times_words(contender.bytes_total / base.bytes_total)
        parts.append(f"{contender.name} at {times} the bytes of {base.name}")

    return ", ".join(parts)


def _tested(found: Difference, scale: float, form: str) -> str:
    """Return the interval of a difference times `scale`, its test and p."""
    parts = []
    if found.low is not None and found.high is not None:
        low, high = (figure(scale * end, form) for end in (found.low, found.high))
        parts.append(f"95 % interval {low} to {high}")
    tested = test_words(found)
    parts.append(tested if found.p_holm is None else f"{tested}, p = {p_words(found.p_holm)}")
    return ", ".join(parts)


def times_words(ratio: float) -> str:
    """Return a ratio as "1/20 of" where much is saved, else as "9.1 times"."""
    if ratio < 0.7:
        return f"{human_ratio(ratio)} of"
    return f"{ratio:.{2 if ratio < 2 else 1 if ratio < 10 else 0}f} times"


def p_words(p: float | None) -> str:
    """Return a p-value with two digits."""
    if p is None:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.2g}"
