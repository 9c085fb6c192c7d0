"""`fluvial export`: a finished run's result as a folder to publish or to serve.

What a run writes refers to its machine: the base by its path. An exported folder names the base by
the id that others load it by, and holds a card, no path and no record.
"""

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file

from fluvial import __version__
from fluvial.data import DataConfig, with_template
from fluvial.errors import CheckpointError, ConfigError
from fluvial.federation.store import folder_of
from fluvial.methods import METHODS
from fluvial.models.export import with_equal_ranks
from fluvial.models.fingerprints import fingerprints
from fluvial.models.merging import MergeCheck, merge
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import EMBEDDED, HUB_ID, ModelConfig, source_of
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.evaluation import evaluation_settings
from fluvial.runs.model_card import BASE, Described, Form, base_name, model_card
from fluvial.runs.site_weights import kept_by, read_run_or_baseline, site_weights
from fluvial.storage import exported, toml
from fluvial.storage.files import writing
from fluvial.storage.run_files import (
    COMPARE,
    COMPARED,
    CONFIG,
    EXPORTS,
    RESULT,
    JsonObject,
    anew,
    begun,
    with_description,
)
from fluvial.training.folders import AdapterFolder, read_adapter_folder
from fluvial.training.opened import check_base

FORMS = ("peft", "merged", "gguf")
DType = Literal["auto", "float32", "bfloat16", "float16"]
_WRITTEN_ANEW = ("README.md", exported.FILE, "adapter_config.json", "adapter_model.safetensors")
_CARD_OF: dict[str, Form] = {"peft": "adapter", "merged": "merged", "model": "model"}
_BASE_FILES = {
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank` (vllm/config/lora.py of vLLM 0.27)."""
MOST_COMMANDS = 12
"""Commands that a refusal lists."""
GGUF = (
    "no maintained package converts a model of transformers to GGUF; use --form merged, and on the "
    "folder that it writes the script of llama.cpp: python convert_hf_to_gguf.py FOLDER"
)


@dataclass(frozen=True)
class Exported:
    """A written folder."""

    folder: Path
    form: str
    """"peft", "merged", or "model" for a run that tuned all weights."""
    base: str | None
    """Name of the base in the folder; None where it has none."""
    rank: int | None
    """Rank of the adapter's factors; None for a model."""
    check: MergeCheck | None
    """Comparison of the merged model with base and adapter; None where nothing was merged."""

    @property
    def base_folder(self) -> Path | None:
        """Return the folder of the base within an adapter's; None where a hub has the base."""
        return self.folder / BASE if (self.folder / BASE).is_dir() else None

    @property
    def max_lora_rank(self) -> int | None:
        """The `--max-lora-rank` with which vLLM serves the adapter; None where it cannot."""
        return next((rank for rank in VLLM_RANKS if self.rank and rank >= self.rank), None)


def export_run(
    folder: Path,
    to: Path | None = None,
    *,
    form: str | None = None,
    base: str | None = None,
    name_sites: bool = False,
    dtype: DType = "auto",
    site: str | None = None,
    overrides: Sequence[str] = (),
) -> Exported:
    """Write the result of the run in `folder` to the new folder `to`, by default
    `folder`/export-FORM, or `folder`/export-FORM-SITE.

    `site` names the site whose model is written, for a method that leaves each site its own.
    `form` is "peft" or "merged"; by default the adapter, or the model where all weights were tuned.
    `base` is the name of the base model for others, needed for a base without an id of the hub.
    `overrides` are settings of [model], such as the folder that a base was moved to.
    Raises `CheckpointError` for a run that has not finished, and `ConfigError` for what cannot be
    exported, and where a merged model is not base and adapter.
    """
    if form == "gguf":
        raise ConfigError(f"--form gguf: {GGUF}")

    folder = _run_of(folder)
    _refuse_several(folder)
    run = read_run_or_baseline(folder)
    with _weights(folder, run, site, overrides) as weights:
        config = run["config"]
        full = weights.name == "model"
        form = _form(form, full=full)
        if dtype != "auto" and form != "merged":
            raise ConfigError(
                f"--dtype {dtype}: without effect, because nothing is merged; remove it"
            )

        name = _base(base, str(config["model"]["name_or_path"]), needed=form == "peft")
        RunFolder(folder).verify_finished()
        target = to or folder / "-".join(["export", form, *([folder_of(site)] if site else [])])

        with _draft(target) as draft:
            adapter = read_adapter_folder(weights) if not full else None
            settings = evaluation_settings(
                {"model": config["model"], "data": {}} if adapter is None else adapter.settings(),
                None,
                overrides,
            )
            if adapter is not None:
                check_base(adapter, settings.model)
            pool = ModelPool(settings.model, adapter.lora if adapter else None)
            check, rank = None, None
            if form == "merged":
                check = _write_merged(draft, pool, adapter, config, dtype)
            elif adapter is not None:
                rank = _write_adapter(draft, weights, name)
                if name == EMBEDDED:
                    _write_base(draft / BASE, settings.model)
            else:
                _copy(weights, draft, all_but=("README.md", exported.FILE))

            readings = toml.read(DataConfig, config["data"], str(folder)).readings()
            named = _named(with_description(run), name)
            exported.write(draft, __version__, named, readings=readings)

            prints = fingerprints(pool)
            facts = {
                "digest of the base": prints["base"],
                "digest of the tokenizer": prints["tokenizer"],
                **({} if check is None else {"merged logits": check.words}),
            }
            paper = METHODS[config["method"]["name"]].paper if _known(config) else ""
            described = Described(
                config,
                run["result"],
                paper,
                _CARD_OF[form],
                name,
                name_sites,
                facts,
                site,
                base_within=(draft / BASE).is_dir(),
            )
            card = model_card(described)
            (draft / "README.md").write_text(card, encoding="utf-8")
            _refuse_paths(draft, config, folder)

    return Exported(target, form, name, rank, check)


def _run_of(folder: Path) -> Path:
    """Return the run's folder for it or for the folder of its weights."""
    inside = folder.name in ("adapter", "model") and (folder.parent / "result.json").is_file()
    return folder.parent if inside else folder


def _refuse_several(folder: Path) -> None:
    """Raise `ConfigError`, with the commands that work, for a folder of several runs: of a
    comparison, of one of its contenders, or of the baselines of a run."""
    if (folder / COMPARED).is_file():
        found = folder.glob(f"*/seed-*/{RESULT}")
    elif (folder.parent / COMPARED).is_file():
        found = folder.glob(f"seed-*/{RESULT}")
    elif folder.name == COMPARE and not begun(folder):
        found = folder.glob(f"*/{RESULT}")
    else:
        return

    runs = sorted(path.parent for path in found)
    commands = [f"`{_command(run)}`" for run in runs[:MOST_COMMANDS]]
    more = f" and {len(runs) - MOST_COMMANDS} more" if len(runs) > MOST_COMMANDS else ""
    remedy = f"export one of them: {', '.join(commands)}{more}" if runs else "none has finished"
    raise ConfigError(f"{folder} holds several runs; {remedy}")


def _command(run: Path) -> str:
    """Return the command that exports a run; one without common weights needs the name of a
    site."""
    has_weights = any((run / name).is_dir() for name in EXPORTS)
    return f"fluvial export {shlex.quote(str(run))}{'' if has_weights else ' --site NAME'}"


@contextmanager
def _weights(
    folder: Path, run: JsonObject, site: str | None, overrides: Sequence[str]
) -> Iterator[Path]:
    """Yield the folder of the final weights of a finished run, or of those of a site."""
    if run["result"] is None:
        raise CheckpointError(
            f"{folder}: the run has not finished; continue it with `fluvial run ... --resume`"
        )
    if not run["config"]:
        if folder.resolve().parent.name == COMPARE:
            raise ConfigError(
                f"{folder} is no baseline that the run around it names; export the run itself"
            )
        raise CheckpointError(f"{folder / CONFIG} is missing; {anew()}")

    if site is not None:
        with site_weights(folder, run, site, overrides) as weights:
            yield weights
        return

    made = [folder / name for name in EXPORTS if (folder / name).is_dir()]
    if not made:
        sites = kept_by(folder, run)
        remedy = f"; name one with --site: {', '.join(sites)}" if sites else ""
        raise ConfigError(
            f"{folder} has neither an adapter nor a model: method {run['result']['method']!r} "
            f"leaves every site its own, and nothing is common to all{remedy}"
        )
    yield made[0]


def _form(form: str | None, *, full: bool) -> str:
    if not full:
        return form or "peft"
    if form == "peft":
        raise ConfigError(
            "--form peft: the run tuned weights of the base itself, so that there is no adapter; "
            "use --form merged, which writes the model"
        )
    return "model"


def _base(given: str | None, trained: str, *, needed: bool) -> str | None:
    """Return the name by which others load the base."""
    if given is not None:
        if not HUB_ID.fullmatch(given):
            raise ConfigError(
                f"--base-name {given!r}: must be the id of a model on the hub, such as "
                "Qwen/Qwen2.5-0.5B, and no path"
            )
        return given

    if trained == EMBEDDED:
        return EMBEDDED
    name = base_name(trained)
    if name is None and needed:
        raise ConfigError(
            f"the base is the local folder {trained!r}, which nobody else has; name its id on the "
            "hub with --base-name, or write base and adapter as one model with --form merged"
        )
    return name


def _write_adapter(draft: Path, weights: Path, base: str | None) -> int:
    """Write the adapter, without the path of its base; return the rank of its factors."""
    _copy(weights, draft, all_but=_WRITTEN_ANEW)
    config = json.loads((weights / "adapter_config.json").read_text(encoding="utf-8"))
    config, factors = with_equal_ranks(config, load_file(weights / "adapter_model.safetensors"))
    save_file(factors, draft / "adapter_model.safetensors", metadata={"format": "pt"})
    config["base_model_name_or_path"] = f"./{BASE}" if base == EMBEDDED else base
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()

    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (draft / "adapter_config.json").write_text(text, encoding="utf-8")
    rank: int = config["r"]
    return rank


def _write_base(folder: Path, config: ModelConfig) -> None:
    """Write the base that comes with the package, which no hub has, for other programs."""
    folder.mkdir()
    for path in sorted(Path(source_of(config)).iterdir()):
        if path.name in _BASE_FILES:
            shutil.copyfile(path, folder / path.name)


def _write_merged(
    draft: Path, pool: ModelPool, adapter: AdapterFolder | None, config: JsonObject, dtype: DType
) -> MergeCheck:
    assert adapter is not None, "where weights are tuned, nothing is merged"
    assert adapter.lora is not None, "an adapter has its settings"
    check = merge(pool.config, adapter.lora, adapter.tensors, draft, dtype)
    template = exported.chat_template(config["data"])
    tokenizer = pool.tokenizer if template is None else with_template(pool.tokenizer, template)
    tokenizer.save_pretrained(str(draft))
    return check


def _named(config: JsonObject, base: str | None) -> JsonObject:
    """Return the configuration with the base's name for others, and without a base where it has no
    such name: the model is then measured by itself."""
    data = {**config["data"], "source": Path(str(config["data"]["source"])).name}
    model = {} if base is None else {**config["model"], "name_or_path": base}
    return {**config, "data": data, "model": model}


def _copy(source: Path, draft: Path, *, all_but: tuple[str, ...]) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in all_but:
            shutil.copyfile(path, draft / path.name)


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of `target`, which may not exist, when all is written."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already; remove it, or name another folder with --to")

    draft = target.with_name(f".{target.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with writing(target, "name another folder with --to"):
            draft.mkdir(parents=True)
            yield draft
            if target.is_dir():
                target.rmdir()
            draft.replace(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _refuse_paths(draft: Path, config: Mapping[str, Any], folder: Path) -> None:
    """Assert that no text file of the draft names a path of this machine."""
    places = [str(folder.resolve()), str(draft.resolve())]
    places += [text for text in _strings(config) if text.startswith(("/", "~"))]
    for path in sorted(draft.iterdir()):
        if path.suffix in (".json", ".md") and not path.name.startswith("tokenizer."):
            text = path.read_text(encoding="utf-8")
            found = [place for place in places if place in text]
            assert not found, f"{path.name} names {found[0]}"


def _strings(value: object) -> Iterator[str]:
    """Yield all texts in JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _known(config: JsonObject) -> bool:
    """Return whether the method is one of Fluvial's own."""
    return config["method"]["name"] in METHODS
