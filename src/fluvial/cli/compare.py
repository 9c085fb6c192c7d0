"""`fluvial compare`: several configurations on the same data and seeds, and which is better."""

import hashlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from fluvial import interrupt
from fluvial.cli.comparison_progress import comparison_progress
from fluvial.cli.console import Format, Overrides, out, print_json, print_whole, program_name
from fluvial.cli.progress import spinner
from fluvial.storage.recipes import recipe_of, stem

if TYPE_CHECKING:
    from fluvial.runs.comparison.result import Compared


LONGEST = 80
"""Characters of a folder's name, beyond which it ends in a digest."""


class SeedsCommand(TyperCommand):
    """Command whose `--seeds` takes several numbers: `--seeds 0 1 2`, or `--seeds 0,1,2`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write every number as an option of its own, which the parser knows."""
        words: list[str] = []
        left = list(args)
        while left:
            word = left.pop(0)
            if word != "--seeds" and not word.startswith("--seeds="):
                words.append(word)
                continue

            numbers = word.removeprefix("--seeds=").split(",") if "=" in word else []
            while left and all(map(str.isdecimal, left[0].split(","))):
                numbers += left.pop(0).split(",")
            words += [part for number in numbers for part in ("--seeds", number)] or [word]

        return super().parse_args(ctx, words)


def compare(
    configs: Annotated[
        list[Path],
        typer.Argument(help="Configurations, or one file that lists contenders."),
    ],
    seeds: Annotated[
        list[int] | None,
        typer.Option(
            "--seeds", min=0, help="Seeds of each contender, such as 0 1 2; default the files'."
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder of all runs; default runs/compare-NAMES, by the files' paths."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Contender that the others are compared with; default the first."),
    ] = None,
    allow_different: Annotated[
        bool,
        typer.Option(
            "--allow-different", help="Allow other data, models or measures among the contenders."
        ),
    ] = False,
    overrides: Overrides = None,
    format: Format = "table",
) -> None:
    """Run configurations with the same seeds, and compare losses, bytes, time and memory.

    Every run has a folder of its own below --out. The same command again goes on where it was
    stopped, and makes no finished run again.
    """
    path = folder or Path("runs") / default_name(configs)
    interrupt.set_advice(partial(_advice, path))
    with spinner("reading the configurations"):
        from fluvial.report.comparison_tables import comparison_tables
        from fluvial.runs.comparison.contenders import read_comparison
        from fluvial.runs.comparison.execute import execute_comparison
        from fluvial.runs.comparison.files import PAGE
        from fluvial.runs.comparison.gathering import gather
        from fluvial.storage.run_files import COMPARED

        comparison = read_comparison(
            configs,
            overrides or [],
            seeds=seeds or (),
            baseline=baseline,
            allow_different=allow_different,
        )

    failed: dict[tuple[str, int], str] = {}
    with comparison_progress(comparison, quiet=format == "json") as progress:
        for step in execute_comparison(comparison, path):
            progress.show(step)
            if step.kind == "failed":
                failed[step.contender, step.seed] = step.reason
            if step.kind != "message" or not (path / COMPARED).exists():
                _write(gather(comparison, path, failed), path)

    interrupt.set_advice(str)
    compared = gather(comparison, path, failed)
    if format == "json":
        print_json(compared.model_dump(mode="json"))
    else:
        print_whole(comparison_tables(compared))
        out.print()
        out.print(f"Runs     {path}", markup=False, soft_wrap=True)
        out.print(f"Page     {path / PAGE}", markup=False, soft_wrap=True)

    if failed:
        raise typer.Exit(1)


def default_name(configs: Sequence[Path]) -> str:
    """Return the name of a comparison's folder, which follows from the paths of its files, so that
    other files have another folder."""
    names = []
    for config in configs:
        path = Path(stem(config))
        if recipe_of(config) is None:
            path = Path(os.path.relpath(config)).with_suffix("")
        names.append("-".join(part for part in path.parts if part != ".."))
    name = "-".join(["compare", *names])
    if len(name) <= LONGEST:
        return name
    return f"{name[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _write(compared: "Compared", path: Path) -> None:
    """Write the comparison and its page into its folder."""
    from fluvial.report.comparison_page import comparison_page
    from fluvial.runs.comparison.files import PAGE
    from fluvial.storage.files import write_atomically
    from fluvial.storage.run_files import COMPARED

    write_atomically(path / COMPARED, (compared.model_dump_json(indent=2) + "\n").encode())
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    write_atomically(path / PAGE, comparison_page(compared, path, written=written))


def _advice(folder: Path) -> str:
    """Return the line that is printed after a signal has stopped the comparison in `folder`."""
    command = shlex.join([*program_name(), *sys.argv[1:]])
    if not folder.exists():
        return f"interrupted before anything was written; start again with:  {command}"
    return f"interrupted; finished rounds are saved, continue with:  {command}"
