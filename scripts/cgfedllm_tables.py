"""Tables of the benchmark of CG-FedLLM."""

from statistics import mean
from typing import Any

from table_parts import claims, read, table

from fluvial.formatting import human_ratio


def gate() -> str:
    """Return the errors of codecs on held-out updates at 1/64."""
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
            f"Held-out snapshots of {settings['tgap_rounds']} TGAP rounds x 8 sites; squared "
            "errors "
            f"relative to the update (1 is sending nothing), frames as sent. {machine['cores']} "
            "cores, torch "
            f"{machine['torch']}. `stdlib` is the embedded model and text; `fairytales` and "
            "`mini_ops` are tales "
            "(FairytaleQA) and an arithmetic set with a 260 k parameter Llama trained on "
            "TinyStories, whose k and v "
            "are half as wide: there the paper's autoencoder needs padding and so more bytes.",
            table(rows),
        ]
    )


def training() -> str:
    """Return what the training of the paper's autoencoder changes, and what rounds with it keep."""
    found = read("cgfedllm_autoencoder.json")
    headings = ["objects", "rate", "learning rate", "schedule", "squares", "error", "bound"]
    gates = [[*headings, "cosine", "gate"]]
    runs: dict[int, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        if row["what"] == "loss":
            runs.setdefault(row["rate"], []).append(row)
            continue
        gates.append(
            [
                row["kind"],
                f"1/{row['rate']}",
                f"{row['learning_rate']:g}",
                row["schedule"],
                str(row["crop"]),
                f"{row['error']:.3f}",
                f"{row['bound']:.3f}",
                f"{row['cosine']:.3f}",
                "passes" if row["passes"] else "refused",
            ]
        )

    losses = [["rate", "seeds", "loss", "share of the gain that is kept"]]
    plain = {row["seed"]: row["loss"] for row in runs[1]}
    for rate, some in sorted(runs.items()):
        kept = [
            (row["base_loss"] - row["loss"]) / (row["base_loss"] - plain[row["seed"]])
            for row in some
        ]
        losses.append(
            [
                "uncompressed" if rate == 1 else f"1/{rate}",
                str(len(some)),
                f"{mean(row['loss'] for row in some):.4f}",
                f"{100 * mean(kept):.0f} % ({100 * min(kept):.0f} to {100 * max(kept):.0f})",
            ]
        )

    return "\n\n".join(
        [table(gates), "Federated rounds with the defaults, the gate set to report:", table(losses)]
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
            f"{rounds} rounds of {steps} steps on 8 sites. *Gain kept* is the share of the "
            "uncompressed run's fall of "
            "loss. *Ratio* is of the frames of a round, *amortised* of all bytes, up and down, "
            "with set-up. The learning "
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
            f"Embedded model, one seed, {settings['tgap_rounds']} TGAP rounds of "
            f"{settings['steps']} steps, "
            f"{settings['iterations']} iterations of the paper's autoencoder (`--quick`): enough "
            "to rank them, "
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
