"""Report values in a run's folder that are not those that a run writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluvial.errors import CheckpointError
from fluvial.federation.boundary import place


@contextmanager
def damage_reported(folder: Path) -> Iterator[None]:
    """Raise `CheckpointError` where the values of a folder are not those that a run writes."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{folder} is damaged: its JSON files are not as `fluvial run` wrote them "
            f"({type(error).__name__} at {place(error)}); restore them from a copy"
        ) from error
