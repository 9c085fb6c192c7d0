"""Parts of tables: files of results, rows, claims and figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> Any:
    """Return a file of results."""
    return json.loads((RESULTS / name).read_text())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the heading, the first column is text."""
    heading, *body = rows
    rule = ["---", *("---:" for _ in heading[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, rule, *body))


def claims(name: str) -> str:
    """Return the claims of a benchmark, those that do not hold included."""
    return claim_table(read(name)["claims"])


def claim_table(given: Sequence[dict[str, Any]]) -> str:
    """Return claims as a table."""
    rows = [["claim", "value", "bar", "holds"]]
    for claim in given:
        value = claim["value"]
        shown = (
            f"{value:.4g}"
            if isinstance(value, int | float) and not isinstance(value, bool)
            else str(value)
        )
        rows.append(
            [
                claim["name"],
                shown,
                f"{claim.get('side', '')} {claim['bar']}".strip(),
                "yes" if claim["holds"] else "**no**",
            ]
        )

    return table(rows)


def cell(value: Any) -> str:
    """Return a figure with five digits, a large one whole; what was not measured is a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def listing(name: str, part: str, columns: dict[str, str], words: str) -> str:
    """Return the rows of one part of a benchmark, what it skipped, and its claims."""
    found = read(name)
    rows = [row for row in found["rows"] if row["part"] == part]
    lines = [list(columns.values()), *([cell(row.get(key)) for key in columns] for row in rows)]
    skipped = "".join(f"- not measured: {line}\n" for line in found["skipped"])

    return "\n\n".join(each for each in (words, table(lines), skipped, claims(name)) if each)
