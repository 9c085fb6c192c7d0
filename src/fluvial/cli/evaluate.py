"""`fluvial evaluate`: measure an adapter or a model on records, questions and SuperGLUE."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from fluvial.cli.console import Format, Overrides, print_content
from fluvial.cli.progress import spinner
from fluvial.errors import ConfigError


def evaluate(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="runs/NAME/adapter or any PEFT folder, runs/NAME/model, a model's folder or hub "
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
    base: Annotated[
        bool, typer.Option(help="Measure the base model too, where there is one.")
    ] = True,
    overrides: Overrides = None,
    format: Format = "table",
) -> None:
    """Measure an adapter or a tuned model beside its base, or a model alone.

    Measured are records, multiple-choice questions, SuperGLUE, or several of them. Records are read
    as the run read its own: form, columns, template, max_length. --set 'data.form="text"'
    overrides.
    """
    only_with_choices = {
        "--shots": shots,
        "--shots-from": shots_from,
        "--scoring": scoring != "letter",
        "--language": language != "auto",
        "--benchmark": benchmark != "auto",
        "--subject-field": subject_field != "subject",
    }
    without_effect = [option for option, given in only_with_choices.items() if given]

    if choices is None and without_effect:
        raise ConfigError(
            f"{', '.join(without_effect)}: without effect, because no questions are named; "
            "add --choices"
        )

    with spinner("reading the weights"):
        from fluvial.runs.evaluation import evaluation_settings, how_records_are_read, run_settings
        from fluvial.training.assess import ChoiceConfig, evaluate_adapter, evaluate_model
        from fluvial.training.folders import kind_of, read_adapter_folder

        questions = None
        if choices is not None:
            questions = ChoiceConfig(
                choices, shots, shots_from, scoring, language, subject_field, benchmark
            )

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
            max_new_tokens=settings.evaluate.max_new_tokens,
            seed=settings.seed,
        )

        if data is not None:
            measured["records"] = how_records_are_read(
                settings.data, run, overrides or [], measured["data"]["form"]
            )

    from fluvial.report.evaluation_tables import evaluation_tables

    print_content(measured, format, evaluation_tables)
