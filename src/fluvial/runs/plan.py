"""Plan of a run, made without training: parameters, bytes, memory, and whether everything fits."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fluvial.codecs import must_learn
from fluvial.codecs.auto import AutoSettings
from fluvial.data import IGNORE_INDEX, POOLED, Example, SiteTexts
from fluvial.data.overlap import Asked, own_only
from fluvial.errors import ConfigError
from fluvial.formatting import privacy_words
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.interface import Forecast
from fluvial.methods.traffic import Bytes, Traffic
from fluvial.models.attention import check_attention
from fluvial.models.hf import PreTrainedModel, PreTrainedTokenizerBase
from fluvial.models.loading import meta_base, resolve_device
from fluvial.models.miniature import check_packing_of_miniature
from fluvial.models.outline import Outline
from fluvial.models.part_tuning import PartTuning, tunes_weights
from fluvial.models.pretrained import context_length, num_embeddings
from fluvial.models.quantised import check_library
from fluvial.models.targets import LoraSettings, target_names
from fluvial.models.tokenizers import check_tokenizer, load_tokenizer
from fluvial.models.weights import check_weights
from fluvial.runs.budget.preview import shown
from fluvial.runs.config import RunConfig
from fluvial.runs.idle import idle_remarks, refuse_idle
from fluvial.runs.opening import check_settings, settled, train_config
from fluvial.runs.trackers import check_trackers

logger = logging.getLogger(__name__)

_ENVELOPE = 64
"""Bytes by which rounds may differ through the digits of their numbers."""
_LOPSIDED = 8
"""Factor of what a site receives over what it sends, from which an uncoded downlink is remarked."""
_CONTEXT = 64
"""Tokens before one that it is decoded with."""
_CUT = "\N{REPLACEMENT CHARACTER}"
"""Character that a decoder writes for bytes that are not a whole character yet."""
_MOST_BYTES = 4
"""Bytes of a character of UTF-8, each of which may be a token."""

_UNTRIED = (
    "data.packing: a run measures at its start whether packed records of this architecture leave "
    "each other alone, and is refused where they do not"
)


def plan(config: RunConfig, *, weights_needed: bool = True) -> dict[str, Any]:
    """Check `config` with its model's shapes and its data; raises `ConfigError` for what a run
    would refuse.

    The model's weights are read once and not kept, and with `weights_needed=False` not looked at.
    Sizes are in bytes; the memory of a site leaves out activations.
    """
    device = resolve_device(config.model.device)
    if config.model.quantisation:
        check_library()
    elif isinstance(config.method, FedPipeConfig) and config.method.planner.quantises:
        check_library("method.planner.formats")
    base = meta_base(config.model)
    tokenizer = load_tokenizer(config.model)
    check_tokenizer(tokenizer, base, config.model.name_or_path)
    check_attention(config.model, device)
    check_trackers(config.report_to)
    weights = check_weights(config.model, base, values=True) if weights_needed else []
    parameters = sum(parameter.numel() for parameter in base.parameters())
    texts = _texts(config, tokenizer, base)
    config, choosing = shown(config, texts)
    layout = Outline(config.model, config.adapter).assignment.layout
    planned = check_settings(config, layout, base, texts)
    packs = not config.data.packing or check_packing_of_miniature(config.model)
    if isinstance(config.adapter, PartTuning) and config.adapter.cut is None:
        chosen = settled(config, layout, base, len(texts.names))
        layout = Outline(config.model, chosen.adapter).assignment.layout
    remarks = texts.check()
    remarks += [] if packs else [_UNTRIED]
    logger.info("predicting bytes and memory")
    refuse_idle(config, planned, texts)
    remarks += idle_remarks(config, planned, texts)
    sites, asked = _sites(config, texts)
    remarks += own_only(config.data, asked)
    forecast = planned.forecast()
    trained = planned.sent.numel if planned.num_trained is None else planned.num_trained
    rows = [
        ("base parameters", f"{parameters:,}"),
        ("trained parameters", f"{trained:,} ({trained / parameters:.2%})"),
        ("sites in a round", f"{config.method.cohort(len(sites))} of {len(sites)}"),
        (
            "optimizer steps of a site in a round",
            f"{max(site['steps'] for site in sites)}, {config.train.logical_batch} sequences each",
        ),
        ("update, uncompressed", f"{layout.raw_bytes:,} B"),
        *forecast.rows,
        *_traffic_rows(forecast.traffic, config.rounds),
    ]
    promise = config.promise
    rows.append(("held-out measures, one site, whole run", _measured_words(config, forecast)))
    if promise is not None:
        rows.append(("privacy", privacy_words(promise.report(config.rounds, config.rounds))))

    return {
        "model": {
            "name": config.model.name_or_path,
            "parameters": parameters,
            "trainable": trained,
            "targets": _targets(config, base),
        },
        "bytes": {"raw": layout.raw_bytes, "frame": forecast.frame, "down": forecast.down},
        "round_over_line_s": forecast.round_over_line_s,
        "sites": sites,
        "rows": [{"what": what, "value": value} for what, value in rows],
        "notes": [*_notes(config, forecast, [*planned.notes, *choosing, *remarks]), *weights],
    }


def _sites(config: RunConfig, texts: SiteTexts) -> tuple[list[dict[str, Any]], dict[str, Asked]]:
    """Return counts of each site, of records, sequences and optimizer steps of a round, and the
    questions of each; of data in one place there is one row, and there are no questions of sites.
    """
    train = train_config(config, len(texts.names))
    pooled = config.entry.traits.pooled
    sites = []
    asked = {}
    for name in (POOLED,) if pooled else texts.names:
        data = texts.pooled() if pooled else texts.load(name)
        if not pooled:
            asked[name] = Asked.of(data, texts.trained_questions(name))
        sites.append(
            {
                "name": name,
                "records": data.records,
                "train_records": data.records - data.heldout_records,
                "heldout_records": data.heldout_records,
                "train": len(data.train),
                "steps": train.steps(len(data.train)),
                "heldout": len(data.heldout),
                "questions": len(data.questions),
                "truncated_records": data.truncated_records,
                "dropped_records": data.dropped_records,
            }
        )
    return sites, asked


def _texts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel
) -> SiteTexts:
    """Return the data of all sites for the model `base`, which may be without weights."""
    return SiteTexts(
        config.data,
        tokenizer,
        seed=config.seed,
        num_embeddings=num_embeddings(base),
        context=context_length(base),
    )


def _targets(config: RunConfig, base: nn.Module) -> list[str]:
    """Return the modules that an adapter is put on, and "all weights" where these are tuned."""
    adapter = config.adapter
    targets = []
    if isinstance(adapter, LoraSettings) or (
        isinstance(adapter, PartTuning) and adapter.tunes("lora")
    ):
        targets += target_names(base, config.lora)
    if tunes_weights(adapter):
        targets.append("all weights")
    return targets


def _traffic_rows(traffic: Callable[[int], Traffic], rounds: int) -> list[tuple[str, str]]:
    """Return the bytes between the server and one site, in the last round and in a first that
    differs."""
    last = traffic(rounds)
    first = traffic(1)
    rows = []
    for way in ("up", "down"):
        now: Bytes = getattr(last, way)
        before: Bytes = getattr(first, way)
        apart = abs(now.most - before.most) > _ENVELOPE or now.unknown != before.unknown
        words = f"{now.words}, {before.words} in round 1" if apart else now.words
        rows.append((f"{way}, one site in a round, with headers", words))

    return rows


def _measured_words(config: RunConfig, forecast: Forecast) -> str:
    """Return the bytes of held-out measures in both directions, which are counted apart."""
    if config.promise is not None and not config.promise.measures:
        return "none"
    if forecast.measured is None:
        return f"not predicted: method {config.method.name!r} sends them in its own way"
    every = config.evaluate.every
    models = 1 + (config.rounds // every if every else 0)
    return f"{forecast.measured.bytes(models, config.evaluate.max_new_tokens).words}, both ways"


def preview(config: RunConfig, site: str | None, count: int) -> dict[str, Any]:
    """The first `count` training sequences of a site and its first held-out one, token by token,
    with the loss mask."""
    tokenizer = load_tokenizer(config.model)
    texts = _texts(config, tokenizer, meta_base(config.model))
    name = texts.names[0] if site is None else site

    if name not in texts.names:
        raise ConfigError(f"--site {name!r}: the sites are {', '.join(texts.names)}")

    data = texts.load(name)
    return {
        "site": name,
        "sites": list(texts.names),
        "form": config.data.form,
        "train_records": data.records - data.heldout_records,
        "train": len(data.train),
        "heldout_records": data.heldout_records,
        "sequences": [_shown(tokenizer, example) for example in data.train[:count]],
        "heldout": [_shown(tokenizer, example) for example in data.heldout[:1]],
    }


def _shown(tokenizer: Any, example: Example) -> dict[str, Any]:
    """Return a sequence token by token."""
    pieces = _pieces(tokenizer, example.input_ids)
    tokens = [
        {"text": piece, "loss": label != IGNORE_INDEX}
        for piece, label in zip(pieces, example.labels, strict=True)
    ]
    tokens[0]["loss"] = False  # nothing stands before it that could predict it
    return {"tokens": tokens, "length": len(tokens), "label_tokens": example.label_tokens}


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to those before it.

    Some decoders drop a space at the start of a text, so a token is decoded with those before it.
    A character whose bytes are several tokens is the text of the last of them.
    """
    pieces = list[str]()
    start = 0
    for number in range(len(ids)):
        near = list(ids[max(0, start - _CONTEXT) : start])
        new = list(ids[start : number + 1])
        before: str = tokenizer.decode(near)
        text: str = tokenizer.decode([*near, *new])
        piece = text[len(before) :] if text.startswith(before) else tokenizer.decode(new)
        whole = not piece.endswith(_CUT) or len(new) == _MOST_BYTES or number + 1 == len(ids)
        pieces.append(piece if whole else "")
        start = number + 1 if whole else start

    return pieces


def _lopsided(config: RunConfig, forecast: Forecast) -> bool:
    """Return whether downloads that no codec shortens are most of the bytes, and of the time where
    the line is known."""
    line = config.fleet.line
    faster = 1.0 if line is None else line.down_mbit_s / line.up_mbit_s
    return (
        config.entry.traits.receives == "downlink"
        and config.downlink is None
        and config.rounds > 1
        and forecast.down > _LOPSIDED * max(1.0, faster) * forecast.frame > 0
    )


def _notes(config: RunConfig, forecast: Forecast, remarks: Sequence[str]) -> list[str]:
    notes = [f"method: {config.entry.paper}", *remarks]
    if isinstance(config.coding, AutoSettings):
        notes.append(
            "the codec is chosen when the run starts, by measurement; the frame "
            "is what its rate allows"
        )
    elif must_learn(config.coding):
        notes.append(
            "the codec is learned: its gate is measured when the run starts, and may refuse it"
        )

    if config.fleet.line is not None and not any("fleet.line" in what for what, _ in forecast.rows):
        notes.append(
            f"fleet.line: no time is predicted, because method {config.method.name!r} does not "
            "predict its bytes"
        )

    if _lopsided(config, forecast):
        notes.append(
            f"downlink: from round 2 a site receives {forecast.down:,} B in a round, "
            f"{forecast.down / forecast.frame:.0f} times what it sends; if downloads count, add "
            '[downlink] with name = "trellis" and rate = 32'
        )

    iterations = config.coding.fit_iterations
    if iterations is not None:
        notes.append(
            f"the codec is trained for {iterations} iterations before the first "
            "round: minutes, on a CPU"
        )

    return notes
