"""The report of a benchmark: machine, settings, rows, and claims that hold or do not."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A sentence with a figure, the bar it was held to, and whether it is under (or over) it."""

    name: str
    value: float | None
    """None where nothing was measured; such a claim does not hold."""
    bar: float
    side: Literal["at most", "below", "at least"]

    @property
    def holds(self) -> bool:
        """Return True where the figure is on the right side of its bar."""
        if self.value is None:
            return False
        if self.side == "at least":
            return self.value >= self.bar
        return self.value < self.bar if self.side == "below" else self.value <= self.bar


@dataclass
class Report:
    """One run of one benchmark."""

    benchmark: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """One line for everything that was not measured on this machine, with the reason."""

    def skip(self, line: str) -> None:
        """Say on the screen and in the file that something was left out."""
        self.skipped.append(line)
        Console().print(f"skipped: {line}", markup=False)

    def finish(self, out: Path | None, started: Sequence[float]) -> None:
        """Print the claims and write the file; `started` is the load average when the benchmark
        began."""
        _print_claims(self.claims)
        if out is None:
            return

        content = {
            "benchmark": self.benchmark,
            "machine": machine(started),
            "settings": self.settings,
            "skipped": self.skipped,
            "rows": [_plain(row) for row in self.rows],
            "claims": [_plain({**asdict(claim), "holds": claim.holds}) for claim in self.claims],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_pretty(content) + "\n", encoding="utf-8")


def machine(started: Sequence[float]) -> dict[str, Any]:
    """Where it was measured, and how busy that was before and after."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "load_before": [round(value, 2) for value in started],
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def show(title: str, columns: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Print a table of `rows`; `columns` is key to heading."""
    console = Console()
    if not console.is_terminal:
        console.width = 240

    table = Table(title=title, title_justify="left")
    for key, heading in columns.items():
        words = any(isinstance(row.get(key), str) for row in rows)
        table.add_column(heading, justify="left" if words else "right", overflow="fold")

    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns))
    console.print(table, markup=False)


def _print_claims(claims: Sequence[Claim]) -> None:
    rows: list[Row] = [
        {
            "claim": claim.name,
            "value": claim.value,
            "bar": f"{claim.side} {claim.bar:g}",
            "holds": claim.holds,
        }
        for claim in claims
    ]
    show("Claims", {"claim": "claim", "value": "measured", "bar": "bar", "holds": "holds"}, rows)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """JSON types with floats of six digits; what is not finite becomes text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _pretty(content: dict[str, Any]) -> str:
    """Readable JSON with one row on a line."""
    lines = []
    for key, value in content.items():
        if isinstance(value, list) and value:
            inner = ",\n    ".join(
                json.dumps(item, allow_nan=False, ensure_ascii=False) for item in value
            )
            lines.append(f"  {json.dumps(key)}: [\n    {inner}\n  ]")
        else:
            lines.append(
                f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False, ensure_ascii=False)}"
            )

    return "{\n" + ",\n".join(lines) + "\n}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()

    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
