"""Measures of models on the records of a file: loss, accuracy, and scores of greedy answers."""

import math
from collections.abc import Mapping
from typing import Any

from fluvial.data import DataConfig, Whole, read_whole
from fluvial.errors import ConfigError
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import check_length
from fluvial.training.evaluate import Heldout, heldout
from fluvial.training.generated import AnswerConfig, answer_result
from fluvial.wire.tensors import Named


def read_texts(data: DataConfig, pool: ModelPool, answers: AnswerConfig | None) -> Whole:
    """Return the records of a file; raises `ConfigError` for a length that the model does not read,
    and where answers are asked for that no record has."""
    context = pool.outline.context
    check_length(context, data.max_length)
    if answers is None:
        return read_whole(data, pool.tokenizer, "--data", context=context)

    texts = read_whole(
        data,
        pool.tokenizer,
        "--data",
        answers.site_field,
        site_required=answers.site_required,
        context=context,
    )
    if answers.required and not texts.questions:
        option = "--answers" if answers.file else "--generate"
        raise ConfigError(
            f"{option}: {data.source} (--data) has no records with an answer, but the form "
            f"{', '.join(texts.forms)}; give records with a prompt and a completion, "
            "or conversations that end with a turn of the assistant"
        )
    return texts


def record_result(
    data: DataConfig,
    texts: Whole,
    pool: ModelPool,
    models: Mapping[str, Named],
    answers: AnswerConfig | None,
    seed: int,
) -> dict[str, Any]:
    """Return the measures of all models on the records, as JSON types."""
    asked = answers is not None and answers.max_new_tokens > 0
    questions = texts.questions if asked else []
    result: dict[str, Any] = {
        "source": data.source,
        "form": ", ".join(texts.forms),
        "notes": texts.notes,
        "max_length": data.max_length,
        "records": texts.records,
        "truncated_records": texts.surplus.records,
        "truncated_tokens": texts.surplus.tokens,
        "sequences": len(texts.examples),
        "unmeasured_sequences": texts.unmeasured,
        "label_tokens": sum(example.label_tokens for example in texts.examples),
        "questions": len(questions),
        "questions_too_long": 0,
        "max_new_tokens": 0 if answers is None else answers.max_new_tokens,
    }

    for name, state in models.items():
        with pool.model(state) as model:
            sums = heldout(model, texts.examples, pad_token_id=pool.tokenizer.pad_token_id)
        result[name] = _measures(sums, name)

    if questions and answers is not None:
        scored = answer_result(pool, models, questions, texts.sites, answers, seed)
        result["answers"] = scored
        result["questions_too_long"] = scored["too_long"]
        for name in models:
            result[name] |= {key: figure["mean"] for key, figure in scored[name].items()}

    return result


def _measures(sums: Heldout, name: str) -> dict[str, Any]:
    """Return the measures as JSON types; raises `ConfigError` where the model's logits are not
    numbers."""
    if not math.isfinite(sums.loss):
        raise ConfigError(
            f"the held-out loss of the {name} is {sums.loss}: its weights may be damaged, or too "
            "large for "
            "model.dtype: choose --set 'model.dtype=\"float32\"'"
        )

    perplexity = sums.perplexity if math.isfinite(sums.perplexity) else None
    return {"loss": sums.loss, "perplexity": perplexity, "accuracy": sums.accuracy}
