"""A commented configuration as TOML text: tables of settings, each with its why."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS = 100
INDENT = 40
"""Column of comments behind a setting."""


@dataclass(frozen=True)
class Setting:
    """A setting with its value and the reason for it."""

    key: str
    value: Any
    why: str = ""

    def lines(self) -> list[str]:
        """Return the setting with its comment behind it, or above where that is too long."""
        line = f"{self.key} = {toml_value(self.value)}"
        if not self.why:
            return [line]

        behind = f"{line:<{INDENT - 1}} # {self.why}"
        return [behind] if len(behind) <= COLUMNS else [*comment(self.why), line]


@dataclass(frozen=True)
class Section:
    """A table of a configuration; the first has no name."""

    name: str
    settings: Sequence[Setting]
    why: str = ""
    remarks: Sequence[str] = ()
    """Comments at its end, such as settings that may be added."""

    def lines(self) -> list[str]:
        """Return the table as lines of TOML."""
        head = [*comment(self.why)] if self.why else []
        head += [self.name] if self.name else []
        settings = [line for setting in self.settings for line in setting.lines()]
        return [*head, *settings, *(line for remark in self.remarks for line in comment(remark))]


def comment(text: str) -> list[str]:
    """Return a comment of lines that are no wider than a page."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) + 3 > COLUMNS:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word

    return [f"# {line}" for line in lines]


def document(head: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the text of a configuration; tables without a setting or remark are left out."""
    blocks = ["\n".join(line for text in head for line in comment(text))]
    blocks += ["\n".join(each.lines()) for each in sections if each.settings or each.remarks]
    return "\n\n".join(blocks) + "\n"


def toml_value(value: Any) -> str:
    """Return a value of a setting as TOML writes it, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=not value.isprintable())
    if isinstance(value, Mapping):
        pairs = (f"{key} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(toml_value, value))}]"

    return repr(value)
