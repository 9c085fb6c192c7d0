"""The result of a run, as result.json holds it: measures, bytes, verdict, versions."""

import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fluvial import __version__
from fluvial.data import POOLED, Overlap, SiteTexts
from fluvial.federation.meter import APART, MEASURING, Kind
from fluvial.methods import BASELINES
from fluvial.methods.interface import Export, Measures, Traits
from fluvial.methods.measuring import SiteMeasures, Texts
from fluvial.runs.config import RunConfig
from fluvial.runs.verdict import judge
from fluvial.storage.exported import MOSTLY
from fluvial.storage.inputs import digests
from fluvial.storage.run_files import COMPARE, DESCRIBED, DESCRIPTION, INPUTS, read_result

BytesByKind = Mapping[Kind, int]
"""Bytes by direction and task."""


def result_of(
    config: RunConfig,
    folder: Path,
    *,
    sites: int,
    base: Measures,
    final: Measures,
    export: Export,
    tasks: dict[str, Any] | None,
    traffic: dict[str, Any],
    setup: dict[str, Any],
    wall_s: float,
    texts: Texts,
    own_models: dict[str, dict[str, SiteMeasures]] | None = None,
    right_answers: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything that a run found, beside the results of its baselines in `folder`.

    `own_models` has the measures of the sites' own models, see `cross_site`. `right_answers` has a
    1 or a 0 for each held-out answer of the base and of the final model, by site, where the sites
    are in this process.
    """
    baselines = {name: _stored(folder, name) for name in BASELINES}
    promise = config.promise
    result: dict[str, Any] = {
        "fluvial": __version__,
        "method": config.method.name,
        **description_of(config),
        "codec": coding_of(config),
        "quantization": config.model.quantisation_settings or None,
        "rounds": config.rounds,
        "sites": sites,
        "heldout": {
            "base": base.mean(),
            **{name: _final(stored, "heldout") for name, stored in baselines.items()},
            "final": final.mean(),
        },
        "heldout_pooled": {
            "base": base.pooled(),
            **{name: _final(stored, "heldout_pooled") for name, stored in baselines.items()},
            "final": final.pooled(),
        },
        "questions": final.answers.questions,
        "questions_too_long": final.answers.too_long,
        "answers_without_end": final.answers.without_end,
        "right_answers": right_answers,
        "overlap": _overlap(texts, list(final.by_site)),
        "heldout_by_site": {
            site: {"base": base.by_site[site], "final": row}
            for site, row in final.by_site.items()
            if site in base.by_site
        },
        "cross_site": None
        if own_models is None
        else {"local": own_models, "federated": final.by_site},
        **traffic,
        "wall_s": wall_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "adapter_sha256": export.adapter_sha256,
        "model_sha256": export.model_sha256,
        "samples": export.samples,
        "public": export.public,
        "tasks": tasks,
        "leakage": export.leakage,
        "parts": export.parts,
        "noise": export.noise,
        "privacy": None if promise is None else promise.report(config.rounds, config.rounds),
        "compare": {name: _compared(baselines[name] or {}) for name in config.compare},
        "setup": setup,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(),
    }

    if result["baseline"] in BASELINES:
        for means in ("heldout", "heldout_pooled"):
            result[means][result["baseline"]] = result[means]["final"]

    compared: dict[str, Any] = {name: _stored(folder, name) for name in config.compare}
    result["verdict"] = judge(result, compared).to_json()
    return result


def _overlap(texts: Texts, sites: Sequence[str]) -> dict[str, Any] | None:
    """Return how far `sites` measure on the same records; None where their data is elsewhere."""
    if not isinstance(texts, SiteTexts):
        return None
    data = [texts.pooled()] if POOLED in sites else map(texts.load, sites)
    return asdict(Overlap.of(data))


def coding_of(config: RunConfig) -> str | None:
    """Return the name of the codec of `[codec]`; None where it carries no update."""
    return config.coding.name if config.entry.traits.sends == "codec" else None


def recorded(config: RunConfig, baselines: Sequence[RunConfig], texts: Texts) -> dict[str, Any]:
    """Return the content of config.json: the resolved configuration, and the description of the run
    with those of its `baselines`, with what was set, with digests of the files that it reads, and
    with what most records are where they are known."""
    mostly = {MOSTLY: texts.mostly()} if isinstance(texts, SiteTexts) else {}
    description = {
        **description_of(config),
        **mostly,
        INPUTS: digests(config.resolved()),
        "compare": {each.method.name: description_of(each) for each in baselines},
        "set": config.model_dump(mode="json", exclude_unset=True),
    }
    return {"fluvial": __version__, DESCRIPTION: description, **config.resolved()}


def description_of(config: RunConfig) -> dict[str, Any]:
    """Return the label of a run, and the properties of its method that readers of results need."""
    return described(config.method.name, config.entry.traits, coding_of(config))


def described(method: str, traits: Traits, codec: str | None) -> dict[str, Any]:
    """Return the description of a run: its label, True where its data is pooled, the baseline that
    it is itself or None, and True where sites send updates to a server."""
    itself = codec in (None, "identity") and (traits.baseline or traits.uncompressed is not None)
    label = traits.uncompressed if itself and traits.uncompressed else traits.label
    return {
        "label": label,
        "pooled": traits.pooled,
        "baseline": method if itself else None,
        "sends_updates": traits.sends != "nothing" and not traits.pooled,
    }


def traffic_of(
    totals: BytesByKind, setup: BytesByKind, size: int, trained: Sequence[int]
) -> dict[str, Any]:
    """Return the bytes of a run as they were sent, and their ratios to those without compression.

    An uncompressed update has `size` bytes, 0 where no update is sent, and each round has so many
    `trained` ones, also those that the method dropped. Downloads are as many, but for round 1,
    whose start the sites make themselves.
    """
    raw_up, raw_down = size * sum(trained), size * sum(trained[1:])
    setup_up = directed(setup, "up")
    setup_down = directed(setup, "down")
    up = directed(totals, "up") - setup_up
    down = directed(totals, "down") - setup_down
    total = up + down + setup_up + setup_down

    return {
        "bytes": {
            "up": up,
            "down": down,
            "setup": setup_up + setup_down,
            "setup_up": setup_up,
            "up_raw": raw_up,
            "down_raw": raw_down,
            "evaluate": sum(size for (_, task), size in totals.items() if task == MEASURING),
            "by_kind": {f"{way} {task}": size for (way, task), size in sorted(totals.items())},
        },
        "round_ratio": up / raw_up if raw_up else None,
        "amortised_ratio": total / (raw_up + raw_down) if raw_up else None,
        "amortised_uplink_ratio": (up + setup_up) / raw_up if raw_up else None,
    }


def directed(sizes: BytesByKind, direction: str) -> int:
    """Return the bytes of one direction, without those of measures, samples and audits."""
    return sum(
        size for (way, task), size in sizes.items() if way == direction and task not in APART
    )


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _stored(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the result of the baseline `name`; None where it was not run."""
    return read_result(folder / COMPARE / name)


def _final(stored: dict[str, Any] | None, means: str) -> dict[str, Any] | None:
    return None if stored is None else stored.get(means, {}).get("final")


def _compared(stored: dict[str, Any]) -> dict[str, Any]:
    keys = (*DESCRIBED, "sites", "bytes", "round_ratio", "amortised_ratio", "wall_s")
    return {key: stored[key] for key in keys}
