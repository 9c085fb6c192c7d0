"""Faults of a TOML file: pydantic's problems as lines with a place, the value and a remedy."""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from fluvial.settings import ConflictError, Settings
from fluvial.storage.toml_expected import TAGS, Expected, allows, expected_item, show, tags_of


class Fault:
    """A pydantic problem, with its place in the TOML file."""

    def __init__(self, problem: Any, root: type[Settings]) -> None:
        self.kind: str = problem["type"]
        self.input = problem["input"]
        self.context: dict[str, Any] = problem.get("ctx", {})
        self.path = list[str | int]()
        self.right = Expected((root,))
        self.chosen = ""
        self.others = dict[str, type[Settings]]()
        loc = list(problem["loc"])
        if loc[-1:] == ["[key]"] and loc[-2:-1] == [self.input]:  # a key of a dict, no value
            loc.pop()
            self.kind = "invalid_key"

        self.key = str(loc.pop()) if self.kind in ("extra_forbidden", "invalid_key") else ""

        for part in loc:
            self._enter(part)

    def _enter(self, part: str | int) -> None:
        """Follow one part of pydantic's location, which also names the alternatives of a
        union."""
        if len(self.right.tables) > 1:  # the tag of a union, such as the method's name, is no key
            self.chosen = str(part)
            self.others = {tag: each for each in self.right.tables for tag in tags_of(each)}
            self.right = Expected(
                tuple(each for each in self.right.tables if part in tags_of(each))
            )
            return

        self.others = {}
        if self.right.tables:
            field = self.right.tables[0].model_fields.get(str(part))
            self.path.append(part)
            self.right = Expected.of(field.annotation, field.metadata) if field else Expected()
            return

        item = expected_item(self.right.annotation, part)
        if item is not None:
            self.path.append(part)
            self.right = item

    @property
    def place(self) -> str:
        """The dotted place."""
        return ".".join(map(str, self.path))

    def holds(self, other: "Fault") -> bool:
        """Return whether the place of `other` lies inside the place of this fault."""
        return len(other.path) > len(self.path) and other.path[: len(self.path)] == self.path

    def aside(self) -> list[str]:
        """Return the keys to what must be set aside for the rest to be read; empty if that is
        everything."""
        keys = [str(part) for part in self.path if isinstance(part, str)]
        if self.key:
            return [*keys, self.key]
        return keys[:-1] if self.kind == "missing" else keys

    def lines(self) -> Iterator[str]:
        """Yield one line for each fault."""
        if self.kind == "extra_forbidden":
            yield f"{_dotted(self.place, self.key)}: {self._unknown_key()}"
        elif self.kind == "invalid_key":
            kind = type(self.input).__name__
            yield f"{_dotted(self.place, self.key)}: the key is of type {kind}; write it as a str"
        elif self.kind == "missing":
            yield f"{self.place}: missing, and has no default; it must be {self.right.words()}"
        elif self.kind == "value_error":
            yield from self._conflicts()
        elif self.kind == "union_tag_invalid":
            yield self._unknown_tag()
        elif self.kind == "union_tag_not_found":
            tags = [tag for each in self.right.tables for tag in tags_of(each)]
            key = self.context["discriminator"].strip("'")
            yield f"{self.place}: {key} is missing; choose one of {', '.join(tags)}"
        else:
            yield f"{self.place} = {show(self.input)}: {self._rule()}{self._hint()}"

    def _conflicts(self) -> Iterator[str]:
        error = self.context["error"]
        if isinstance(error, ConflictError):
            yield from (_dotted(self.place, line) for line in error.lines)
        elif self.right.tables:
            yield _dotted(self.place, str(error))
        else:
            yield f"{self.place} = {show(self.input)}: {error}"

    def _rule(self) -> str:
        """Return what a value must be."""
        if self.kind == "string_pattern_mismatch":
            return f"must match {self.context['pattern']}"
        if self.kind == "string_too_short":
            return "the string is empty; give a value or remove the key"
        if self.kind == "string_too_long":
            return f"must have at most {self.context['max_length']} characters"
        return f"must be {self.right.words()}"

    def _unknown_key(self) -> str:
        for table in self.right.tables:
            if self.key in table.moved:
                return f"no longer a setting; use {table.moved[self.key]} in its place"

        having = [tag for tag, each in self.others.items() if self.key in each.model_fields]
        if having:
            return (
                f"{self.path[-1]} {self.chosen!r} has no key {self.key!r}; "
                f"remove it, or choose another {self.path[-1]} that has it: {', '.join(having)}"
            )
        known = list(self.right.tables[0].model_fields) if self.right.tables else []
        return f"unknown key; {_nearest(self.key, known, 'known keys: ')}"

    def _unknown_tag(self) -> str:
        known = self.context["expected_tags"].replace("'", "").split(", ")
        key = self.context["discriminator"].strip("'")
        found = self.input.get(key) if isinstance(self.input, dict) else self.context["tag"]
        nearest = _nearest(str(found), known, "choose one of ")
        return f"{self.place}: unknown {key} {show(found)}; {nearest}"

    def _hint(self) -> str:
        found = self.input
        annotation = self.right.annotation
        if self.right.tables:
            tag = next((key for key in TAGS if key in self.right.tables[0].model_fields), None)
            chooses = tag is not None and len(self.right.tables) > 1 and isinstance(found, str)
            return f"; write {{{tag} = {show(found)}}}" if chooses else ""

        if isinstance(found, str) and allows(annotation, tuple):
            return f"; write [{show(found)}]"

        number = _number(found)
        if number is not None and any(allows(annotation, kind) for kind in (int, float)):
            return f"; write {number} without quotes"

        return ""


def _number(found: Any) -> str | None:
    """Return the number that a string holds, as TOML writes it."""
    if isinstance(found, str) and re.fullmatch(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", found.strip()):
        return found.strip()
    return None


def explain(problems: Sequence[Fault]) -> Iterator[str]:
    """Yield the lines of all problems; the alternatives of one value are one fault."""
    seen = set[str]()
    for problem in problems:
        if problem.kind == "too_short" and any(problem.holds(other) for other in problems):
            continue  # the items are at fault, not their number

        for line in problem.lines():
            if line not in seen:
                seen.add(line)
                yield line


def _dotted(place: str, rest: str) -> str:
    return f"{place}.{rest}" if place else rest


def _nearest(found: str, known: Sequence[str], otherwise: str) -> str:
    close = difflib.get_close_matches(found, known, n=1) or _abbreviated(found, known)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise}{', '.join(known) or 'none'}"


def _abbreviated(found: str, known: Sequence[str]) -> list[str]:
    """Return the names that `found` abbreviates, the likeliest first: it has the initials of their
    words (`lr`), is a piece of them (`epochs`), or has some of their letters in order (`lrn_rate`).
    """
    word = re.sub(r"[\W_]+", "", found.casefold())
    if len(word) < 2:
        return []

    plain = {name: name.replace("_", "") for name in sorted(known, key=len)}
    initials = [name for name in plain if word == "".join(part[:1] for part in name.split("_"))]
    pieces = [name for name in plain if len(word) > 2 and word in plain[name]]
    in_order = re.compile(".*".join(map(re.escape, word)))
    letters = [name for name in plain if len(word) > 2 and in_order.match(plain[name])]
    return [*initials, *pieces, *letters]
