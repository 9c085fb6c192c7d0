"""A comparison in this process, for tests."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from fluvial.runs.comparison.child import Message
from fluvial.runs.comparison.contenders import Comparison
from fluvial.runs.comparison.execute import execute_comparison
from fluvial.runs.comparison.gathering import gather
from fluvial.runs.comparison.result import Compared
from fluvial.runs.config import RunConfig
from fluvial.runs.run import execute


def launch_here(
    config: RunConfig, folder: Path, *, resume: bool, lent: Mapping[str, Path]
) -> Iterator[Message]:
    """The events of a run, without a process of its own."""
    yield from execute(config, folder, resume=resume, lent=lent)


def compare_here(comparison: Comparison, out: Path) -> Compared:
    """The figures of a whole comparison."""
    for _ in execute_comparison(comparison, out, launch=launch_here):
        pass
    return gather(comparison, out)
