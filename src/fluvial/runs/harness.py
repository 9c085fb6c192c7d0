"""Tasks of lm-eval at the end of a run, on the base and on the model that the run wrote."""

import logging
from pathlib import Path
from typing import Any

from fluvial.errors import ConfigError
from fluvial.methods.interface import Export
from fluvial.models.pool import ModelPool
from fluvial.runs.config import RunConfig
from fluvial.training.assess import evaluate_adapter
from fluvial.training.folders import read_adapter_folder
from fluvial.training.harness import Harness, HarnessConfig

logger = logging.getLogger(__name__)


def harness_config(config: RunConfig) -> HarnessConfig | None:
    """Return what a run asks of lm-eval at its end; None for nothing."""
    settings = config.evaluate
    if not settings.tasks:
        return None

    path = settings.include_path
    return HarnessConfig(
        settings.tasks,
        settings.num_fewshot,
        settings.limit,
        None if path is None else Path(path),
    )


def check_tasks(config: RunConfig) -> None:
    """Load the tasks with their data, and raise `ConfigError` for one that cannot be measured, as
    long as nothing is trained."""
    asked = harness_config(config)
    if asked is not None:
        logger.info("loading the tasks of lm-eval")
        Harness(asked)


def measure_tasks(
    config: RunConfig, pool: ModelPool, folder: Path, export: Export
) -> dict[str, Any] | None:
    """Return the results of the tasks on the base and on the model in `folder`; None without tasks.

    A run does not end without a result because of them: where they fail, the result says why.
    """
    asked = harness_config(config)
    if asked is None:
        return None

    written = folder / ("model" if export.adapter_sha256 is None else "adapter")
    try:
        weights = read_adapter_folder(written)
        found = evaluate_adapter(weights, config.model, tasks=asked, pool=pool)["tasks"]
    except ConfigError as error:
        logger.warning("evaluate.tasks: %s", error)
        return {"why": str(error)}

    # Without the texts of tasks and the folders of this machine.
    kept = ("lm_eval", "tasks", "limit", "num_fewshot", "cut_prompts", "rows")
    return {key: found[key] for key in kept}
