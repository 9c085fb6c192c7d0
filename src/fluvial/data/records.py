"""From a record to token ids and labels, in the forms that people keep data in.

| form                | fields                                                   | loss on                      |
|---------------------|----------------------------------------------------------|------------------------------|
| `text`              | `text`                                                   | everything                   |
| `prompt_completion` | `prompt`, `completion`                                   | the completion and EOS       |
| `messages`          | `messages`: list of `{"role", "content"}`                | the assistant's turns        |
| `alpaca`            | `instruction`, `output`, optional `input`                | the output and EOS           |
| `sharegpt`          | `conversations`: list of `{"from", "value"}`             | the turns of "gpt"           |
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from jinja2 import TemplateError

from fluvial.encoding import Encoder
from fluvial.errors import ConfigError

IGNORE_INDEX = -100
"""Label of a position without loss (PyTorch's and Hugging Face's convention)."""

Form = Literal["text", "prompt_completion", "messages", "alpaca", "sharegpt"]
REQUIRED_FIELDS: dict[Form, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """One training sequence; `labels` equal `input_ids` or `IGNORE_INDEX`, position by position (unshifted)."""

    input_ids: Sequence[int]
    labels: Sequence[int]

    @property
    def label_tokens(self) -> int:
        """Positions that are predicted: labels but the first, which has nothing before it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True)
class Question:
    """A prompt with the answer that greedy decoding should give."""

    prompt: str
    answer: str


@dataclass
class Tokenized:
    """The examples of a list of records, with what was cut off on the way."""

    examples: list[Example] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    """One for each prompt/completion or Alpaca record; empty for the other forms."""
    records: int = 0
    truncated_records: int = 0
    truncated_tokens: int = 0


def detect_form(columns: Iterable[str], where: str) -> Form:
    """The form whose fields are all among `columns`; raises `ConfigError` if none or several fit."""
    present = set(columns)
    fits: list[Form] = [form for form in get_args(Form) if present.issuperset(REQUIRED_FIELDS[form])]
    if len(fits) > 1 and "text" in fits:
        fits.remove("text")  # many instruction sets carry a rendered `text` beside their fields
    if len(fits) != 1:
        known = "; ".join(f"{form}: {', '.join(REQUIRED_FIELDS[form])}" for form in get_args(Form))
        raise ConfigError(
            f"{where}: fields {sorted(present)} fit {'no form' if not fits else ' and '.join(fits)}. Set data.form, or "
            f"rename fields with data.columns, such as {{completion = 'answer'}}. Forms and their fields: {known}"
        )
    return fits[0]


def tokenize(
    records: Iterable[tuple[str, Mapping[str, Any]]],
    form: Form,
    tokenizer: Any,
    *,
    max_length: int,
    packing: bool = False,
    loss_on: Literal["answer", "all"] = "answer",
) -> Tokenized:
    """Token ids and labels of `records`, pairs of a name for messages and the fields.

    Text is cut into windows of `max_length` and so loses nothing; other forms are truncated at the right, which is
    counted. With `packing` the sequences are joined before cutting (attention crosses the EOS between them).
    Raises `ConfigError`, naming the record, when a field is missing or no label is left.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no EOS token, so a model could never learn to stop; set one in its folder")
    encoder = Encoder.of(tokenizer)
    result = Tokenized()
    stream = Example([], [])
    for name, fields in records:
        result.records += 1
        example, question = _example(name, fields, form, encoder, loss_on)
        if question is not None:
            result.questions.append(question)
        if packing or form == "text":
            if not packing:
                result.examples += _windows(example, max_length)
            else:
                stream = Example([*stream.input_ids, *example.input_ids], [*stream.labels, *example.labels])
                full = len(stream.input_ids) // max_length * max_length
                result.examples += _windows(_cut(stream, 0, full), max_length)
                stream = _cut(stream, full, None)
            continue
        surplus = len(example.input_ids) - max_length
        if surplus > 0:
            result.truncated_records += 1
            result.truncated_tokens += surplus
            example = _cut(example, 0, max_length)
        if example.label_tokens == 0:
            raise ConfigError(
                f"{name}: no token is left to learn from after cutting to data.max_length={max_length} "
                f"({max(surplus, 0)} tokens cut, and the answer stands at the end); raise data.max_length or "
                "remove the record"
            )
        result.examples.append(example)
    result.examples += _windows(stream, max_length)
    return result


def _example(
    name: str, fields: Mapping[str, Any], form: Form, encoder: Encoder, loss_on: Literal["answer", "all"]
) -> tuple[Example, Question | None]:
    missing = [key for key in REQUIRED_FIELDS[form] if fields.get(key) is None]
    if missing:
        raise ConfigError(f"{name}: form {form!r} needs the field {missing[0]!r}; found {sorted(fields)}")
    if form == "text":
        ids = encoder.ended(encoder.prompt(_text(name, fields, "text")))
        return Example(ids, ids), None
    if form in ("messages", "sharegpt"):
        return _chat(name, _messages(name, fields, form), encoder.tokenizer, loss_on), None
    if form == "alpaca":
        template = ALPACA_WITH_INPUT if fields.get("input") else ALPACA_WITHOUT_INPUT
        prompt = template.format(instruction=fields["instruction"], input=fields.get("input", ""))
        answer = _text(name, fields, "output")
    else:
        prompt, answer = _text(name, fields, "prompt"), _text(name, fields, "completion")
    if not answer.strip():
        raise ConfigError(f"{name}: the answer is empty, which would teach the model to say nothing; remove the record")
    before = encoder.prompt(prompt)
    after = encoder.answer(prompt, answer)
    labels = [IGNORE_INDEX] * len(before) if loss_on == "answer" else before
    return Example([*before, *after], [*labels, *after]), Question(prompt, answer)


def _chat(name: str, messages: list[dict[str, str]], tokenizer: Any, loss_on: str) -> Example:
    """The whole conversation by the tokenizer's own chat template; labels on the assistant's turns."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"{name}: the tokenizer has no chat template; use form 'prompt_completion' instead")
    rendered = _render(name, messages, tokenizer)
    spans = []
    for turn, message in enumerate(messages):
        if loss_on == "all" or message["role"] != "assistant":
            continue
        end = _render(name, messages[: turn + 1], tokenizer)
        if turn == 0:  # there is no conversation before it to render, so its header ends where its content begins
            start = end[: max(0, end.find(message["content"].strip()))]
        else:
            start = _render(name, messages[:turn], tokenizer, add_generation_prompt=True)
        if not (rendered.startswith(end) and end.startswith(start)):
            raise ConfigError(
                f"{name}: the tokenizer's chat template renders turn {turn + 1} differently inside the whole "
                "conversation, so its tokens cannot be told apart; keep one assistant turn a record, or set "
                "data.loss_on='all'"
            )
        spans.append((len(start), len(end)))
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])
    if loss_on == "all":
        labels = list(ids)
    else:
        labels = [
            token if any(begin < to and since < end for begin, end in spans) else IGNORE_INDEX
            for token, (since, to) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
    return Example(ids, labels)


def _render(name: str, messages: list[dict[str, str]], tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:  # templates refuse what they cannot show, such as two user turns in a row
        raise ConfigError(f"{name}: the tokenizer's chat template refuses the conversation: {error}") from error
    return text


def _messages(name: str, fields: Mapping[str, Any], form: Form) -> list[dict[str, str]]:
    turns = fields["messages" if form == "messages" else "conversations"]
    who, what = ("role", "content") if form == "messages" else ("from", "value")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ConfigError(f"{name}: the conversation must be a list of turns, found {type(turns).__name__}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get(what), str) or not isinstance(turn.get(who), str):
            raise ConfigError(f"{name}: turn {number} needs the texts {who!r} and {what!r}, found {turn!r:.80}")
        role = turn[who] if form == "messages" else SHAREGPT_ROLES.get(turn[who])
        if role is None:
            raise ConfigError(f"{name}: turn {number} is from {turn[who]!r}; known are {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": role, "content": turn[what]})
    return messages


def _text(name: str, fields: Mapping[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise ConfigError(f"{name}: field {key!r} must be text, found {type(value).__name__}")
    return value


def _cut(example: Example, start: int, end: int | None) -> Example:
    return Example(example.input_ids[start:end], example.labels[start:end])


def _windows(example: Example, length: int) -> list[Example]:
    """Cut into windows of `length`; windows without a label to predict are dropped."""
    starts = range(0, len(example.input_ids), length)
    windows = [_cut(example, start, start + length) for start in starts]
    return [window for window in windows if window.label_tokens]
