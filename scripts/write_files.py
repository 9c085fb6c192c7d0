"""Write the tables of folders, layers and files into README and docs/architecture.md.

    python scripts/write_files.py [--check]

A folder's and a file's line is the first sentence of its docstring, and the layers are those of
`[tool.importlinter]` in pyproject.toml. With `--check` nothing is written, and the exit code says
whether both pages are up to date.
"""

import argparse
import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "fluvial"
FOLDERS = ("benchmarks", "examples", "scripts")
"""Folders beside the package whose files are listed."""
OTHER = {
    "configs": "Recipes: configurations to run or to copy, which a wheel has inside",
    "deploy": "Files for machines: services of systemd, a container image, a fleet of containers",
    "docs": "Documents; docs/README.md is their index",
    "examples": "A plain loop, a method and a codec of one's own, to read and run",
    "scripts": "Commands of this repository: checks, tests, tables, figures, the small model",
}
"""Folders without a docstring."""


def purpose(file: Path) -> str:
    """Return the first sentence of the docstring of `file`, without its full stop.

    Raises `ValueError` where there is none.
    """
    doc = ast.get_docstring(ast.parse(file.read_text("utf-8")))
    if not doc:
        raise ValueError(f"{file.relative_to(ROOT)} has no docstring")

    paragraph = " ".join(doc.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`\"])", paragraph)[0]

    return sentence.rstrip(".").replace("|", "\\|")


def layers() -> str:
    """Return the table of layers, the highest one first; the last rows are one layer together."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (contract,) = (contract for contract in contracts if contract["type"] == "layers")
    rows = ["| layer | purpose |", "| --- | --- |"]

    for layer in contract["layers"]:
        for name in layer.replace("|", " ").split():
            package = PACKAGE / name / "__init__.py"
            file = package if package.exists() else PACKAGE / f"{name}.py"
            rows.append(f"| `{name}` | {purpose(file)} |")

    return "\n".join(rows)


def folders_of(root: Path) -> Iterator[Path]:
    """Yield `root` and every folder below it that holds Python files."""
    yield from sorted({file.parent for file in root.rglob("*.py")})


def files() -> str:
    """Return one table for each folder of the package and beside it."""
    tables = []
    for root in (PACKAGE, *(ROOT / name for name in FOLDERS)):
        for folder in folders_of(root):
            rows = ["| file | purpose |", "| --- | --- |"]
            rows += [f"| `{file.name}` | {purpose(file)} |" for file in sorted(folder.glob("*.py"))]
            name = folder.relative_to(ROOT).as_posix()
            tables.append(f"### `{name}/`\n\n" + "\n".join(rows))

    return "\n\n".join(tables)


def folders() -> str:
    """Return the tree of folders, one line each."""
    lines = []
    for name, root in (("src/fluvial", PACKAGE), ("tests", ROOT / "tests")):
        lines.append((f"{name}/", purpose(root / "__init__.py")))
        inner = sorted(path.parent for path in root.glob("*/__init__.py"))
        lines += [(f"  {path.name}/", purpose(path / "__init__.py")) for path in inner]

    lines.append(("benchmarks/", purpose(ROOT / "benchmarks" / "__init__.py")))
    lines += [(f"{name}/", text) for name, text in OTHER.items() if (ROOT / name).exists()]
    width = max(len(name) for name, _ in lines) + 2
    text = "\n".join(f"{name:{width}}{purpose_of}" for name, purpose_of in lines)

    return f"```text\n{text}\n```"


SECTIONS = {
    "README.md": {"folders": folders},
    "docs/architecture.md": {"layers": layers, "files": files},
}


def written(page: str) -> str:
    """Return the text of `page` with its generated sections as they should be."""
    text = (ROOT / page).read_text("utf-8")
    for name, make in SECTIONS[page].items():
        start = f"<!-- {name}: made by scripts/write_files.py -->"
        end = f"<!-- /{name} -->"
        if start not in text or end not in text:
            raise ValueError(f"{page} has no section between {start} and {end}")

        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        section = f"{start}\n\n{make()}\n\n{end}"
        text = pattern.sub(lambda _, section=section: section, text)  # type: ignore[misc]

    return text


def main() -> None:
    """Write both pages, or say which one is not up to date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = [page for page in SECTIONS if (ROOT / page).read_text("utf-8") != written(page)]

    if options.check:
        if stale:
            sys.exit(f"{', '.join(stale)}: not up to date; run python scripts/write_files.py")
        return

    for page in stale:
        (ROOT / page).write_text(written(page), encoding="utf-8")


if __name__ == "__main__":
    main()
