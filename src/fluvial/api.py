"""Runs from Python: check a configuration, run it, and read results that show as tables."""

import html
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from fluvial.caller import from_python
from fluvial.codecs.base import Codec
from fluvial.errors import CheckpointError, ConfigError
from fluvial.methods.interface import Method
from fluvial.report.line_rates import Rates
from fluvial.report.plan_tables import plan_table
from fluvial.report.result_tables import (
    result_caption,
    result_rows,
    verdict_of,
    with_compared,
)
from fluvial.report.round_lines import round_header, round_lines, setup_lines
from fluvial.report.site_plans import site_plans_table
from fluvial.report.tables import table
from fluvial.runs.config import RunConfig, load, merge, override, parse
from fluvial.runs.own import listed, with_own, wrong_argument
from fluvial.storage.run_files import read_run

if TYPE_CHECKING:
    from fluvial.runs.run import Event

logger = logging.getLogger(__name__)

Configuration = str | Path | Mapping[str, Any] | RunConfig
"""A TOML file, a table with the same keys, where a path may be a `Path`, or a loaded
configuration."""
COLUMNS = 100


@dataclass(frozen=True)
class Result:
    """The result of a run, which shows as a table in a terminal and in a notebook."""

    folder: Path
    """Folder of the run."""
    values: dict[str, Any] = field(repr=False)
    """Content of result.json."""
    config: dict[str, Any] = field(repr=False)
    """The configuration with every default."""
    rounds: list[dict[str, Any]] = field(repr=False)
    """Lines of metrics.jsonl, one for each round."""

    @property
    def rows(self) -> list[list[str]]:
        """Return the table of the result as texts; the first row has the headings."""
        return result_rows(self.values, Rates.of(self.config))

    @property
    def verdict(self) -> str:
        """Return one line that says whether the run helped."""
        return verdict_of(read_run(self.folder)).line()

    @property
    def weights(self) -> Path:
        """Return the folder of the final weights: a PEFT adapter, or a model of transformers."""
        found = [self.folder / name for name in ("adapter", "model")]
        return next((path for path in found if path.is_dir()), found[0])

    def __str__(self) -> str:
        """Return the table and the verdict as text."""
        headings, *rows = self.rows
        return f"{_text(table(headings, rows, 'Result'))}\n{self.verdict}"

    def _repr_html_(self) -> str:
        """Return the table and the verdict as HTML, for a notebook."""
        headings, *rows = self.rows
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headings)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        caption = html.escape(result_caption(self.rows[0], Rates.of(self.config), self.values))
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            f"<p>{html.escape(self.verdict)}</p><p><small>{caption}</small></p>"
        )


@dataclass(frozen=True)
class Check:
    """Sizes and notes about a configuration, predicted without training."""

    values: dict[str, Any] = field(repr=False)
    """The same content as `fluvial check --format json`."""

    def __str__(self) -> str:
        """Return the tables of `fluvial check` as text."""
        return _text(plan_table(self.values))

    def _repr_html_(self) -> str:
        """Return the tables as HTML, for a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"


@dataclass(frozen=True)
class SitePlans(Check):
    """Plans of the sites under FedPipe; `values` are those of `fluvial plan --format json`."""

    def __str__(self) -> str:
        """Return the tables of `fluvial plan` as text."""
        return _text(site_plans_table(self.values))


@from_python()
def load_config(
    config: Configuration,
    overrides: Sequence[str] = (),
    *,
    methods: Iterable[Method] = (),
    codecs: Iterable[type[Codec]] = (),
) -> RunConfig:
    """Return a checked configuration.

    `overrides` are lines of TOML such as `method.fraction = 0.5`. `methods` and `codecs` of your
    own are known under the default of their settings' `name`. Raises `ConfigError` with every fault
    of the configuration.
    """
    lines = listed("overrides", overrides, "a list of lines of TOML, each a str")
    for number, line in enumerate(lines):
        if not isinstance(line, str):
            raise wrong_argument(f"overrides[{number}]", line, "a line of TOML as a str")

    kind = with_own(methods, codecs)
    if isinstance(config, RunConfig):
        if lines:
            raise ConfigError(
                "overrides: a loaded configuration takes none; give the file or table"
            )
        return config
    if isinstance(config, str | Path):
        return load(Path(config), lines, kind=kind)
    if not isinstance(config, Mapping):
        raise wrong_argument("config", config, "a TOML file, a table, or a RunConfig")

    values = _plain(config)
    for line in lines:
        values = merge(values, override(line))

    return parse(values, "the table", kind=kind)


@from_python()
def check(config: Configuration, overrides: Sequence[str] = (), **own: Any) -> Check:
    """Return the sizes of a run, predicted without training; raises `ConfigError`.

    `overrides`, `methods` and `codecs` are those of `load_config`.
    """
    from fluvial.runs.plan import plan

    return Check(plan(load_config(config, overrides, **own)))


@from_python()
def plan(config: Configuration, overrides: Sequence[str] = (), **own: Any) -> SitePlans:
    """Return the plan of each site under FedPipe, before anything runs: its sites measure
    themselves in this process; raises `ConfigError` for another method.

    `overrides`, `methods` and `codecs` are those of `load_config`.
    """
    from fluvial.runs.site_plans import site_plans

    return SitePlans(site_plans(load_config(config, overrides, **own)))


@from_python()
def run(
    config: Configuration,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    fleet: Literal["process", "flower"] = "process",
    progress: bool | Callable[["Event"], None] = True,
    **own: Any,
) -> Result:
    """Run a configuration and return its result.

    `out` is the folder of the run, by default runs/NAME for a file NAME.toml. `progress` prints a
    line for each round on standard error, or is called with each `Event`. `methods` and `codecs`
    are those of `load_config`. Raises `ConfigError` for settings that cannot work, and
    `CheckpointError` for a folder that holds another run.
    """
    if not isinstance(resume, bool):
        raise wrong_argument("resume", resume, "True or False")
    if out is not None:
        _folder("out", out)
    if fleet not in ("process", "flower"):
        raise ConfigError(f"fleet={fleet!r}: choose 'process' or 'flower'")
    if not isinstance(progress, bool) and not callable(progress):
        raise wrong_argument("progress", progress, "True, False or a function of an event")

    settings = load_config(config, overrides, **own)
    if out is None and not isinstance(config, str | Path):
        raise ConfigError("out: a configuration that is no file needs the folder of its run")

    folder = Path(out) if out is not None else Path("runs") / Path(str(config)).stem
    show = progress if callable(progress) else _Lines().show if progress else None

    if fleet == "flower":
        from fluvial.flower.simulate import simulate as execute
    else:
        from fluvial.runs.run import execute

    from fluvial.report.live import with_page

    for event in with_page(execute(settings, folder, resume=resume), settings, folder):
        if show is not None:
            show(event)

    return load_result(folder)


@from_python()
def load_result(folder: str | Path) -> Result:
    """Return the result of the finished run in `folder`.

    Raises `CheckpointError` for a folder without a run, or with a run that has not finished.
    """
    content = read_run(_folder("folder", folder))
    if content["result"] is None:
        raise CheckpointError(
            f"{folder}: the run has not finished; continue it with fluvial.run(..., resume=True)"
        )

    for line in content["damaged"]:
        logger.warning("%s: %s", folder, line)
    return Result(Path(folder), with_compared(content), content["config"], content["metrics"])


def _plain(value: Any) -> Any:
    """Return a table with its paths as texts, as a TOML file has them."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}

    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _folder(name: str, value: object) -> Path:
    """Return the path of an argument; raises `ConfigError` for what is none."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise wrong_argument(name, value, "a path as a str or pathlib.Path")

    return Path(value)


class _Lines:
    """Lines about the rounds of a run, on standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, width=COLUMNS, highlight=False)
        self._method = ""

    def show(self, event: "Event") -> None:
        """Print the lines of one event."""
        if event.kind not in ("setup", "round"):
            return
        if event.method != self._method:
            self._method = event.method
            self._console.print(round_header(event.method))

        lines = (setup_lines if event.kind == "setup" else round_lines)(event.values)
        for line in lines:
            self._console.print(line)


def _text(content: Any) -> str:
    console = Console(width=COLUMNS, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(content)

    return captured.get().rstrip("\n")
