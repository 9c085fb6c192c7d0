"""Write the tables of results into the documents, from what benchmarks and a run left behind.

    fluvial run configs/quickstart.toml --out runs/quickstart
    cp runs/quickstart/result.json benchmarks/results/quickstart.json
    python scripts/write_tables.py [--check]

Tables stand between `<!-- name: ... -->` and `<!-- /name -->`. With `--check` nothing is written,
and the exit code says whether the documents are up to date.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fidelity_figures import fill_cells

from fluvial.formatting import human_bytes, human_ratio
from fluvial.report.result_tables import RESULT_CAPTION, result_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> Any:
    """A file of results."""
    return json.loads((RESULTS / name).read_text())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the heading, the first column is text."""
    heading, *body = rows
    rule = ["---", *("---:" for _ in heading[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, rule, *body))


def quickstart() -> str:
    """What `make quickstart` ends with, and the machine's cost of it."""
    result = read("quickstart.json")
    sites = result["heldout_by_site"]
    gains = {site: row["base"]["loss"] - row["final"]["loss"] for site, row in sites.items()}
    least = min(gains, key=gains.__getitem__)
    setup = result["bytes"]["setup"] / result["sites"]

    return "\n\n".join(
        [
            f"`make quickstart`: {result['sites']} sites, {result['rounds']} rounds, Python {result['python']}, "
            f"torch {result['versions']['torch']}, two CPU cores.",
            table(result_rows(result)),
            f"The run in one line: {result['verdict']['line']}.",
            RESULT_CAPTION,
            f"Loss falls on every site's held-out files, by {gains[least]:.3f} ({least}) to {max(gains.values()):.3f} "
            f"nats. Set-up is {human_bytes(setup)} for each site. What `auto` said: "
            f"{result['setup']['choice']['why']}.",
        ]
    )


def claims(name: str) -> str:
    """The claims of a benchmark, those that do not hold included."""
    rows = [["claim", "value", "bar", "holds"]]
    for claim in read(name)["claims"]:
        value = claim["value"]
        shown = (
            f"{value:.4g}"
            if isinstance(value, int | float) and not isinstance(value, bool)
            else str(value)
        )
        rows.append(
            [
                claim["name"],
                shown,
                f"{claim.get('side', '')} {claim['bar']}".strip(),
                "yes" if claim["holds"] else "**no**",
            ]
        )

    return table(rows)


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


def gate() -> str:
    """What the codecs carry of held-out updates, at 1/64."""
    found = read("cgfedllm.json")
    rows = [
        [
            "codec, at 1/64",
            "corpus",
            "bytes",
            "error A",
            "error B",
            "error, mean",
            "cosine",
            "SNR, dB",
            "gate",
        ]
    ]

    for row in found["rows"]:
        if row["part"] == "gate" and "1/64" in row["codec"]:
            figures = [
                f"{row[key]:.3f}" for key in ("error_a", "error_b", "error_aggregate", "cosine")
            ]
            verdict = "passes" if row["passes"] else "**refused**"
            rows.append(
                [
                    row["codec"],
                    row["corpus"],
                    f"{row['bytes']:.0f}",
                    *figures,
                    f"{row['snr_db']:.2f}",
                    verdict,
                ]
            )

    machine = found["machine"]
    settings = found["settings"]
    return "\n\n".join(
        [
            f"Held-out snapshots of {settings['tgap_rounds']} TGAP rounds x 8 sites; squared errors "
            f"relative to the update (1 is sending nothing), frames as sent. {machine['cores']} cores, torch "
            f"{machine['torch']}. `stdlib` is the embedded model and text; `fairytales` and `mini_ops` are tales "
            "(FairytaleQA) and an arithmetic set with a 260 k parameter Llama trained on TinyStories, whose k and v "
            "are half as wide: there the paper's autoencoder needs padding and so more bytes.",
            table(rows),
        ]
    )


def loss() -> str:
    """Held-out loss against what was sent."""
    found = read("cgfedllm.json")
    rows = [
        [
            "method and codec",
            "corpus",
            "seeds",
            "held-out loss",
            "range",
            "gain kept",
            "up per round",
            "ratio",
            "amortised",
        ]
    ]

    for row in found["rows"]:
        if row["part"] != "loss":
            continue
        if row["stopped"]:
            rows.append([row["codec"], row["corpus"], "0", "refused", *["-"] * 5])
            continue

        kept = f"{100 * row['gain_kept']:.1f} %"
        span = f"{row['lowest']:.4f} to {row['highest']:.4f}" if row["seeds"] > 1 else "-"
        ratios = [human_ratio(row["round_ratio"]), human_ratio(row["amortised_ratio"])]
        sent = f"{row['bytes_up']:,.0f} B"
        rows.append(
            [
                row["codec"],
                row["corpus"],
                str(row["seeds"]),
                f"{row['loss']:.4f}",
                span,
                kept,
                sent,
                *ratios,
            ]
        )

    rounds = found["settings"]["rounds"]
    steps = found["settings"]["steps"]
    return "\n\n".join(
        [
            f"{rounds} rounds of {steps} steps on 8 sites. *Gain kept* is the share of the uncompressed run's fall of "
            "loss. *Ratio* is of the frames of a round, *amortised* of all bytes both ways with set-up. The learning "
            "rate is the same for all and tuned for none.",
            table(rows),
            "Claims of the benchmark:",
            claims("cgfedllm.json"),
        ]
    )


def parts() -> str:
    """Transfer, normalisations, rates and ranks, TGAP's sources: short runs."""
    columns = {"a": "error_a", "b": "error_b", "cosine": "cosine"}
    transfer = [["codec", "fitted on", "measured on", "error A", "error B", "cosine", "gate"]]

    for row in read("cgfedllm_transfer.json")["rows"]:
        figures = [f"{row[key]:.3f}" for key in columns.values()]
        transfer.append(
            [
                row["codec"],
                row["fitted"],
                row["corpus"],
                *figures,
                "passes" if row["passes"] else "refused",
            ]
        )

    normalise = [
        ["codec, normalisation", "representation", "error A", "error B", "cosine", "B norm ratio"]
    ]
    for row in read("cgfedllm_normalise.json")["rows"]:
        figures = [f"{row[key]:.3f}" for key in (*columns.values(), "b_norm_ratio")]
        normalise.append([row["codec"], row["representation"], *figures])

    rates = [["codec", "rank", "bytes", "ratio", "error", "cosine", "gate"]]
    for row in read("cgfedllm_rates.json")["rows"]:
        if "cosine" in row:
            figures = [
                f"{row['bytes']:.0f}",
                f"1/{row['ratio']:.1f}",
                f"{row['error']:.3f}",
                f"{row['cosine']:.3f}",
            ]
            verdict = "passes" if row["passes"] else "refused"
            rates.append([row["codec"], str(row["rank"]), *figures, verdict])

    sources = [
        ["source", "reading", "gate error", "held-out loss", "amortised uplink", "amortised"]
    ]
    for row in read("cgfedllm_tgap.json")["rows"]:
        ratios = [f"{row['amortised_uplink_ratio']:.3f}", f"{row['amortised_ratio']:.3f}"]
        loss = [f"{row['gate_error']:.3f}", f"{row['loss']:.4f}"]
        sources.append([row["source"], row["reading"], *loss, *ratios])

    settings = read("cgfedllm_transfer.json")["settings"]
    return "\n\n".join(
        [
            f"Embedded model, one seed, {settings['tgap_rounds']} TGAP rounds of {settings['steps']} steps, "
            f"{settings['iterations']} iterations of the paper's autoencoder (`--quick`): enough to rank them, "
            "not to quote.",
            "Transfer to other data:",
            table(transfer),
            "The four normalisations, errors of the innovation:",
            table(normalise),
            "Rates and ranks:",
            table(rates),
            "Where TGAP's updates come from, linear at 1/64 with error feedback:",
            table(sources),
        ]
    )


def distortion() -> str:
    """Error of held-out updates at every rate, real frames."""
    found = read("rate_distortion.json")
    rated = [
        row
        for row in found["rows"]
        if "part" not in row and row["rate"] is not None and row["seeds"]
    ]
    tables = []

    for cell in dict.fromkeys(row["cell"] for row in rated):
        here = [row for row in rated if row["cell"] == cell]
        rates = sorted({row["rate"] for row in here})
        kinds = list(dict.fromkeys((row["codec"], row["source"]) for row in here))
        by = {(row["codec"], row["source"], row["rate"]): row for row in here}
        order = sorted(kinds, key=lambda kind: by[*kind, 64]["error"] if (*kind, 64) in by else 9.0)
        rows = [
            [
                "codec",
                "fitted on",
                *(f"1/{rate:g}" for rate in rates),
                "cosine at 1/64",
                "of the mean",
            ]
        ]

        for kind in order:
            errors = [
                f"{by[*kind, rate]['error']:.3f}" if (*kind, rate) in by else "-" for rate in rates
            ]
            at_64 = by.get((*kind, 64), {})
            cosines = [f"{at_64[key]:.3f}" if at_64 else "-" for key in ("cosine", "cosine_mean")]
            rows.append([*kind, *errors, *cosines])

        width = max(row["width"] for row in here)
        tables += [f"`{cell}` (widest factor {width}):", table(rows)]

    settings = found["settings"]
    return "\n\n".join(
        [
            f"Relative squared error of held-out updates (1 is sending nothing): {settings['tgap_rounds']} rounds of "
            f"{settings['steps']} steps on 8 sites, {settings['seeds']} seeds, every byte of the "
            "frames counted. `sites` and `public` say what a codec was fitted on.",
            *tables,
            "Claims of `python -m benchmarks.codecs rate_distortion`:",
            claims("rate_distortion.json"),
        ]
    )


def target() -> str:
    """Loss and bytes to the uncompressed loss."""
    found = read("bytes_to_target.json")
    heading = ["contender", "seeds", "local rate", "excess loss", "+-", "reached", "rounds"]
    heading += ["up", "down", "set-up", "amortised"]
    tables = []

    for cell in dict.fromkeys(row["cell"] for row in found["rows"]):
        rows = [heading]
        for row in found["rows"]:
            if row["cell"] != cell or not row["seeds"]:
                continue

            half = row["excess_half"]
            parts = [f"{row[f'bytes_{key}'] / 1000:.1f}" for key in ("up", "down", "setup", "all")]
            reached = f"{row['reached']} of {row['seeds']}"
            rounds = f"{row['rounds']:.1f}"
            excess = [f"{row['excess']:+.4f}", "-" if half is None else f"{half:.4f}"]
            rows.append(
                [
                    row["contender"],
                    str(row["seeds"]),
                    f"{row['learning_rate']:g}",
                    *excess,
                    reached,
                    rounds,
                    *parts,
                ]
            )

        tables += [f"`{cell}`:", table(rows)]

    settings = found["settings"]
    return "\n\n".join(
        [
            f"{settings['rounds']} rounds of {settings['steps']} steps on 8 sites; local learning rate of every "
            "contender, the uncompressed run included, is the best of three on seed 0. *Excess loss* is over the "
            "uncompressed run, in nats, with a 95 % interval over seeds. *Rounds* and kB of one site until the loss of "
            f"uncompressed round {settings['target']}; who did not reach it in every seed is shown with all its bytes.",
            *tables,
            "Claims of `python -m benchmarks.codecs bytes_to_target`:",
            claims("bytes_to_target.json"),
        ]
    )


def speed() -> str:
    """Megabytes of fp32 update a second."""
    found = read("codec_speed.json")
    rows = [["layout", "codec", "encode", "decode", "both", "both, share of a memory copy"]]

    for row in found["rows"]:
        if row.get("stopped") or row.get("encode_mb_s") is None:
            continue

        both = row.get("both_mb_s")
        figures = [
            f"{row['encode_mb_s']:.1f}",
            "-" if row.get("decode_mb_s") is None else f"{row['decode_mb_s']:.1f}",
        ]
        share = None if both is None else both / row["copy_mb_s"]
        last = [
            "-" if both is None else f"{both:.1f}",
            "-" if share is None else f"{100 * share:.2f} %",
        ]
        rows.append([row["layout"], row["codec"], *figures, *last])

    return "\n\n".join(
        [
            "Megabytes of fp32 update per second on one thread, synthetic updates.",
            table(rows),
            "Claims of `python -m benchmarks.codecs speed`:",
            claims("codec_speed.json"),
        ]
    )


def cell(value: Any) -> str:
    """A figure with five digits, a large one whole; what was not measured is a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def listing(name: str, part: str, columns: dict[str, str], words: str) -> str:
    """The rows of one part of a benchmark, what it skipped, and its claims."""
    found = read(name)
    rows = [row for row in found["rows"] if row["part"] == part]
    lines = [list(columns.values()), *([cell(row.get(key)) for key in columns] for row in rows)]
    skipped = "".join(f"- not measured: {line}\n" for line in found["skipped"])

    return "\n\n".join(each for each in (words, table(lines), skipped, claims(name)) if each)


def block_losses() -> str:
    """FedCyBGD's losses beside full tuning and LoRA."""
    columns = {
        "cell": "cell",
        "contender": "contender",
        "learning_rate": "learning rate",
        "seeds": "seeds",
        "loss": "held-out loss",
        "loss_half": "±",
        "ratio": "of fed-full",
        "bytes_up": "up, B a site",
        "bytes_down": "down, B a site",
        "up_share": "up, of fed-full",
        "memory_share": "client memory, of fed-full",
    }
    words = "The same passes for all unless a name says otherwise; every learning rate is the best of three on seed 0."

    return listing("fedcybgd_losses.json", "losses", columns, words)


def block_downloads() -> str:
    """Forms of download."""
    columns = {
        "cell": "cell",
        "form": "form",
        "down": "down per visit, B",
        "loss": "held-out loss",
        "loss_half": "±",
        "cosine_base": "gradient cosine at the base",
        "cosine_tuned": "after tuning",
        "cosine_tuned_least": "the least",
    }
    return listing(
        "fedcybgd_download.json",
        "download",
        columns,
        "Bytes as sent, one setting and learning rate for all.",
    )


def block_memory() -> str:
    """Client memory, measured and by formula."""
    columns = {
        "case": "tunes, type, rest in",
        "formula_mb": "formula, MB",
        "before_mb": "receiving, MB",
        "train_mb": "training, MB",
        "after_mb": "coding, MB",
        "ratio": "training, of formula",
        "visit_ratio": "whole visit, of formula",
        "share": "of full tuning",
    }
    shapes = {
        "model": "model",
        "form": "form",
        "coded": "upload coded",
        "up_half": "up, half",
        "up_coded": "up, coded",
        "down_half": "down, half",
        "down_fp32": "down, fp32 block",
        "memory": "memory",
        "full_memory": "full tuning",
        "badam": "2M + 16M/D",
    }
    found = read("fedcybgd_memory.json")["rows"]
    lines = [[cell(row.get(key)) for key in shapes] for row in found if row["part"] == "shapes"]
    measured = listing(
        "fedcybgd_memory.json", "memory", columns, "Growth of a client's process in one visit."
    )

    return f"{measured}\n\nBy formula, bytes of one visit and of a client:\n\n{table([list(shapes.values()), *lines])}"


def block_compute() -> str:
    """Time per step by block."""
    found = read("fedcybgd_compute.json")["rows"]
    keys = [key for key in found[0] if key != "part"]

    return listing(
        "fedcybgd_compute.json", "compute", {key: key.replace("_", " ") for key in keys}, ""
    )


def engine_rounds() -> str:
    """Rounds on five engines."""
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
    words = "Two CPU cores, everything on one machine; what each column is, `python -m benchmarks.engine --help` says."

    return listing("engine_rounds.json", "rounds", columns, words)


def engine_line() -> str:
    """Rounds over a slow line, predicted and measured."""
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
        "Two warm sites behind an emulated line (packets through TUN devices between network namespaces, TCP Reno); "
        "`none` is without."
    )

    return listing("engine_link.json", "link", columns, words)


TABLES = {
    "README.md": {"results": quickstart},
    "docs/methods/cgfedllm.md": {"gate": gate, "loss": loss, "parts": parts},
    "docs/methods/fedcybgd.md": {
        "losses": block_losses,
        "download": block_downloads,
        "memory": block_memory,
        "compute": block_compute,
    },
    "docs/codecs.md": {"distortion": distortion, "target": target, "speed": speed},
    "docs/architecture.md": {"overhead": overhead},
    "docs/deploy.md": {"rounds": engine_rounds, "line": engine_line},
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
    """The page's name where `after` is another text, which is written unless this is a `check`."""
    if after == before:
        return []
    if not check:
        path.write_text(after)
    return [str(path.relative_to(ROOT))]


if __name__ == "__main__":
    main()
