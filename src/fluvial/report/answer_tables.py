"""Tables of the scores of generated answers: over all records, and by site.

What repeats is named below a table, not listed: scores that equal another in all cells, and one
site that has all records.
"""

from rich.table import Table

from fluvial.formatting import safe_text
from fluvial.report.tables import table
from fluvial.storage.run_files import JsonObject

LABELS = {
    "exact_match": "exact match, outer white space aside",
    "exact_match_squad": "exact match, normalised as in SQuAD",
    "f1": "token F1, as SQuAD counts it",
    "rouge_1": "ROUGE-1, F1",
    "rouge_2": "ROUGE-2, F1",
    "rouge_l": "ROUGE-L, F1",
    "bleu": "BLEU, 0 to 100",
    "chrf": "chrF, 0 to 100",
}

SHORT = {key: label.partition(",")[0] for key, label in LABELS.items()}
"""Labels of the scores without what tells them apart."""
Scores = dict[str, list[list[str]]]
"""Cells of each score, in a list for each site or for all records."""
METHODS = {
    "bootstrap": "bootstrap over questions (BCa)",
    "clopper-pearson": "exact (Clopper-Pearson), because all answers are alike",
    "wilson": "Wilson's, over all questions",
    "sacrebleu": "sacreBLEU's bootstrap over answers",
}
"""Words for the methods of intervals."""


def answer_tables(answers: JsonObject | None, headings: dict[str, str]) -> list[Table]:
    """Return a table of all answers, and one with a row for each site and score."""
    if answers is None:
        return []

    models = [model for model in headings if model in answers]
    columns = [headings[model] for model in models]
    columns += ["difference"] if "difference" in answers else []
    notes = [f"greedy, at most {answers['max_new_tokens']} tokens"]
    notes += _interval_notes(answers, {model: headings[model] for model in models})
    if answers["distinct_questions"] < answers["questions"]:
        notes += [
            f"{answers['distinct_questions']} distinct questions, each of which an interval counts "
            "once"
        ]
    notes += [f"{SHORT[key]} is left out: {why}" for key, why in answers["left_out"].items()]
    if answers["too_long"]:
        count = answers["too_long"]
        notes += [f"{count} prompts leave less room in the context: shorter or empty answers"]

    by_site = answers.get("by_site", {})
    only = f" of site {next(iter(by_site))}" if len(by_site) == 1 else ""
    title = safe_text(f"Generated answers to {answers['questions']} records{only}")
    scores = {key: [_cells(answers, key, models)] for key in answers[models[0]]}
    rows = [[LABELS[key], *scores[key][0]] for key in _different(scores)]
    tables = [table(["", *columns], rows, title, caption="; ".join(notes + _equal(scores)))]
    if len(by_site) > 1:
        tables.append(_site_table(by_site, models, columns))
    return tables


def _site_table(by_site: JsonObject, models: list[str], columns: list[str]) -> Table:
    """Return a row for each site and score, but for scores that equal another at all sites."""
    parts = list(by_site.values())
    keys = dict.fromkeys(key for part in parts for key in part[models[0]])
    keys.pop("exact_match_squad", None)
    scores = {
        key: [_cells(part, key, models) if key in part[models[0]] else [] for part in parts]
        for key in keys
    }
    rows = [
        [safe_text(site), str(part["questions"]), SHORT[key], *scores[key][place]]
        for place, (site, part) in enumerate(by_site.items())
        for key in _different(scores)
        if scores[key][place]
    ]
    names = ["site", "records", "score", *columns]
    return table(names, rows, "Generated answers by site", caption="; ".join(_equal(scores)))


def _different(scores: Scores) -> list[str]:
    """Return the scores but for those whose cells are all those of an earlier one."""
    return [key for key in scores if scores[key] not in _before(scores, key)]


def _equal(scores: Scores) -> list[str]:
    """Return which scores equal which other one in all cells, in words."""
    twins = {
        first: [key for key in scores if key != first and scores[key] == scores[first]]
        for first in _different(scores)
    }
    return [
        f"equal to {_row(first)}: {', '.join(map(_row, keys))}"
        for first, keys in twins.items()
        if keys
    ]


def _before(scores: Scores, key: str) -> list[list[list[str]]]:
    keys = list(scores)
    return [scores[each] for each in keys[: keys.index(key)]]


def interval_words(choices: JsonObject, headings: dict[str, str]) -> list[str]:
    """Return which method made the interval of each model's accuracy."""
    found: dict[str, list[str]] = {}
    for model, heading in headings.items():
        found.setdefault(choices[model]["interval_by"], []).append(heading)
    return [
        f"95 % interval{' of ' + ', '.join(models) if len(found) > 1 else ''}: {METHODS[method]}"
        for method, models in found.items()
    ]


def _interval_notes(answers: JsonObject, headings: dict[str, str]) -> list[str]:
    """Return which method made which of the intervals."""
    columns = {**headings, **({"difference": "difference"} if "difference" in answers else {})}
    places: dict[str, dict[str, list[str]]] = {}
    for model, heading in columns.items():
        for key, figure in answers[model].items():
            if figure["interval_by"] is not None:
                places.setdefault(figure["interval_by"], {}).setdefault(heading, []).append(key)

    if len(places) == 1:
        return [f"95 % intervals: {METHODS[method]}" for method in places]
    usual = max(places, key=lambda method: sum(map(len, places[method].values())), default="")
    notes = [f"95 % intervals: {METHODS[usual]}"] if places else []
    for method, found in places.items():
        if method != usual:
            rows = [f"{name} ({', '.join(map(_row, keys))})" for name, keys in found.items()]
            notes.append(f"{METHODS[method]}: {', '.join(rows)}")
    return notes


def _row(key: str) -> str:
    """Return the name of a row in a sentence."""
    return "exact match as in SQuAD" if key == "exact_match_squad" else SHORT[key]


def _cells(scored: JsonObject, key: str, models: list[str]) -> list[str]:
    """Return the figures of a score for each model, and of the difference of two."""
    cells = [_figure(scored[model][key], key, "") for model in models]
    if "difference" in scored:
        change = scored["difference"].get(key)
        cells.append("" if change is None else _figure(change, key, "+"))
    return cells


def _figure(figure: JsonObject, key: str, sign: str) -> str:
    """Return a mean with its interval, where there is one: shares in per cent, their differences in
    points, and what is 0 to 100 as it is."""
    corpus = key in ("bleu", "chrf")
    scale, unit = (1, "") if corpus else (100, " points" if sign else " %")
    mean = f"{scale * figure['mean']:{sign}.2f}{unit}"
    if figure["interval"] is None:
        return mean

    low, high = (format(scale * end, f"{sign}.1f") for end in figure["interval"])
    return f"{mean} ({low} to {high})"
