"""Configuration of a run as it holds at a site, with the site's own data, model and device.

The site's `[data]` table replaces the run's sources, and its `model` the run's. A run may name
other paths of the site's disk only where `allow.run_paths` in site.toml covers them. The refusal is
the same for a path that exists and one that does not, so it discloses nothing.
"""

import fnmatch
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from fluvial.data.config import STDLIB, DataConfig
from fluvial.data.sources import has_splits
from fluvial.errors import RefusalError
from fluvial.models.pretrained import EMBEDDED, HUB_ID
from fluvial.runs.config import RunConfig, parse
from fluvial.site_process.site_file import SiteFile
from fluvial.storage.files import expanded
from fluvial.storage.kinds import kind_of, taken_over
from fluvial.storage.paths import BUNDLED

INDEPENDENT = (
    "form",
    "columns",
    "encoding",
    "delimiter",
    "numbers",
    "read_as",
    "chat_template",
    "heldout_share",
    "max_length",
    "overlong",
    "packing",
    "loss_on",
    "max_heldout",
)
"""Settings of a run's [data] that also hold for a site with its own records, because they depend on
no source."""
RENDERED = ("chat_template", "read_as", "numbers")
"""Settings of a site's table in a run's data.by_site that also hold where the site has its own
records: they say how a text is put, and name no source."""
PUBLIC = ("public_source", "public")
"""Settings of the public text, which the server alone reads."""
SOURCES = ("source", "heldout_source")
"""Settings that name what a site reads."""
_MAX_FILES = 10_000
"""Most files of a folder that a run may name."""


def at_site(config: RunConfig, site: SiteFile) -> RunConfig:
    """Return the run's configuration as it holds at `site`.

    Raises `RefusalError` if the run names a path that the site's file does not allow.
    """
    table = config.model_dump(mode="json", exclude_unset=True)
    table["model"] = {**table.get("model", {}), "device": site.device}

    if site.model is not None:
        table["model"] |= {"name_or_path": site.model, "revision": None}
    elif not _may_load(config.model.name_or_path, site):
        raise refusal("model.name_or_path", site)

    table["data"] = _data(config.data, site)
    return parse(table, f"site {site.name!r}")


def refusal(setting: str, site: SiteFile) -> RefusalError:
    """Return the refusal of a path that a run names, the same whether it exists or not."""
    own = "model" if setting.startswith("model") else "[data]"
    return RefusalError(
        f"site {site.name!r} does not read what a run names as {setting}: its file sets no {own} "
        "of its own, and allow.run_paths does not name this, or nothing is there; a run names "
        "whole paths of the site's disk"
    )


def _data(run: DataConfig, site: SiteFile) -> dict[str, Any]:
    """Return the run's [data] with the site's records."""
    settings = run.model_dump(mode="json", exclude_unset=True)
    if site.data is not None:
        own = {name: value for name, value in settings.items() if name in INDEPENDENT}
        table = settings.get("by_site", {}).get(site.name, {})
        own |= {name: table[name] for name in RENDERED if table.get(name) is not None}
        if site.data.heldout_source is not None:
            own.pop("heldout_share", None)
        own = taken_over(own, kind_of(run.source), kind_of(site.data.source))
        return {**own, **site.data.model_dump(exclude_none=True)}

    if run.by_site:
        return _own_table(run, settings, site)

    _check_paths("data", settings, site)
    local = {name: value for name, value in settings.items() if name not in PUBLIC}
    if settings.get("source", STDLIB) in BUNDLED:
        # The run sets these for its public text.
        for name in ("encoding", "delimiter", "numbers"):
            local.pop(name, None)

    return local


def _own_table(run: DataConfig, settings: Mapping[str, Any], site: SiteFile) -> dict[str, Any]:
    """Return a run's [data] with the table of this site alone in `by_site`."""
    if site.name not in run.by_site:
        raise RefusalError(
            f"site {site.name!r}: the run's data.by_site has tables for other sites alone; add one "
            "for this site, or set [data] in its own file"
        )

    own = run.by_site[site.name]
    _check_paths(f"data.by_site.{site.name}", own.model_dump(), site)
    of_others = {*PUBLIC, "sites"}
    if own.heldout_source is not None:
        of_others.add("heldout_share")
    if not any(map(has_splits, filter(None, (own.source, own.heldout_source)))):
        of_others.add("split")

    local = {name: value for name, value in settings.items() if name not in of_others}
    return {**local, "by_site": {site.name: settings["by_site"][site.name]}}


def _check_paths(table: str, settings: Mapping[str, Any], site: SiteFile) -> None:
    """Raise `RefusalError` for a source in `settings` that the site's file does not allow."""
    for name in SOURCES:
        named = settings.get(name)
        if named not in (None, *BUNDLED) and not _allowed(named, site):
            raise refusal(f"{table}.{name}", site)


def _may_load(name: str, site: SiteFile) -> bool:
    """Return True if the site may load the base model of a run; a hub id names no path."""
    if name == EMBEDDED or name in site.allow.models or _allowed(name, site):
        return True
    return HUB_ID.fullmatch(name) is not None and ".." not in name and not Path(name).exists()


def _allowed(named: str, site: SiteFile) -> bool:
    """Return True if the site's patterns cover a path, with links resolved, and all files in it."""
    patterns = site.allow.run_paths
    if not patterns:
        return False
    if "*" in patterns:
        return True

    try:
        real = expanded(named).resolve()
        inside = [real, *islice(real.rglob("*"), _MAX_FILES + 1)] if real.is_dir() else [real]
        return len(inside) <= _MAX_FILES and all(
            _covered(path.resolve(), patterns) for path in inside
        )
    except (OSError, RuntimeError, ValueError):
        return False


def _covered(path: Path, patterns: tuple[str, ...]) -> bool:
    """Return True if a pattern matches the whole path or a folder above it."""
    return any(
        fnmatch.fnmatchcase(str(path), pattern)
        or fnmatch.fnmatchcase(str(path), f"{pattern.rstrip('/')}/*")
        for pattern in patterns
    )
