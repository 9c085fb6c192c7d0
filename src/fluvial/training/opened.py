"""The weights of a folder over their base, as one state of a pool of models."""

import logging
from dataclasses import replace

from fluvial import caller
from fluvial.errors import ConfigError
from fluvial.models.digests import weights_digest
from fluvial.models.loading import weights_folder
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.storage import exported
from fluvial.training.folders import AdapterFolder
from fluvial.wire.tensors import Layout, Named

logger = logging.getLogger(__name__)


def open_weights(
    adapter: AdapterFolder, model: ModelConfig, pool: ModelPool | None = None
) -> tuple[ModelPool, Named]:
    """Return a pool of the base `model` and the state in which it has the folder's weights.

    A `pool` of the same base lends an adapter what it has loaded.

    Raises `ConfigError` where the weights do not belong to this base.
    """
    logger.info("loading the base model")
    check_base(adapter, model)
    shared = pool is not None and not pool.full and adapter.lora is not None
    pool = pool.beside(adapter.lora) if pool and shared else ModelPool(model, adapter.lora)

    if adapter.lora:
        adapter = replace(adapter, tensors=_without_copies(adapter, pool))

    _check_fit(adapter, pool.layout, model.name_or_path)
    return pool, adapter.tensors if adapter.lora else _change(adapter.tensors, pool)


def check_base(adapter: AdapterFolder, model: ModelConfig) -> None:
    """Raise `ConfigError` where the files of the base are not those that the run trained on.

    Warn where the caller names another base than the folder does: it may be a copy in another
    type.
    """
    known = adapter.run.get(exported.BASE_DIGEST)
    if known is None or weights_digest(weights_folder(model)) == known:
        return

    found = f"model.name_or_path={model.name_or_path!r}: its files are not those of the base that "
    if model.name_or_path == adapter.base:
        raise ConfigError(
            f"{found}{adapter.path} was trained on; restore them, or {caller.another_base()}"
        )
    logger.warning("%s%s was trained on", found, adapter.path)


def _change(weights: Named, pool: ModelPool) -> Named:
    """Return the change from the base's weights to the tuned `weights`."""
    return {name: tensor - pool.base.get(name).float() for name, tensor in weights.items()}


def _without_copies(adapter: AdapterFolder, pool: ModelPool) -> Named:
    """Return the factors of `adapter` without copies of the base's matrices.

    PEFT saves such copies with an adapted head. Raises `ConfigError` if one is not the base's.
    """
    with pool.model(pool.base_state()) as model:
        base = {
            name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        copies = [name for name in adapter.tensors if name.replace(".base_layer.", ".") in base]
        for name in copies:
            own = base[name.replace(".base_layer.", ".")].detach().cpu().float()
            if own.shape != adapter.tensors[name].shape or not own.equal(adapter.tensors[name]):
                raise ConfigError(
                    f"{adapter.path} holds a matrix {name!r} that is not the base's: its "
                    "embeddings were resized or trained; merge the adapter into its base with PEFT"
                )

    return {name: tensor for name, tensor in adapter.tensors.items() if name not in copies}


def _check_fit(adapter: AdapterFolder, layout: Layout, base: str) -> None:
    """Raise `ConfigError` unless the adapter has exactly the model's factors, in its shapes."""
    wanted = dict(layout.shapes)
    found = dict(Layout.of(adapter.tensors).shapes)
    wrong = sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )

    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"{adapter.path} does not fit {base!r}: {name} has shape {found.get(name, 'none')}, "
            "the model needs "
            f"{wanted.get(name, 'none')} ({len(wrong)} tensors differ); is model.name_or_path what "
            "it was trained on?"
        )
