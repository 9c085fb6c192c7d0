"""Write the tables of results into the documents, from what benchmarks and a run left behind.

    fluvial run configs/quickstart.toml --out runs/quickstart
    cp runs/quickstart/result.json benchmarks/results/quickstart.json
    fluvial run configs/fedpipe.toml --out runs/fedpipe
    cp runs/fedpipe/result.json benchmarks/results/fedpipe.json
    python scripts/write_tables.py [--check]

Tables stand between `<!-- name: ... -->` and `<!-- /name -->`. With `--check` nothing is written,
and the exit code says whether the documents are up to date.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from block_tables import block_compute, block_curves, block_downloads, block_losses, block_memory
from cgfedllm_tables import gate, loss, parts, training
from codec_tables import (
    adapters,
    budget,
    budget_both,
    default_adapter,
    distortion,
    driven,
    speed,
    target,
)
from fidelity_figures import fill_cells
from pipe_benchmark_tables import (
    pipe_enforced,
    pipe_errors,
    pipe_losses,
    pipe_predictions,
    pipe_value,
)
from pipe_tables import example_plans, selections
from split_tables import (
    activation_codecs,
    activations,
    leakage,
    privacy_utility,
    split_line,
    split_memory,
    split_modes,
    split_pipeline,
    split_thousand,
)
from table_parts import ROOT, cell, claims, listing, read, table

from fluvial.formatting import human_bytes
from fluvial.report.result_tables import answers_caption, result_caption, result_rows

QUICK = (
    "",
    "exact match",
    "95 % interval",
    "held-out loss",
    "pooled loss",
    "up per site",
    "round ratio",
    "amortised",
    "at 20 Mbit/s",
)
"""Columns of the result of the quick start."""


def _columns(rows: list[list[str]], names: tuple[str, ...]) -> list[list[str]]:
    """Return the columns of a table that `names` has, in their order."""
    places = [rows[0].index(name) for name in names]
    return [[row[place] for place in places] for row in rows]


def quickstart() -> str:
    """Return the result of `make quickstart`."""
    result = read("quickstart.json")
    sites = result["heldout_by_site"]
    gains = {site: row["base"]["loss"] - row["final"]["loss"] for site, row in sites.items()}
    least = min(gains, key=gains.__getitem__)
    setup = result["bytes"]["setup"] / result["sites"]
    rows = result_rows(result)

    return "\n\n".join(
        [
            f"`make quickstart`: {result['sites']} sites, {result['rounds']} rounds, Python "
            f"{result['python']}, "
            f"torch {result['versions']['torch']}, two CPU cores.",
            table(_columns(rows, QUICK)),
            f"The run in short: {result['verdict']['line']}",
            result_caption(rows[0], result=result),
            # The caption above says already that values are means over the sites.
            f"Of the scores of answers, {answers_caption(result).partition('; ')[2]}",
            "Loss is the mean of -ln p over the tokens of the answers, where p is the model's "
            "probability of the right token; its unit is the nat, and lower is better. It falls at "
            f"every site, by {gains[least]:.2f} ({least}) to {max(gains.values()):.2f} nats. "
            f"Before the first round, {human_bytes(setup)} are sent for each site. Why `auto` took "
            f"this codec: {result['setup']['choice']['why']}.",
        ]
    )


def overhead() -> str:
    """Time and memory of a round apart from training, ours and Flower's."""
    rows = [
        [
            "sites",
            "Fluvial, ms per site",
            "Flower + Ray, ms per site",
            "Fluvial, peak MB",
            "Flower + Ray, MB",
        ]
    ]
    found = read("overhead.json")["rows"]
    ours = {row["sites"]: row for row in found if row["what"] == "fluvial"}
    theirs = {row["sites"]: row for row in found if row["what"].startswith("Flower")}

    for sites, row in ours.items():
        other = theirs.get(sites, {})
        cells = [row["site_ms"], other.get("site_ms"), row["peak_mb"], other.get("peak_mb")]
        rows.append([str(sites), *("-" if cell is None else f"{cell:.1f}" for cell in cells)])

    return table(rows) + "\n\n" + claims("overhead.json")


def engine_rounds() -> str:
    """Return the table of rounds on five engines."""
    columns = {
        "what": "engine",
        "payload_mb": "payload, MB",
        "sites": "sites",
        "apart_s": "s a round, training apart",
        "apart_worst_s": "worst",
        "start_s": "s to the first round's end",
        "peak_mb": "peak memory of all, MB",
        "server_mb": "of the server, MB",
        "bytes_up": "up, B a site",
        "metered_ratio": "Flower's meter, of the payloads",
    }
    words = (
        "Two CPU cores, everything on one machine; what each column is, `python -m "
        "benchmarks.engine --help` says."
    )

    return listing("engine_rounds.json", "rounds", columns, words)


def engine_line() -> str:
    """Return the table of rounds over a slow line, predicted and measured."""
    columns = {
        "link": "line",
        "payload_mb": "payload, MB each way",
        "round_s": "s a round",
        "fastest_s": "fastest",
        "slowest_s": "slowest",
        "predicted_s": "`fluvial check`, with training as measured",
        "off": "off",
        "fitted_s": "with this run's own constants",
    }
    words = (
        "Two warm sites behind an emulated line (packets through TUN devices between network "
        "namespaces, TCP Reno); "
        "`none` is without."
    )

    return listing("engine_link.json", "link", columns, words)


def engine_size() -> str:
    """Return the table of the parts of a round at the size of a real model."""
    columns = {
        "contender": "contender",
        "round_s": "s a round",
        "download_s": "download",
        "train_s": "training",
        "encode_s": "coding at the site",
        "other_s": "other work of the site",
        "upload_s": "upload at the line's rate",
        "engine_s": "Flower, polls",
        "server_codec_s": "coding at the server",
        "codec_share": "codec, share of the round",
        "codec_share_untrained": "share without training",
        "rounds": "rounds to the target",
        "to_target_s": "computed s to the target",
        "server_mb": "server, MB",
        "site_mb": "site, MB",
    }
    given = read("engine_size.json")
    settings = given["settings"]
    words = (
        f"{settings['sites']} sites, {settings['line']}, LoRA of rank 16 on all linear layers (or "
        f"rank 2, where it says so) of a random {settings['shape']} in {settings['dtype']}, "
        f"{settings['steps']} step of one sequence of {settings['tokens']} tokens. Seconds are "
        "medians over rounds, at a site the mean of both. Both sites and the server share two "
        "cores, with the priority of real time over all else on the machine. Rounds to the target "
        f"are those of the benchmarks with a small model (`{settings['cell_of_rounds']}`), so "
        "seconds to the target are computed and not measured: all rounds, less one download, since "
        "round 1 has none; `-` is not known."
    )
    return listing("engine_size.json", "size", columns, words)


def load_words(machine: dict[str, Any]) -> str:
    """Return the load of a machine, before a benchmark and after it."""
    return f"{machine['load_before'][0]:g} before and {machine['load'][0]:g} after"


def channel() -> str:
    """Return the table of the secure channel's speed."""
    columns = {
        "size": "message",
        "memory": "freed memory",
        "what": "contender",
        "seal_mb_s": "seal, MB/s",
        "open_mb_s": "open, MB/s",
        "both_mb_s": "both, MB/s a core",
        "share": "of a copy's speed",
    }
    given = read("channel.json")
    cells = [
        [cell(row.get(key)) for key in columns]
        for row in given["rows"]
        if "milliseconds" not in row
    ]
    times = [
        [row["what"], cell(row["milliseconds"])] for row in given["rows"] if "milliseconds" in row
    ]
    machine = given["machine"]
    loads = load_words(machine)
    tables = (
        f"One of {machine['cores']} cores; the load of the machine was {loads}.",
        table([list(columns.values()), *cells]),
        table([["handshake", "ms"], *times]),
        claims("channel.json"),
    )

    return "\n\n".join(tables)


def stream() -> str:
    """Return the table of turns over the live stream."""
    columns = {
        "size": "turn, and its answer",
        "kind": "stream",
        "exchanges_s": "exchanges a second",
        "mb_s": "MB/s, both ways",
        "ms": "ms an exchange",
        "slowest_ms": "slowest round, ms",
    }
    given = read("stream.json")
    machine = given["machine"]
    loads = load_words(machine)
    words = (
        f"Two processes over loopback on {machine['cores']} cores; the load of the machine was "
        f"{loads}, so other processes took a share of them (`python -m benchmarks.stream`)."
    )
    rows = [[cell(row[key]) for key in columns] for row in given["rows"]]

    return "\n\n".join((words, table([list(columns.values()), *rows]), claims("stream.json")))


def quantised_costs() -> str:
    """Return memory and time of a step over each format of a base."""
    columns = {
        "format": "base",
        "allocator": "allocator",
        "stored_mb": "weights, MB",
        "load_peak_mb": "peak of loading, MB",
        "step_peak_mb": "peak with steps, MB",
        "load_s": "loading, CPU s",
        "step_s": "step, CPU s",
    }
    given = read("quantised_costs.json")
    words = (
        "A random model of the shape of Qwen2.5-0.5B in bfloat16; an adapter of rank 8, batch 1, "
        f"{given['settings']['length']} tokens; one thread. Each row is a process of its own, "
        "above the memory of its libraries. "
        "The allocator is glibc's: as it is, or with MALLOC_MMAP_THRESHOLD_=1048576."
    )
    return listing("quantised_costs.json", "costs", columns, words)


def quantised_merging() -> str:
    """Return held-out losses of adapters beside quantised bases and merged into them."""
    columns = {
        "base": "base in training",
        "base_loss": "untuned",
        "adapter_loss": "adapter beside the base",
        "float_loss": "same adapter, float base",
        "merged_loss": "merged, in float",
        "requantised_loss": "merged, quantised again",
    }
    words = "The embedded model and one site's text, 60 steps, one seed; held-out loss in nats."
    return listing("quantised_merging.json", "merging", columns, words)


TABLES = {
    "README.md": {"results": quickstart},
    "docs/methods/cgfedllm.md": {
        "gate": gate,
        "loss": loss,
        "training": training,
        "parts": parts,
    },
    "docs/methods/fedcybgd.md": {
        "losses": block_losses,
        "download": block_downloads,
        "memory": block_memory,
        "compute": block_compute,
        "curves": block_curves,
    },
    "docs/methods/flglm.md": {
        "codecs": activation_codecs,
        "memory": split_memory,
        "slow-line": split_line,
        "modes": split_modes,
        "pipeline": split_pipeline,
        "thousand": split_thousand,
        "leakage": leakage,
        "privacy-utility": privacy_utility,
    },
    "docs/methods/fedpipe.md": {
        "example": example_plans,
        "selection": selections,
        "losses": pipe_losses,
        "errors": pipe_errors,
        "value": pipe_value,
        "predictions": pipe_predictions,
        "enforced": pipe_enforced,
    },
    "docs/codecs.md": {
        "distortion": distortion,
        "target": target,
        "budget": budget,
        "budget_both": budget_both,
        "default_adapter": default_adapter,
        "adapters": adapters,
        "driven": driven,
        "speed": speed,
        "activations": activations,
    },
    "docs/quantisation.md": {"costs": quantised_costs, "merging": quantised_merging},
    "docs/architecture.md": {"overhead": overhead},
    "docs/deploy.md": {
        "rounds": engine_rounds,
        "line": engine_line,
        "size": engine_size,
        "channel": channel,
        "stream": stream,
    },
}


def fill(text: str, marker: str, content: str) -> str:
    """`text` with `content` between the two comments of `marker`."""
    pattern = re.compile(rf"(<!-- {marker}:[^>]*-->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    found = pattern.search(text)
    assert found, f"no place marked {marker!r}"
    return f"{text[: found.start()]}{found[1]}\n{content}\n\n{found[2]}{text[found.end() :]}"


def main() -> None:
    """Fill every marked place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []

    for name, makers in TABLES.items():
        path = ROOT / name
        before = after = path.read_text()
        for marker, make in makers.items():
            after = fill(after, marker, make())
        stale += _write(path, before, after, check)

    path = ROOT / "docs" / "fidelity.md"
    before = path.read_text()
    stale += _write(path, before, fill_cells(before), check)
    print("out of date:" if check else "changed:", ", ".join(stale) or "nothing")
    sys.exit(bool(stale) and check)


def _write(path: Path, before: str, after: str, check: bool) -> list[str]:
    """Return the page's name where `after` is another text, which is written unless this is a
    `check`."""
    if after == before:
        return []
    if not check:
        path.write_text(after)
    return [str(path.relative_to(ROOT))]


if __name__ == "__main__":
    main()
