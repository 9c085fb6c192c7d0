"""A check that the Hugging Face hub can be reached, made at once instead of after many retries."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

TIMEOUT_S = 5.0
"""Time for one attempt to reach the hub, name look-up included."""
REMEMBERED_S = 60.0
"""Time for which one attempt counts: a model is loaded in several calls, and each would wait."""


@contextmanager
def reachable_hub() -> Iterator[bool]:
    """Yield true if the hub answers; otherwise the libraries read only the local cache.

    The switch is that of `HF_HUB_OFFLINE`, which the libraries read once when they are imported.
    """
    from huggingface_hub import constants

    reached = not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT, _period())

    if reached:
        yield True
        return

    switches = _switches()
    try:
        for module, name, _ in switches:
            setattr(module, name, True)
        yield False
    finally:
        for module, name, value in switches:
            setattr(module, name, value)


def _switches() -> list[tuple[object, str, bool]]:
    """Return every module of a library that keeps a copy of the switch, with its value."""
    places = (
        ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
        ("datasets.config", "HF_HUB_OFFLINE"),
        ("datasets.config", "HF_DATASETS_OFFLINE"),
    )
    modules = ((sys.modules.get(module), name) for module, name in places)

    return [
        (module, name, getattr(module, name)) for module, name in modules if hasattr(module, name)
    ]


def _period() -> int:
    """Return a number that changes every `REMEMBERED_S` seconds."""
    return int(time.monotonic() // REMEMBERED_S)


@lru_cache(maxsize=8)
def _answers(endpoint: str, period: int) -> bool:  # noqa: ARG001 - another period is another call
    """Return true if `endpoint` answers a request, with any status, within `TIMEOUT_S`."""
    from huggingface_hub import get_session

    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=TIMEOUT_S)
        except Exception:  # any way not to answer is one
            return

        answered.set()

    asking = threading.Thread(
        target=ask, daemon=True
    )  # a name look-up cannot be given a time limit
    asking.start()
    asking.join(TIMEOUT_S)

    return answered.is_set()
