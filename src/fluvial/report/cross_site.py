"""The cross-site matrix for people: the model of every site, and the final one, on the data of all
sites."""

from collections.abc import Mapping
from dataclasses import dataclass

from fluvial.formatting import figure, percent, safe_text
from fluvial.report.block_tables import Excerpt
from fluvial.storage.run_files import JsonObject

FEDERATED = "federated"
"""Label of the row of the final model."""
MOST_COLUMNS = 6
"""Number of sites whose columns fit on a terminal."""


@dataclass(frozen=True)
class Matrix:
    """One measure of every model on every site's data."""

    name: str
    rows: list[str]
    """Models: the sites in order, then `FEDERATED`."""
    columns: list[str]
    """Sites of the data."""
    values: list[list[float | None]]
    """Values by row, None where a site sent none."""
    words: str
    """One sentence on own data, other sites' data and the final model."""

    def short(self, value: float) -> str:
        """Return a value as a cell of a heat map has it."""
        return f"{value:.2f}" if self.name == "loss" else f"{100 * value:.0f}"

    def text(self, value: float | None) -> str:
        """Return a value as the cells of a table have it."""
        return figure(value, ".3f") if self.name == "loss" else percent(value)


def matrix_of(result: JsonObject, name: str = "loss") -> Matrix | None:
    """Return the matrix of the measure `name`; None where the run has none."""
    cross = result.get("cross_site")
    if not cross:
        return None

    models: dict[str, Mapping[str, JsonObject]] = dict(cross["local"])
    columns = sorted(models)
    rows = [_row(models[site], columns, name) for site in columns]
    final = _row(cross["federated"], columns, name)
    if all(value is None for row in rows for value in row):
        return None

    return Matrix(
        name,
        [*map(safe_text, columns), FEDERATED],
        [*map(safe_text, columns)],
        [*rows, final],
        _words(rows, final, name),
    )


def cross_site_table(result: JsonObject) -> Excerpt | None:
    """Return the matrix of losses for a terminal: all columns of few sites, means of many."""
    matrix = matrix_of(result)
    if matrix is None:
        return None

    means = []
    for number, row in enumerate(matrix.values):
        own = row[number] if number < len(row) else None
        others = _mean([value for at, value in enumerate(row) if at != number])
        means.append([figure(own) if number < len(row) else "-", figure(others)])
    headings = ["model of", "own data", "other sites' data"]
    rows = [[name, *pair] for name, pair in zip(matrix.rows, means, strict=True)]
    if len(matrix.columns) <= MOST_COLUMNS:
        headings = ["model of", *matrix.columns, "others"]
        rows = [
            [name, *(figure(value, ".2f") for value in row), pair[1]]
            for name, row, pair in zip(matrix.rows, matrix.values, means, strict=True)
        ]

    return Excerpt("Held-out loss, by model and by data", headings, rows, 1, matrix.words)


def _row(measures: Mapping[str, JsonObject], columns: list[str], name: str) -> list[float | None]:
    return [(measures.get(site) or {}).get(name) for site in columns]


def _words(rows: list[list[float | None]], final: list[float | None], name: str) -> str:
    """Return what the models of single sites reach on other sites' data, and the final model."""
    others = [
        (value, final[at])
        for number, row in enumerate(rows)
        for at, value in enumerate(row)
        if at != number
    ]
    pairs = [(ours, theirs) for ours, theirs in others if ours is not None and theirs is not None]
    if not pairs:
        return ""

    better = sum(theirs < ours if name == "loss" else theirs > ours for ours, theirs in pairs)
    alone, together = (_mean([pair[side] for pair in pairs]) for side in (0, 1))
    form = figure if name == "loss" else percent
    return (
        f"A row is a model, a column the data of a site. On other sites' data the models of single "
        f"sites have {form(alone)} in the mean and the federated one {form(together)}; it is "
        f"better in {better} of {len(pairs)} pairs."
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
