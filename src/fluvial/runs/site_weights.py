"""The model of one site, for methods that leave each site its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fluvial import __version__
from fluvial.data import DataConfig
from fluvial.errors import ConfigError
from fluvial.methods import BASELINES, METHODS
from fluvial.methods.exporting import save_weights
from fluvial.models.digests import weights_digest
from fluvial.models.loading import weights_folder
from fluvial.models.pool import ModelPool
from fluvial.models.targets import LoraSettings
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import parse
from fluvial.runs.evaluation import evaluation_settings
from fluvial.storage import exported, toml
from fluvial.storage.run_files import COMPARE, JsonObject, read_run, with_description
from fluvial.wire.payload import Payload

SLOT = "adapter"
"""Slot of a site for the weights that it keeps."""


def kept_by(folder: Path, run: JsonObject) -> list[str]:
    """Return the sites of a finished run whose own models can be made from its folder."""
    method = METHODS.get(run["config"]["method"]["name"])
    if method is None or method.site_model is None:
        return []
    store = RunFolder(folder).store
    return [site for site in run["result"]["heldout_by_site"] if store.file(site, SLOT) is not None]


def read_run_or_baseline(folder: Path) -> JsonObject:
    """Return the content of a run's folder (see `read_run`); that of a baseline has the
    configuration that it has in the run around it."""
    run = read_run(folder)
    place = folder.resolve()
    if run["config"] or place.parent.name != COMPARE:
        return run

    around = read_run(place.parents[1])
    described = around["description"] or {}
    name = next((each for each in BASELINES if each == place.name), None)
    if name is None or name not in described.get("compare", {}):
        return run
    config = parse(described["set"], str(place.parents[1])).baseline(name)
    mostly = {key: described[key] for key in (exported.MOSTLY,) if key in described}
    description = {**described["compare"][name], **mostly}
    return {**run, "config": config.resolved(), "description": description}


@contextmanager
def site_weights(
    folder: Path, run: JsonObject, site: str, overrides: Sequence[str] = ()
) -> Iterator[Path]:
    """Yield a folder, for this while, with the model of `site` as a run writes its own.

    `overrides` are settings of [model], such as the folder that a base was moved to. Raises
    `ConfigError` where the run has one model for all sites, or none of this site.
    """
    method = METHODS.get(run["config"]["method"]["name"])
    if method is None or method.site_model is None:
        raise ConfigError(
            f"--site {site}: without effect, because method {run['result']['method']!r} leaves no "
            "site a model of its own; remove it"
        )

    sites = kept_by(folder, run)
    if site not in sites:
        there = f"those of {', '.join(sites)} are" if sites else "no site's are, as after a run"
        lacking = "" if sites else " over Flower, whose sites keep theirs"
        raise ConfigError(
            f"--site {site}: {folder} has no weights of this site; {there} in it{lacking}"
        )

    place = RunFolder(folder)
    newest = place.newest()
    assert newest is not None, "a finished run has its last checkpoint"
    server = Payload(newest[1].tensors, newest[1].value("server", dict))
    state = method.site_model(place.store.read(site, SLOT).tensors, server)

    config = run["config"]
    told = {"model": config["model"], "data": {}}
    model = evaluation_settings(told, None, overrides).model
    settings = method.config.model_validate(config["method"])
    lora = LoraSettings.model_validate(config["lora"])
    pool = ModelPool(model, settings.tuning(config["tune"], lora))
    with TemporaryDirectory() as draft:
        made = Path(draft) / ("model" if pool.full else "adapter")
        described = exported.of_site(with_description(run), site)
        save_weights(pool, state, made, template=exported.chat_template(described["data"]))
        base = weights_digest(weights_folder(model))
        readings = toml.read(DataConfig, config["data"], str(folder)).readings()
        exported.write(made, __version__, described, base, readings)
        yield made
