"""Conversations to tokens and labels, by a tokenizer's chat template."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from fluvial.data.examples import IGNORE_INDEX, Example, Question
from fluvial.data.records import Chat, Message
from fluvial.data.template_work import check_template
from fluvial.data.templates import dated
from fluvial.errors import ConfigError
from fluvial.formatting import safe_line
from fluvial.models.ends import Rendered, end_in
from fluvial.models.hf import PreTrainedTokenizerBase

_MARK = "content-of-a-turn-"
"""A placeholder for the content of a turn, which a template may compare, cut or leave out."""
ANY_ROLE = "chatml"
"""Named template that writes any role."""
OTHER_TEMPLATE = f"set data.chat_template to another template, of which {ANY_ROLE!r} and "
_REMEDY = f"change the record, or {OTHER_TEMPLATE}'llama3' write any role"


def encode_chat(
    place: object, chat: Chat, tokenizer: PreTrainedTokenizerBase, loss_on: str
) -> tuple[Example, Question | None]:
    """Return the tokens of a conversation by the tokenizer's template, labels on assistant turns.

    The question asks for the last turn after all others; None where the last turn is not the
    assistant's, has no loss, or is the only one.

    Raise `ConfigError` where the template cannot render it, leaves a turn out, or renders a turn in
    two ways.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the tokenizer has no chat template, which the data's conversations need; set "
            'data.chat_template to "plain" (roles as words), to another known one, such as '
            '"chatml", or to a file'
        )

    messages = chat.messages
    answers = {number for number, turn in enumerate(messages) if turn["role"] == "assistant"}
    if loss_on != "all" and not answers - chat.unlearned:
        why = " of a weight of 1" if answers else ""
        raise ConfigError(
            f"{place}: the conversation has no turn of the assistant{why} to learn; remove the "
            "record"
        )

    every = loss_on == "all"
    if every and chat.unlearned - answers:
        number = min(chat.unlearned - answers)
        raise ConfigError(
            f"{place}: turn {number + 1} (role {messages[number]['role']}) has the weight 0, and "
            "data.loss_on = 'all' gives it loss; remove the weight or the setting"
        )

    rendered = _render(place, messages, tokenizer)
    learned = answers - chat.unlearned
    _refuse_omissions(place, messages, tokenizer, rendered, learned)
    spans = _spans(place, messages, tokenizer, rendered, chat.unlearned if every else learned)
    ids, offsets = _tokens(place, rendered, tokenizer)
    question = None
    if len(messages) - 1 in learned:
        question = _question(place, chat, tokenizer, rendered)

    labels = [
        token
        if any(begin < to and since < end for begin, end in spans) is not every
        else IGNORE_INDEX
        for token, (since, to) in zip(ids, offsets, strict=True)
    ]
    return Example(ids, labels), question


def _question(
    place: object, chat: Chat, tokenizer: PreTrainedTokenizerBase, rendered: str
) -> Question | None:
    """Return the last turn of the assistant as a question after all turns before it."""
    messages = chat.messages
    if len(messages) < 2:
        return None

    prompt = _render(place, messages[:-1], tokenizer, add_generation_prompt=True)
    around = _around(place, messages[:-1], messages[-1], tokenizer)
    if around.adds_to(prompt) and rendered.startswith(around.before):
        prompt = around.before
        ids = _ids_before(place, around, tokenizer)
    elif rendered.startswith(prompt):
        ids, _ = _tokens(place, prompt, tokenizer)
    else:  # a template that writes a turn of the past otherwise
        return None

    shown = prompt.removeprefix(tokenizer.bos_token or "")  # the ids have it; no person wrote it
    asked = Rendered(ids, end_in(around.after, tokenizer))
    return Question(shown, messages[-1]["content"], chat.references, asked)


def chat_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, remedy: str
) -> Rendered:
    """Return the tokens of a conversation up to the point where the assistant answers.

    Raises `ConfigError` with `remedy` where the tokenizer's template cannot render it.
    """
    place = "the conversation"
    prompt = _render(place, messages, tokenizer, remedy, add_generation_prompt=True)
    answer: Message = {"role": "assistant", "content": ""}
    around = _around(place, messages, answer, tokenizer, remedy)
    if around.adds_to(prompt) and prompt == _render(place, messages, tokenizer, remedy):
        ids = _ids_before(place, around, tokenizer)
    else:
        ids, _ = _tokens(place, prompt, tokenizer)
    return Rendered(ids, end_in(around.after, tokenizer))


def _spans(
    place: object,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    rendered: str,
    turns: AbstractSet[int],
) -> list[tuple[int, int]]:
    """Return where these turns of the assistant stand in `rendered`, in characters."""
    spans = []
    for turn, message in enumerate(messages):
        if turn not in turns:
            continue

        end = _render(place, messages[: turn + 1], tokenizer)
        start = _start(place, messages[:turn], message, tokenizer)

        if not (rendered.startswith(end) and end.startswith(start)):
            raise ConfigError(
                f"{place}: the chat template renders turn {turn + 1} differently inside the whole "
                "conversation, so its tokens cannot be told apart; keep one assistant turn a "
                "record, or set data.loss_on='all'"
            )

        if message["content"].strip() not in end[len(start) :]:
            raise _omitted(place, turn, message)

        spans.append((len(start), len(end)))

    return spans


def _tokens(
    place: object, rendered: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return token ids and their places in `rendered`; the template has put BOS where it
    belongs."""
    try:
        encoded = tokenizer(
            rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
    except NotImplementedError:
        raise ConfigError(
            f"{place}: the tokenizer cannot say where its tokens stand, which the loss on the "
            "assistant's turns needs; use a model folder with a tokenizer.json"
        ) from None

    ids = list(encoded["input_ids"])
    offsets = list(encoded["offset_mapping"])
    bos = tokenizer.bos_token_id

    if bos is not None and ids[:2] == [bos, bos]:  # one by the template, one by the tokenizer
        return ids[1:], offsets[1:]

    return ids, offsets


class _Around(NamedTuple):
    """Text of a template around the content of a turn, empty where it leaves the content out."""

    before: str
    after: str

    def adds_to(self, prompt: str) -> bool:
        """Return whether `before` is the prompt for generation and a header that it lacks."""
        added = self.before[len(prompt) :]
        return self.before.startswith(prompt) and bool(added.strip())


def _around(
    place: object,
    earlier: Sequence[Message],
    message: Message,
    tokenizer: PreTrainedTokenizerBase,
    remedy: str = _REMEDY,
) -> _Around:
    """Return what the template writes around the content of a turn after `earlier` ones."""
    marked = _render(place, [*earlier, message | {"content": _MARK}], tokenizer, remedy)
    before, mark, after = marked.rpartition(_MARK)
    return _Around(before, after) if mark else _Around("", "")


def _start(
    place: object,
    earlier: Sequence[Message],
    message: Message,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Return what stands before a turn that is learned: what the template writes for generation.

    A template that writes nothing for it, or has no turn before it to render, writes the header of
    a turn, which ends where the content begins.
    """
    if not earlier:
        return _around(place, earlier, message, tokenizer).before

    start = _render(place, earlier, tokenizer, add_generation_prompt=True)
    if start != _render(place, earlier, tokenizer):
        return start
    around = _around(place, earlier, message, tokenizer)
    return around.before if around.adds_to(start) else start


def _ids_before(place: object, around: _Around, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens before the content of a turn, none of which has a part of it."""
    ids, offsets = _tokens(place, f"{around.before}{_MARK}", tokenizer)
    begin = len(around.before)
    return [token for token, (_, to) in zip(ids, offsets, strict=True) if to <= begin]


def _refuse_omissions(
    place: object,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    rendered: str,
    learned: AbstractSet[int],
) -> None:
    """Raise `ConfigError` for a turn whose content the template leaves out or changes, except those
    that are `learned`, which `_spans` looks at.

    A short content may stand in the template's own text too, so marks are rendered in the place of
    contents.
    """
    marks = [f"{_MARK}{number}." for number in range(len(messages))]
    pairs = zip(messages, marks, strict=True)
    marked = _render(place, [message | {"content": mark} for message, mark in pairs], tokenizer)

    for number, message in enumerate(messages):
        shown_whole = marks[number] in marked and message["content"].strip() in rendered
        if number not in learned and not shown_whole:
            raise _omitted(place, number, message)


def _omitted(place: object, number: int, message: Message) -> ConfigError:
    return ConfigError(
        f"{place}: the chat template leaves out or changes turn {number + 1} (role "
        f"{message['role']}); set data.chat_template to another one, or change or remove the turn"
    )


def _render(
    place: object,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    remedy: str = _REMEDY,
    *,
    add_generation_prompt: bool = False,
) -> str:
    known = dated(tokenizer)
    try:
        check_template(known, messages, add_generation_prompt)
        text: str = known.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program: it may raise whatever a program raises
        said = safe_line(str(error).strip().partition("\n")[0])[:120]
        raise ConfigError(
            f"{place}: the chat template refuses the conversation: {said or type(error).__name__}; "
            f"{remedy}"
        ) from error

    return text
