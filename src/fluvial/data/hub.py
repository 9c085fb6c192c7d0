"""Data sets of Hugging Face: saved to disk, or of a hub id."""

from typing import Any

from fluvial.errors import ConfigError
from fluvial.models.network import reachable_hub
from fluvial.storage.files import exists, expanded


def dataset_of(name: str, wanted: str, where: str) -> Any:
    """Return the split `wanted` as a `datasets.Dataset`; raise `ConfigError` naming `where`.

    A hub that cannot be reached is noticed in one attempt; its local cache is read instead.
    """
    import datasets

    datasets.disable_progress_bars()  # the command line shows its own
    datasets.logging.set_verbosity(
        datasets.logging.CRITICAL
    )  # what goes wrong is in the error below
    path = expanded(name)
    saved = exists(path) and path.is_dir()

    try:
        if saved:
            return _split_of(datasets.load_from_disk(str(path)), wanted, f"{where}: {name!r}")
        with reachable_hub() as reached:
            return datasets.load_dataset(name, split=wanted)
    except ConfigError:
        raise
    except Exception as error:  # datasets raises whatever its readers raise
        if saved:
            why = f"is a damaged data set ({type(error).__name__}); save it again"
        elif not reached:
            why = (
                "is no file or folder here, and the Hugging Face hub cannot be reached; name a "
                "local file, or load the data set once with a network"
            )
        else:
            why = f"cannot be read from the Hugging Face hub: {_cause(error)}"

        raise ConfigError(f"{where}: {name!r:.200} {why}") from error


def _split_of(saved: Any, wanted: str, name: str) -> Any:
    from datasets import DatasetDict

    if not isinstance(saved, DatasetDict):
        return saved
    if wanted not in saved:
        raise ConfigError(f"{name} has the splits {', '.join(saved)}, not {wanted!r}")
    return saved[wanted]


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error)[:300]}"
