"""What `fluvial evaluate` prints for people."""

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fluvial.formatting import safe_text


def evaluation_tables(found: dict[str, Any]) -> Group:
    """One table for the records, one for the questions, one for their subjects."""
    title = found["model"] if "model" in found else f"{found['adapter']} on {found['base_model']}"
    parts: list[Any] = [Text(safe_text(title), style="bold")]

    if "records" in found:
        parts.append(Text(safe_text(found["records"]["line"])))
    if "data" in found:
        parts.append(_record_table(found["data"], _title(found)))
    if "choices" in found:
        parts += _choice_tables(found["choices"], _title(found))

    return Group(*parts)


def _title(found: dict[str, Any]) -> dict[str, str]:
    """The heading of each column."""
    tuned = "tuned model" if found.get("tuned") == "full" else "adapter"
    return {"base": "base", "adapter": tuned, "model": "model"}


def _figure(value: float | None) -> str:
    """A measure with four decimals; the perplexity of a loss beyond 709 nats is None."""
    return "over 1e308" if value is None else f"{value:.4f}"


def _measured(table: dict[str, Any]) -> list[str]:
    """The models of a table, in the order of its columns."""
    return [name for name in ("base", "adapter", "model") if name in table]


def _record_table(data: dict[str, Any], titles: dict[str, str]) -> Table:
    models = _measured(data)
    labels = {
        "loss": "loss, nats per token",
        "perplexity": "perplexity",
        "accuracy": "next-token accuracy",
        "exact_match": "exact match of greedy answers, outer white space aside",
    }
    rows = [
        [labels[key], *(_figure(data[model][key]) for model in models)] for key in data[models[-1]]
    ]
    notes = [f"{data['records']} records", f"{data['label_tokens']:,} label tokens"]

    if data["unmeasured_sequences"]:
        notes += [
            f"the first {data['sequences']} sequences; {data['unmeasured_sequences']} beyond data.max_heldout"
        ]

    notes += data["notes"]
    notes += [
        f"{data['truncated_records']} records truncated to data.max_length={data['max_length']}"
    ]
    if data["questions_too_long"]:
        notes += [f"{data['questions_too_long']} prompts too long for an answer, counted as wrong"]

    return _columns(data["source"], ["", *(titles[model] for model in models)], rows, notes)


def _choice_tables(asked: dict[str, Any], titles: dict[str, str]) -> list[Table]:
    models = _measured(asked)
    macro = [f"{asked[model]['macro_accuracy']:.4f}" for model in models]
    spans = {model: asked[model]["interval"] for model in models}
    rows = [
        ["accuracy", *(f"{asked[model]['accuracy']:.4f}" for model in models)],
        *([["accuracy, mean over subjects", *macro]] if len(asked["by_subject"]) > 1 else []),
        ["95 % interval", *(f"{low:.4f} to {high:.4f}" for low, high in spans.values())],
        ["standard error", *(f"{asked[model]['standard_error']:.4f}" for model in models)],
    ]
    notes = [f"{asked['questions']} questions by {asked['scoring']}", f"{asked['shots']} shots"]
    notes += [f"chance {asked['chance']:.2f}"]

    if "difference" in asked:
        span = asked["difference"]["interval"]
        known = f"95 %: {span[0]:+.4f} to {span[1]:+.4f}" if span else "the same for every question"
        notes += [f"difference {asked['difference']['accuracy']:+.4f} ({known})"]

    losses = {
        "short_of_shots": "questions with fewer examples than asked for",
        "dropped_shots": "examples dropped to fit the context",
        "cut_questions": "prompts cut on the left to fit the context",
    }
    notes += [f"{asked[key]} {what}" for key, what in losses.items() if asked[key]]
    subjects = [
        [subject or "-", str(row["questions"]), *(f"{row[model]:.4f}" for model in models)]
        for subject, row in asked["by_subject"].items()
    ]

    return [
        _columns(asked["source"], ["", *(titles[model] for model in models)], rows, notes),
        *_group_tables(asked.get("groups"), models, titles),
        _columns(
            "By subject",
            ["subject", "questions", *(titles[model] for model in models)],
            subjects,
            [],
        ),
    ]


def _group_tables(
    groups: dict[str, Any] | None, models: list[str], titles: dict[str, str]
) -> list[Table]:
    """Groups of subjects by both means; nothing where the subjects are of no known benchmark."""
    if groups is None:
        return []

    headings = ["group", "subjects", "questions"]
    headings += [f"{titles[model]}, {mean}" for model in models for mean in ("macro", "micro")]
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

    return [_columns(f"By group of {groups['benchmark']}", headings, rows, notes)]


def _columns(title: str, headings: list[str], rows: list[list[str]], notes: list[str]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(
        title=Text(safe_text(title)),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption="; ".join(notes) or None,
    )
    table.caption_justify = "left"

    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(safe_text(cell)) for cell in row))
    return table
