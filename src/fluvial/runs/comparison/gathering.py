"""The figures of a comparison, from the folders of its runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fluvial import __version__
from fluvial.runs.comparison.contenders import Comparison, Contender
from fluvial.runs.comparison.files import CHECK, run_folder
from fluvial.runs.comparison.judging import verdict_line
from fluvial.runs.comparison.result import (
    Compared,
    ComparedContender,
    ComparedRun,
    Difference,
    Over,
    Score,
)
from fluvial.runs.comparison.statistics import alike, holm, interval, p_value
from fluvial.runs.result import coding_of
from fluvial.storage.run_files import JsonObject, read_file, read_result

Results = dict[int, JsonObject]
"""Results of a contender's finished runs, by seed."""
POOLED = "_pooled"
"""End of the name of a measure over all sites together."""


def gather(
    comparison: Comparison, out: Path, failed: Mapping[tuple[str, int], str] | None = None
) -> Compared:
    """Return the figures of all runs in `out` that are finished; `failed` has the reasons of those
    that ended with an error, by contender and seed.

    Raises `CheckpointError` for a damaged file.
    """
    results = {
        each.name: {
            seed: result
            for seed in comparison.seeds
            if (result := read_result(run_folder(out, each.name, seed))) is not None
        }
        for each in comparison.contenders
    }
    measures = _measures(comparison, results)
    differences = _differences(comparison, results, measures)
    contenders = tuple(
        _contender(each, results[each.name], measures, differences[each.name], out, failed or {})
        for each in comparison.contenders
    )
    compared = Compared(
        fluvial=__version__,
        seeds=comparison.seeds,
        baseline=comparison.baseline,
        verdict="",
        measures=tuple(measures),
        notes=(
            *_notes(contenders, results),
            *_one_observation(contenders, results),
            *_baselines(comparison),
        ),
        differing=comparison.differing(),
        contenders=contenders,
    )
    return compared.model_copy(update={"verdict": verdict_line(compared)})


def _measures(comparison: Comparison, results: Mapping[str, Results]) -> list[str]:
    """Return the names of all measures, the loss first; with those over all sites together where
    the data of a contender lie in one place."""
    names = dict.fromkeys(("loss", "accuracy"))
    for runs in results.values():
        for result in runs.values():
            names |= dict.fromkeys((result["heldout"].get("final") or {}).keys())

    pooled = any(each.config.entry.traits.pooled for each in comparison.contenders)
    every = [[name, *([name + POOLED] if pooled else [])] for name in names]
    return [
        name
        for some in every
        for name in some
        if any(
            _value(result, name) is not None
            for runs in results.values()
            for result in runs.values()
        )
    ]


def _value(result: JsonObject, measure: str) -> float | None:
    """Return a measure of a run; None where it was not measured, or is not finite."""
    if measure.endswith(POOLED):
        row, name = result.get("heldout_pooled"), measure.removesuffix(POOLED)
    else:
        row, name = (None if result["pooled"] else result["heldout"]), measure

    return _finite(((row or {}).get("final") or {}).get(name))


def _by_site(result: JsonObject, measure: str) -> dict[str, float]:
    """Return a measure of each site that was measured."""
    if result["pooled"] or measure.endswith(POOLED):
        return {}
    rows = result.get("heldout_by_site") or {}
    values = {
        site: _finite(((row or {}).get("final") or {}).get(measure)) for site, row in rows.items()
    }
    return {site: value for site, value in values.items() if value is not None}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _differences(
    comparison: Comparison, results: Mapping[str, Results], measures: Sequence[str]
) -> dict[str, dict[str, Difference]]:
    """Return the differences of each contender to the baseline, by measure."""
    base = results[comparison.baseline]
    found: dict[str, dict[str, Difference]] = {each.name: {} for each in comparison.contenders}

    for measure in measures:
        ours = {
            name: difference
            for name, runs in results.items()
            if name != comparison.baseline
            and (difference := _difference(runs, base, measure)) is not None
        }
        corrected = holm({name: each.p for name, each in ours.items()})
        for name, each in ours.items():
            found[name][measure] = each.model_copy(update={"p_holm": corrected[name]})

    return found


def _difference(runs: Results, base: Results, measure: str) -> Difference | None:
    """Return the difference of two contenders on the seeds and sites that both have."""
    cells: list[list[float]] = []
    seeds = runs.keys() & base.keys()
    for seed in seeds:
        row = _cells(runs[seed], base[seed], measure)
        differs = any(row) or len(seeds) > 1  # sites of one seed tell that two runs are equal
        once = differs and alike(row) and _shared(runs[seed], base[seed])
        row = row[:1] if once else row
        cells += [row] if row else []

    if not cells:
        return None

    means = [math.fsum(row) / len(row) for row in cells]
    over: Over = "seeds" if len(means) > 1 else "sites"
    pairs = means if over == "seeds" else cells[0]
    mean, low, high = interval(pairs)
    better = [gain < 0 if is_loss(measure) else gain > 0 for row in cells for gain in row]

    return Difference(
        mean=mean,
        low=low,
        high=high,
        over=over if len(pairs) > 1 else None,
        pairs=len(pairs),
        p=p_value(pairs),
        p_holm=None,
        better=sum(better),
        cells=len(better),
    )


def _cells(ours: JsonObject, theirs: JsonObject, measure: str) -> list[float]:
    """Return the differences of two runs by site; over all sites together, the only one."""
    if measure.endswith(POOLED):
        pair = _value(ours, measure), _value(theirs, measure)
        return [] if pair[0] is None or pair[1] is None else [pair[0] - pair[1]]

    left, right = _by_site(ours, measure), _by_site(theirs, measure)
    return [left[site] - right[site] for site in left if site in right]


def _shared(*results: JsonObject) -> bool:
    """Return whether all sites of these runs are measured on the same held-out records."""
    return all((result.get("overlap") or {}).get("one_set") for result in results)


def is_loss(measure: str) -> bool:
    """Return whether less of a measure is better."""
    return measure.removesuffix(POOLED) == "loss"


def _contender(
    contender: Contender,
    results: Results,
    measures: Sequence[str],
    differences: dict[str, Difference],
    out: Path,
    failed: Mapping[tuple[str, int], str],
) -> ComparedContender:
    scores = {}
    for measure in measures:
        by_seed = {
            seed: value
            for seed, result in results.items()
            if (value := _value(result, measure)) is not None
        }
        if by_seed:
            mean, low, high = interval(list(by_seed.values()))
            scores[measure] = Score(mean=mean, low=low, high=high, by_seed=by_seed)

    check = read_file(out / contender.name / CHECK) or {}
    every = list(results.values())
    sizes = [result["bytes"] for result in every]
    up = [
        (size["up"] + size["setup_up"]) / r["sites"] for size, r in zip(sizes, every, strict=True)
    ]
    down = [
        (size["down"] + size["setup"] - size["setup_up"]) / r["sites"]
        for size, r in zip(sizes, every, strict=True)
    ]

    return ComparedContender(
        name=contender.name,
        method=contender.config.method.name,
        codec=coding_of(contender.config),
        pooled=contender.config.entry.traits.pooled,
        trained_parameters=check.get("model", {}).get("trainable"),
        optimizer_steps=_steps(contender, check),
        runs=tuple(
            _run(contender.name, seed, results.get(seed), failed.get((contender.name, seed)))
            for seed in contender.configs
        ),
        scores=scores,
        differences=differences,
        up_bytes_per_site=_mean(up),
        down_bytes_per_site=_mean(down),
        bytes_total=_mean([size["up"] + size["down"] + size["setup"] for size in sizes]),
        amortised_ratio=_mean([result["amortised_ratio"] for result in every]),
        wall_s=_mean([result["wall_s"] for result in every]),
        peak_rss_bytes=max((result["peak_rss_bytes"] for result in every), default=None),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of known values; None where one is unknown, or there is none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _steps(contender: Contender, check: JsonObject) -> float | None:
    """Return the optimizer steps of all sites in all rounds, those of sites that are drawn for a
    round counted by their share."""
    sites = check.get("sites", [])
    if not sites or any("steps" not in site for site in sites):
        return None

    config = contender.config
    steps: int = sum(site["steps"] for site in sites)
    cohort = 1 if config.entry.traits.pooled else config.method.cohort(len(sites))
    return steps * cohort / len(sites) * config.rounds


def _run(name: str, seed: int, result: JsonObject | None, failed: str | None) -> ComparedRun:
    known = result or {}
    return ComparedRun(
        seed=seed,
        folder=run_folder(Path(), name, seed).as_posix(),
        finished=result is not None,
        failed=failed if result is None else None,
        weights_sha256=known.get("adapter_sha256") or known.get("model_sha256"),
        wall_s=known.get("wall_s"),
        peak_rss_bytes=known.get("peak_rss_bytes"),
    )


def _one_observation(
    contenders: Sequence[ComparedContender], results: Mapping[str, Results]
) -> list[str]:
    """Return why a difference has no interval, where sites that share a held-out set count once."""
    every = [result for runs in results.values() for result in runs.values()]
    untested = any(
        each.over is None and not measure.endswith(POOLED)
        for one in contenders
        for measure, each in one.differences.items()
    )
    if not untested or len(every) < 2 or not _shared(*every):
        return []
    return [
        "all sites share one held-out set, on which a model of all sites is one observation: its "
        "difference has no interval and no test; compare under more seeds, or name held-out "
        "records of each site"
    ]


def _baselines(comparison: Comparison) -> list[str]:
    """Return a remark on the baselines of single runs, which are no contenders."""
    named = {name: None for each in comparison.contenders for name in each.config.compare}
    if not named:
        return []
    return [
        f"the baselines of each run ({', '.join(named)}) stand on its own page; to have one in "
        "these tables, make it a contender, or remove compare from the configuration to save its "
        "time"
    ]


def _notes(contenders: Sequence[ComparedContender], results: Mapping[str, Results]) -> list[str]:
    """Return remarks on what should be equal among the runs, and is not."""
    notes = []
    if len({each.optimizer_steps for each in contenders}) > 1:
        notes.append("the contenders take unequal numbers of optimizer steps")

    versions: dict[str, set[str]] = {}
    for runs in results.values():
        for result in runs.values():
            known = {"fluvial": result["fluvial"], "python": result["python"], **result["versions"]}
            for name, version in known.items():
                versions.setdefault(name, set()).add(version)
    notes += [
        f"runs were made with several versions of {name}: {', '.join(sorted(found))}"
        for name, found in versions.items()
        if len(found) > 1
    ]
    return notes
