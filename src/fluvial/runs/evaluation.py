"""Settings of `fluvial evaluate`: what a folder tells about its run, and what --set adds."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fluvial.data import DataConfig, DataError
from fluvial.data.config import READING
from fluvial.data.faults import Faults
from fluvial.data.files import UTF8
from fluvial.data.forms import CONVERSATIONS
from fluvial.data.sources import DELIMITED, Found, Source, read_source
from fluvial.errors import ConfigError
from fluvial.runs.config import RunConfig, merge, override, parse, with_chat_template
from fluvial.runs.proposal.document import toml_value
from fluvial.storage import exported, toml
from fluvial.storage.files import expanded
from fluvial.storage.kinds import kind_of, taken_over
from fluvial.training.assess import whole_file
from fluvial.training.folders import measured_as

RECORDS = frozenset(DataConfig.model_fields) - exported.PLACES | {"max_heldout"}
"""Settings of [data] that change how records of a file are read or scored."""


Way = TypeVar("Way")
SITES = "sites"
"""Key of the sites whose tables fit the file, where the one that is named does not, in what a
folder tells about a run."""
EXAMPLES: dict[str, Any] = {
    "encoding": "cp1252",
    "delimiter": ";",
    "columns": {"completion": "answer"},
    "overlong": "shorten_prompt",
}
"""Values of settings that an error about records may ask for, where it proposes none."""
TEMPLATE = "chat_template"
"""Setting of [data] that conversations alone have."""
UNSET = (TEMPLATE, "read_as", "numbers")
"""Settings of [data] in which ways of reading may differ, and which may be unset."""
TXT = ".txt"
"""Suffix of files of plain text, which have neither columns nor form."""
AS_SITE = "as_site"
"""Key of the site, or of the sites, as whose records those to measure are read, in the same."""


def run_settings(
    name: str,
    records: Path | None,
    site: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tables that measure a model by itself, and what its folder tells about its run,
    see `own_reading`."""
    folder = expanded(name)
    told = exported.read(folder) if folder.is_dir() else {}
    run = own_reading(folder, told, records, site, overrides)
    return measured_as(run, name, records), run


def own_reading(
    folder: Path,
    run: dict[str, Any],
    records: Path | None,
    site: str | None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what a folder tells about its `run`, with [data] as the run reads the file `records`.

    That is the table of `site`, or of the sites whose own file this is, else the only way of the
    run in which the file can be read. Held-out and public records of the run have their own
    settings. Raises `ConfigError` for a site without a table, and for a file that can be read in
    two ways.
    """
    config = exported.config_around(folder) if folder.is_dir() else None
    if config is None:
        if site is not None:
            raise ConfigError(
                f"--site {site}: no run lies around {folder}, and a written folder names no sites; "
                "remove it: the file is read as the run read files with its columns"
            )
        return _alone(run, records, _changes(overrides).get("data", {}))

    data = toml.read(DataConfig, config["data"], str(folder))
    tables = {name: data.of_site(name) for name in sorted(data.by_site)}
    if site is not None and site not in tables:
        why = f"data.by_site of the run has no such table; name one of {', '.join(tables)}"
        if not tables:
            why = "without effect, because the run reads all sites' records in one way; remove it"
        raise ConfigError(f"--site {site}: {why}")

    known = {name: _reading(table, records) for name, table in tables.items()}
    chosen = [site] if site else [name for name in tables if _reads(tables[name], records)]
    if not tables:
        return {**run, **_reading(data, records)}
    if records is not None and (site or not chosen):
        fitting = _that_fit(known, records)
        if site and site not in fitting:
            run = {**run, SITES: fitting}
        chosen = chosen or fitting
    if not chosen:
        return run

    own = [known[name] for name in chosen]
    if not _alike(own, records):
        raise ConfigError(
            f"--data {records}: the tables of {', '.join(chosen)} in data.by_site "
            "read this file in different ways; choose one with --site NAME"
        )
    return {**run, **own[0], AS_SITE: ", ".join(chosen)}


def _alone(run: dict[str, Any], records: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a folder without its run tells, with [data] in the only way of the run in which
    `records` can be read; settings that are `given` take the place of the run's.

    Where the run had one source for all sites, the way of that source goes before those of its
    held-out and public records. Raises `ConfigError` for two ways.
    """
    readings = run.get(exported.READINGS)
    if records is None or not readings:
        return run

    ways: dict[int, dict[str, Any]] = {}
    for number, reading in enumerate(readings):
        own = {key: value for key, value in reading.items() if key != "suffix"}
        data = {key: value for key, value in run["data"].items() if key not in READING}
        table = taken_over({**data, **own}, reading.get("suffix", ""), kind_of(records))
        if kind_of(records) == TXT:
            table = _as_text(table)
        whole = {"encoding": UTF8, "delimiter": None, **table, **given}
        told = {"data": whole, "suffix": kind_of(records)}
        if told not in ways.values():
            ways[number] = told

    fitting = [ways[number] for number in _that_fit(ways, records)]
    if not fitting:
        return run
    if not CONVERSATIONS & _forms(fitting[0], records):  # which alone are read with a template
        for way in fitting:
            way["data"].pop(TEMPLATE, None)
        fitting = [way for place, way in enumerate(fitting) if way not in fitting[:place]]
    if not run.get("suffix") and not _alike(fitting, records):
        keys = [
            key
            for key in (*READING, *UNSET)
            if len({str(way["data"].get(key)) for way in fitting}) > 1
        ]
        values = [
            " ".join(
                _as_set(key, value)
                for key in keys
                if (value := way["data"].get(key)) is not None or key not in UNSET
            )
            for way in fitting
        ]
        raise ConfigError(
            f"--data {records}: sites of the run read such a file in different ways; add "
            f"{', or '.join(dict.fromkeys(filter(None, values)))}"
        )
    return {**run, **fitting[0]}


def _as_text(table: dict[str, Any]) -> dict[str, Any]:
    """Return [data] without what a file of plain text cannot have."""
    return {**table, "form": "auto", "columns": {}, "delimiter": None}


def _as_set(key: str, value: Any) -> str:
    """Return a setting of [data] as an option of the command; the text of a template stands in a
    file."""
    if key == TEMPLATE and "{" in str(value):
        value = "FILE"
    value = {"columns": {}, "encoding": UTF8, "delimiter": ","}.get(key) if value is None else value
    return f"--set {shlex.quote(f'data.{key}={toml_value(value)}')}"


def _that_fit(ways: Mapping[Way, dict[str, Any]], records: Path) -> list[Way]:
    """Return the keys of the ways in which the file `records` can be read.

    Text that is UTF-8 is not read by an encoding of one byte, which fits every text.
    """
    fitting = [key for key, told in ways.items() if _fits(told, records)]
    plain = [_all_but_encoding(ways[key]) for key in fitting if _encoding(ways[key]) == UTF8]
    return [
        key
        for key in fitting
        if _encoding(ways[key]) == UTF8 or _all_but_encoding(ways[key]) not in plain
    ]


def _encoding(told: Mapping[str, Any]) -> str:
    return str(told["data"].get("encoding", UTF8))


def _all_but_encoding(told: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in told["data"].items() if key != "encoding"}


def _fits(told: Mapping[str, Any], records: Path) -> bool:
    """Return whether the file `records` can be read by what is `told` about [data]."""
    try:
        return bool(_forms(told, records))
    except (ConfigError, ValidationError):
        return False


def _alike(ways: Sequence[Mapping[str, Any]], records: Path | None) -> bool:
    """Return whether all ways of reading give the same records of a file, however they are
    written: with the same template, where there are conversations."""
    if all(way == ways[0] for way in ways[1:]):
        return True
    if records is None:
        return False

    read = []
    for way in ways:
        try:
            found = _found(way, records)
        except (ConfigError, ValidationError):
            return False
        template = way["data"].get(TEMPLATE) if CONVERSATIONS & set(found.forms) else None
        read.append(([entry.record.content for entry in found.entries], template))
    return all(other == read[0] for other in read[1:])


def _forms(told: Mapping[str, Any], records: Path) -> set[str]:
    """Return the forms of the records in a file; raises `ConfigError` where it has faults."""
    return set(_found(told, records).forms)


def _found(told: Mapping[str, Any], records: Path) -> Found:
    """Return the records of a file; raises `ConfigError` where it has faults."""
    data = DataConfig.model_validate({**told["data"], "source": str(records)})
    faults = Faults()
    source = Source("--data", data.source, data.split, data.reading(), strict=False)
    found = read_source(source, faults)
    faults.raise_any()
    return found


def _reads(data: DataConfig, records: Path | None) -> bool:
    """Return whether a file is one of those that the table of a site names."""
    return any(_same(records, name) for name in (data.source, data.heldout_source))


def _reading(data: DataConfig, records: Path | None) -> dict[str, Any]:
    """Return what a folder tells about [data], with the settings of the source that the file
    `records` is."""
    table = data.model_dump(mode="json")
    for name, own in ((data.heldout_source, data.heldout), (data.public_source, data.public)):
        if _same(records, name):
            table |= data.reading(own, name).model_dump(include=set(READING)) | {"source": name}
    if records is not None and records.suffix.lower() not in DELIMITED:
        table["delimiter"] = None

    told = exported.settings_of({"data": table})
    if records is not None and kind_of(records) == TXT:
        text = taken_over(told["data"], told["suffix"], TXT)
        return {"data": _as_text({"encoding": UTF8} | text), "suffix": TXT}
    return {"data": told["data"], "suffix": told["suffix"]}


def _same(records: Path | None, name: str | None) -> bool:
    """Return whether two names are of one file."""
    if records is None or name is None:
        return False
    return expanded(records).resolve() == expanded(name).resolve()


@contextmanager
def with_remedies(run: dict[str, Any]) -> Iterator[None]:
    """Add to an error about records that names a setting the options by which a command reads them
    in another way."""
    try:
        yield
    except DataError as error:
        named = [key for key in EXAMPLES if f"data.{key}" in str(error)]
        remedies = [f"--site {name}, whose table fits the file" for name in run.get(SITES, [])]
        if not remedies and named and "--set" not in str(error):
            remedies.append(_as_set(named[0], _proposed(named[0], str(error))))
        if not remedies:
            raise
        raise ConfigError(f"{error}. With this command, add {' or '.join(remedies)}") from error


def _proposed(key: str, error: str) -> Any:
    """Return the value of a setting of [data] that an error proposes, else one of `EXAMPLES`."""
    told = re.search(rf'data\.{key}(?: =|, for instance to) ("(?:[^"\\]|\\.)*")', error)
    return EXAMPLES[key] if told is None else json.loads(told[1])


def evaluation_settings(
    table: dict[str, Any], records: Path | None, overrides: Sequence[str]
) -> RunConfig:
    """Return the configuration of an evaluation; `table` holds what a folder tells, see
    `measured_as`.

    Raises `ConfigError` for a setting without effect here.
    """
    changes = _changes(overrides)
    _refuse_idle(changes, records)
    if "name_or_path" in changes.get("model", {}):  # the revision is that of the base it replaces
        base = {key: value for key, value in table["model"].items() if key != "revision"}
        table = {**table, "model": base}

    merged = merge(
        {**table, "data": {}}, {key: value for key, value in changes.items() if key != "data"}
    )
    if records is not None:
        # Key by key: a table such as `columns` that is set takes the place of the run's.
        merged["data"] = {**table["data"], **changes.get("data", {}), **whole_file(records)}

    return with_chat_template(
        parse(merged, "--set" if overrides else "what the folder tells about its run")
    )


def _changes(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings of all lines of --set in one table."""
    changes: dict[str, Any] = {}
    for line in overrides:
        changes = merge(changes, override(line))
    return changes


def _refuse_idle(changes: dict[str, Any], records: Path | None) -> None:
    known = {"seed", "model.", "evaluate.max_new_tokens"}
    known |= set() if records is None else {f"data.{key}" for key in RECORDS}
    for key, value in changes.items():
        for name in (f"{key}.{inner}" for inner in value) if isinstance(value, dict) else (key,):
            if name not in known and not name.startswith("model."):
                raise ConfigError(
                    f"--set {name}: without effect {'' if records else 'without --data '}on what "
                    f"is done with these weights; known here: {', '.join(sorted(known))}"
                )


def how_records_are_read(
    data: DataConfig, run: dict[str, Any], overrides: Sequence[str], form: str
) -> dict[str, Any]:
    """Return form, columns and template of the records, and where they come from, with a line for
    people.

    `form` is the one of the records as they were read.
    """
    given: set[str] = set()
    for line in overrides:
        given |= set(override(line).get("data", {}))
    origin = "as the run that wrote the folder" if run else "no run is known, so by default"
    origin += f" reads those of {run[AS_SITE]}" if AS_SITE in run else ""
    template = data.chat_template
    columns = ", ".join(f"{ours} = {theirs!r}" for ours, theirs in data.columns.items())
    detected = " (detected)" if data.form == "auto" else ""
    parts = [f"form {form}{detected}", f"columns {columns or 'as they are named'}"]
    parts += [f"encoding {data.encoding}"] if data.encoding != UTF8 else []
    parts += [f"delimiter {data.delimiter!r}"] if data.delimiter else []
    parts += [f"max_length {data.max_length}", f"loss on {data.loss_on}"]
    parts += [_template_words(template, form)]
    line = f"Records read {origin}: {'; '.join(parts)}"
    line += f"; set here: {', '.join(sorted(given))}" if given else ""

    return {
        "form": form,
        "detected": data.form == "auto",
        "columns": dict(data.columns),
        "chat_template": template,
        "max_length": data.max_length,
        "loss_on": data.loss_on,
        "from_run": bool(run),
        "as_site": run.get(AS_SITE),
        "set_here": sorted(given),
        "line": line,
    }


def _template_words(template: str | None, form: str) -> str:
    """Return which chat template renders the records; none unless one is a conversation, which a
    tokenizer without a template refuses."""
    if not CONVERSATIONS & set(form.split(", ")):
        return "no chat template, which conversations alone have"
    return "template of the run" if template else "template of the tokenizer"
