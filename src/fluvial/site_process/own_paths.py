"""Paths of a site's disk that a run may name: none, unless the site's own file says so.

The site's `[data]` table takes the place of the run's sources, and its `model` that of the run's.
Any other file or folder that a run names is refused in the same words, be it there or not, so that
a refusal tells nothing.
"""

import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

from fluvial.data.config import STDLIB
from fluvial.errors import RefusalError
from fluvial.models.pretrained import EMBEDDED, HUB_ID
from fluvial.runs.config import RunConfig, parse
from fluvial.site_process.site_file import SiteFile

OF_NO_SOURCE = (
    "form",
    "columns",
    "encoding",
    "delimiter",
    "numbers",
    "chat_template",
    "heldout_share",
    "max_length",
    "overlong",
    "packing",
    "loss_on",
    "max_heldout",
)
"""Settings of a run's [data] that hold for a site with records of its own. All others are the
site's."""
SOURCES = ("source", "heldout_source")
"""Settings that name what a site reads; the public text is the server's."""
_MANY = 10_000
"""Files of a folder that are looked at."""


def at_site(config: RunConfig, site: SiteFile) -> RunConfig:
    """Return the run's configuration as it holds at a site; raises `RefusalError` for what the run
    may not name."""
    table = config.model_dump(mode="json", exclude_unset=True)
    table["model"] = {**table.get("model", {}), "device": site.device}

    if site.model is not None:
        table["model"] |= {"name_or_path": site.model, "revision": None}
    elif not _may_load(config.model.name_or_path, site):
        raise refusal("model.name_or_path", site)

    table["data"] = _data(table.get("data", {}), site)
    return parse(table, f"site {site.name!r}")


def refusal(setting: str, site: SiteFile) -> RefusalError:
    """Return the one answer to a path that a run names, whatever lies there."""
    own = "model" if setting.startswith("model") else "[data]"
    return RefusalError(
        f"site {site.name!r} does not read what a run names as {setting}: its file sets no {own} "
        "of its own, and allow.run_paths does not name this, or nothing is there"
    )


def _data(asked: dict[str, Any], site: SiteFile) -> dict[str, Any]:
    """The run's [data] with the site's records."""
    if site.data is not None:
        kept = {name: value for name, value in asked.items() if name in OF_NO_SOURCE}
        if site.data.heldout_source is not None:
            kept.pop("heldout_share", None)
        return {**kept, **site.data.model_dump(exclude_none=True)}

    for name in SOURCES:
        named = asked.get(name)
        if named not in (None, STDLIB) and not _allowed(named, site):
            raise refusal(f"data.{name}", site)

    kept = {name: value for name, value in asked.items() if name not in ("public_source", "public")}
    if asked.get("source", STDLIB) == STDLIB:  # these were for the public text
        for name in ("encoding", "delimiter", "numbers"):
            kept.pop(name, None)

    return kept


def _may_load(name: str, site: SiteFile) -> bool:
    """Return whether the site may load the base model that a run names; a hub id is no place on its
    disk."""
    if name == EMBEDDED or name in site.allow.models or _allowed(name, site):
        return True
    return HUB_ID.fullmatch(name) is not None and ".." not in name and not Path(name).exists()


def _allowed(named: str, site: SiteFile) -> bool:
    """Return whether a pattern of the site's file covers a path, where it really lies, and all that
    lies in it."""
    patterns = site.allow.run_paths
    if not patterns:
        return False
    if "*" in patterns:
        return True

    try:
        real = Path(named).expanduser().resolve()
        inside = [real, *islice(real.rglob("*"), _MANY + 1)] if real.is_dir() else [real]
        return len(inside) <= _MANY and all(_covered(path.resolve(), patterns) for path in inside)
    except (OSError, RuntimeError, ValueError):
        return False


def _covered(path: Path, patterns: tuple[str, ...]) -> bool:
    """Return whether a whole path is a pattern's, or lies below it."""
    return any(
        fnmatch.fnmatchcase(str(path), pattern)
        or fnmatch.fnmatchcase(str(path), f"{pattern.rstrip('/')}/*")
        for pattern in patterns
    )
