"""Several sources, each of them a site's."""

import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress

from fluvial.data.faults import Faults, listed
from fluvial.data.site_names import composed, fault_of
from fluvial.errors import ConfigError
from fluvial.runs.proposal.columns import as_options
from fluvial.runs.proposal.records import (
    Ask,
    DataFacts,
    RecordFiles,
    SeparateFacts,
    facts_about,
)
from fluvial.runs.proposal.sites import Sites, answer_pairs
from fluvial.runs.proposal.undecided import UndecidedError, noting, unknown_answer
from fluvial.storage.files import expanded


def separate(
    sources: Sequence[RecordFiles],
    columns: Mapping[str, Mapping[str, str]],
    ask: Ask | None = None,
) -> SeparateFacts:
    """Return the facts about several sources, each of them a site's, which is named after it.

    See `parts_of` for `columns` and `ask`. Raises `DataError` with the faults of all sources.
    """
    faults = Faults()
    parts = parts_of(sources, columns, ask, defaultdict(lambda: faults), {})
    faults.raise_any()

    files = RecordFiles(
        ", ".join(each.source for each in sources),
        all(each.local for each in sources),
        {},
        tuple(table for each in sources for table in each.tables),
    )
    return SeparateFacts(files, next(iter(parts.values())).form, {}, False, parts)


def parts_of(
    sources: Sequence[RecordFiles],
    columns: Mapping[str, Mapping[str, str]],
    ask: Ask | None,
    faults: Mapping[str, Faults],
    undecided: dict[str, UndecidedError],
) -> dict[str, DataFacts]:
    """Return the facts about each source that has rows, by its site.

    `columns` has those that the caller renames by site, and under "" those of all sites. `ask` is
    called for those of a source, also where a text may have its answer beside it. Two sources of
    one name, columns that fit no form, and plain text beside questions with answers go to `faults`
    of the source, and what concerns several sources to those of ""; columns that nobody can be
    asked for go to `undecided` too, by site.
    """
    parts: dict[str, DataFacts] = {}
    names: list[str] = []
    for files in sources:
        with faults[files.source].catch():
            name = site_of(files.source, files.site)
            if name in names:
                raise ConfigError(
                    f"--data {files.source!r}: another source makes the site {name!r} too; name "
                    "one with --data NAME=PATH"
                )
            names.append(name)
            if files.rows:
                own = {**columns.get("", {}), **columns.get(name, {})}
                with noting(faults[files.source], undecided, name):
                    parts[name] = _part(name, files, own, ask)

    for name in columns.keys() - {"", *names}:
        faults[""].add(
            f"--column {name}:...: no --data makes a site {name!r}; they make {', '.join(names)}"
        )

    forms = {part.form: name for name, part in parts.items()}
    if len(forms) > 1 and "text" in forms:
        other = next(name for form, name in forms.items() if form != "text")
        plain = forms["text"]
        options = as_options("COLUMN", "COLUMN", plain)
        faults[""].add(
            f"--data: the records of {plain!r} are plain text, with the columns "
            f"{listed(parts[plain].files.names)}, and those of {other!r} have answers, which are "
            f"two tasks; name the columns with {options}, or leave one out"
        )
    return parts


def named_sources(options: Sequence[str]) -> list[tuple[str | None, str]]:
    """Return site and source of each `--data`, PATH or NAME=PATH; the site is None without a name.

    What exists is a path, also with "=" in it. Raises `DataError` with all names that are wrong or
    are given again, and for a name of the only source.
    """
    faults = Faults()
    found: list[tuple[str | None, str]] = []
    for option in options:
        name, mark, source = option.partition("=")
        if not mark or expanded(option).exists():
            found.append((None, option))
            continue

        shown = f"--data {option!r}"
        fault = fault_of(name)
        if not source.strip():
            faults.add(f"{shown}: names no file or folder; write --data NAME=PATH")
        elif fault is not None:
            faults.add(f"{shown}: {fault}; write --data NAME=PATH")
        elif name in (site for site, _ in found):
            faults.add(f"{shown}: site {name!r} is named again; give each source a name of its own")
        elif len(options) == 1:
            faults.add(
                f"{shown}: a name is for one of several --data, each of which is a site; write "
                f"--data {shlex.quote(source)}"
            )
        found.append((name, source))

    faults.raise_any()
    return found


def site_names(options: Sequence[str]) -> list[str]:
    """Return the names of the sites that several `--data` make, without those that can be no
    site's; raises `DataError` as `named_sources` does."""
    names: list[str] = []
    for site, source in named_sources(options) if len(options) > 1 else ():
        with suppress(ConfigError):
            names.append(site_of(source, site))
    return names


def site_of(source: str, given: str | None) -> str:
    """Return the name of a source's site: the one that is given, else that of its file without
    suffix, or of its folder.

    Raises `ConfigError` for one that can be no site's.
    """
    if given is not None:
        return given
    path = expanded(source)
    name = composed(path.resolve().name if path.is_dir() else path.stem)
    fault = fault_of(name)
    if fault is not None:
        raise ConfigError(
            f"--data {source!r}: its site would be named after it, but {fault}; name it with "
            "--data NAME=PATH"
        )
    return name


def _part(
    name: str,
    files: RecordFiles,
    columns: Mapping[str, str],
    ask: Ask | None,
) -> DataFacts:
    """Return the facts about the source of one of several sites."""
    source = files.source
    try:
        part = facts_about(files, columns, ask, name)
    except UndecidedError:
        raise
    except ConfigError as error:
        options = as_options("COLUMN", "COLUMN", name)
        fault = str(error).removeprefix("--data: ")
        raise ConfigError(f"--data {source!r}: {fault}; for this site alone, {options}") from None

    pairs = [] if columns else answer_pairs(part, Sites({}, {}, ""))
    if pairs and ask is not None:
        return facts_about(files, ask(files))
    if pairs:
        raise unknown_answer(source, pairs, name)
    return part
