"""`fluvial evaluate`: measure an adapter or a model on records, questions, and tasks of lm-eval."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from click.core import ParameterSource

from fluvial.cli.console import Format, Overrides, finite, print_content
from fluvial.cli.progress import spinner
from fluvial.errors import ConfigError
from fluvial.storage.files import exists, expanded

if TYPE_CHECKING:
    from fluvial.training.generated import Metric

ANSWERS: dict[str, Any] = {"rich_help_panel": "Generated answers"}
HARNESS: dict[str, Any] = {"rich_help_panel": "Tasks of lm-eval"}
ONLY_WITH_CHOICES = {
    "--shots",
    "--shots-from",
    "--scoring",
    "--language",
    "--benchmark",
    "--subject-field",
}
ONLY_WITH_TASKS = {
    "--num-fewshot",
    "--limit",
    "--include-path",
    "--dataset",
    "--apply-chat-template",
    "--out",
}
ONLY_WITH_RECORDS = {"--site", "--generate", "--no-generate"}
ONLY_WITH_ANSWERS = {"--max-new-tokens", "--metrics", "--answers", "--site-field"}


def evaluate(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            help="A run's folder, a PEFT folder such as runs/NAME/adapter, a model's folder or hub "
            "id, or 'embedded'.",
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help="Records for loss, perplexity, accuracy, exact match.")
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            help="Site whose table data.by_site.NAME of the run says how --data is read; unset, "
            "the one that names this file.",
            show_default=False,
        ),
    ] = None,
    generate: Annotated[
        bool | None,
        typer.Option(
            "--generate/--no-generate",
            help="Write greedy answers to the records of --data and score them; the default where "
            "they have answers.",
            **ANSWERS,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of an answer; unset, those of the run, or 64.", **ANSWERS),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Of exact_match, f1, rouge, bleu and chrf.", **ANSWERS)
    ] = "exact_match,f1,rouge",
    answers_out: Annotated[
        Path | None,
        typer.Option(
            "--answers",
            help="File for question, right answers and each model's answer, JSON lines.",
            **ANSWERS,
        ),
    ] = None,
    site_field: Annotated[
        str | None,
        typer.Option(
            help="The field that names a record's site; unset, the column of the run's partition.",
            **ANSWERS,
        ),
    ] = None,
    choices: Annotated[
        Path | None, typer.Option(help="Multiple-choice questions, JSON lines.")
    ] = None,
    shots: Annotated[
        int, typer.Option(min=0, max=5, help="Solved examples before each question.")
    ] = 0,
    shots_from: Annotated[
        Path | None, typer.Option(help="Questions that the examples are taken from.")
    ] = None,
    scoring: Annotated[
        Literal["letter", "text"],
        typer.Option(help="Compare the answers' letters, or their texts by loss per byte."),
    ] = "letter",
    language: Annotated[
        Literal["auto", "en", "zh"], typer.Option(help="Language of the prompt's wording.")
    ] = "auto",
    benchmark: Annotated[
        Literal["auto", "none", "mmlu", "ceval", "cmmlu"],
        typer.Option(help="Benchmark that groups the subjects; auto recognises it by their names."),
    ] = "auto",
    subject_field: Annotated[
        str, typer.Option(help="The field of a question that names its subject.")
    ] = "subject",
    superglue: Annotated[
        Path | None,
        typer.Option(help="Folder of SuperGLUE's tasks, such as FOLDER/RTE/val.jsonl."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, such as 'mmlu,gsm8k'; patterns, too.", **HARNESS),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Solved examples; unset, the task's own number.", **HARNESS),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            min=0, callback=finite, help="First documents of a task; below 1, a share.", **HARNESS
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own, as YAML files.", **HARNESS)
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=FOLDER",
            help="A task's data set from a folder, a copy of its repository; may be repeated.",
            **HARNESS,
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in the chat template.", **HARNESS)
    ] = False,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, max=1024, help="Prompts at a time, also of generated answers.", **HARNESS
        ),
    ] = 8,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for lm-eval's result files, one for each model.", **HARNESS),
    ] = None,
    base: Annotated[
        bool, typer.Option(help="Measure the base model too, where there is one.")
    ] = True,
    overrides: Overrides = None,
    format: Format = "table",
) -> None:
    """Measure an adapter or a tuned model beside its base, or a model alone.

    Measured are records, multiple-choice questions, SuperGLUE, tasks of lm-eval, or several of
    them. Records are read as the run read its own: form, columns, encoding, template, max_length.
    --set 'data.form="text"' overrides.
    """
    given = _given(context)
    if choices is None:
        _refuse(given & ONLY_WITH_CHOICES, "no questions are named; add --choices")
    if limit == 0:
        raise ConfigError("--limit 0: would measure nothing; give a number of documents or a share")
    if tasks is None:
        _refuse(given & ONLY_WITH_TASKS, "no tasks of lm-eval are named; add --tasks")
    if data is None:
        idle = given & (ONLY_WITH_RECORDS | ONLY_WITH_ANSWERS)
        _refuse(idle, "no records are named; add --data")
    if data is None and tasks is None:
        _refuse(given & {"--batch-size"}, "no records or tasks are named; add --data or --tasks")
    if generate is False:
        _refuse(given & ONLY_WITH_ANSWERS, "--no-generate is given; remove it")
    _refuse_missing(
        {
            "--data": data,
            "--choices": choices,
            "--shots-from": shots_from,
            "--superglue": superglue,
            "--include-path": include_path,
        }
    )

    with spinner("reading the weights"):
        from fluvial.runs.evaluation import (
            evaluation_settings,
            how_records_are_read,
            own_reading,
            run_settings,
            with_remedies,
        )
        from fluvial.runs.trained_on import trained_on, trained_words
        from fluvial.training.assess import ChoiceConfig, evaluate_adapter, evaluate_model
        from fluvial.training.folders import kind_of, measured_as, read_adapter_folder, weights_in
        from fluvial.training.generated import AnswerConfig
        from fluvial.training.harness import HarnessConfig

        questions = None
        if choices is not None:
            questions = ChoiceConfig(
                choices, shots, shots_from, scoring, language, subject_field, benchmark
            )

        harness = None
        if tasks is not None:
            harness = HarnessConfig(
                _names(tasks, "--tasks", "task"),
                num_fewshot,
                limit,
                include_path,
                _folders(dataset or []),
                apply_chat_template,
                batch_size,
                out,
            )

        target = weights_in(target)
        kind = kind_of(target)
        if kind == "adapter" or (kind == "tuned" and base):
            folder = expanded(target)
            weights = read_adapter_folder(folder)
            run = own_reading(folder, weights.run, data, site, overrides or [])
            recorded = measured_as(run, weights.base, data)
        else:
            weights = None
            recorded, run = run_settings(target, data, site, overrides or [])

        settings = evaluation_settings(recorded, data, overrides or [])
        answers = None
        if generate is not False:
            answers = AnswerConfig(
                max_new_tokens or settings.evaluate.max_new_tokens,
                cast("tuple[Metric, ...]", _names(metrics, "--metrics", "metric")),
                batch_size,
                bool(generate or answers_out),
                site_field or run.get("site_column"),
                site_field is not None,
                answers_out,
            )

        measure = evaluate_model
        if weights is not None:
            measure = partial(evaluate_adapter, weights, base=base)
        with with_remedies(run):
            measured = measure(
                settings.model,
                data=settings.data if data else None,
                choices=questions,
                superglue=superglue,
                tasks=harness,
                answers=answers,
                seed=settings.seed,
            )

        if data is not None:
            measured["records"] = how_records_are_read(
                settings.data, run, overrides or [], measured["data"]["form"]
            )
            known = trained_on(expanded(target), settings.data)
            measured["records"]["trained_on"] = known
            measured["records"]["warning"] = trained_words(known, measured["data"]["records"])

    from fluvial.report.evaluation_tables import evaluation_tables

    print_content(measured, format, evaluation_tables)


def _given(context: typer.Context) -> set[str]:
    """Return the options on the command line, `--no-` ones as such."""
    return {
        parameter.secondary_opts[0]
        if context.params[str(parameter.name)] is False and parameter.secondary_opts
        else parameter.opts[0]
        for parameter in context.command.params
        if context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    }


def _refuse_missing(paths: Mapping[str, Path | None]) -> None:
    """Raise `ConfigError` for a path that names nothing, before weights are read."""
    from fluvial.data.sources import is_local

    for option, path in paths.items():
        if path is None or exists(expanded(path)):
            continue
        if option != "--data" or is_local(str(path)):  # which a hub id may be
            raise ConfigError(f"{option}: there is no file or folder {str(path)!r}")


def _refuse(options: set[str], why: str) -> None:
    """Raise `ConfigError` for options that were given and have no effect."""
    if options:
        raise ConfigError(f"{', '.join(sorted(options))}: without effect, because {why}")


def _names(text: str, option: str, kind: str) -> tuple[str, ...]:
    """Return the names in a list with commas."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ConfigError(f"{option}: names no {kind}; write one, or several with commas")
    return names


def _folders(lines: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each task's data set."""
    folders = {}
    for line in lines:
        task, mark, folder = line.partition("=")
        if not (mark and task and folder):
            raise ConfigError(f"--dataset {line!r}: write TASK=FOLDER, such as 'mmlu=copies/mmlu'")
        if not expanded(folder).is_dir():
            raise ConfigError(f"--dataset {line!r}: there is no folder {folder!r}")
        folders[task] = Path(folder)
    return folders
