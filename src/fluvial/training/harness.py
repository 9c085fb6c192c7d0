"""Tasks of lm-evaluation-harness on the models that Fluvial loads, with results in its own form.

Gao et al., "The Language Model Evaluation Harness", 2024. Prompts, metrics and standard errors are
lm-eval's. A task's data set is on the Hugging Face hub, in this machine's cache of it, or in a
folder.
"""

import difflib
import json
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import stdev
from typing import Any

from fluvial.errors import ConfigError
from fluvial.models.network import reachable_hub
from fluvial.models.pool import ModelPool
from fluvial.models.stored import first_line
from fluvial.storage.files import expanded
from fluvial.wire.tensors import Named

MISSING = "--tasks needs lm-eval: pip install 'fluvial[evaluation]'"

Samples = Mapping[str, Sequence[Mapping[str, Any]]]
"""Documents of each task with prompts, answers and values of the metrics, as lm-eval has them."""


@dataclass(frozen=True)
class HarnessConfig:
    """Tasks of lm-eval, and how they are asked; the names are those of lm-eval's command line."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags, patterns such as "mmlu_*", or YAML files."""
    num_fewshot: int | None = None
    """Solved examples before each question; None for the task's own number."""
    limit: float | None = None
    """First documents of each task, or a share of them below 1; None for all."""
    include_path: Path | None = None
    """Folder with tasks of one's own, as YAML files."""
    datasets: Mapping[str, Path] = field(default_factory=dict)
    """Folder with a copy of the data set of a task or group, by its name."""
    apply_chat_template: bool = False
    batch_size: int = 8
    out: Path | None = None
    """Folder of the result files, one for each model, in lm-eval's own form and places."""


class Harness:
    """The tasks of a configuration with their data, ready to be asked."""

    def __init__(self, config: HarnessConfig) -> None:
        """Load the tasks and their data; raises `ConfigError` naming one that cannot be loaded."""
        try:
            from fluvial.training.harness_model import quiet
        except ImportError as error:
            raise ConfigError(MISSING) from error

        self.config = config
        self._quiet = quiet
        with quiet(), reachable_hub() as reached:
            self._manager, names = _known(config)
            _refuse_idle(config, names)
            self._tasks = [task for name in names for task in self._load(name, reached=reached)]

    def _load(self, name: str, *, reached: bool) -> list[Any]:
        """Return a task, a group, or the tasks of a tag."""
        folder = self.config.datasets.get(name)
        changes = None if folder is None else {"dataset_path": str(expanded(folder).resolve())}

        try:
            if changes is None:
                found = self._manager._load_spec(name)
            else:  # a group passes it on to its tasks
                entry = self._manager.task_index[name]
                index = self._manager.task_index
                found = self._manager._factory.build(entry, overrides=changes, registry=index)
        except Exception as error:  # of lm-eval, datasets, or a task's own code
            raise ConfigError(_why(name, folder, error, reached=reached)) from error

        return found if isinstance(found, list) else [found]

    def measure(
        self, pool: ModelPool, models: Mapping[str, Named], names: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return the results of all `models`, as JSON types, and write them where asked for.

        `names` has the arguments by which lm-eval would load each model, for its own record.
        """
        found = {}
        samples = {}
        written = []
        cut = {}

        for model, state in models.items():
            with self._quiet(), reachable_hub():
                found[model], samples[model], cut[model], path = self._ask(
                    pool, state, names[model]
                )
            written += [] if path is None else [str(path)]

        return {
            "lm_eval": version("lm_eval"),
            "tasks": list(self.config.tasks),
            "limit": self.config.limit,
            "num_fewshot": self.config.num_fewshot,
            "apply_chat_template": self.config.apply_chat_template,
            "cut_prompts": max(cut.values()),
            "rows": _rows(found, samples),
            "results": found,
            "written": written,
        }

    def _ask(
        self, pool: ModelPool, state: Named, name: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Samples, int, Path | None]:
        """Return lm-eval's results and samples, the number of prompts that were cut, and the
        file."""
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.utils import handle_non_serializable

        from fluvial.training.harness_model import LoadedModel

        config = self.config
        out = config.out
        tracker = EvaluationTracker(output_path=None if out is None else str(expanded(out)))

        with pool.model(state) as model:
            asked = LoadedModel(
                model, pool.tokenizer, batch_size=config.batch_size, context=pool.outline.context
            )
            try:
                results = simple_evaluate(
                    model=asked,
                    model_args=dict(name),
                    tasks=self._tasks,
                    task_manager=self._manager,
                    num_fewshot=config.num_fewshot,
                    limit=config.limit,
                    apply_chat_template=config.apply_chat_template,
                    batch_size=config.batch_size,
                    evaluation_tracker=tracker,
                )
            except (AssertionError, ValueError, KeyError, TypeError, RuntimeError) as error:
                raise ConfigError(
                    f"--tasks {', '.join(config.tasks)}: lm-eval stopped: {first_line(error)}"
                ) from error

        results["config"] |= {"model": "hf", **_digests(name)}
        samples: Samples = results.pop("samples")
        path = None if out is None else _write(tracker, results, samples, expanded(out))
        plain = json.loads(json.dumps(results, default=handle_non_serializable))
        return plain, samples, asked.cut_prompts, path


def _digests(name: Mapping[str, Any]) -> dict[str, Any]:
    """Return the digests of a model and its adapter under lm-eval's keys for their commits."""
    return {
        key: name[digest]
        for key, digest in (("model_sha", "sha256"), ("peft_sha", "peft_sha256"))
        if digest in name
    }


def _known(config: HarnessConfig) -> tuple[Any, list[str]]:
    """Return lm-eval's manager of tasks, and the names of those that are asked for.

    lm-eval reads thousands of files to know its own tasks, so these are left out where the folder
    of one's own has all that is asked for. Raises `ConfigError` for an unknown name.
    """
    from lm_eval.tasks import TaskManager

    folder = config.include_path
    if folder is not None and not expanded(folder).is_dir():
        raise ConfigError(f"--include-path: there is no folder {str(folder)!r}")

    paths = None if folder is None else [str(expanded(folder).resolve())]
    if paths is not None:
        own = TaskManager(include_path=paths, include_defaults=False)
        if set(config.tasks) <= set(own.all_subtasks):
            return own, list(config.tasks)

    manager = TaskManager(include_path=paths)
    names = []
    for name in config.tasks:
        path = expanded(name)
        matching = [str(path)] if path.is_file() else sorted(manager.match_tasks([name]))
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"--tasks {name}: lm-eval {version('lm_eval')} has no such task"
                f"{'' if folder is None else f', and {str(folder)!r} has none'}{hint} "
                "('lm-eval ls tasks' lists all of them)"
            )
        names += matching

    return manager, names


def _refuse_idle(config: HarnessConfig, names: Sequence[str]) -> None:
    """Raise `ConfigError` for a folder of data of a task that is not asked for."""
    for name in config.datasets:
        if name not in names:
            raise ConfigError(
                f"--dataset {name}: this is none of the tasks of --tasks, which are "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            )


def _why(name: str, folder: Path | None, error: Exception, *, reached: bool) -> str:
    """Return why a task cannot be loaded, and the remedy."""
    reason = first_line(error)
    if folder is not None:
        return (
            f"--dataset {name}={folder}: its data cannot be read: {reason}; the folder must be a "
            "copy of the data set's repository on the hub"
        )
    if type(error) is FileNotFoundError:  # a data set that no hub has is an error of another class
        return (
            f"--tasks {name}: a file that it names cannot be read: {reason}; a relative path is "
            "seen from the working directory"
        )
    from_data = any(
        frame.f_globals.get("__name__", "").startswith("datasets.")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    if not reached and from_data and isinstance(error, OSError | ValueError):
        return (
            f"--tasks {name}: its data set is not in this machine's cache, and the Hugging Face "
            f"hub cannot be reached ({reason}); load it once with a network, or give a copy of "
            f"its repository with --dataset {name}=FOLDER"
        )
    return f"--tasks {name}: lm-eval cannot load it: {reason}"


def _write(tracker: Any, results: dict[str, Any], samples: Samples, out: Path) -> Path:
    """Write a result file by lm-eval's own tracker, and return it; raises `ConfigError`."""
    before = set(out.glob("*/results_*.json"))
    tracker.save_results_aggregated(results=results, samples=samples)
    new = set(out.glob("*/results_*.json")) - before

    if not new:  # the tracker logs what fails, and goes on
        raise ConfigError(f"--out {out}: lm-eval could not write its results; is it writable?")
    return new.pop()


def _rows(found: Mapping[str, Any], samples: Mapping[str, Samples]) -> list[dict[str, Any]]:
    """Return one row for each task and metric, with the values of all models."""
    rows = []
    first = next(iter(found.values()))

    for task, metrics in first["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not _is_number(value):
                continue

            row = {
                "task": task,
                "metric": metric,
                "filter": filtered,
                "n_shot": first["n-shot"].get(task),
                "documents": first.get("n-samples", {}).get(task, {}).get("effective"),
            }
            for model, results in found.items():
                error = results["results"][task].get(f"{metric}_stderr,{filtered}")
                row[model] = {
                    "value": results["results"][task][key],
                    "stderr": error if _is_number(error) else None,
                }

            if "base" in row and "adapter" in row:
                pairs = [samples[model].get(task, []) for model in ("base", "adapter")]
                row["difference"] = {
                    "value": row["adapter"]["value"] - row["base"]["value"],
                    "stderr": _paired_error(pairs, row),
                }
            rows.append(row)

    return rows


def _paired_error(pairs: Sequence[Sequence[Mapping[str, Any]]], row: Mapping[str, Any]) -> Any:
    """Return the standard error of the mean difference over the same documents.

    None for a metric that is not the mean of its documents' values, such as that of a group.
    """
    values = []
    for model, listed in zip(("base", "adapter"), pairs, strict=True):
        own = [one for one in listed if one["filter"] == row["filter"] and row["metric"] in one]
        values.append([one[row["metric"]] for one in own])
        if len(own) < 2 or not all(_is_number(value) for value in values[-1]):
            return None
        mean = math.fsum(values[-1]) / len(own)
        if not math.isclose(mean, row[model]["value"], abs_tol=1e-9):
            return None

    asked = [[one["prompt_hash"] for one in listed] for listed in pairs]
    assert asked[0] == asked[1], "base and adapter answer the same prompts in the same order"
    differences = [after - before for before, after in zip(*values, strict=True)]
    return stdev(differences) / math.sqrt(len(differences))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
