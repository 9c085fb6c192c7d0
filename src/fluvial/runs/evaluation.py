"""Settings of `fluvial evaluate`: what a folder tells about its run, and what --set adds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluvial.data import DataConfig
from fluvial.data.forms import CONVERSATIONS
from fluvial.errors import ConfigError
from fluvial.runs.config import RunConfig, merge, override, parse, with_chat_template
from fluvial.storage import exported
from fluvial.training.assess import whole_file
from fluvial.training.folders import measured_as

RECORDS = frozenset(DataConfig.model_fields) - exported.PLACES | {"max_heldout"}
"""Settings of [data] that change how records of a file are read or scored."""


def run_settings(name: str, records: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tables that measure a model by itself, and what its folder tells about its run."""
    run = exported.read(Path(name).expanduser()) if Path(name).expanduser().is_dir() else {}
    return measured_as(run, name, records), run


def evaluation_settings(
    table: dict[str, Any], records: Path | None, overrides: Sequence[str]
) -> RunConfig:
    """Return the configuration of an evaluation; `table` holds what a folder tells, see
    `measured_as`.

    Raises `ConfigError` for a setting without effect here.
    """
    changes: dict[str, Any] = {}
    for line in overrides:
        changes = merge(changes, override(line))
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
    template = data.chat_template
    columns = ", ".join(f"{ours} = {theirs!r}" for ours, theirs in data.columns.items())
    detected = " (detected)" if data.form == "auto" else ""
    parts = [f"form {form}{detected}", f"columns {columns or 'as they are named'}"]
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
        "set_here": sorted(given),
        "line": line,
    }


def _template_words(template: str | None, form: str) -> str:
    """Return which chat template renders the records: none unless one is a conversation, which a
    tokenizer without a template refuses."""
    if template:
        return "template of the run"
    return "template of the tokenizer" if CONVERSATIONS & set(form.split(", ")) else "no template"
