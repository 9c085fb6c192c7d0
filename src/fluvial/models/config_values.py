"""Values of a base's JSON files that no model can have, refused before anything is loaded."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluvial.errors import ConfigError
from fluvial.models.stored import first_line
from fluvial.storage.files import read_object

_POSITIVE = ("rope_theta", "rotary_emb_base", "factor")
"""Keys of numbers by which positions are divided."""
_NOT_NEGATIVE = ("eps", "epsilon")
"""Ends of keys of numbers that are added to a variance before its root is taken."""
_ROPE = ("rope_parameters", "rope_scaling")


def check_numbers(stored: dict[str, Any], path: Path) -> None:
    """Raise `ConfigError` for a number in config.json with which a model computes NaN.

    `stored` is the content of the file `path`.
    """
    for place, value in _numbers(stored, ()):
        key = place[-1]
        expected = None
        if isinstance(value, float) and math.isnan(value):
            expected = "a number"
        elif key in _POSITIVE and (key != "factor" or _is_rope(place)) and not 0 < value < math.inf:
            expected = "a finite number above 0"
        elif key.rpartition("_")[2] in _NOT_NEGATIVE and not 0 <= value < math.inf:
            expected = "a finite number at least 0"

        if expected is not None:
            raise ConfigError(
                f"{path}: {'.'.join(place)} = {value!r}, expected {expected}; copy config.json "
                "from where the model came from, or write the number of its architecture there"
            )


def _is_rope(place: tuple[str, ...]) -> bool:
    return any(name in place for name in _ROPE)


def _numbers(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int | float]]:
    """Yield the numbers of a JSON value, each with its place: keys, and positions in lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, (*place, str(key)))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _numbers(inner, (*place, str(index)))
    elif isinstance(value, int | float) and not isinstance(value, bool) and place:
        yield place, value


def check_generation(folder: Path) -> None:
    """Raise `ConfigError` where transformers cannot read generation_config.json, which a folder
    need not have."""
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if read_object(path) is None:
        return

    try:
        GenerationConfig.from_pretrained(str(folder))
    except Exception as error:
        raise ConfigError(
            f"{path}: transformers cannot read it: {first_line(error)}; copy it again, or remove "
            "it: a run uses its end tokens only"
        ) from error
