"""End of a written answer: the tokens, and the text, after which nothing belongs to it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

from fluvial.models.hf import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class End:
    """Marks that end an answer; the first of them counts."""

    ids: frozenset[int] = frozenset()
    """Tokens."""
    text: str = ""
    """Text of several tokens; empty where there is none."""
    closed: bool = False
    """True where a token of `ids` follows the text, which may stand within an answer too."""


class Rendered(tuple[int, ...]):
    """Tokens of a prompt that a chat template wrote, with the end that it writes after an
    answer."""

    end: End

    def __new__(cls, ids: Iterable[int], end: End = End()) -> Self:
        """Return tokens that know their end."""
        made = super().__new__(cls, ids)
        made.end = end
        return made


def end_of(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, prompt: str | Sequence[int]
) -> End:
    """Return the end of an answer to `prompt`: EOS, the end tokens of the model's generation
    settings, and the mark of the chat template that wrote the prompt."""
    end = prompt.end if isinstance(prompt, Rendered) else End()
    settings = getattr(model, "generation_config", None)
    more: int | list[int] | None = getattr(settings, "eos_token_id", None)
    listed = [more] if isinstance(more, int) else more or []
    ids = {*end.ids, *listed, tokenizer.eos_token_id} - {None}
    return replace(end, ids=frozenset(ids))


@lru_cache(maxsize=32)
def end_in(tail: str, tokenizer: PreTrainedTokenizerBase) -> End:
    """Return the end that is written in `tail`, the text of a template after an answer.

    It is the first added token, such as <|im_end|>, and the text before it, if any.
    """
    found = [
        (tail.find(text), -len(text), index)
        for index, token in tokenizer.added_tokens_decoder.items()
        if (text := str(token)).strip() and text in tail
    ]
    if not found:
        return End(text=tail.strip())
    place, _, index = min(found)
    return End(frozenset({index}), tail[:place].strip(), closed=True)


def answer_text(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], end: End
) -> tuple[str, bool]:
    """Return the text of an answer's tokens up to its end, and whether it has one.

    End, padding and BOS tokens are no part of it; other special tokens are, as they may be of the
    expected answer.
    """
    place = next((place for place, token in enumerate(tokens) if token in end.ids), None)
    dropped = {tokenizer.bos_token_id, tokenizer.pad_token_id}
    plain = [token for token in tokens[:place] if token not in dropped]
    text: str = tokenizer.decode(plain, skip_special_tokens=False)
    if end.text and end.closed:
        return text.rstrip().removesuffix(end.text), place is not None
    if end.text:
        text, mark, _ = text.partition(end.text)
        return text, place is not None or bool(mark)
    return text, place is not None


def until(pieces: Iterable[str], end: End) -> Iterator[str]:
    """Yield a text that comes in pieces up to the text of `end`.

    What may be the beginning of that text waits for the next piece.
    """
    waiting = ""
    for piece in pieces:
        waiting += piece
        place = waiting.find(end.text) if end.text else -1
        if place >= 0 and not (end.closed and waiting[place + len(end.text) :].strip()):
            waiting = waiting[:place]
            break
        free = max(0, len(waiting) - max(0, len(end.text) - 1))
        if free:
            yield waiting[:free]
            waiting = waiting[free:]
    if waiting:
        yield waiting
