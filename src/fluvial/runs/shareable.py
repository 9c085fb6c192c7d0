"""Settings of a run that may leave its folder: without paths, records, sites' names or prompts."""

from collections.abc import Mapping
from typing import Any

from fluvial.models.pretrained import HUB_ID
from fluvial.storage.files import expanded

TABLES: dict[str, tuple[str, ...] | None] = {
    "model": (
        *("name_or_path", "revision", "dtype"),
        *("quantization", "layer_quantization", "quantization_correction"),
    ),
    "lora": None,
    "train": None,
    "method": None,
    "codec": None,
    "downlink": None,
    "data": ("form", "max_length", "overlong", "packing", "loss_on", "heldout_share"),
    "fleet": ("on_failure", "deadline_s"),
    "evaluate": ("every", "max_new_tokens"),
}
"""Tables whose settings are shown, and which of them; None for all."""
VALUES = ("seed", "rounds", "compare", "tune")
"""Settings above the tables that are shown."""


def shareable(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a resolved configuration that tell nothing about the machine, the
    records or who takes part, as JSON types.

    Settings without a value are left out.
    """
    shown: dict[str, Any] = {key: resolved[key] for key in VALUES if resolved.get(key) is not None}
    for name, keys in TABLES.items():
        table = resolved.get(name) or {}
        kept = {key: value for key, value in table.items() if keys is None or key in keys}
        if cleaned := _cleaned(kept):
            shown[name] = cleaned

    if is_local(str(shown.get("model", {}).get("name_or_path", ""))):
        shown.get("model", {}).pop("name_or_path", None)

    return shown


def is_local(name: str) -> bool:
    """Return whether the name of a model is a folder of this machine and no id of a hub."""
    return not HUB_ID.fullmatch(name) or expanded(name).exists()


def _cleaned(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table without what has no value, names a path or is about one site."""
    cleaned = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            value = _cleaned(value)
        if isinstance(value, list | tuple):
            value = [each for each in value if not _is_private(each)]
        if value not in (None, {}, []) and not _is_private(value):
            cleaned[key] = value

    return cleaned


def _is_private(value: object) -> bool:
    """Return whether a value names a path, or is a table about one site."""
    if isinstance(value, str):
        return value.startswith(("/", "~", ".")) or "\\" in value or value.count("/") > 1
    return isinstance(value, Mapping) and "site" in value
