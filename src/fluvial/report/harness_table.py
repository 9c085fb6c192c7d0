"""The table of tasks of lm-eval, of an evaluation and of a run."""

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fluvial.formatting import safe_text
from fluvial.report.block_tables import Excerpt
from fluvial.report.tables import table
from fluvial.storage.run_files import JsonObject

TITLE = "Tasks of lm-eval"
"""Title of the table."""
RUN = {"base": "base", "adapter": "final"}
"""Headings of the models that a run measures at its end."""


def run_tasks(result: JsonObject) -> list[RenderableType]:
    """Return the table of the tasks that a run measured at its end; nothing without tasks."""
    tasks = result.get("tasks")
    if tasks is None:
        return []
    if "why" in tasks:
        return [Text(f"{TITLE}: not measured, because {_why(tasks)}"), Text()]
    return [harness_table(tasks, RUN)]


def tasks_of_run(result: JsonObject) -> Excerpt | None:
    """Return the tasks that a run measured at its end, for its page; None without tasks."""
    tasks = result.get("tasks")
    if tasks is None:
        return None
    if "why" in tasks:
        return Excerpt(TITLE, [], [], left=0, words=f"Not measured, because {_why(tasks)}.")
    return harness_rows(tasks, RUN)


def _why(tasks: JsonObject) -> str:
    """Return why a run has no values of its tasks."""
    return safe_text(tasks["why"])


def harness_table(tasks: JsonObject, headings: dict[str, str]) -> Table:
    """Return a table of tasks of lm-eval: values with their standard errors, and differences."""
    found = harness_rows(tasks, headings)
    return table(found.headings, found.rows, found.title, found.left, found.words)


def harness_rows(tasks: JsonObject, headings: dict[str, str]) -> Excerpt:
    """Return the rows of tasks of lm-eval, by model with its heading."""
    rows = []
    models = [model for model in headings if model in tasks["rows"][0]] if tasks["rows"] else []

    for row in tasks["rows"]:
        name = row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
        shots = "" if row["n_shot"] is None else str(row["n_shot"])
        documents = "" if row["documents"] is None else str(row["documents"])
        cells = [row["task"], name, shots, documents]
        cells += [_with_error(row[model], "") for model in models]
        cells += [_with_error(row["difference"], "+")] if "difference" in row else []
        rows.append(cells)

    columns = ["task", "metric", "shots", "documents", *(headings[model] for model in models)]
    columns += ["difference"] if len(models) == 2 else []
    notes = [f"lm-eval {tasks['lm_eval']}, with its standard errors"]
    if len(models) == 2:
        notes += ["that of a difference is over the same documents"]
    if tasks["limit"] is not None:
        notes += [f"limit {tasks['limit']:g}"]
    if tasks["cut_prompts"]:
        notes += [f"{tasks['cut_prompts']} prompts cut on the left to fit the context"]
    notes += [f"written to {path}" for path in tasks.get("written", [])]
    cells = [[safe_text(cell) for cell in row] for row in rows]
    caption = safe_text("; ".join(notes))

    return Excerpt(TITLE, columns, cells, left=2, words=caption)


def _with_error(figure: JsonObject, sign: str) -> str:
    """Return a value with its standard error, where there is one."""
    value = f"{figure['value']:{sign}.4f}"
    return value if figure["stderr"] is None else f"{value} ± {figure['stderr']:.4f}"
