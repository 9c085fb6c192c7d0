"""Tables of the benchmarks of codecs."""

from statistics import geometric_mean, mean
from typing import Any

from table_parts import claims, read, table

NONE = "uncompressed"
"""Contender whose update is not coded."""


DETAILED = ("fairytales", "fairytales, babyllama105")
"""Cells whose errors are shown at every rate."""


def distortion() -> str:
    """Error of held-out updates, real frames: two cells at every rate, all cells at 1/64."""
    found = read("rate_distortion.json")
    rated = [
        row
        for row in found["rows"]
        if "part" not in row and row["rate"] is not None and row["seeds"]
    ]
    tables = []
    for cell in DETAILED:
        here = [row for row in rated if row["cell"] == cell]
        width = max(row["width"] for row in here)
        tables += [f"`{cell}` (widest factor {width}):", table(_by_rate(here))]

    settings = found["settings"]
    seeds = sorted({row["seeds"] for row in rated})
    return "\n\n".join(
        [
            "Relative squared error of held-out updates (1 is sending nothing): "
            f"{settings['tgap_rounds']} rounds of "
            f"{settings['steps']} steps on 8 sites, seeds: {' or '.join(map(str, seeds))}, every "
            "byte of the frames counted. `sites` and `public` say what a codec was fitted on.",
            *tables,
            "Errors at 1/64 in every cell, and the widest factor:",
            table(_at_one_rate([row for row in rated if row["rate"] == 64])),
            "Claims of `python -m benchmarks.codecs rate_distortion`:",
            claims("rate_distortion.json"),
        ]
    )


def _by_rate(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the errors of one cell, by codec and rate, the least at 1/64 first."""
    rates = sorted({row["rate"] for row in rows})
    by = {(row["codec"], row["source"], row["rate"]): row for row in rows}
    order = sorted(
        dict.fromkeys((row["codec"], row["source"]) for row in rows),
        key=lambda kind: by[*kind, 64]["error"] if (*kind, 64) in by else 9.0,
    )
    heading = ["codec", "fitted on", *(f"1/{rate:g}" for rate in rates)]
    lines = [[*heading, "cosine at 1/64", "of the mean"]]

    for kind in order:
        errors = [
            f"{by[*kind, rate]['error']:.3f}" if (*kind, rate) in by else "-" for rate in rates
        ]
        at_64 = by.get((*kind, 64), {})
        cosines = [f"{at_64[key]:.3f}" if at_64 else "-" for key in ("cosine", "cosine_mean")]
        lines.append([*kind, *errors, *cosines])

    return lines


def _at_one_rate(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the errors of all cells at one rate, by codec, the least geometric mean first."""
    widths = {row["cell"]: row["width"] for row in rows}
    by: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        by.setdefault((row["codec"], row["source"]), {})[row["cell"]] = row["error"]

    lines = [["codec", "fitted on", *(f"{cell} ({width})" for cell, width in widths.items())]]
    for kind in sorted(by, key=lambda kind: geometric_mean(by[kind].values())):
        errors = [f"{by[kind][cell]:.3f}" if cell in by[kind] else "-" for cell in widths]
        lines.append([*kind, *errors])

    return lines


def _target_tables(found: Any) -> list[str]:
    """Return a table for each cell."""
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

    return tables


def _across_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return amortised kB of each contender in each cell, the fewest against uncompressed first."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    spent: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["seeds"]:
            spent.setdefault(row["contender"], {})[row["cell"]] = row

    def ratio(contender: str) -> float:
        found = spent[contender].items()
        return geometric_mean(r["bytes_all"] / spent[NONE][name]["bytes_all"] for name, r in found)

    lines = [["contender", *cells]]
    for contender in sorted(spent, key=ratio):
        line = [contender]
        for name in cells:
            if name not in spent[contender]:
                line.append("-")
                continue
            measured = spent[contender][name]
            text = f"{measured['bytes_all'] / 1000:.1f}"
            line.append(text if measured["reached"] == measured["seeds"] else f"({text})")
        lines.append(line)

    return lines


def target() -> str:
    """Loss and bytes to the uncompressed loss."""
    found = read("bytes_to_target.json")
    more = read("bytes_to_target_cells.json")
    settings = found["settings"]
    return "\n\n".join(
        [
            f"{settings['rounds']} rounds of {settings['steps']} steps on 8 sites; local learning "
            "rate of every "
            "contender, the uncompressed run included, is the best of three on seed 0. *Excess "
            "loss* is over the "
            "uncompressed run, in nats, with a 95 % interval over seeds. *Rounds* and kB of one "
            "site until the loss of "
            f"uncompressed round {settings['target']}; who did not reach it in every seed is "
            "shown with all its bytes.",
            *_target_tables(found),
            "Claims of `python -m benchmarks.codecs bytes_to_target`:",
            claims("bytes_to_target.json"),
            "Further cells with one seed, at the learning rate that is best for the uncompressed "
            "run (`--seeds 1 --rate-of-uncompressed`). Amortised kB of one site until the target, "
            "in brackets all kB of a run that did not reach it; in the order of their geometric "
            "mean over the cells, against uncompressed:",
            table(_across_cells(more["rows"])),
            claims("bytes_to_target_cells.json"),
        ]
    )


def adapters() -> str:
    """Return bytes to the uncompressed loss where the adapter is no longer the same for all."""
    found = read("adapters.json")
    heading = ["scheme", "choice of", "adapter", "steps", "local rate"]
    rows = [[*heading, "rounds", "up", "amortised", "CPU s"]]
    for row in found["rows"]:
        if not row["seeds"]:
            continue
        reached = row["reached"] == row["seeds"]
        spent = [f"{row[f'bytes_{key}']:,.0f} B" for key in ("up", "all")]
        rows.append(
            [
                row["scheme"],
                row["kind"],
                row["adapter"],
                row["steps"].removesuffix(" steps"),
                f"{row['learning_rate']:g}",
                f"{row['rounds']:.0f}" if reached else f"not in {row['rounds']:.0f}",
                *(spent if reached else [f"({each})" for each in spent]),
                f"{row['cpu_s']:.0f}",
            ]
        )

    settings = found["settings"]
    return "\n\n".join(
        [
            f"Until the uncompressed loss of round {settings['target']}, bytes of one site, "
            f"{settings['steps']} steps of {settings['batch']} in a round, seed 0, `fairytales` on "
            "stories260k. *Own*: each scheme has the best of two adapters (Fed-SB of three), then "
            "of once and four times the local steps, then of three learning rates. *Common "
            "adapter*: the same for ours with rank 8 on q, k, v and o alone. In brackets, all of a "
            "run that did not reach it.",
            table(rows),
            "Claims of `python -m benchmarks.codecs adapters`:",
            claims("adapters.json"),
        ]
    )


def speed() -> str:
    """Megabytes of fp32 update a second."""
    found = read("codec_speed.json")
    rows = [
        [
            "layout",
            "codec",
            "encode",
            "decode",
            "both",
            "both, share of a memory copy",
            "memory of an encode, in updates",
        ]
    ]

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
            "-" if row.get("encode_peak") is None else f"{row['encode_peak']:.1f}",
        ]
        rows.append([row["layout"], row["codec"], *figures, *last])

    return "\n\n".join(
        [
            "Megabytes of fp32 update per second of one core, synthetic updates. An update of d 64 "
            "has 72 kB: there calls take the time, not values. `trellis` has memory 10 where none "
            "is named.",
            table(rows),
            "Claims of `python -m benchmarks.codecs speed`:",
            claims("codec_speed.json"),
        ]
    )


def driven() -> str:
    """Return the loss of rates that follow the noise, over fixed rates at their bytes."""
    found = read("codec_snr.json")
    settings = found["settings"]
    rows = [["codec and rate", "bytes of a site, up", "loss", "over a fixed rate", "95 %"]]

    for row in found["rows"]:
        excess = row.get("excess")
        half = row.get("excess_half")
        rows.append(
            [
                row["contender"],
                f"{row['bytes_up']:,.0f}",
                f"{row['loss']:.4f}",
                "-" if excess is None else f"{excess:+.4f}",
                "-" if half is None else f"{half:.4f}",
            ]
        )

    return "\n\n".join(
        [
            f"Held-out loss after {settings['rounds']} rounds of {settings['steps']} steps on "
            f"{settings['cell']}, {settings['seeds']} seeds, error feedback, learning rate "
            f"{settings['learning_rate']:g} for all. Driven runs begin at 1/64. Fixed rates are "
            'interpolated in the logarithm of the bytes, by seed; "-" lies outside of them.',
            table(rows),
            "Claims of `python -m benchmarks.codecs snr`:",
            claims("codec_snr.json"),
        ]
    )


def default_adapter() -> str:
    """Return the loss of each adapter without a limit on bytes, and at equal bytes."""
    found = read("default_adapter.json")
    rows = [
        ["cell", "limit on bytes", "adapter", "seeds", "learning rate", "up, whole run", "loss"]
    ]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        groups.setdefault((row["cell"], row["limit"], row["adapter"]), []).append(row)

    for (cell, limit, adapter), runs in groups.items():
        rows.append(
            [
                cell,
                limit,
                adapter,
                str(len(runs)),
                f"{runs[0]['learning_rate']:g}",
                f"{mean(run['up'] for run in runs):,.0f} B",
                f"{mean(run['loss'] for run in runs):.4f}",
            ]
        )

    return "\n\n".join([table(rows), claims("default_adapter.json")])


def budget_both() -> str:
    """Return bytes of both ways to a loss, of choices within a budget and of fixed adapters."""
    found = read("budget_both.json")
    settings = found["settings"]
    headings = ["cell", "contender", "what is chosen", "reached in round", "both ways", "loss"]
    rows = [
        [
            row["cell"],
            row["contender"],
            _chosen(row["chosen"]) if "chosen" in row else "-",
            "-" if row["reached"] is None else str(row["reached"]),
            f"{row['all_to_target']:,.0f} B",
            f"{row['loss']:.4f}",
        ]
        for row in found["rows"]
    ]

    return "\n\n".join(
        [
            f"{settings['rounds']} rounds of {settings['steps']} steps of {settings['batch']}, one "
            "seed, bytes of one site in both directions until the loss of the uncompressed run "
            f"after {settings['target']} rounds, or of the whole run where that is not reached. "
            "The budgets are all, a half and a third of the bytes of rank 8 on q, k, v and o with "
            "powersgd at 1/64 both ways; adapters by hand have the third. Where the rounds are "
            "chosen, a site takes as many steps in all. A budget's run measures "
            "the moving average of its adapter (`method.ema_decay = 0.5`), but in the rows of the "
            "last adapter.",
            table([headings, *rows]),
            claims("budget_both.json"),
        ]
    )


def _chosen(choice: dict[str, Any]) -> str:
    """Return a choice within a budget in a few words."""
    steps = f", {choice['max_steps']} steps" if "max_steps" in choice else ""
    steps += f" in {choice['rounds']} rounds" if "rounds" in choice else ""
    ways = {name: choice[name] or {"name": "exact"} for name in ("codec", "downlink")}
    up, down = (
        f"{each['name']} 1/{each['rate']:.3g}" if "rate" in each else each["name"]
        for each in ways.values()
    )
    return f"r {choice['r']} on {choice['target_modules']}{steps}, {up} up, {down} down"


def budget() -> str:
    """Return bytes to a loss, and the loss, of a choice within a budget and of fixed adapters."""
    found = read("budget.json")
    settings = found["settings"]
    headings = ["cell", "contender", "seeds", "reach the target", "up to the target"]
    rows = [[*headings, "up, whole run", "loss"]]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        groups.setdefault((row["cell"], row["contender"]), []).append(row)

    for (cell, contender), runs in groups.items():
        reached = [run for run in runs if run["reached"] is not None]
        until = mean(run["up_to_target"] for run in reached) if reached else None
        rows.append(
            [
                cell,
                contender,
                str(len(runs)),
                f"{len(reached)} of {len(runs)}",
                "-" if until is None else f"{until:,.0f} B",
                f"{mean(run['up'] for run in runs):,.0f} B",
                f"{mean(run['loss'] for run in runs):.4f}",
            ]
        )

    return "\n\n".join(
        [
            f"{settings['rounds']} rounds of {settings['steps']} steps of {settings['batch']}, "
            "bytes of one site. The target is the loss of the uncompressed run after "
            f"{settings['target']} rounds; the budget, and every adapter by hand, has a third of "
            "the bytes of the fixed one.",
            table(rows),
            claims("budget.json"),
        ]
    )
