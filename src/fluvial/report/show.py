"""Lines and tables of a run: a line per round, its result and its bytes.

A run is read from its JSON files, without torch, so that `fluvial show` answers at once.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fluvial.errors import CheckpointError
from fluvial.federation.boundary import place
from fluvial.formatting import (
    figure,
    human_bytes,
    human_ratio,
    human_seconds,
    percent,
    plain,
    privacy_words,
    table,
)
from fluvial.report.block_tables import block_schedule, conflict_log, failures
from fluvial.runs.verdict import Verdict, judge, loss_of

BASELINES = {
    "local": "local only",
    "central": "central, all data at one place",
    "central_cyclic": "central, block after block",
    "fedavg": "federated, uncompressed",
}
"""Runs that others are compared with, in the order of the result table."""
CENTRAL = ("central", "central_cyclic")
"""Runs with all data at one place, which have no value for each site."""

CYCLES = 12
SITES = 32
CONFLICTS = 10
"""How much of a long block schedule and of a long conflict log the terminal gets; the page gets
more."""


def read_run(folder: Path) -> dict[str, Any]:
    """Everything that the folder of a run tells, as plain JSON values; raises `CheckpointError` if
    it holds no run."""
    found = {
        "folder": str(folder),
        "config": _read_json(folder / "config.json"),
        "refused": _read_json(folder / "refused.json"),
        **_read_part(folder),
    }
    if found["config"] is None and not found["metrics"] and found["result"] is None:
        raise CheckpointError(
            f"{folder} holds no run: it has no config.json; give the folder that `fluvial run` wrote, "
            "by default runs/NAME"
        )

    compared = sorted(path for path in folder.glob("compare/*") if path.is_dir())
    return {
        **found,
        "config": found["config"] or {},
        "compare": {path.name: _read_part(path) for path in compared},
    }


def _read_part(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.jsonl"
    records = []
    try:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    for line in lines:
        try:
            record = json.loads(line)
        except (
            ValueError,
            RecursionError,
        ):  # a run that is being written, or was cut off, may end in half a line
            break

        if not isinstance(record, dict):
            break

        records.append(record)

    return {"metrics": records, "result": _read_json(folder / "result.json")}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}; it should be JSON that `fluvial run` wrote"
        ) from error

    if not isinstance(found, dict):
        raise CheckpointError(
            f"cannot read {path}: it holds no JSON object, which `fluvial run` writes"
        )

    return found


@contextmanager
def drawing(folder: Path) -> Iterator[None]:
    """Raise `CheckpointError` where what `read_run` found cannot be shown, since no run wrote
    it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(
            f"{folder} is damaged: its JSON files are not as `fluvial run` wrote them "
            f"({type(error).__name__} at {place(error)}); restore them from a copy"
        ) from error


def _without_controls(value: Any) -> Any:
    """Return a plain value whose strings hold no characters that could drive a terminal."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list):
        return [_without_controls(each) for each in value]
    if isinstance(value, dict):
        return {plain(key): _without_controls(each) for key, each in value.items()}
    return value


# -- while it runs -------------------------------------------------------------------------------


def round_header(method: str) -> str:
    """The name of a method and the headings of its `round_line`s."""
    headings = f"{'round':>5}  {'loss':>8}  {'up':>8}  {'down':>8}  {'time':>8}  sites"
    return f"[bold]{escape(method)}[/], bytes of all sites\n[dim]{headings}[/]"


def round_line(record: dict[str, Any]) -> str:
    """One round: the columns that every round has, then what else is known, by name."""
    missing = [each["site"] for each in record.get("missing", [])]
    sites = str(record["sites"]) + (f"/{record['sites'] + len(missing)}" if missing else "")
    loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"  # may not leave a site
    parts = [
        f"{record['round']:>5}  {loss:>8}  {human_bytes(record['bytes_up']):>8}  "
        f"{human_bytes(record['bytes_down']):>8}  {human_seconds(record['seconds']):>8}  {sites:>5}"
    ]

    if "snr_db" in record:
        parts.append(f"codec SNR {record['snr_db']:.1f} dB")
    if "epsilon" in record:
        parts.append(
            f"epsilon {record['epsilon']:.3g}"
            + (f" at delta {record['delta']:g}" if "delta" in record else "")
        )

    if "heldout_loss" in record:
        parts.append(f"held-out {record['heldout_loss']:.4f}")

    parts += [f"codec: {escape(plain(record['choice']))}"] if "choice" in record else []
    parts += ["transform refitted"] if "refit" in record else []
    parts += (
        [f"gradient cosine {record['gradient_cosine']:.3f}"] if "gradient_cosine" in record else []
    )
    refused = [
        f"{each['site']} ({each['block']})"
        for each in record.get("visits", [])
        if each["share"] == 0
    ]
    parts += [
        f"[yellow]{word} {_some(names)}[/]"
        for word, names in (("refused", refused), ("missing", missing))
        if names
    ]
    clipped = [each["site"] for each in record.get("clipped", [])]
    parts += [f"[yellow]weight lowered {_some(clipped)}[/]"] if clipped else []

    return "  ".join(parts)


def _some(names: Sequence[str]) -> str:
    """The first five, safe to print."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return escape(plain(", ".join(names[:5]))) + more


def setup_lines(values: dict[str, Any]) -> list[str]:
    """What set-up found, for people; nothing for a method that has none."""
    return [*_block_lines(values), *_gate_lines(values)]


def _block_lines(values: dict[str, Any]) -> list[str]:
    """The blocks, runs of equal ones together, and what the download leaves of their gradients."""
    if "blocks" not in values:
        return []

    sizes = []
    for size, run in groupby(values["blocks"], key=lambda block: block["values"]):
        names = [block["name"] for block in run]
        sizes.append(" ... ".join(dict.fromkeys((names[0], names[-1]))) + f" with {size:,} values")

    lines = [f"{len(values['blocks'])} blocks: {escape(plain('; '.join(sizes)))}"]
    cosines = ", ".join(
        f"{name} {value:.3f}" for name, value in values.get("gradient_cosines", {}).items()
    )
    return lines + (
        [f"cosine of gradients through the download: {escape(plain(cosines))}"] if cosines else []
    )


def _gate_lines(values: dict[str, Any]) -> list[str]:
    """The verdict on a codec."""
    if "gate" not in values:
        return []

    gate = values["gate"]
    if gate is None:
        return ["codec gate: not measured, no snapshots were collected"]

    best = best_predictor(gate)
    unmet = [name for name, holds in gate["reproduction"].items() if not holds]
    verdict = "[green]passed[/]" if gate["passed"] else "[red]failed[/]"
    choice = values.get("choice")

    return [
        *([f"codec: {escape(plain(choice['why']))}"] if choice else []),
        f"codec gate: {verdict} on {gate['snapshots']} held-out of {values['snapshots']} snapshots",
        *(f"  [red]failed:[/] {escape(plain(reason))}" for reason in gate["failed"]),
        f"  cosine to the true update {gate['cosine']:.3f}; relative error {gate['errors']['all']:.3f}, "
        f"the best predictor ({escape(best)}) {gate['predictors'][best]['all']:.3f}",
        f"  {human_bytes(gate['bytes_per_update'])} per update, "
        f"{human_ratio(gate['bytes_per_update'] / gate['raw_bytes'])} of {human_bytes(gate['raw_bytes'])}",
        "  for comparison, the thresholds of an independent reproduction of the paper: "
        + (f"missed are {escape('; '.join(unmet))}" if unmet else "all met"),
    ]


def best_predictor(gate: dict[str, Any]) -> str:
    """The guess without a message whose error is least."""
    errors: dict[str, dict[str, float]] = gate["predictors"]
    return min(errors, key=lambda name: errors[name]["all"])


# -- the result ----------------------------------------------------------------------------------


def run_name(result: dict[str, Any]) -> str:
    """Method and codec in a few words."""
    method = str(result["method"])
    codec = result.get("codec")

    if codec == "auto" and result.get("setup", {}).get("choice"):
        codec = f"auto ({result['setup']['choice']['codec']['name']})"
    if method in BASELINES and codec in (None, "identity"):
        return BASELINES[method]

    return f"federated, {method}" + (f" + {codec}" if codec else "")


def result_rows(result: dict[str, Any]) -> list[list[str]]:
    """Headings, then base model, baselines and the run itself."""
    heldout = result["heldout"]
    compared = result.get("compare", {})
    pooled = result.get("heldout_pooled") or {}
    names = [name for name in BASELINES if name != result["method"]]
    names = [name for name in names if heldout.get(name) is not None or name in compared]
    runs: list[tuple[str, str, Any]] = [("base model, untuned", "base", {})]
    runs += [(BASELINES[name], name, compared.get(name) or {}) for name in names]
    runs.append((run_name(result), "final", result))
    centrally = [name for name in CENTRAL if name in names or name == result["method"]]

    exact = any("exact_match" in (heldout.get(key) or {}) for _, key, _ in runs)
    headings = ["", "held-out loss", *(["pooled loss"] if centrally else []), "next-token accuracy"]
    headings += ["exact match"] if exact else []
    rows = [[*headings, "up per site", "round ratio", "amortised"]]

    for label, key, traffic in runs:
        values = heldout.get(key) or {}
        total = pooled.get(key) or {}
        at_one_place = key in CENTRAL or (key == "final" and result["method"] in CENTRAL)
        traffic = {} if at_one_place else traffic
        row = [label, "-" if at_one_place else figure(values.get("loss"))]
        row += (
            [figure((total or (values if at_one_place else {})).get("loss"))] if centrally else []
        )
        row += [percent(values.get("accuracy"))]
        row += [percent(values.get("exact_match"))] if exact else []
        row += [
            human_bytes(traffic["bytes"]["up"] / traffic["sites"]) if "bytes" in traffic else "-"
        ]
        row += [
            human_ratio(traffic.get("round_ratio")),
            human_ratio(traffic.get("amortised_ratio")),
        ]
        rows.append(row)

    return rows


RESULT_CAPTION = (
    "Held-out values are means over the sites, each counting the same; pooled: over all their "
    "label tokens, which is all that a central run has. Up per site: bytes of all rounds; round "
    "ratio: these against "
    "uncompressed updates; local training only reports its loss. Amortised: all bytes both ways, set-up included, "
    "against an uncompressed run of the same rounds."
)


def result_table(result: dict[str, Any], more: str = "") -> Table:
    """The run beside the base model and its baselines, with `more` in the caption."""
    headings, *rows = result_rows(result)
    headings = [
        heading.replace(" ", "\n", 1) for heading in headings
    ]  # 80 columns hold the labels in one line

    return table(headings, rows, "Result", caption=RESULT_CAPTION + more)


def closing_words(result: dict[str, Any], path: Path, command: str = "fluvial") -> RenderableType:
    """Where adapter or model lies, how to load it, what it changed."""
    lines: list[RenderableType] = []
    if result.get("adapter_sha256"):
        lines += [
            Text.assemble("Adapter  ", (str(path / "adapter"), "bold")),
            Text.assemble(
                "Load it  ",
                (
                    f"peft.AutoPeftModelForCausalLM.from_pretrained({str(path / 'adapter')!r})",
                    "cyan",
                ),
            ),
        ]
    elif result.get("model_sha256"):
        lines += [
            Text.assemble("Model    ", (str(path / "model"), "bold")),
            Text.assemble(
                "Load it  ",
                (
                    f"transformers.AutoModelForCausalLM.from_pretrained({str(path / 'model')!r})",
                    "cyan",
                ),
            ),
        ]
    else:
        lines.append(
            Text(
                f"There is no global model: each site keeps its own weights below {path / 'sites'}"
            )
        )

    if result.get("public"):
        before, after = (result["public"][key]["loss"] for key in ("base", "final"))
        count = result["public"]["sequences"]
        lines.append(
            Text(
                f"Public   loss {before:.4f} before, {after:.4f} after, on {count} public sequences"
            )
        )

    if result.get("privacy"):
        lines.append(Text(f"Privacy  {privacy_words(result['privacy'])}"))

    for sample in result.get("samples", []):
        for when, key in (("before", "base"), ("after", "final")):
            shown = Text.assemble((plain(sample["prompt"]), "dim"), plain(sample[key]).rstrip())
            lines += [Text(f"\nSample {when}", style="bold"), Padding(shown, (0, 0, 0, 2))]

    return Group(
        *lines, Text.assemble("\nDraw it  ", (f"{command} show {path} --html report.html", "cyan"))
    )


def cut_words(config: dict[str, Any]) -> str:
    """Return that held-out sets were cut, from a run's configuration; empty where they were not."""
    most = config.get("data", {}).get("max_heldout")
    return (
        ""
        if most is None
        else f" Of each site the first {most} held-out sequences at most (data.max_heldout)."
    )


def verdict_of(found: dict[str, Any]) -> Verdict:
    """Return whether a finished run helped, from its result and those of its baselines."""
    compared = {name: run["result"] for name, run in found["compare"].items()}
    return judge(found["result"], compared)


def verdict_line(found: dict[str, Any]) -> Text:
    """Return the verdict of a finished run in one line."""
    verdict = verdict_of(found)
    colour = {"yes": "green", "no": "red"}.get(verdict.helped, "yellow")
    return Text(plain(verdict.line()), style=f"bold {colour}")


def with_compared(found: dict[str, Any]) -> dict[str, Any]:
    """The result, with the traffic of its baselines even where the run has not written it down."""
    finished = {name: run["result"] for name, run in found["compare"].items() if run["result"]}
    return {**found["result"], "compare": {**finished, **found["result"].get("compare", {})}}


def run_tables(found: dict[str, Any]) -> Group:
    """All of a run, finished or not."""
    found = _without_controls(found)
    config = found["config"]
    result = found["result"]
    metrics = found["metrics"]
    method = config.get("method", {}).get("name") or (result or {}).get("method", "run")
    parts: list[RenderableType] = []

    if result:
        parts += [Text.from_markup(line) for line in setup_lines(result.get("setup", {}))]
    if metrics:
        parts += [
            Text.from_markup(line) for line in (round_header(method), *map(round_line, metrics))
        ]

    refused = found.get("refused")
    if refused:
        parts.append(Text(f"Refused by the gate: {plain(refused['why'])}", style="red"))
    elif result is None:
        state = f"Not finished: {len(metrics)} of {config.get('rounds', '?')} rounds of {method}."
        for name, run in found["compare"].items():
            state += f" Baseline {name}: " + (
                "finished." if run["result"] else f"{len(run['metrics'])} rounds."
            )

        parts.append(Text(f"{state} Go on with --resume.", style="yellow"))
    else:
        parts += [
            Text(),
            result_table(with_compared(found), cut_words(config)),
            verdict_line(found),
            Text(),
            _site_table(found),
        ]
        parts += [Text(), _bytes_table(result)]

    for excerpt in (
        block_schedule(metrics, cycles=CYCLES, sites=SITES),
        conflict_log(metrics, last=CONFLICTS),
    ):
        if excerpt:
            parts += [
                Text(f"\n{excerpt.title}", style="bold")
            ]  # a table's own title wraps to its width
            parts += [
                table(excerpt.headings, excerpt.rows, "", excerpt.left),
                Text(excerpt.words, style="italic dim"),
            ]

    failed = failures(metrics)
    if failed:
        rows = [
            [str(each["round"]), plain(each["site"]), each["task"], plain(each["reason"])]
            for each in failed
        ]
        parts += [
            Text(),
            table(["round", "site", "task", "reason"], rows, "Missing replies", left=4),
        ]

    if result:
        parts += [Text(), closing_words(result, Path(found["folder"]))]

    return Group(*parts)


def _site_table(found: dict[str, Any]) -> Table:
    local = (found["compare"].get("local", {}).get("result") or {}).get("heldout_by_site", {})
    rows = []
    for site, row in found["result"]["heldout_by_site"].items():
        base, final = (row.get(which) or {} for which in ("base", "final"))
        before = loss_of(base)
        after = loss_of(final)
        change = None if before is None or after is None else after - before
        losses = [figure(before), figure(after), figure(change, "+.4f")]
        losses += [figure(loss_of((local.get(site) or {}).get("final")))] if local else []
        rows.append(
            [plain(site), *losses, *(percent(each.get("accuracy")) for each in (base, final))]
        )

    rows = rows or [["not measured", *["-"] * (6 if local else 5)]]
    headings = [
        "site",
        "base loss",
        "final loss",
        "change",
        *(["local only"] if local else []),
        "base acc.",
        "final acc.",
    ]
    return table(headings, rows, "Held-out, by site")


def _bytes_table(result: dict[str, Any]) -> Table:
    rows = [
        [kind, human_bytes(size), f"{size:,}"] for kind, size in result["bytes"]["by_kind"].items()
    ]
    return table(["message", "", "bytes"], rows, "Bytes by kind, all rounds and sites")
