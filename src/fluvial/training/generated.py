"""Generated answers of one or two models: scores by site and over all, with 95 % intervals.

ROUGE is that of `rouge_score`, BLEU and chrF those of sacreBLEU (Post, 2018). Token F1 and the
normalised exact match are those of SQuAD (Rajpurkar et al., 2016).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fluvial.data import Question, independent
from fluvial.errors import ConfigError
from fluvial.models.generation import AT_ONCE, continuations, count_too_long
from fluvial.models.pool import ModelPool
from fluvial.storage.files import write_whole
from fluvial.training.answer_scores import AnswerSums, equal_in_squad
from fluvial.training.choice_scores import Interval, bootstrap
from fluvial.training.rouge import has_pairs
from fluvial.training.wilson import wilson
from fluvial.wire.tensors import Named

Metric = Literal["exact_match", "f1", "rouge", "bleu", "chrf"]
METRICS: tuple[Metric, ...] = get_args(Metric)
_KEYS: dict[Metric, tuple[str, ...]] = {
    "exact_match": ("exact_match", "exact_match_squad"),
    "f1": ("f1",),
    "rouge": ("rouge_1", "rouge_2", "rouge_l"),
    "bleu": (),
    "chrf": (),
}
"""Scores of one answer that belong to a metric; the others are scores of all answers together."""
_RESAMPLES = 1000
ANOTHER = "name another file with --answers"
NO_PAIRS = "no reference has two words of a-z and 0-9"
"""Why answers have no ROUGE-2, which counts pairs of words."""
MISSING = "--metrics {}: needs sacreBLEU: pip install 'fluvial[evaluation]'"


@dataclass(frozen=True)
class AnswerConfig:
    """The generation of answers, and their scores."""

    max_new_tokens: int
    """Greedy tokens of an answer."""
    metrics: tuple[Metric, ...] = ("exact_match", "f1", "rouge")
    batch_size: int = AT_ONCE
    """Prompts at a time; that of a run unless it is set, since rounding depends on it."""
    required: bool = False
    """True if records without answers are refused."""
    site_field: str | None = None
    """The field of a record that names its site."""
    site_required: bool = True
    """False if records need not have that field, because it is the run's."""
    file: Path | None = None
    """File that questions and answers are written to, as JSON Lines."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a metric that is unknown or needs a package that is missing, and
        for a file whose content is no answers."""
        if self.file is not None and self.file.is_file() and not _has_answers(self.file):
            raise ConfigError(
                f"--answers {self.file}: exists, and is no file of answers; {ANOTHER}"
            )
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(f"--metrics {metric}: unknown; known are {', '.join(METRICS)}")
            if not _KEYS[metric]:
                _sacrebleu(metric)
        if self.file is not None and not self.file.absolute().parent.is_dir():
            raise ConfigError(f"--answers {self.file}: there is no folder {self.file.parent}")


def answer_result(
    pool: ModelPool,
    models: Mapping[str, Named],
    questions: Sequence[Question],
    sites: Sequence[str],
    config: AnswerConfig,
    seed: int,
) -> dict[str, Any]:
    """Return the scores of all models' greedy answers to `questions`, as JSON types.

    `sites` has the site of each question, or nothing.
    """
    context = pool.outline.context
    prompts = [question.asked for question in questions]
    answers = {}

    for name, state in models.items():
        with pool.model(state) as model:
            answers[name] = continuations(
                model,
                pool.tokenizer,
                prompts,
                max_new_tokens=config.max_new_tokens,
                context=context,
                at_once=config.batch_size,
                of=name,
            )

    if config.file is not None:
        write_whole(config.file, _lines(answers, questions, sites).encode(), ANOTHER)

    result = {
        "metrics": list(config.metrics),
        "max_new_tokens": config.max_new_tokens,
        "too_long": count_too_long(pool.tokenizer, prompts, config.max_new_tokens, context),
        "distinct_questions": len(set(questions)),
        "left_out": {} if _measurable("rouge_2", questions) else _left_out(config.metrics),
        **_scored(answers, questions, config, seed),
    }
    if sites:
        result["by_site"] = {
            site: _scored(*_part(answers, questions, sites, site), config, seed)
            for site in sorted(set(sites))
        }
    return result


def _lines(
    answers: Mapping[str, Sequence[str]], questions: Sequence[Question], sites: Sequence[str]
) -> str:
    """Return a line of JSON for each question: prompt, right answers, site, each model's answer."""
    lines = []
    for place, question in enumerate(questions):
        line = {
            "prompt": question.prompt,
            "references": [question.answer, *question.references],
            **({"site": sites[place]} if sites else {}),
            "answers": {name: given[place] for name, given in answers.items()},
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _has_answers(file: Path) -> bool:
    """Return whether a file is empty, or begins with a line of `_lines`."""
    try:
        with file.open("rb") as lines:
            first = lines.readline()
            return not first or {"references", "answers"} <= json.loads(first).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _part(
    answers: Mapping[str, Sequence[str]],
    questions: Sequence[Question],
    sites: Sequence[str],
    wanted: str,
) -> tuple[dict[str, list[str]], list[Question]]:
    """Return the answers and the questions of one site."""
    places = [place for place, site in enumerate(sites) if site == wanted]
    own = {name: [given[place] for place in places] for name, given in answers.items()}
    return own, [questions[place] for place in places]


def _measurable(key: str, questions: Iterable[Question]) -> bool:
    """Return False for ROUGE-2 where no reference has a pair of words."""
    texts = (text for each in questions for text in (each.answer, *each.references))
    return key != "rouge_2" or has_pairs(texts)


def _left_out(metrics: Sequence[Metric]) -> dict[str, str]:
    """Return the scores of `metrics` that answers of one word do not have, and why."""
    return {"rouge_2": NO_PAIRS} if "rouge" in metrics else {}


def _scored(
    answers: Mapping[str, Sequence[str]],
    questions: Sequence[Question],
    config: AnswerConfig,
    seed: int,
) -> dict[str, Any]:
    """Return the scores of each model over `questions`, and the differences of two."""
    references = [(question.answer, *question.references) for question in questions]
    keys = [
        key for metric in config.metrics for key in _KEYS[metric] if _measurable(key, questions)
    ]
    places: dict[Question, list[int]] = {}
    for place, question in enumerate(questions):
        places.setdefault(question, []).append(place)
    same = list(places.values())
    values = {
        name: [_scores(*pair) for pair in zip(given, references, strict=True)]
        for name, given in answers.items()
    }
    result: dict[str, Any] = {"questions": len(questions)}

    for name, rows in values.items():
        result[name] = {
            key: _figure(
                _mean_interval(
                    [row[key] for row in rows], same, seed, shares=key.startswith("exact")
                )
            )
            for key in keys
        } | {
            metric: _corpus_score(metric, answers[name], references)
            for metric in config.metrics
            if not _KEYS[metric]
        }

    if "base" in values and "adapter" in values:
        pairs = list(zip(values["base"], values["adapter"], strict=True))
        result["difference"] = {
            key: _figure(_mean_interval([new[key] - old[key] for old, new in pairs], same, seed))
            for key in keys
        }
    return result


def _scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Return the scores of one answer, each against the reference that it meets best."""
    normalised = any(equal_in_squad(answer, reference) for reference in references)
    return AnswerSums.of(answer, references).means(1) | {"exact_match_squad": float(normalised)}


def _mean_interval(
    values: Sequence[float], same: Sequence[Sequence[int]], seed: int, *, shares: bool = False
) -> Interval | float:
    """Return the mean of `values` with its bootstrap interval over distinct questions.

    `same` has the places of each distinct question. The interval of a share is Wilson's, as in the
    tables of a run; any other mean that all questions have is returned without an interval.
    """
    counts = [len(places) for places in same]
    if shares:
        share = _mean(values)
        return Interval(share, *wilson(share, independent(counts)), "wilson")
    means = [_mean([values[place] for place in places]) for places in same]
    found = bootstrap(means, seed, counts)
    return means[0] if found is None else found


def _mean(values: Sequence[float]) -> float:
    """Return the mean, without rounding where all values are equal."""
    return values[0] if len(set(values)) == 1 else math.fsum(values) / len(values)


def _figure(found: Interval | float) -> dict[str, Any]:
    if isinstance(found, float):
        return {"mean": found, "interval": None, "interval_by": None}
    return {
        "mean": found.mean,
        "interval": [found.low, found.high],
        "interval_by": found.method,
    }


def _sacrebleu(metric: Metric) -> Any:
    """Return a metric of sacreBLEU; raises `ConfigError` where it is not installed."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ConfigError(MISSING.format(metric)) from error
    return BLEU() if metric == "bleu" else CHRF()


def _corpus_score(
    metric: Metric, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Return a score of all answers together, 0 to 100, with its bootstrap interval."""
    most = max(map(len, references))
    streams = [
        [each[number] if number < len(each) else None for each in references]
        for number in range(most)
    ]
    scorer = _sacrebleu(metric)
    found = scorer.corpus_score(list(answers), streams, n_bootstrap=_RESAMPLES)
    told = json.loads(found.format(4, signature=str(scorer.get_signature()), is_json=True))
    middle, half = told["confidence_mean"], told["confidence_var"]
    low, high = max(0.0, middle - half), min(100.0, middle + half)
    return _figure(Interval(found.score, low, high, "sacrebleu"))
