"""Multiple-choice questions as tokens.

Where letters are scored, log P(letter | prompt) decides. Where texts are, log P(choice | prompt) in
nats per UTF-8 byte decides (the "continuation" form of lm-evaluation-harness), which measures
models that are too small to know what a letter stands for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fluvial.data.multiple_choice import Choice, Language, Scoring, ending, language_of, render
from fluvial.errors import ConfigError
from fluvial.models.encoding import Encoder
from fluvial.models.hf import PreTrainedTokenizerBase

MAX_SHOTS = 5


@dataclass(frozen=True)
class Prompt:
    """A question as tokens: the common beginning, and the ending of each choice."""

    name: str
    """Place of the record for messages."""
    prefix: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    """Divisor of each choice's log-probability: 1 for a letter, UTF-8 bytes for a text."""


@dataclass(frozen=True)
class Sheet:
    """All questions as tokens, with counts of what did not fit into the model's context."""

    questions: tuple[Choice, ...]
    prompts: tuple[Prompt, ...]
    short_of_shots: int
    """Questions for whose subject there were fewer examples than asked for."""
    dropped_shots: int
    """Examples left out because the prompt was too long, over all questions."""
    cut_questions: int
    """Prompts cut on the left because they were too long without any example."""
    cut_tokens: int


def prepare(
    questions: Sequence[Choice],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None,
    scoring: Scoring = "letter",
    shots: int = 0,
    examples: Sequence[Choice] = (),
    language: Literal["auto"] | Language = "auto",
) -> Sheet:
    """Return the tokens of `questions`, each after the first `shots` of `examples` of its subject.

    A prompt longer than `context` (tokens; None for any length) loses its last examples first, then
    its beginning. Raises `ConfigError` naming a record of which a choice alone is too long.
    """
    if not 0 <= shots <= MAX_SHOTS:
        raise ConfigError(f"shots={shots}: choose 0 to {MAX_SHOTS}")
    if (shots > 0) != bool(examples):
        lacking = (
            "--shots-from, a file to take the examples from"
            if shots
            else "--shots, how many examples to take"
        )
        raise ConfigError(f"solved examples need --shots and --shots-from; add {lacking}")

    encoder = Encoder.of(tokenizer)
    prompts = []
    short = 0
    dropped = 0
    cut = 0
    cut_tokens = 0

    for choice in questions:
        wording = language_of(choice.question) if language == "auto" else language
        own = [
            shot
            for shot in examples
            if shot.subject == choice.subject and shot.question != choice.question
        ]
        own = own[:shots]
        short += len(own) < shots
        num_shots = len(own)
        prompt = _tokens(choice, own, encoder, scoring, wording)

        while context is not None and num_shots and _length(prompt) > context:
            num_shots -= 1
            prompt = _tokens(choice, own[:num_shots], encoder, scoring, wording)

        dropped += len(own) - num_shots
        prompt, surplus = fitted(prompt, context, encoder)
        cut += surplus > 0
        cut_tokens += surplus
        prompts.append(prompt)

    return Sheet(tuple(questions), tuple(prompts), short, dropped, cut, cut_tokens)


def _tokens(
    choice: Choice, shots: Sequence[Choice], encoder: Encoder, scoring: Scoring, language: Language
) -> Prompt:
    endings = [ending(choice, index, scoring, language) for index in range(len(choice.choices))]
    sizes = [1 if scoring == "letter" else len(text.encode()) for text in choice.choices]
    return encoded(choice.name, render(choice, shots, scoring, language), endings, sizes, encoder)


def encoded(
    name: str, text: str, endings: Sequence[str], sizes: Sequence[int], encoder: Encoder
) -> Prompt:
    """Return a text and its possible endings, tokenised together, and split where the tokens
    differ.

    Nothing follows an ending: a tokenizer's EOS would be scored with it, and would stand between
    prompt and ending. Raises `ConfigError` where an ending has no token of its own.
    """
    rows = [encoder.prompt(way) for way in (text, *(text + ending for ending in endings))]
    common = 0

    while all(common < len(row) and row[common] == rows[0][common] for row in rows):
        common += 1
    tokens = tuple(tuple(row[common:]) for row in rows[1:])
    if common == 0 or not all(tokens):
        raise ConfigError(
            f"{name}: the tokenizer gives the same tokens with and without a choice, so it "
            "cannot be scored; "
            "remove the record"
        )

    return Prompt(name, tuple(rows[0][:common]), tokens, tuple(sizes))


def fitted(prompt: Prompt, context: int | None, encoder: Encoder) -> tuple[Prompt, int]:
    """Return the prompt without its beginning where it is longer than `context` tokens, and the
    tokens that are cut.

    Special tokens at the beginning, such as BOS, stay. Raises `ConfigError` where an ending alone
    is too long.
    """
    surplus = 0 if context is None else max(0, _length(prompt) - context)
    if not surplus:
        return prompt, 0

    first = len(encoder.prefix) if prompt.prefix[: len(encoder.prefix)] == encoder.prefix else 0
    if len(prompt.prefix) - surplus < first + 1:
        raise ConfigError(
            f"{prompt.name}: its longest choice has "
            f"{max(len(ending) for ending in prompt.endings)} tokens, which "
            "leaves no room for the question in the model's context; remove the record, or score "
            "by letter"
        )

    prefix = prompt.prefix[:first] + prompt.prefix[first + surplus :]
    return replace(prompt, prefix=prefix), surplus


def _length(prompt: Prompt) -> int:
    return len(prompt.prefix) + max(len(ending) for ending in prompt.endings)
