"""The contenders of a comparison, from the files that people write: all of them valid, on the same
data, model and evaluation."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fluvial import caller
from fluvial.codecs import must_learn
from fluvial.codecs.auto import AutoSettings
from fluvial.errors import ConfigError, FluvialError
from fluvial.methods.fedavg import FedAvgConfig
from fluvial.runs.comparison.sweep import (
    SweepConfig,
    folder_name,
    is_sweep,
    repeated,
    variants,
    without,
)
from fluvial.runs.config import (
    RunConfig,
    difference,
    merge,
    override,
    parse,
    with_chat_template,
)
from fluvial.storage import paths, recipes, toml
from fluvial.storage.recipes import table_of

logger = logging.getLogger(__name__)

SAME = ("data.", "model.", "evaluate.")
"""Tables of settings that contenders must have in common."""
BESIDE = ("evaluate.sample_prompt", "evaluate.sample_tokens", "evaluate.cross_site")
"""Settings among these that change no measure, and that some methods refuse."""
ASIDE = ("compare", "page", "report_to", "profile")
"""Settings that change what is made beside a run, and nothing of the run."""
BY_SITE = "data.by_site."
SHOWN = 12
"""Settings that a refusal names, at most."""


@dataclass(frozen=True)
class Contender:
    """One of the configurations that are compared."""

    name: str
    """Name in tables, and of the folder of its runs."""
    configs: dict[int, RunConfig]
    """Configuration by seed, all of them equal but for the seed."""

    @property
    def config(self) -> RunConfig:
        """Return the configuration with the first seed."""
        return next(iter(self.configs.values()))


@dataclass(frozen=True)
class Comparison:
    """Contenders that are compared, each with the same seeds."""

    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    baseline: str
    """Name of the contender that the others are compared with."""

    def differing(self) -> dict[str, dict[str, Any]]:
        """Return the value of each contender, by name, for every setting that one of them sets and
        in which they differ; a table of `data.by_site` is one setting."""
        resolved = {each.name: each.config.resolved() for each in self.contenders}
        written = [
            each.config.model_dump(mode="json", exclude_unset=True) for each in self.contenders
        ]
        first, *others = resolved.values()
        keys = sorted({key for other in others for key in _differences(first, other)})
        return {
            key: {name: _value(table, key) for name, table in resolved.items()}
            for key in keys
            if any(_value(table, key) is not None for table in written)
        }


@dataclass(frozen=True)
class _Draft:
    """A contender that has not been checked yet."""

    name: str
    where: str
    """File and contender, for messages."""
    table: dict[str, Any]


def read_comparison(
    files: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (),
    baseline: str | None = None,
    allow_different: bool = False,
) -> Comparison:
    """Return the comparison of several configurations, or of one file of contenders.

    `overrides` are lines of TOML for all contenders. Without `seeds`, those of the file or of the
    configurations count. Raises `ConfigError` with every fault of every contender, and for
    contenders on other data, models or measures unless `allow_different`.
    """
    for line in repeated(seeds):
        raise ConfigError(f"--{line}")
    tables = {path: table_of(path) for path in dict.fromkeys(files)}
    sweeps = [path for path, table in tables.items() if is_sweep(table)]
    if sweeps and len(tables) > 1:
        raise ConfigError(
            f"{sweeps[0]}: lists its contenders itself; give it alone, or only configurations"
        )

    if sweeps:
        sweep = _sweep_of(sweeps[0], tables[sweeps[0]])
        drafts = _of_sweep(sweep, sweeps[0])
        seeds = seeds or sweep.seeds
        baseline = baseline or sweep.baseline
    else:
        drafts = _of_files(tables)

    changes = [paths.here(override(line)) for line in overrides]
    for change in changes:
        drafts = [_Draft(each.name, each.where, merge(each.table, change)) for each in drafts]
    _check_names(drafts)

    contenders = _parsed(drafts, seeds)
    names = [each.name for each in contenders]
    if baseline is not None and baseline not in names:
        raise ConfigError(
            f"{caller.argument('baseline', baseline)}: no contender has this name; the contenders "
            f"are {', '.join(names)}"
        )

    comparison = Comparison(contenders, tuple(contenders[0].configs), baseline or names[0])
    if not allow_different:
        _refuse_other_data(comparison)
    for line in same_runs(comparison):
        logger.warning("%s", line)

    return comparison


def together(faults: Iterable[Callable[[], object]]) -> None:
    """Call all functions, and raise one `ConfigError` with the lines of all that they raised."""
    lines = dict[str, None]()
    for check in faults:
        try:
            check()
        except FluvialError as error:
            lines |= dict.fromkeys(str(error).splitlines())
    if lines:
        raise ConfigError("\n".join(lines))


def _sweep_of(path: Path, table: dict[str, Any]) -> SweepConfig:
    """Return the settings of a comparison's file, with the path of its base whole; a recipe has
    none."""
    sweep = toml.read(SweepConfig, table, str(path))
    if recipes.recipe_of(sweep.base) is not None:
        return sweep
    return sweep.model_copy(update={"base": path.resolve().parent / sweep.base})


def _of_sweep(sweep: SweepConfig, path: Path) -> list[_Draft]:
    base = table_of(sweep.base)
    if is_sweep(base):
        raise ConfigError(f"{path}: base: {sweep.base} is a comparison; give a run's configuration")

    drafts = []
    for name, changes, left_out in variants(sweep, path):
        try:
            table = merge(without(base, left_out), changes)
        except KeyError as error:
            raise ConfigError(
                f"{path}: contender {name!r}: unset: {sweep.base.name} does not set "
                f"{error.args[0]}; remove it"
            ) from None
        drafts.append(_Draft(name, f"{path}: contender {name!r}", _without_itself(name, table)))
    if not drafts:
        raise ConfigError(f"{path}: exclude: leaves no combination of the grid; remove some")

    return drafts


def _without_itself(name: str, table: dict[str, Any]) -> dict[str, Any]:
    """Return the table of a contender whose base compares with the method that the contender is,
    without this baseline."""
    method = table.get("method", {})
    method = method.get("name") if isinstance(method, dict) else None
    compare = table.get("compare", [])
    if not isinstance(compare, list) or method not in compare:
        return table
    logger.warning("contender %r: compare=%r is this method itself, and is left out", name, method)
    return {**table, "compare": [each for each in compare if each != method]}


def same_runs(comparison: Comparison) -> list[str]:
    """Return a line for each contender that makes the same run as an earlier one."""
    known: list[tuple[Contender, dict[str, Any]]] = []
    lines = []
    for each in comparison.contenders:
        plain = _plain(each.config)
        first = next((earlier for earlier, other in known if other == plain), None)
        if first is None:
            known.append((each, plain))
        else:
            why = (
                "no setting that changes a run differs; remove one"
                if first.config.method.name == each.config.method.name
                else "without pre-training (method.tgap.source='none') cgfedllm is fedavg with its "
                "codec; remove one, or set another tgap.source"
            )
            lines.append(
                f"contenders {first.name!r} and {each.name!r} make the same run, so nothing can "
                f"tell them apart: {why}"
            )
    return lines


def _plain(config: RunConfig) -> dict[str, Any]:
    """Return the settings that change a run, those of cgfedllm without pre-training as of
    fedavg."""
    table = {key: value for key, value in config.resolved().items() if key not in ASIDE}
    method = table["method"]
    learns = isinstance(config.coding, AutoSettings) or must_learn(config.coding)
    without = method["name"] == "cgfedllm" and method["tgap"]["source"] == "none"
    if without and method["representation"] == "delta" and method["privacy"] is None:
        shared = FedAvgConfig().model_dump(mode="json")
        table["method"] = {
            key: method[key] if key in method and key not in ("name", "tgap") else value
            for key, value in shared.items()
        }
    elif method["name"] == "fedavg" and not learns:
        table["method"] = {**method, "tgap": FedAvgConfig().model_dump(mode="json")["tgap"]}
    return table


def _of_files(tables: dict[Path, dict[str, Any]]) -> list[_Draft]:
    """Return a contender for each file, named by the file; with its folder, where two have one
    name."""
    stems = [recipes.stem(path) for path in tables]
    return [
        _Draft(
            folder_name(
                recipes.stem(path)
                if stems.count(recipes.stem(path)) == 1
                else f"{path.resolve().parent.name}-{path.stem}"
            ),
            str(path),
            table,
        )
        for path, table in tables.items()
    ]


def _check_names(drafts: Sequence[_Draft]) -> None:
    """Raise `ConfigError` where two contenders have one name, or one that differs in case only."""
    seen = dict[str, _Draft]()
    for draft in drafts:
        other = seen.setdefault(draft.name.casefold(), draft)
        if other is not draft:
            raise ConfigError(
                f"{draft.where}: another contender is called {other.name!r} too "
                f"({other.where}); give it another name"
            )


def _parsed(drafts: Sequence[_Draft], seeds: Sequence[int]) -> tuple[Contender, ...]:
    """Return the contenders; raises `ConfigError` with the faults of all of them."""
    found = dict[str, dict[int, RunConfig]]()

    def read(draft: _Draft) -> None:
        changes = [{"seed": seed} for seed in seeds] or [{}]
        read = [with_chat_template(parse({**draft.table, **each}, draft.where)) for each in changes]
        found[draft.name] = {config.seed: config for config in read}

    together(partial(read, draft) for draft in drafts)
    first = next(iter(found))
    for name, configs in found.items():
        if configs.keys() != found[first].keys():
            raise ConfigError(
                f"contenders {first!r} and {name!r} have other seeds "
                f"({', '.join(map(str, found[first]))}; {', '.join(map(str, configs))}), and runs "
                f"are compared seed by seed; give {caller.argument('seeds')}"
            )

    return tuple(Contender(name, configs) for name, configs in found.items())


def _refuse_other_data(comparison: Comparison) -> None:
    """Raise `ConfigError` with the settings of data, model and evaluation that differ."""
    first, *others = comparison.contenders
    lines = []
    for other in others:
        keys = [
            key
            for key in _differences(first.config.resolved(), other.config.resolved())
            if key.startswith(SAME) and key not in BESIDE
        ]
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            lines.append(
                f"contender {other.name!r} differs from {first.name!r} in "
                f"{', '.join(keys[:SHOWN])}{more}"
            )

    if lines:
        remedy = (
            "contenders need the same data, model and evaluation: make these settings equal, or "
            f"use {caller.argument('allow-different')}"
        )
        raise ConfigError("\n".join([*lines, remedy]))


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return the dotted names of the settings in which two resolved configurations differ, each
    table of `data.by_site` once."""
    named = {f"{BY_SITE}{name}" for table in (ours, theirs) for name in table["data"]["by_site"]}
    longest_first = sorted(named, key=len, reverse=True)  # names of sites may have dots
    return sorted(
        {
            next((site for site in longest_first if key.startswith(f"{site}.")), key)
            for key in difference(ours, theirs)
        }
    )


def _value(table: dict[str, Any], key: str) -> Any:
    """Return the value at a dotted key of nested tables, what is unset in the table of a site left
    out; None where there is none."""
    if key.startswith(BY_SITE):
        own = table.get("data", {}).get("by_site", {}).get(key.removeprefix(BY_SITE))
        return own and {name: value for name, value in own.items() if value is not None}

    value: Any = table
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
