"""`fluvial evaluate`: measure an adapter or a model on records, questions, and tasks of lm-eval."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fluvial.cli.console import Format, Overrides, print_content
from fluvial.cli.progress import spinner
from fluvial.errors import ConfigError

HARNESS: dict[str, Any] = {"rich_help_panel": "Tasks of lm-eval"}


def evaluate(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A run's folder, a PEFT folder such as runs/NAME/adapter, a model's folder or hub "
            "id, or 'embedded'.",
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help="Records for loss, perplexity, accuracy, exact match.")
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
        typer.Option(min=0, help="First documents of a task; below 1, a share.", **HARNESS),
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
        int, typer.Option(min=1, help="Documents of one forward pass.", **HARNESS)
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
    them. Records are read as the run read its own: form, columns, template, max_length. --set
    'data.form="text"' overrides.
    """
    only_with_choices = {
        "--shots": shots,
        "--shots-from": shots_from,
        "--scoring": scoring != "letter",
        "--language": language != "auto",
        "--benchmark": benchmark != "auto",
        "--subject-field": subject_field != "subject",
    }
    if choices is None:
        _refuse(only_with_choices, "no questions are named; add --choices")

    if limit == 0:
        raise ConfigError("--limit 0: would measure nothing; give a number of documents or a share")
    only_with_tasks = {
        "--num-fewshot": num_fewshot is not None,
        "--limit": limit is not None,
        "--include-path": include_path is not None,
        "--dataset": dataset,
        "--apply-chat-template": apply_chat_template,
        "--batch-size": batch_size != 8,
        "--out": out is not None,
    }
    if tasks is None:
        _refuse(only_with_tasks, "no tasks of lm-eval are named; add --tasks")

    with spinner("reading the weights"):
        from fluvial.runs.evaluation import evaluation_settings, how_records_are_read, run_settings
        from fluvial.training.assess import ChoiceConfig, evaluate_adapter, evaluate_model
        from fluvial.training.folders import kind_of, read_adapter_folder, weights_in
        from fluvial.training.harness import HarnessConfig

        questions = None
        if choices is not None:
            questions = ChoiceConfig(
                choices, shots, shots_from, scoring, language, subject_field, benchmark
            )

        harness = None
        if tasks is not None:
            harness = HarnessConfig(
                _names(tasks),
                num_fewshot,
                limit,
                include_path,
                _folders(dataset or []),
                apply_chat_template,
                batch_size,
                out,
            )

        adapter = weights_in(adapter)
        kind = kind_of(adapter)
        if kind == "adapter" or (kind == "tuned" and base):
            weights = read_adapter_folder(Path(adapter).expanduser())
            recorded = weights.settings(data)
            run = weights.run
        else:
            weights = None
            recorded, run = run_settings(adapter, data)

        settings = evaluation_settings(recorded, data, overrides or [])
        measure = evaluate_model
        if weights is not None:
            measure = partial(evaluate_adapter, weights, base=base)
        measured = measure(
            settings.model,
            data=settings.data if data else None,
            choices=questions,
            superglue=superglue,
            tasks=harness,
            max_new_tokens=settings.evaluate.max_new_tokens,
            seed=settings.seed,
        )

        if data is not None:
            measured["records"] = how_records_are_read(
                settings.data, run, overrides or [], measured["data"]["form"]
            )

    from fluvial.report.evaluation_tables import evaluation_tables

    print_content(measured, format, evaluation_tables)


def _refuse(options: Mapping[str, Any], why: str) -> None:
    """Raise `ConfigError` for those of `options` that were given, which have no effect."""
    given = [option for option, value in options.items() if value]
    if given:
        raise ConfigError(f"{', '.join(given)}: without effect, because {why}")


def _names(tasks: str) -> tuple[str, ...]:
    """Return the names in a list with commas."""
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise ConfigError("--tasks: names no task; write one such as 'mmlu', several with commas")
    return names


def _folders(lines: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each task's data set."""
    folders = {}
    for line in lines:
        task, mark, folder = line.partition("=")
        if not (mark and task and folder):
            raise ConfigError(f"--dataset {line!r}: write TASK=FOLDER, such as 'mmlu=copies/mmlu'")
        if not Path(folder).expanduser().is_dir():
            raise ConfigError(f"--dataset {line!r}: there is no folder {folder!r}")
        folders[task] = Path(folder)
    return folders
