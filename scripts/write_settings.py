"""Write docs/settings.md, every setting of the files that people write, from the classes that
read them.

    python scripts/write_settings.py [--check]

With `--check` nothing is written, and the exit code says whether the page is up to date.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluvial.settings import Settings

Settings.model_config["use_attribute_docstrings"] = True  # before a class of settings is made

from fluvial.flower.server_operator import ServerFile  # noqa: E402
from fluvial.runs.comparison.sweep import SweepConfig  # noqa: E402
from fluvial.runs.config import RunConfig  # noqa: E402
from fluvial.site_process.site_file import SiteFile  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """# Every setting

`python scripts/write_settings.py` writes this page from the classes that read the files. Do not
edit it by hand.

`fluvial check CONFIG` names an unknown key and the nearest known one, or all known keys of the
table if none is near. `--set 'method.fraction = 0.5'` replaces one setting of a run. A relative
path in a file is relative to the folder of that file; a relative path in `--set` is relative to the
working directory. `fluvial submit` sends paths to sites as they are written. A setting without a
default must be given. Its text says what "unset" means.
"""
FILES: tuple[tuple[str, str, type[Settings]], ...] = (
    (
        "The configuration of a run",
        "`fluvial run`, `check`, `preview` and `submit` read it.",
        RunConfig,
    ),
    (
        "The file of a comparison",
        "`fluvial compare` reads it; [comparing](comparing.md) explains it.",
        SweepConfig,
    ),
    (
        "site.toml",
        "Made by `fluvial site init`; the site's operator decides what is in it.",
        SiteFile,
    ),
    ("server.toml", "Made by `fluvial server init`.", ServerFile),
)
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
TYPES = {"integer": "integer", "number": "number", "string": "string", "boolean": "true or false"}


class Page:
    """The sections of one file."""

    def __init__(self, root: type[Settings]) -> None:
        self.schema = root.model_json_schema()
        self.definitions = self.schema.get("$defs", {})
        self.home: dict[str, str] = {}
        """The place that describes a table which stands at several places: the one with the
        fewest names."""

        for place, found in self._places(self.schema, ""):
            what = json.dumps(found)
            self.home[what] = min(
                self.home.get(what, place), place, key=lambda each: each.count(".")
            )

        self.described = set[str]()

    def sections(self) -> Iterator[str]:
        """Yield the top level, then every table below it."""
        yield from self._table(self.schema, "")

    def _places(
        self, schema: dict[str, Any], place: str
    ) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Every table below one, and what it may hold."""
        for key, field in schema.get("properties", {}).items():
            inner = f"{place}.{key}".lstrip(".")
            found = self._tables(field)
            if found:
                yield inner, found
            for each in found:
                yield from self._places(each, inner)

    def _table(
        self, schema: dict[str, Any], place: str, but: frozenset[str] = frozenset()
    ) -> Iterator[str]:
        """Yield a table's own keys as rows, then its tables; `but` were described before."""
        fields = {
            key: field for key, field in schema.get("properties", {}).items() if key not in but
        }
        tables = {key: found for key, field in fields.items() if (found := self._tables(field))}
        required = schema.get("required", [])
        rows = [
            self._row(key, field, key in required)
            for key, field in fields.items()
            if key not in tables
        ]

        if rows:
            yield "\n".join(["| key | value | default | |", "| --- | --- | --- | --- |", *rows])

        for key, found in tables.items():
            inner = f"{place}.{key}".lstrip(".")
            words = _sentence(fields[key]) or (_sentence(found[0]) if len(found) == 1 else "")
            what = json.dumps(found)
            home = self.home[what]
            here = home == inner and what not in self.described

            if not here:
                words = f"{words} See `[{home}]`.".lstrip()

            heading = f"[[{inner}]]" if _is_array(fields[key]) else f"[{inner}]"
            yield f"### `{heading}`\n\n{words}".rstrip()
            if here:
                self.described.add(what)
                yield from (
                    self._table(found[0], inner) if len(found) == 1 else self._union(found, inner)
                )

    def _union(self, found: list[dict[str, Any]], place: str) -> Iterator[str]:
        """Yield a table of several kinds: what all of them have, as most of them have it, then
        each."""
        kinds = [each["properties"] for each in found]
        everywhere = [key for key in kinds[0] if all(key in each for each in kinds)]
        usual = {key: _most([each[key] for each in kinds]) for key in everywhere}
        usual = {key: field for key, field in usual.items() if "const" not in field}
        yield from self._table({"properties": usual}, place)

        for each in found:
            tag, value = next(
                (key, field["const"])
                for key, field in each["properties"].items()
                if "const" in field
            )
            heading = f"#### `[{place}]` with `{tag} = {json.dumps(value)}`"
            yield f"{heading}\n\n{_sentence(each)}".rstrip()
            same = {key for key, field in usual.items() if each["properties"][key] == field}
            yield from self._table(each, place, frozenset({*same, tag}))

    def _tables(self, field: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the tables that a field may hold."""
        options = [
            each
            for each in field.get("anyOf", field.get("oneOf", [field]))
            if each.get("type") != "null"
        ]
        options = [inner for each in options for inner in each.get("oneOf", [each])]
        options = [each["items"] if _is_array(each) else each for each in options]

        if options and all("$ref" in each for each in options):
            return [self.definitions[each["$ref"].rpartition("/")[2]] for each in options]

        return []

    def _row(self, key: str, field: dict[str, Any], required: bool) -> str:
        default = (
            "" if required else "unset" if field.get("default") is None else _code(field["default"])
        )
        cells = (f"`{key}`", self._value(field), default, _sentence(field))
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    def _value(self, field: dict[str, Any]) -> str:
        if "$ref" in field:
            return self._value(self.definitions[field["$ref"].rpartition("/")[2]])
        if "anyOf" in field:
            return " or ".join(
                self._value(each) for each in field["anyOf"] if each.get("type") != "null"
            )

        if "const" in field:
            return _code(field["const"])
        if "enum" in field:
            return ", ".join(map(_code, field["enum"]))
        if field["type"] == "array":
            items = field.get("prefixItems", [field["items"]] if field.get("items") else [])
            return "array of " + ", ".join(self._value(each) for each in items)

        if field["type"] == "object":
            return "table"

        bounds = [f"{words} {_short(field[key])}" for key, words in BOUNDS.items() if key in field]
        return " ".join([TYPES[field["type"]], ", ".join(bounds)]).strip()


def _is_array(field: dict[str, Any]) -> bool:
    """Return true for an array of tables, each with a heading of its own in TOML."""
    return field.get("type") == "array" and "$ref" in field.get("items", {})


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _short(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.12g}"


def _most(found: list[Any]) -> Any:
    """Return the most frequent value, the first of several."""
    return max(found, key=found.count)


def _sentence(schema: dict[str, Any]) -> str:
    """Return a description on one line."""
    return " ".join(schema.get("description", "").split())


def page() -> str:
    """Return the whole document."""
    parts = [HEAD.strip()]
    for title, words, root in FILES:
        parts += [f"## {title}\n\n{words}", *Page(root).sections()]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    written = page()

    if parser.parse_args().check:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != written)

    PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
