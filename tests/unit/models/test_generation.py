"""Continuations of prompts as values: copies, also for another process."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from fluvial.models.generation import Continuation


def pickled(made: Any) -> Any:
    return pickle.loads(pickle.dumps(made))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
def test_a_continuation_is_copied_with_what_it_knows(again: Callable[[Any], Any]) -> None:
    """A run of a comparison sends its sample from another process."""
    made = again(Continuation("x", cut=True))
    assert (type(made), made, made.cut) == (Continuation, "x", True)
