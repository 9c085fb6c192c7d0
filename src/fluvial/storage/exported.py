"""Settings that go with a written adapter or model, so that it is measured as it was trained.

The file `fluvial.json` beside the weights holds the base and its digest, the form of the records,
their columns and template, and the lengths. Where the files of sites differ, it has each way in
which the run read some, without the names of sites and files. It goes where the folder goes; the
run's own `config.json` does not.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluvial.errors import ConfigError
from fluvial.storage.files import read_object
from fluvial.storage.kinds import kind_of, taken_over
from fluvial.storage.run_files import CONFIG, DESCRIPTION

FILE = "fluvial.json"
PLACES = frozenset(
    {
        *("source", "split", "heldout_source", "heldout_split", "heldout_share", "heldout"),
        *("public_source", "public", "partition", "sites", "by_site", "max_heldout", "packing"),
    }
)
"""Settings of [data] that say where text lies, who has it and how training joins it; the others say
how a record is read and scored."""
QUANTISATION = ("quantization", "layer_quantization", "quantization_correction")
"""Settings of [model] about quantised weights."""
BASE_DIGEST = "base_digest"
"""Key of the digest of the base's weights."""
MOSTLY = "records_are_mostly"
"""Key of what most records of the run are, see `SiteTexts.mostly`; absent where it is not known."""
READINGS = "readings"
"""Key of the ways in which the run read files, where there are several: settings of [data], and the
`suffix` of the files."""
_FORM: dict[str, type] = {
    **dict.fromkeys(("fluvial", "suffix", "site_column", BASE_DIGEST, MOSTLY), str),
    **dict.fromkeys(("model", "data", "evaluate", DESCRIPTION), dict),
    READINGS: list,
}
"""Type of the value of each key of the file, and of those of a run's configuration beside them."""
_DATA: dict[str, type] = {
    **dict.fromkeys(("suffix", "source", "chat_template", "encoding", "delimiter"), str),
    **dict.fromkeys(("columns", "partition", "by_site"), dict),
}
"""Type of the value of each key of the table [data], and of a way of reading."""
_UNSET = ({"site_column", DESCRIPTION} | _DATA.keys()) - {"suffix"}
"""Keys whose value may be null."""
_WORDS: dict[type, str] = {str: "text", dict: "an object", list: "a list of objects"}
MODEL = ("name_or_path", "revision", "dtype", *QUANTISATION)


def settings_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a run's resolved configuration that a measurement of its result needs."""
    data = {key: value for key, value in resolved.get("data", {}).items() if key not in PLACES}
    model = resolved.get("model", {})
    mostly = (resolved.get(DESCRIPTION) or {}).get(MOSTLY)
    partition = resolved.get("data", {}).get("partition") or {}
    data["chat_template"] = chat_template(resolved.get("data", {}))

    return {
        "model": {key: model[key] for key in MODEL if model.get(key)},
        "data": {key: value for key, value in data.items() if value is not None},
        "evaluate": {"max_new_tokens": resolved.get("evaluate", {}).get("max_new_tokens", 0)},
        "site_column": partition.get("column") if partition.get("by") == "column" else None,
        "suffix": kind_of(str(resolved.get("data", {}).get("source", ""))),
        **({MOSTLY: mostly} if mostly else {}),
    }


def chat_template(data: Mapping[str, Any]) -> str | None:
    """Return the chat template that [data] of a run sets for all conversations: its own, or that of
    all tables of sites that set one; None where it sets none, or several."""
    own = {table.get("chat_template") for table in (data.get("by_site") or {}).values()} - {None}
    shared = own.pop() if len(own) == 1 else None
    return data.get("chat_template") or shared


def templates_by_site(data: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the chat template of each site that has a table in [data] of a run, its own or that of
    [data]; None for the tokenizer's."""
    return {
        name: table.get("chat_template") or data.get("chat_template")
        for name, table in sorted((data.get("by_site") or {}).items())
    }


def of_site(resolved: Mapping[str, Any], site: str) -> dict[str, Any]:
    """Return a run's resolved configuration with the chat template of one site for all."""
    data = resolved.get("data", {})
    own = templates_by_site(data)
    if site not in own:
        return dict(resolved)
    return {**resolved, "data": {**data, "by_site": {}, "chat_template": own[site]}}


def write(
    folder: Path,
    version: str,
    resolved: Mapping[str, Any],
    base_digest: str | None = None,
    readings: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write `FILE` into the folder of an adapter or a model.

    `readings` are those of the run's data, see `DataConfig.readings`.
    `base_digest` is that of the base's weights (see `models.digests`); None where others load the
    base by another name, from files that may be written in another way.
    """
    digest = {} if base_digest is None else {BASE_DIGEST: base_digest}
    several = {READINGS: list(readings)} if len(readings) > 1 else {}
    content = {"fluvial": version, **settings_of(resolved), **several, **digest}
    (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """Return what `write` wrote, or the same from the configuration of the run that `folder` lies
    in (see `config_around`), or {}.

    Raises `ConfigError` for a file that is damaged.
    """
    own = _tables(folder / FILE)
    if own is not None:
        return own

    around = config_around(folder)
    return {} if around is None else settings_of(around)


def config_around(folder: Path) -> dict[str, Any] | None:
    """Return the configuration of the run that `folder` lies in, None without one.

    A run lies around RUN/adapter and around RUN/compare/NAME/adapter. Raises `ConfigError` for a
    file that is damaged.
    """
    parents = folder.resolve().parents
    for parent in (*parents[:1], *parents[2:3]):
        tables = _tables(parent / CONFIG)
        if tables is not None and "fluvial" in tables:  # another config.json is a model's
            return tables

    return None


def for_file(settings: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """Return the table [data] for records in `path`, as the run read its own."""
    kind = "" if path is None else kind_of(path)
    return taken_over(settings.get("data", {}), settings.get("suffix", "").lower(), kind)


def _tables(path: Path) -> dict[str, Any] | None:
    """Return the content of a file, None without one; raises `ConfigError` where it has not the
    form of `_FORM`. A config.json that names no version of Fluvial is a model's, of any form."""
    tables = read_object(path)
    if tables is not None and (path.name == FILE or "fluvial" in tables):
        _check_form(path, tables, _FORM)
        data = tables.get("data", {})
        _check_form(path, data, _DATA, "data.")
        own = data.get("by_site") or {}
        inner = {f"data.by_site.{name}": table for name, table in own.items()}
        inner |= {f"{READINGS}.{place}": way for place, way in enumerate(tables.get(READINGS, []))}
        for key, table in inner.items():
            _check_form(path, {key: table}, {key: dict})
            _check_form(path, table, _DATA, f"{key}.")
    return tables


def _check_form(
    path: Path, table: Mapping[str, Any], form: Mapping[str, type], prefix: str = ""
) -> None:
    """Raise `ConfigError` for the first value that is of another type than its key in `form`."""
    for key, expected in form.items():
        value = table.get(key, expected())
        if not isinstance(value, expected) and not (value is None and key in _UNSET):
            raise ConfigError(f"{path}: {prefix + key!r} must be {_WORDS[expected]}; copy it again")
