"""Cloze accuracy of a finished run: the right answer among all answers of its kind of question.

A model of this size writes few answers as they are expected, so greedy answers tell codecs apart
less than the probabilities of a closed list do. Candidates are the answers that the held-out
records with the same value of a field have, and each is followed by EOS, as in training.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean

from benchmarks.report import Row
from fluvial.data import read_whole
from fluvial.models.encoding import Encoder
from fluvial.models.pool import ModelPool
from fluvial.runs.config import parse
from fluvial.training.choice_prompts import Prompt, fitted
from fluvial.training.choice_scores import score
from fluvial.training.folders import read_adapter_folder

EVERY = 5
"""Step between the held-out records that are asked: every fifth."""
CLOZE_SCORES = {
    "cloze_accuracy": "cloze accuracy",
    "cloze_chance": "by chance",
    "cloze_probability": "probability of the right answer",
    "cloze_rank": "mean rank of the right answer",
}
"""Headings of the scores; the rank is counted from 1."""


def cloze(configuration: dict[str, object], adapter: Path, field: str) -> Row:
    """Return the `CLOZE_SCORES` of the adapter of a run of `configuration`, over held-out
    records."""
    config = parse(configuration, "benchmark")
    saved = read_adapter_folder(adapter)
    pool = ModelPool(config.model, saved.lora)
    source = str(config.data.heldout_source)
    data = config.data.model_copy(update={"source": source, "max_heldout": None})
    questions = read_whole(data, pool.tokenizer, "held-out").questions
    records = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    kinds = [str(record[field]) for record in records]
    assert len(kinds) == len(questions), "a record that is no question"

    answers: dict[str, set[str]] = defaultdict(set)
    for kind, question in zip(kinds, questions, strict=True):
        answers[kind].add(question.answer)

    encoder = Encoder.of(pool.tokenizer)
    candidates = {kind: sorted(texts) for kind, texts in answers.items()}
    asked = list(zip(kinds, questions, strict=True))[::EVERY]
    prompts = [
        _prompt(encoder, question.prompt, candidates[kind], config.data.max_length)
        for kind, question in asked
    ]
    with pool.model(saved.tensors) as model:
        scores = score(model, prompts, pad_token_id=pool.tokenizer.pad_token_id)

    ranks = []
    probabilities = []
    for (kind, question), logs in zip(asked, scores, strict=True):
        right = logs[candidates[kind].index(question.answer)]
        ranks.append(1 + sum(each > right for each in logs))
        probabilities.append(1 / sum(math.exp(each - right) for each in logs))

    return {
        "cloze_accuracy": mean(rank == 1 for rank in ranks),
        "cloze_chance": mean(1 / len(candidates[kind]) for kind, _ in asked),
        "cloze_probability": mean(probabilities),
        "cloze_rank": mean(ranks),
    }


def _prompt(encoder: Encoder, text: str, candidates: list[str], context: int) -> Prompt:
    """Return a question and its candidates as tokens, cut to `context` on the left as in
    training."""
    endings = tuple(tuple(encoder.answer(candidate)) for candidate in candidates)
    sizes = (1,) * len(candidates)
    prompt = Prompt("held-out", tuple(encoder.prompt(text)), endings, sizes)
    return fitted(prompt, context, encoder)[0]
