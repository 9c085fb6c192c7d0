"""Tables that `fluvial evaluate` prints: records, questions, their subjects, SuperGLUE, tasks."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fluvial.formatting import safe_text
from fluvial.report.answer_tables import answer_tables, interval_words
from fluvial.report.harness_table import harness_table
from fluvial.report.tables import table
from fluvial.storage.run_files import JsonObject


def evaluation_tables(measured: JsonObject) -> Group:
    """Return tables of the records, the questions, also by subject, SuperGLUE, and the tasks."""
    title = (
        measured["model"]
        if "model" in measured
        else f"{measured['adapter']} on {measured['base_model']}"
    )
    content: list[RenderableType] = [Text(safe_text(title), style="bold")]

    if "records" in measured:
        content.append(Text(safe_text(measured["records"]["line"])))
        if measured["records"]["warning"]:
            content.append(Text(f"• {measured['records']['warning']}", style="bold"))
    if "data" in measured:
        content.append(_record_table(measured["data"], _headings(measured)))
        content += answer_tables(measured["data"].get("answers"), _headings(measured))
    if "choices" in measured:
        content += _choice_tables(measured["choices"], _headings(measured))

    if "superglue" in measured:
        content.append(_superglue_table(measured["superglue"], _headings(measured)))
    if "tasks" in measured:
        content.append(harness_table(measured["tasks"], _headings(measured)))

    return Group(*content)


def _headings(measured: JsonObject) -> dict[str, str]:
    """Return the heading of each column."""
    tuned = "tuned model" if measured.get("tuned") == "full" else "adapter"
    return {"base": "base", "adapter": tuned, "model": "model"}


def _figure(value: float | None) -> str:
    """Return a measure with four decimals; the perplexity of a loss beyond 709 nats is None."""
    return "over 1e308" if value is None else f"{value:.4f}"


def _models(measures: JsonObject) -> list[str]:
    """Return the measured models in the order of the columns."""
    return [name for name in ("base", "adapter", "model") if name in measures]


def _record_table(data: JsonObject, headings: dict[str, str]) -> Table:
    models = _models(data)
    labels = {
        "loss": "loss, nats per token",
        "perplexity": "perplexity",
        "accuracy": "next-token accuracy",
    }
    rows = [
        [label, *(_figure(data[model][key]) for model in models)] for key, label in labels.items()
    ]
    notes = [f"{data['records']} records", f"{data['label_tokens']:,} label tokens"]

    if data["unmeasured_sequences"]:
        notes += [
            f"the first {data['sequences']} sequences; {data['unmeasured_sequences']} beyond "
            "data.max_heldout"
        ]

    notes += data["notes"]
    notes += [
        f"{data['truncated_records']} records truncated to data.max_length={data['max_length']}"
    ]
    return _measures(data["source"], ["", *(headings[model] for model in models)], rows, notes)


def _choice_tables(choices: JsonObject, headings: dict[str, str]) -> list[Table]:
    models = _models(choices)
    macro = [f"{choices[model]['macro_accuracy']:.4f}" for model in models]
    spans = {model: choices[model]["interval"] for model in models}
    rows = [
        ["accuracy", *(f"{choices[model]['accuracy']:.4f}" for model in models)],
        *([["accuracy, mean over subjects", *macro]] if len(choices["by_subject"]) > 1 else []),
        ["95 % interval", *(f"{low:.4f} to {high:.4f}" for low, high in spans.values())],
        ["standard error", *(f"{choices[model]['standard_error']:.4f}" for model in models)],
    ]
    notes = [
        f"{choices['questions']} questions by {choices['scoring']}",
        f"{choices['shots']} shots",
    ]
    notes += [f"chance {choices['chance']:.2f}"]
    notes += interval_words(choices, {model: headings[model] for model in models})

    if "difference" in choices:
        span = choices["difference"]["interval"]
        interval = (
            f"95 %: {span[0]:+.4f} to {span[1]:+.4f}" if span else "the same for every question"
        )
        notes += [f"difference {choices['difference']['accuracy']:+.4f} ({interval})"]

    losses = {
        "short_of_shots": "questions with fewer examples than asked for",
        "dropped_shots": "examples dropped to fit the context",
        "cut_questions": "prompts cut on the left to fit the context",
    }
    notes += [f"{choices[key]} {loss}" for key, loss in losses.items() if choices[key]]
    subjects = [
        [subject or "-", str(row["questions"]), *(f"{row[model]:.4f}" for model in models)]
        for subject, row in choices["by_subject"].items()
    ]

    columns = [headings[model] for model in models]
    tables = [
        _measures(choices["source"], ["", *columns], rows, notes),
        *_group_tables(choices.get("groups"), models, headings),
    ]
    if len(subjects) > 1:  # one subject has the accuracy of all questions
        tables.append(_measures("By subject", ["subject", "questions", *columns], subjects, []))
    return tables


def _superglue_table(superglue: JsonObject, headings: dict[str, str]) -> Table:
    models = _models(superglue["average"])
    labels = {
        "accuracy": "accuracy",
        "macro_f1": "macro F1",
        "f1a": "F1a",
        "f1": "F1",
        "exact_match": "exact match",
    }
    rows = [
        [task, labels[metric], str(row["clozes"]), *(_figure(row[m][metric]) for m in models)]
        for task, row in superglue["tasks"].items()
        for metric in row[models[0]]
    ]
    averages = [_figure(superglue["average"][model]) for model in models]
    rows.append(["mean of tasks", "", "", *averages])
    notes = [
        f"{row['cut']} prompts of {task} cut on the left to fit the context"
        for task, row in superglue["tasks"].items()
        if row["cut"]
    ]
    notes += [
        f"{row['alone']} clozes of {task} with one candidate, which is taken"
        for task, row in superglue["tasks"].items()
        if row["alone"]
    ]
    columns = ["task", "metric", "clozes", *(headings[model] for model in models)]
    return _measures("SuperGLUE", columns, rows, notes)


def _group_tables(
    groups: JsonObject | None, models: list[str], headings: dict[str, str]
) -> list[Table]:
    """Return the groups of subjects by both means; nothing for subjects of no known benchmark."""
    if groups is None:
        return []

    columns = ["group", "subjects", "questions"]
    columns += [f"{headings[model]}, {mean}" for model in models for mean in ("macro", "micro")]
    rows = []

    for name, row in groups["table"].items():
        subjects = str(row["subjects"])
        if row["subjects"] < row["of_subjects"]:
            subjects += f" of {row['of_subjects']}"
        figures = [f"{row[model][mean]:.4f}" for model in models for mean in ("macro", "micro")]
        rows.append([name, subjects, str(row["questions"]), *figures])

    notes = [
        "macro: mean over subjects; micro: over questions",
        f"{groups['benchmark']}'s own code reports {groups['reported_mean']}",
    ]
    if groups["without_group"]:
        names = ", ".join(subject or "-" for subject in groups["without_group"])
        notes.append(f"in no group, and in no mean of this table: {names}")

    return [_measures(f"By group of {groups['benchmark']}", columns, rows, notes)]


def _measures(title: str, columns: list[str], rows: list[list[str]], notes: list[str]) -> Table:
    """Return a table of measures with `notes` below it."""
    return table(columns, rows, title, caption="; ".join(notes))
