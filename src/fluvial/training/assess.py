"""The measurements of `fluvial evaluate`: an adapter beside its base, or a model by itself.

They are made on a file of records, on multiple-choice questions, on SuperGLUE's tasks, on tasks of
lm-eval, or on several of these.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fluvial import __version__
from fluvial.data import DataConfig
from fluvial.data.multiple_choice import Choice, Language, Scoring, chance, language_of
from fluvial.errors import ConfigError
from fluvial.models.digests import weights_digest
from fluvial.models.encoding import Encoder
from fluvial.models.loading import weights_folder
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.threads import faster_threads, with_threads
from fluvial.training.choice_prompts import Sheet, prepare
from fluvial.training.choice_scores import Marks, bootstrap, score
from fluvial.training.choices import read_choices
from fluvial.training.evaluate import has_effect
from fluvial.training.folders import AdapterFolder
from fluvial.training.generated import AnswerConfig
from fluvial.training.harness import Harness, HarnessConfig
from fluvial.training.opened import open_weights
from fluvial.training.record_result import read_texts, record_result
from fluvial.training.subjects import BENCHMARKS, Benchmark, BenchmarkName, detect, grouped
from fluvial.training.superglue import Cloze, read_superglue
from fluvial.training.superglue_scores import Task, superglue_result
from fluvial.wire.tensors import Named

logger = logging.getLogger(__name__)


NOTHING_TO_MEASURE = (
    "nothing to measure: name a file with --data, questions with --choices, SuperGLUE's folder "
    "with --superglue, tasks of lm-eval with --tasks, or several of them"
)


PROBE = "The"
"""Text on which an adapter must have an effect, where nothing else is at hand."""


@dataclass(frozen=True)
class ChoiceConfig:
    """A multiple-choice test."""

    path: Path
    shots: int = 0
    shots_path: Path | None = None
    """File of the solved examples in a prompt: records of the same form, such as MMLU's dev
    split."""
    scoring: Scoring = "letter"
    language: Literal["auto"] | Language = "auto"
    """Wording of the prompt; "auto" is Chinese for a question with Chinese characters."""
    subject_field: str = "subject"
    """The field of a record that names its subject."""
    benchmark: Literal["auto", "none"] | BenchmarkName = "auto"
    """Benchmark whose groups of subjects are reported; "auto" finds it by the subjects."""


def whole_file(path: Path) -> dict[str, Any]:
    """Return the table `data` of a configuration that measures every record of `path`."""
    return {"source": str(path)}


def evaluate_adapter(
    adapter: AdapterFolder,
    model: ModelConfig,
    *,
    data: DataConfig | None = None,
    choices: ChoiceConfig | None = None,
    superglue: Path | None = None,
    tasks: HarnessConfig | None = None,
    answers: AnswerConfig | None = None,
    seed: int = 0,
    base: bool = True,
    pool: ModelPool | None = None,
) -> dict[str, Any]:
    """Measure an adapter or a tuned model, and with `base` its base model too.

    The text is the held-out part of `data`, made with `whole_file`, the questions of `choices`, the
    tasks in the folder `superglue`, the `tasks` of lm-eval, or several of these. `answers` asks
    for scores of greedy answers to the records of `data`. Return JSON types. Raises `ConfigError`
    when a file or a setting is wrong or the adapter has no effect. A `pool` of the same base lends
    an adapter what it has loaded.
    """
    if data is None and choices is None and superglue is None and tasks is None:
        raise ConfigError(NOTHING_TO_MEASURE)

    questions = None if choices is None else _questions(choices)
    clozes = {} if superglue is None else read_superglue(superglue)
    harness = None if tasks is None else Harness(tasks)
    lent = pool is not None
    pool, state = open_weights(adapter, model, pool)
    with nullcontext() if lent else _faster(pool, pool.base_state()):
        logger.info("reading the data")
        texts = None if data is None else read_texts(data, pool, answers)
        sheet = _sheet(choices, questions, pool) if choices and questions else None
        cloze_tasks = _tasks(clozes, pool)
        probes = [texts.examples[0].input_ids] if texts else []
        probes += [sheet.prompts[0].prefix] if sheet else []
        probes += [task.prompts[0].prefix for task in cloze_tasks.values()]
        probes += [Encoder.of(pool.tokenizer).prompt(PROBE)]
        if not has_effect(pool, state, probes[0]):
            raise ConfigError(
                "what was tuned gives exactly the base model's logits: it was not trained, or does "
                "not belong to this model"
            )

        models = ({"base": pool.base_state()} if base else {}) | {"adapter": state}
        result: dict[str, Any] = {
            "fluvial": __version__,
            "adapter": str(adapter.path),
            "tuned": "lora" if adapter.lora else "full",
            "base_model": model.name_or_path,
        }

        if data is not None and texts is not None:
            result["data"] = record_result(data, texts, pool, models, answers, seed)
        if choices is not None and sheet is not None:
            result["choices"] = _choice_result(choices, sheet, pool, models, seed)
        if cloze_tasks:
            result["superglue"] = superglue_result(cloze_tasks, pool, models)
        if harness is not None:
            names = {"base": _loaded_as(model), "adapter": _loaded_as(model, adapter)}
            result["tasks"] = harness.measure(pool, models, names)

    return result


def evaluate_model(
    model: ModelConfig,
    *,
    data: DataConfig | None = None,
    choices: ChoiceConfig | None = None,
    superglue: Path | None = None,
    tasks: HarnessConfig | None = None,
    answers: AnswerConfig | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a model by itself, as `evaluate_adapter` measures a base model."""
    if data is None and choices is None and superglue is None and tasks is None:
        raise ConfigError(NOTHING_TO_MEASURE)

    questions = None if choices is None else _questions(choices)
    clozes = {} if superglue is None else read_superglue(superglue)
    harness = None if tasks is None else Harness(tasks)
    logger.info("loading the model")
    pool = ModelPool(model, None)
    pool.check_behaviour()
    with _faster(pool, {}):
        logger.info("reading the data")
        texts = None if data is None else read_texts(data, pool, answers)
        cloze_tasks = _tasks(clozes, pool)
        models: dict[str, Named] = {"model": {}}
        result: dict[str, Any] = {"fluvial": __version__, "model": model.name_or_path}

        if data is not None and texts is not None:
            result["data"] = record_result(data, texts, pool, models, answers, seed)
        if choices is not None and questions:
            sheet = _sheet(choices, questions, pool)
            result["choices"] = _choice_result(choices, sheet, pool, models, seed)
        if cloze_tasks:
            result["superglue"] = superglue_result(cloze_tasks, pool, models)
        if harness is not None:
            result["tasks"] = harness.measure(pool, models, {"model": _loaded_as(model)})

    return result


def _faster(pool: ModelPool, state: Named) -> AbstractContextManager[None]:
    """Return a context that computes on the number of threads that is faster for this model."""
    with pool.model(state) as model:
        return with_threads(faster_threads(model))


def _loaded_as(model: ModelConfig, adapter: AdapterFolder | None = None) -> dict[str, Any]:
    """Return the arguments by which lm-eval would load a model, and digests of its files."""
    named = {"dtype": model.dtype, **model.quantisation_settings}
    if adapter is not None and not adapter.lora:
        return {
            "pretrained": str(adapter.path),
            "sha256": weights_digest(adapter.path),
            **named,
        }

    loaded = {
        "pretrained": model.name_or_path,
        "sha256": weights_digest(weights_folder(model)),
        **({"revision": model.revision} if model.revision else {}),
        **named,
    }
    if adapter is not None:
        loaded |= {"peft": str(adapter.path), "peft_sha256": weights_digest(adapter.path)}
    return loaded


def _questions(choices: ChoiceConfig) -> tuple[list[Choice], list[Choice]]:
    """Return the questions, and the records that examples are taken from."""
    paths = [choices.path, *([choices.shots_path] if choices.shots_path else [])]
    asked, *examples = (read_choices(path, choices.subject_field) for path in paths)
    return asked, examples[0] if examples else []


def _sheet(
    choices: ChoiceConfig, questions: tuple[list[Choice], list[Choice]], pool: ModelPool
) -> Sheet:
    asked, examples = questions
    return prepare(
        asked,
        pool.tokenizer,
        context=pool.outline.context,
        scoring=choices.scoring,
        shots=choices.shots,
        examples=examples,
        language=choices.language,
    )


def _tasks(clozes: Mapping[str, Sequence[Cloze]], pool: ModelPool) -> dict[str, Task]:
    encoder = Encoder.of(pool.tokenizer)
    return {name: Task.of(some, encoder, pool.outline.context) for name, some in clozes.items()}


def _choice_result(
    choices: ChoiceConfig, sheet: Sheet, pool: ModelPool, models: dict[str, Named], seed: int
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "source": str(choices.path),
        "scoring": choices.scoring,
        "shots": choices.shots,
        "shots_source": None if choices.shots_path is None else str(choices.shots_path),
        "language": choices.language,
        "questions": len(sheet.questions),
        "short_of_shots": sheet.short_of_shots,
        "dropped_shots": sheet.dropped_shots,
        "cut_questions": sheet.cut_questions,
        "cut_tokens": sheet.cut_tokens,
        "chance": chance(sheet.questions),
    }
    marks = {}
    for name, adapter in models.items():
        with pool.model(adapter) as model:
            marks[name] = Marks.of(
                sheet, score(model, sheet.prompts, pad_token_id=pool.tokenizer.pad_token_id)
            )

        interval = marks[name].interval(seed)
        result[name] = {
            "accuracy": interval.mean,
            "macro_accuracy": _macro(marks[name]),
            "standard_error": marks[name].standard_error,
            "interval": [interval.low, interval.high],
            "interval_by": interval.method,
        }

    if "base" in marks:
        pairs = zip(marks["adapter"].right, marks["base"].right, strict=True)
        gains = [after - before for after, before in pairs]
        gain = bootstrap(gains, seed)
        result["difference"] = {
            "accuracy": sum(gains) / len(gains),
            "interval": None if gain is None else [gain.low, gain.high],
        }

    by_subject = {name: model_marks.by_subject() for name, model_marks in marks.items()}
    result["by_subject"] = {
        subject: {"questions": asked}
        | {name: rows[subject][0] / asked for name, rows in by_subject.items()}
        for subject, (_, asked) in next(iter(by_subject.values())).items()
    }
    benchmark = _benchmark(choices, sheet)
    result["groups"] = None if benchmark is None else grouped(benchmark, by_subject)

    return result


def _macro(marks: Marks) -> float:
    """Return the mean accuracy over the subjects, each counting the same."""
    rows = marks.by_subject().values()
    return sum(right / asked for right, asked in rows) / len(rows)


def _benchmark(choices: ChoiceConfig, sheet: Sheet) -> Benchmark | None:
    """Return the benchmark whose groups are reported, None for no groups."""
    if choices.benchmark == "none":
        return None
    if choices.benchmark != "auto":
        return BENCHMARKS[choices.benchmark]
    chinese = [language_of(question.question) == "zh" for question in sheet.questions]
    subjects = {question.subject for question in sheet.questions if question.subject}
    return detect(subjects, chinese=2 * sum(chinese) > len(chinese))
