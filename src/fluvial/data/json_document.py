"""A parser of JSON documents that gives each record of a list with its line."""

import json
import re
from collections.abc import Iterator, Sequence
from json.decoder import JSONDecodeError
from typing import Any

from fluvial.data.faults import shown
from fluvial.data.rows import Number


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"has the field {shown(twice)} twice in one object; keep one of the two")

    return fields


DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=Number, parse_float=Number, parse_constant=Number
)
"""Decoder that keeps numbers as they are written, and refuses an object with a field twice."""
_BLANK = re.compile(r"[ \t\r\n]*")

Items = list[tuple[int, Any]]
"""Line and value of each element of a list."""


def json_list(text: str) -> list[Any] | None:
    """Return the list that a text is as JSON, None for a text that does not begin as a list.

    Raises `ValueError` with words about the place for one that is no JSON from there on.
    """
    if not text.lstrip().startswith("["):
        return None
    try:
        return list(DECODER.decode(text))
    except JSONDecodeError as error:
        raise ValueError(f"is no JSON ({error.msg} at character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("is nested too deeply for a record") from None


def document(text: str) -> Iterator[tuple[str, Items | None]]:
    """Yield each field of the object that `text` holds, with its items if it is a list.

    A bare list has the name "".
    """
    start = _after_blank(text, 0)
    if text[start : start + 1] == "[":
        items, end = _items(text, start)
        yield "", items
    elif text[start : start + 1] == "{":
        end = start + 1
        comma = False
        while text[(end := _after_blank(text, end)) : end + 1] != "}":
            end = _expect(text, end, ",") if comma else end
            key, end = _value(text, _after_blank(text, end))
            if not isinstance(key, str):
                raise JSONDecodeError("Expecting a field's name in double quotes", text, end)

            end = _after_blank(text, _expect(text, _after_blank(text, end), ":"))
            if text[end : end + 1] == "[":
                items, end = _items(text, end)
                yield key, items
            else:
                _, end = _value(text, end)
                yield key, None

            comma = True

        end += 1
    else:
        _, end = _value(text, start)

    if _after_blank(text, end) != len(text):
        raise JSONDecodeError("Extra data", text, _after_blank(text, end))


def _items(text: str, start: int) -> tuple[Items, int]:
    """Return the elements of the list at `start`, with their lines, and the place of its end."""
    items = Items()
    end = start + 1
    line = text.count("\n", 0, start) + 1
    counted = start

    while text[(end := _after_blank(text, end)) : end + 1] != "]":
        if items:
            end = _after_blank(text, _expect(text, end, ","))
        line = line + text.count("\n", counted, end)
        counted = end
        value, end = _value(text, end)
        items.append((line, value))

    return items, end + 1


def _value(text: str, start: int) -> tuple[Any, int]:
    try:
        return DECODER.raw_decode(text, start)
    except JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, start) + 1
        why = "is nested too deeply for a record" if isinstance(error, RecursionError) else error
        raise ValueError(f"line {line} {why}") from None


def _expect(text: str, start: int, character: str) -> int:
    if text[start : start + 1] != character:
        raise JSONDecodeError(f"Expecting '{character}'", text, start)
    return start + 1


def _after_blank(text: str, start: int) -> int:
    blank = _BLANK.match(text, start)
    assert blank is not None, "the pattern fits everywhere"
    return blank.end()
