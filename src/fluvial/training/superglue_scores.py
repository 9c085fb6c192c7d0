"""Scores of SuperGLUE's tasks: the candidate of the highest likelihood, and the official metrics.

Where a task has two metrics, its score is their mean, and the score of the benchmark is the mean
over tasks, as on the benchmark's own board (Wang et al., 2019, section 3).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from torch import nn

from fluvial.models.encoding import Encoder
from fluvial.models.pool import ModelPool
from fluvial.training.answer_scores import equal_in_squad, token_f1
from fluvial.training.choice_prompts import Prompt, encoded, fitted
from fluvial.training.choice_scores import score
from fluvial.training.superglue import YES_NO, Cloze
from fluvial.wire.tensors import Named

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """The records of a task, as clozes and as tokens."""

    clozes: Sequence[Cloze]
    prompts: Sequence[Prompt]
    cut: int
    """Prompts cut on the left to fit into the model's context."""

    @classmethod
    def of(cls, clozes: Sequence[Cloze], encoder: Encoder, context: int | None) -> "Task":
        """Tokenise `clozes`; raises `ConfigError` naming a record of which a candidate is too long
        for `context`."""
        prompts = []
        cut = 0

        for cloze in clozes:
            endings = cloze.endings()
            sizes = [1 if cloze.words else len(ending.encode()) for ending in endings]
            whole = encoded(cloze.name, cloze.before, endings, sizes, encoder)
            prompt, surplus = fitted(whole, context, encoder)
            prompts.append(prompt)
            cut += surplus > 0

        return cls(clozes, prompts, cut)


def superglue_result(
    tasks: Mapping[str, Task], pool: ModelPool, models: Mapping[str, Named]
) -> dict[str, Any]:
    """Return the metrics of each task and the mean of the tasks' scores for each model, as JSON
    types."""
    rows: dict[str, dict[str, Any]] = {
        name: {
            "clozes": len(task.clozes),
            "cut": task.cut,
            "alone": sum(len(cloze.candidates) == 1 for cloze in task.clozes),
        }
        for name, task in tasks.items()
    }
    average = {}

    for model_name, state in models.items():
        with pool.model(state) as model:
            for name, task in tasks.items():
                logger.info("SuperGLUE: %s", name)
                picks = picked(model, task, pad_token_id=pool.tokenizer.pad_token_id)
                rows[name][model_name] = metrics(name, task.clozes, picks)

        scores = [mean(row[model_name].values()) for row in rows.values()]
        average[model_name] = mean(scores)

    return {"tasks": rows, "average": average}


def picked(model: nn.Module, task: Task, *, pad_token_id: int) -> list[str]:
    """Return the candidate of each cloze with the highest likelihood, the first of equal ones."""
    scores = score(model, task.prompts, pad_token_id=pad_token_id)
    pairs = zip(task.clozes, scores, strict=True)
    return [cloze.candidates[row.index(max(row))] for cloze, row in pairs]


def metrics(task: str, clozes: Sequence[Cloze], picks: Sequence[str]) -> dict[str, float]:
    """Return the official metrics of a task, each from 0 to 1."""
    return {name: metric(clozes, picks) for name, metric in METRICS[task].items()}


def accuracy(clozes: Sequence[Cloze], picks: Sequence[str]) -> float:
    """Return the share of right candidates."""
    return mean(pick in cloze.answers for cloze, pick in zip(clozes, picks, strict=True))


def macro_f1(clozes: Sequence[Cloze], picks: Sequence[str]) -> float:
    """Return the mean F1 over the classes that labels or picks have."""
    labels = [cloze.answers[0] for cloze in clozes]
    return mean(_f1(labels, picks, name) for name in sorted({*labels, *picks}))


def answer_f1(clozes: Sequence[Cloze], picks: Sequence[str]) -> float:
    """Return F1 over all answers of all questions, of the class "right" (F1a)."""
    return _f1([cloze.answers[0] for cloze in clozes], picks, f" {YES_NO[0]}")


def question_match(clozes: Sequence[Cloze], picks: Sequence[str]) -> float:
    """Return the share of questions all of whose answers are judged right (EM)."""
    right: dict[str, bool] = {}
    for cloze, pick in zip(clozes, picks, strict=True):
        right[cloze.question] = right.get(cloze.question, True) and pick in cloze.answers

    return mean(right.values())


def entity_f1(clozes: Sequence[Cloze], picks: Sequence[str]) -> float:
    """Return token F1 of the entity against the answer that it meets best, mean over queries."""
    pairs = zip(clozes, picks, strict=True)
    return mean(max(token_f1(pick, answer) for answer in cloze.answers) for cloze, pick in pairs)


def entity_match(clozes: Sequence[Cloze], picks: Sequence[str]) -> float:
    """Return the share of queries whose entity has the words of an answer."""
    return mean(
        any(equal_in_squad(pick, answer) for answer in cloze.answers)
        for cloze, pick in zip(clozes, picks, strict=True)
    )


def _f1(labels: Sequence[str], picks: Sequence[str], name: str) -> float:
    """Return F1 of one class; 0 where it was never picked rightly."""
    both = sum(label == pick == name for label, pick in zip(labels, picks, strict=True))
    return 2 * both / (labels.count(name) + list(picks).count(name)) if both else 0.0


METRICS: dict[str, dict[str, Callable[[Sequence[Cloze], Sequence[str]], float]]] = {
    "BoolQ": {"accuracy": accuracy},
    "CB": {"accuracy": accuracy, "macro_f1": macro_f1},
    "COPA": {"accuracy": accuracy},
    "MultiRC": {"f1a": answer_f1, "exact_match": question_match},
    "ReCoRD": {"f1": entity_f1, "exact_match": entity_match},
    "RTE": {"accuracy": accuracy},
    "WiC": {"accuracy": accuracy},
    "WSC": {"accuracy": accuracy},
}
"""Metrics of each task: on SuperGLUE's board, in its order."""
