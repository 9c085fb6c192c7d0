"""The model card of a run's result: README.md with the metadata that the Hugging Face hub reads.

It names no path, no record and no text of a site; sites are counted, and named only on request.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fluvial import __version__
from fluvial.formatting import human_bytes, human_ratio, privacy_words
from fluvial.models.pretrained import EMBEDDED, ModelConfig
from fluvial.models.quantised import quantised_words
from fluvial.runs.config import RunConfig
from fluvial.runs.shareable import is_local, shareable
from fluvial.storage.files import write_atomically

Form = Literal["adapter", "model", "merged"]
"""An adapter, a model of which all weights were tuned, or a base with the adapter merged into
it."""
SCORES = {
    "loss": "loss, nats per token",
    "accuracy": "next-token accuracy",
    "exact_match": "exact match",
    "f1": "token F1",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
}
"""Names of the measures, by their keys in result.json."""
BASE = "base"
"""Folder beside an exported adapter with its base, where no hub has that."""
_LOADING = f"""The base model is the folder `{BASE}` within this one.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file
base = AutoModelForCausalLM.from_pretrained(f"{{folder}}/{BASE}")
model = PeftModel.from_pretrained(base, folder)
tokenizer = AutoTokenizer.from_pretrained(f"{{folder}}/{BASE}")
```

`AutoPeftModelForCausalLM.from_pretrained(".")` loads both where this folder is the current
directory, from which PEFT looks for the base."""


@dataclass(frozen=True)
class Described:
    """A run's result, and what its card says beside it."""

    config: Mapping[str, Any]
    """The resolved configuration."""
    result: Mapping[str, Any]
    """The content of result.json."""
    paper: str
    """Source of the method; empty where none is known."""
    form: Form
    base: str | None = None
    """Name of the base model for readers; None for one that has no name outside this machine."""
    name_sites: bool = False
    """True to list the sites and their measures."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further rows of the first table, such as digests, by their name."""
    site: str | None = None
    """Site whose own model this is; None for the model of all."""
    base_within: bool = False
    """True where the folder holds the base in its folder `BASE`."""


def base_name(name_or_path: str) -> str | None:
    """Return the name that a card gives the base model; None for a folder of this machine."""
    return None if is_local(name_or_path) else name_or_path


def write_cards(folder: Path, config: RunConfig, result: Mapping[str, Any]) -> None:
    """Write README.md into the folder of a run's final weights, where there is one."""
    base = base_name(config.model.name_or_path)
    forms: tuple[Form, ...] = ("adapter", "model")
    for form in forms:
        if result[f"{form}_sha256"] is not None:
            card = model_card(Described(config.resolved(), result, config.entry.paper, form, base))
            write_atomically(folder / form / "README.md", card.encode())


def model_card(run: Described) -> str:
    """Return the text of README.md."""
    from huggingface_hub import ModelCard

    result = run.result
    if run.site is not None:
        result = {"heldout": result["heldout_by_site"][run.site], "heldout_pooled": None}
    measured = [_measures(result, means) for means in ("heldout", "heldout_pooled")]
    card = ModelCard(f"---\n{_metadata(run).to_yaml()}\n---\n\n{_text(run, measured)}")
    return str(card)


def _metadata(run: Described) -> Any:
    """Return the metadata of the card, a `ModelCardData` of huggingface_hub."""
    from huggingface_hub import EvalResult, ModelCardData

    heldout = run.result.get("heldout") or {}
    if run.site is not None:
        heldout = run.result["heldout_by_site"][run.site]
    final = heldout.get("final") or {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="held-out text of the site"
            if run.site
            else "held-out text of the sites, mean over the sites",
            metric_type=key,
            metric_name=SCORES[key],
            metric_value=round(value, 6),
        )
        for key, value in final.items()
        if key in SCORES and math.isfinite(value) and not _empty(key, final)
    ]
    tuned = {"adapter": "lora", "merged": "lora", "model": "full-parameter-tuning"}[run.form]
    tags = ["federated-learning", "fluvial", tuned]
    if run.form == "model" and "LoRA" in (run.result.get("parts") or ""):
        tags.append("lora")

    return ModelCardData(
        base_model=None if run.base == EMBEDDED else run.base,
        library_name="peft" if run.form == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=f"{run.result['method']} over {run.result['sites']} sites",
        eval_results=results or None,
    )


def _text(run: Described, measured: list[list[list[str]]]) -> str:
    title = {
        "adapter": "LoRA adapter" if not run.result.get("parts") else "LoRA adapter of some parts",
        "merged": "Model with a LoRA adapter merged into it,",
        "model": "Model, all weights tuned,"
        if not run.result.get("parts")
        else "Model, tuned part by part,",
    }[run.form]
    method = f"`{run.result['method']}`" + (f" ({run.paper})" if run.paper else "")
    promise = run.result.get("privacy")
    privacy = privacy_words(promise) if promise else "none was promised"
    parts = run.result.get("parts")
    paragraphs = [
        f"# {title} made by Fluvial {run.result.get('fluvial', __version__)}",
        f"Method {method}, {run.result['rounds']} rounds over {run.result['sites']} sites. The "
        "records of the sites are not in this folder."
        + ("" if run.site is None else " This is the model of one site, which differs from theirs.")
        + (f" Tuned weights: {parts}." if parts else ""),
        _table(["", ""], _facts(run)),
        f"Differential privacy: {privacy}." + _noise(run.result),
        "## Evaluation",
        *_evaluation(run, measured),
    ]
    if run.base_within:
        paragraphs += ["## Loading", _LOADING]
    if run.form == "adapter":
        quantised = quantised_words(ModelConfig.model_validate(run.config.get("model", {})))
        paragraphs += [quantised.strip()] if quantised else []

    settings = json.dumps(shareable(run.config), indent=2)
    paragraphs += ["## Settings", f"```json\n{settings}\n```"]
    return "\n\n".join(paragraphs) + "\n"


def _facts(run: Described) -> list[list[str]]:
    """Return rows of two: what took part, and what was sent."""
    result = run.result
    sent = result["bytes"]
    base = run.base or "a local model, named by `fluvial export --base-name`"
    if base == EMBEDDED:
        base = "the small Llama of the Fluvial package"
    rows = [["base model", base], *([name, text] for name, text in run.facts.items())]
    sites = str(result["sites"])
    if run.name_sites and result.get("heldout_by_site"):
        sites += f": {', '.join(result['heldout_by_site'])}"

    rows += [["contributing sites", sites], ["rounds", str(result["rounds"])]]
    rows += [["codec of the updates", _codec(result)]]
    downlink = run.config.get("downlink")
    rows += [["codec of the downlink", downlink["name"]]] if downlink else []
    ratio = result.get("round_ratio")
    against = f", {human_ratio(ratio)} of uncompressed updates" if ratio else ""
    rows += [
        ["bytes up, all sites", f"{human_bytes(sent['up'])} ({sent['up']:,}){against}"],
        ["bytes down, all sites", f"{human_bytes(sent['down'])} ({sent['down']:,})"],
        ["bytes of set-up", f"{human_bytes(sent['setup'])} ({sent['setup']:,})"],
        *([name, text] for name, text in result.get("versions", {}).items()),
    ]
    return rows


def _codec(result: Mapping[str, Any]) -> str:
    """Return the codec of `[codec]`, and the one that "auto" chose."""
    codec = result.get("codec")
    chosen = result.get("setup", {}).get("choice") if codec == "auto" else None
    if codec is None:
        return "a code of the method itself, or none"
    return f"auto ({chosen['codec']['name']})" if chosen else str(codec)


def _measures(result: Mapping[str, Any], means: str) -> list[list[str]]:
    """Return a row for each score: its name, the base's value and the tuned model's."""
    values = result.get(means) or {}
    base, final = values.get("base") or {}, values.get("final") or {}
    return [
        [words, *(f"{row[key]:.4f}" if key in row else "-" for row in (base, final))]
        for key, words in SCORES.items()
        if key in final and not _empty(key, base, final)
    ]


def _empty(key: str, *rows: Mapping[str, float]) -> bool:
    """Return True for a ROUGE-2 of 0 in all `rows`, as where no reference has two words."""
    return key == "rouge_2" and not any(row.get(key) for row in rows)


def _evaluation(run: Described, measured: list[list[list[str]]]) -> list[str]:
    means, pooled = measured
    headings = ["", "base", "tuned"]
    public = run.result.get("public")
    paragraphs = []

    if run.site is not None and means:
        paragraphs += ["Held-out text of the site:", _table(headings, means)]
    elif means:
        paragraphs += [
            "Held-out text of the sites, means over the sites:",
            _table(headings, means),
            "The same, over all label tokens together:",
            _table(headings, pooled),
        ]
    if public:
        rows = _measures({"public": public}, "public")
        paragraphs += [
            f"Public text, {public['sequences']} sequences:",
            _table(headings, rows),
        ]
    if run.name_sites and means:
        rows = [
            [site, *(f"{sites[which]['loss']:.4f}" for which in ("base", "final"))]
            for site, sites in run.result["heldout_by_site"].items()
        ]
        paragraphs += ["Loss by site, nats per token:", _table(headings, rows)]

    return paragraphs or ["Held-out measures were not taken."]


def _noise(result: Mapping[str, Any]) -> str:
    noise = result.get("noise")
    return f" {noise['sentence']}" if noise else ""


def _table(headings: list[str], rows: list[list[str]]) -> str:
    """Return a table of Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
