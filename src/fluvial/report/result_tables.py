"""Result of a run beside its baselines: rows, table, verdict and closing lines."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fluvial.formatting import (
    figure,
    human_bytes,
    human_ratio,
    human_seconds,
    percent,
    privacy_words,
    safe_text,
    shown_answer,
)
from fluvial.report.line_rates import PLAIN, Rates
from fluvial.report.tables import table
from fluvial.runs.verdict import Verdict, judge
from fluvial.storage.run_files import PAGE, SITES, JsonObject
from fluvial.training.wilson import wilson


def run_name(result: JsonObject) -> str:
    """Return method and codec in a few words."""
    if result["baseline"] is not None:
        return str(result["label"])

    method = str(result["method"])
    codec = result.get("codec")

    if codec == "auto" and result.get("setup", {}).get("choice"):
        codec = f"auto ({result['setup']['choice']['codec']['name']})"
    return f"federated, {method}" + (f" + {codec}" if codec else "")


ANSWER_SCORES = {"exact_match": "exact match", "f1": "token F1", "rouge_l": "ROUGE-L"}
"""Headings of the scores of greedy answers."""
INTERVAL = "95 % interval"
UP = "up per site"
"""Heading of what a site sends; ratios and the time of all bytes follow."""
RATIOS = {"round ratio": "round_ratio", "amortised": "amortised_ratio"}
"""Headings of the ratios to the bytes of uncompressed updates, with their keys in result.json."""
ENDLESS = 0.2
"""Share of answers without an end up to which they are not remarked: ours."""
SAVED = 0.995
"""Ratio of bytes from which a run without a codec saves nothing."""
COUNTED = "all bytes of training and set-up; held-out measures apart"
"""The bytes that amortised ratios count."""


def result_rows(result: JsonObject, rates: Rates = PLAIN) -> list[list[str]]:
    """Return the headings, then a row for the base model, each baseline and the run itself.

    The last column has the time of a site's bytes at `rates`.
    """
    heldout = result["heldout"]
    compared = result.get("compare", {})
    pooled = result.get("heldout_pooled") or {}
    names = [name for name in heldout if name in compared and name != result["method"]]
    names += [name for name in compared if name not in (*heldout, result["method"])]
    runs: list[tuple[str, str, JsonObject]] = [("base model, untuned", "base", {})]
    runs += [(compared[name]["label"], name, compared[name]) for name in names]
    runs.append((run_name(result), "final", result))
    centrally = any(traffic.get("pooled", False) for _, _, traffic in runs)

    scores = {
        name: heading
        for name, heading in ANSWER_SCORES.items()
        if any(name in (heldout.get(key) or {}) for _, key, _ in runs)
    }
    headings = ["", "held-out loss", *(["pooled loss"] if centrally else []), "next-token accuracy"]
    headings += scores.values()
    if "exact_match" in scores:
        headings.insert(headings.index(scores["exact_match"]) + 1, INTERVAL)
    ratios = [heading for heading, key in RATIOS.items() if says(key, result)]
    rows = [[*headings, UP, *ratios, rates.heading]]

    for label, key, traffic in runs:
        values = heldout.get(key) or {}
        total = pooled.get(key) or {}
        at_one_place = traffic.get("pooled", False)  # which has no value for each site
        traffic = {} if at_one_place else traffic
        row = [label, "-" if at_one_place else figure(values.get("loss"))]
        row += (
            [figure((total or (values if at_one_place else {})).get("loss"))] if centrally else []
        )
        row += [percent(values.get("accuracy"))]
        for name in scores:
            row.append(percent(values.get(name)))
            if name == "exact_match":
                right = (total or values).get(name)
                row.append(interval_words(right, _independent(result)))
        row += [
            human_bytes(traffic["bytes"]["up"] / traffic["sites"]) if "bytes" in traffic else "-"
        ]
        row += [human_ratio(traffic.get(RATIOS[heading])) for heading in ratios]
        rows.append([*row, _line_time(traffic, rates)])

    return rows


def says(ratio: str, result: JsonObject) -> bool:
    """Return whether a ratio of `RATIOS` says something: a run has it and a codec, or it or a
    baseline saves bytes."""
    values = [run.get(ratio) for run in (result, *result.get("compare", {}).values())]
    is_coded = result.get("codec") not in (None, "identity") and values[0] is not None
    return is_coded or any(value is not None and value < SAVED for value in values)


def _independent(result: JsonObject) -> float:
    """Return the number of questions that the interval of exact match counts."""
    overlap = result.get("overlap") or {}
    return float(overlap.get("independent_questions") or result.get("questions") or 0)


def interval_words(share: float | None, questions: float) -> str:
    """Return Wilson's 95 % interval of a share of right answers, in per cent.

    `questions` is the number of independent ones, which need not be whole.
    """
    if share is None or not questions:
        return "-"
    low, high = wilson(share, questions)
    return f"{100 * low:.1f} - {100 * high:.1f} %"


def _line_time(traffic: JsonObject, rates: Rates) -> str:
    """Return the time of one site's bytes of training and set-up, both ways, on a line of its
    own."""
    if "bytes" not in traffic or traffic.get("round_ratio") is None:
        return "-"
    sent = traffic["bytes"]
    up = sent["up"] + sent["setup_up"]
    down = sent["down"] + sent["setup"] - sent["setup_up"]
    return human_seconds(rates.seconds(up / traffic["sites"], down / traffic["sites"]))


def result_caption(
    headings: Sequence[str], rates: Rates = PLAIN, result: JsonObject | None = None
) -> str:
    """Return the meaning of the columns of `result_rows`, below each table of results, with the
    bytes of the held-out measures of `result`."""
    pooled = "; pooled: over all their label tokens, which is all that a central run has"
    against = f"; round ratio: these against uncompressed updates{of_the_chosen(result)}"
    amortised = (
        " Amortised: all bytes of training and set-up, in both directions, against those of the "
        "same run without compression."
    )
    return (
        "Held-out values are means over the sites, each counting the same"
        f"{pooled if 'pooled loss' in headings else ''}. Up per site: bytes of all rounds"
        f"{against if 'round ratio' in headings else ''}; local training only reports its loss."
        f"{amortised if 'amortised' in headings else ''} Held-out measures are apart"
        f"{_measure_words(result)}. {rates.words}"
    )


def of_the_chosen(result: JsonObject | None) -> str:
    """Return whose uncompressed updates a ratio is against, where a budget chose the adapter."""
    chosen = ((result or {}).get("setup") or {}).get("budget", {}).get("chosen", {})
    return " of the adapter that the budget chose" if {"r", "target_modules"} & {*chosen} else ""


def _measure_words(result: JsonObject | None) -> str:
    """Return the bytes of held-out measures in brackets, "" where there are none."""
    size = ((result or {}).get("bytes") or {}).get("evaluate")
    return f" ({human_bytes(size / result['sites'])} of a site here)" if result and size else ""


def answers_caption(result: JsonObject) -> str:
    """Return the meaning of the scores of greedy answers, and of their interval."""
    means = (
        "Means over the sites, each counting the same; result.json has those over all questions "
        "too. The interval of exact match is Wilson's, over all questions together"
    )
    overlap = result.get("overlap", {})
    asked = result.get("questions") or 0
    if overlap is None and result["sites"] > 1:
        return (
            f"{means}; it assumes that no two sites share a question, which the server cannot see."
        )
    if not overlap or overlap["independent_questions"] >= asked:
        return f"{means}."

    once = overlap["distinct_questions"]
    if overlap["independent_questions"] == once:
        return f"{means}, each counted once: the {asked} answers are to {once} distinct questions."
    return (
        f"{means}: {asked} answers to {once} distinct questions. Some were asked more often, so "
        f"that it is as wide as for {overlap['independent_questions']:.0f} questions asked once."
    )


def result_table(result: JsonObject, config: JsonObject) -> RenderableType:
    """Return the run of a configuration beside the base model and its baselines.

    With scores of greedy answers or a central run there are several tables, since 80 columns do not
    hold all.
    """
    rates = Rates.of(config)
    headings, *rows = result_rows(result, rates)
    caption = result_caption(headings, rates, result) + cut_words(config)
    scores = [at for at, heading in enumerate(headings) if heading in ANSWER_SCORES.values()]
    scores += [at for at, heading in enumerate(headings) if heading == INTERVAL]
    others = [at for at in range(1, len(headings)) if at not in scores]
    if not scores and "pooled loss" not in headings:
        return Group(_columns(headings, rows, others, "Result", caption))

    answers = answers_caption(result) + too_long_words(result) + endless_words(result)
    first = headings.index(UP)
    losses = [at for at in others if at < first]
    traffic = [at for at in others if at >= first]
    tables = [_columns(headings, rows, sorted(scores), "Greedy answers", answers)] if scores else []
    return Group(
        *tables,
        _columns(headings, rows, losses, "Held-out loss", ""),
        _columns(headings, rows, traffic, "Bytes and time", caption),
    )


def _columns(
    headings: list[str], rows: list[list[str]], places: list[int], title: str, caption: str
) -> Table:
    """Return a table of the labels and of the columns at `places`."""
    # Two lines for a heading, so that 80 columns hold the labels in one line.
    shown = [headings[at].replace(" ", "\n", 1) for at in (0, *places)]
    return table(shown, [[row[at] for at in (0, *places)] for row in rows], title, caption=caption)


def closing_words(result: JsonObject, path: Path, command: str = "fluvial") -> RenderableType:
    """Return the path of the adapter or model, how to load it, samples before and after, and the
    page."""
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
        own = path / SITES
        words = f"There is no global model: each site keeps its own weights below {own}"
        if any(own.glob("*/adapter-*")):
            export = f"{command} export {shlex.quote(str(path))} --site NAME"
            words += f"; `{export}` writes those of one for `evaluate` and `chat`"
        lines.append(Text(safe_text(words)))

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

    if result.get("parts"):
        lines.append(Text(f"Tuned    {result['parts']}"))

    for heading, key in (("Leakage", "leakage"), ("Noise", "noise")):
        if result.get(key):
            lines.append(Text(f"{heading:9}{safe_text(result[key]['sentence'])}"))

    for sample in result.get("samples", []):
        shown = [
            ("Sample", safe_text(sample["prompt"]).rstrip(), "dim"),
            *(
                (f"  {what}", shown_answer(sample[key]).strip(), "")
                for what, key in (("before", "base"), ("after", "final"), ("right", "right"))
                if key in sample
            ),
        ]
        rows = Table.grid(padding=(0, 1))
        for name, text, style in shown:
            rows.add_row(Text(name, style="bold"), Text(text, style=style))
        lines += [Text(), rows]
        if sample_words(sample):
            lines.append(Text(f"\n{sample_words(sample)}", style="yellow"))

    if (path / PAGE).is_file():
        page = Text.assemble("\nPage     ", (str(path / PAGE), "bold"))
    else:
        words = safe_text(f"{command} show {shlex.quote(str(path))} --html report.html")
        page = Text.assemble("\nDraw it  ", (words, "cyan"))
    return Group(*lines, page)


def sample_words(sample: JsonObject) -> str:
    """Return a warning where the prompt of a sample is text of a site, "" elsewhere."""
    if sample.get("prompt_from") != "site":
        return ""
    shown = "The prompt is" if "right" not in sample else "The prompt with the right answer is"
    return (
        f"{shown} a held-out record of a site; set evaluate.sample_prompt to a text of your own "
        "before you pass this page on."
    )


def too_long_words(result: JsonObject) -> str:
    """Return a sentence on prompts that leave too little room for an answer, "" without any."""
    count = result.get("questions_too_long")
    if not count:
        return ""
    return (
        f" {count} of {result['questions']} prompts are too long for evaluate.max_new_tokens more "
        "in the model's context; their answers are shorter or empty."
    )


def endless_words(result: JsonObject) -> str:
    """Return a sentence on answers without an end, with the remedy, "" where they are few."""
    count = result.get("answers_without_end") or 0
    asked = result.get("questions") or 0
    if count <= ENDLESS * asked:
        return ""
    return (
        f" {count} of {asked} answers ({percent(count / asked)}) of the final model do not end: "
        "they stop at evaluate.max_new_tokens. Raise it where right answers are longer; else the "
        "model has not learned to end them: train longer, or take a base that ends its answers."
    )


def cut_words(config: JsonObject) -> str:
    """Return a sentence on cut held-out sets, "" where the configuration does not cut them."""
    most = config.get("data", {}).get("max_heldout")
    return (
        ""
        if most is None
        else f" Of each site the first {most} held-out sequences at most (data.max_heldout)."
    )


def verdict_of(run: JsonObject) -> Verdict:
    """Return the verdict on a finished run, from its result and those of its baselines."""
    compared = {name: baseline["result"] for name, baseline in run["compare"].items()}
    return judge(run["result"], compared)


def verdict_line(run: JsonObject) -> Text:
    """Return the verdict of a finished run in one line."""
    verdict = verdict_of(run)
    colour = {"yes": "green", "no": "red"}.get(verdict.helped, "yellow")
    return Text(safe_text(verdict.line()), style=f"bold {colour}")


def with_compared(run: JsonObject) -> JsonObject:
    """Return the result with the traffic of its baselines, read from theirs where it is missing."""
    finished = {
        name: baseline["result"] for name, baseline in run["compare"].items() if baseline["result"]
    }
    return {**run["result"], "compare": {**finished, **run["result"].get("compare", {})}}
