"""Lines that a run prints while it works: a header for each method, a line for each round."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.markup import escape

from fluvial.federation.meter import APART
from fluvial.formatting import epsilon_words, human_bytes, human_ratio, human_seconds, safe_text
from fluvial.report.budget_tables import budget_lines
from fluvial.report.site_plans import plan_lines, predicted_lines
from fluvial.storage.run_files import JsonObject


def round_header(method: str) -> str:
    """Return the name of a method and the headings of its round lines, with rich markup."""
    headings = f"{'round':>5}  {'loss':>8}  {'up':>8}  {'down':>8}  {'time':>8}  sites"
    return f"[bold]{escape(method)}[/], bytes of all sites\n[dim]{headings}[/]"


def round_lines(record: JsonObject) -> list[str]:
    """Return the line of a round, and those about predicted figures where the round has them."""
    return [round_line(record), *predicted_lines(record)]


def round_line(record: JsonObject) -> str:
    """Return a round as one line with rich markup: the columns, then further measures by name."""
    failures = record.get("missing", [])
    missing = _sites(failure for failure in failures if failure.get("task") not in APART)
    unmeasured = _sites(failure for failure in failures if failure.get("task") in APART)
    lost = {*missing, *unmeasured}
    asked_again = [site for site in _sites(record.get("asked_again", [])) if site not in lost]
    visited = {visit["site"] for visit in record.get("visits", [])}
    absent = [site for site in missing if site not in visited]
    sites = str(record["sites"]) + (f"/{record['sites'] + len(absent)}" if absent else "")
    loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"  # may not leave a site
    parts = [
        f"{record['round']:>5}  {loss:>8}  {human_bytes(record['bytes_up']):>8}  "
        f"{human_bytes(record['bytes_down']):>8}  {human_seconds(record['seconds']):>8}  {sites:>5}"
    ]

    if "snr_db" in record:
        rate = f" at 1/{record['rate']:.4g}" if "rate" in record else ""
        parts.append(f"codec SNR {record['snr_db']:.1f} dB{rate}")
    if "epsilon" in record:
        parts.append(
            f"epsilon {epsilon_words(record['epsilon'])}"
            + (f" at delta {record['delta']:g}" if "delta" in record else "")
        )

    if "heldout_loss" in record:
        parts.append(f"held-out {record['heldout_loss']:.4f}{_worst(record)}")

    if "aggregation_error" in record:
        parts.append(f"aggregation error {100 * record['aggregation_error']:.2g} %")

    if "leakage" in record:
        parts.append(f"tokens read {100 * record['leakage']:.0f} %")

    parts += [f"codec: {escape(safe_text(record['choice']))}"] if "choice" in record else []
    parts += ["transform refitted"] if "refit" in record else []
    parts += (
        [f"gradient cosine {record['gradient_cosine']:.3f}"] if "gradient_cosine" in record else []
    )
    refused = [
        f"{visit['site']} ({visit['block']})"
        for visit in record.get("visits", [])
        if visit["share"] == 0
    ]
    parts += [
        f"[yellow]{word} {_some(names)}[/]"
        for word, names in (
            ("refused", refused),
            ("missing", missing),
            ("asked again", asked_again),
            ("not measured", unmeasured),
            ("first adapter sent to", record.get("sent_start", [])),
            ("unchanged", record.get("unchanged", [])),
        )
        if names
    ]
    clipped = [reply["site"] for reply in record.get("clipped", [])]
    parts += [f"[yellow]weight lowered {_some(clipped)}[/]"] if clipped else []
    missed = record.get("missed_steps", 0)
    parts += [f"[yellow]{missed} steps of late sites missed[/]"] if missed else []

    return "  ".join(parts)


def _sites(failures: Iterable[JsonObject]) -> list[str]:
    """Return the sites of some failures, each once, in the order of the first."""
    return list(dict.fromkeys(failure["site"] for failure in failures))


def _some(names: Sequence[str]) -> str:
    """Return the first five names, safe to print."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return escape(safe_text(", ".join(names[:5]))) + more


def setup_lines(values: JsonObject) -> list[str]:
    """Return the lines about a set-up, none for a method without one."""
    return [
        *budget_lines(values),
        *_block_lines(values),
        *_gate_lines(values),
        *plan_lines(values),
    ]


def _block_lines(values: JsonObject) -> list[str]:
    """Return the blocks, those of equal size together, and the cosines of their gradients."""
    if "blocks" not in values:
        return []

    sizes = []
    for size, run in groupby(values["blocks"], key=lambda block: block["values"]):
        names = [block["name"] for block in run]
        sizes.append(" ... ".join(dict.fromkeys((names[0], names[-1]))) + f" with {size:,} values")

    lines = [f"{len(values['blocks'])} blocks: {escape(safe_text('; '.join(sizes)))}"]
    cosines = ", ".join(
        f"{name} {value:.3f}" for name, value in values.get("gradient_cosines", {}).items()
    )
    return lines + (
        [f"cosine of gradients through the download: {escape(safe_text(cosines))}"]
        if cosines
        else []
    )


def _gate_lines(values: JsonObject) -> list[str]:
    """Return the verdict of the gate on a codec and the two errors that most of it rests on, no
    lines where it was not measured."""
    if "gate" not in values:
        return []

    gate = values["gate"]
    best = best_predictor(gate)
    best_error = gate["predictors"][best]["all"]
    size = gate["bytes_per_update"]
    raw_size = gate["raw_bytes"]
    verdict = "[green]passed[/]" if gate["passed"] else "[red]failed[/]"
    choice = values.get("choice")

    return [
        *([f"codec: {escape(safe_text(choice['why']))}"] if choice else []),
        f"codec gate: {verdict} on {gate['snapshots']} held-out of {values['snapshots']} updates",
        *(f"  [red]failed:[/] {escape(safe_text(reason))}" for reason in gate["failed"]),
        f"  relative error {gate['errors']['all']:.3f}; the best guess without a message "
        f"({escape(best)}) has {best_error:.3f}",
        f"  {human_bytes(size)} per update, "
        f"{human_ratio(size / raw_size)} of {human_bytes(raw_size)}",
    ]


def best_predictor(gate: JsonObject) -> str:
    """Return the predictor, a guess without a message, whose error is least."""
    errors: dict[str, dict[str, float]] = gate["predictors"]
    return min(errors, key=lambda name: errors[name]["all"])


def _worst(record: JsonObject) -> str:
    """Return the site of the largest held-out loss of a round in words; nothing of a single one."""
    if not record.get("heldout_spread"):
        return ""
    site = escape(safe_text(record["heldout_worst_site"]))
    return f", worst {site} {record['heldout_worst_loss']:.4f}"
