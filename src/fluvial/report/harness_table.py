"""The table of tasks of lm-eval, of an evaluation and of a run."""

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fluvial.formatting import safe_text
from fluvial.report.tables import table
from fluvial.storage.run_files import JsonObject


def run_tasks(result: JsonObject) -> list[RenderableType]:
    """Return the table of the tasks that a run measured at its end; nothing without tasks."""
    tasks = result.get("tasks")
    if tasks is None:
        return []
    if "why" in tasks:
        return [Text(safe_text(f"Tasks of lm-eval: not measured, because {tasks['why']}")), Text()]
    return [harness_table(tasks, {"base": "base", "adapter": "final"})]


def harness_table(tasks: JsonObject, headings: dict[str, str]) -> Table:
    """Return a table of tasks of lm-eval: values with their standard errors, and differences."""
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

    return table(columns, cells, "Tasks of lm-eval", caption=caption)


def _with_error(figure: JsonObject, sign: str) -> str:
    """Return a value with its standard error, where there is one."""
    value = f"{figure['value']:{sign}.4f}"
    return value if figure["stderr"] is None else f"{value} ± {figure['stderr']:.4f}"
