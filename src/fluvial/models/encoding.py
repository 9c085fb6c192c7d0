"""Text to token ids, in the form in which a model continues them.

A tokenizer may put special tokens before a text (BOS) and after it (EOS, SEP). Those before it
belong to a prompt; those after it would stand between the prompt and its answer, and are left out
here. Training, held-out loss, multiple choice and generation all encode a prompt with this module.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from fluvial.models.hf import PreTrainedTokenizerBase

Prompt = str | Sequence[int]
"""A text, or its tokens where a chat template has written it."""
PROBES = ("a b", "The", "1")
"""Texts from which the special tokens of a tokenizer are read."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, with the special tokens that it puts before a text."""

    tokenizer: PreTrainedTokenizerBase
    prefix: tuple[int, ...]
    """Special tokens before a text, such as BOS; empty for a tokenizer that adds none."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Encoder":
        """Return the encoder of a tokenizer of transformers, fast or slow."""
        return cls(tokenizer, _prefix(tokenizer))

    def plain(self, text: str) -> list[int]:
        """Encode `text` without special tokens."""
        return _ids(self.tokenizer, text, special=False)

    def prompt(self, text: str) -> list[int]:
        """Encode a prompt: special tokens before `text`, none after it.

        A text that itself begins with them gets no second ones. An empty text without any becomes
        one BOS or EOS token, since a model cannot continue nothing.
        """
        ids = self.plain(text)
        own = tuple(ids[: len(self.prefix)]) == self.prefix
        whole = ids if own else [*self.prefix, *ids]

        return whole or [self._start()]

    def asked(self, prompt: Prompt) -> list[int]:
        """Return the tokens from which a model continues a prompt."""
        return self.prompt(prompt) if isinstance(prompt, str) else list(prompt)

    def answer(self, text: str) -> list[int]:
        """Encode an answer by itself, without special tokens, and end it with one EOS.

        The prompt's tokens are thus those that generation starts from, whatever the answer is.
        """
        return self.ended(self.plain(text))

    def continued(self, prompt: str, before: list[int], text: str) -> list[int]:
        """Encode an answer as what follows the prompt, whose tokens are `before`, in one text, and
        end it with one EOS; by itself, where the prompt would have other tokens in that text."""
        whole = self.prompt(prompt + text)
        after = whole[len(before) :]
        return (
            self.ended(after)
            if after and whole[: len(before)] == list(before)
            else self.answer(text)
        )

    def ended(self, ids: Sequence[int]) -> list[int]:
        """Return `ids` with one EOS at the end."""
        eos: int = self.tokenizer.eos_token_id
        return list(ids) if ids and ids[-1] == eos else [*ids, eos]

    def _start(self) -> int:
        bos: int | None = self.tokenizer.bos_token_id
        eos: int = self.tokenizer.eos_token_id
        return eos if bos is None else bos


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    # verbose=False: a text longer than the model's context is cut into windows later, so its
    # warning is no news.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the special tokens before a text: those that precede its own tokens in the whole."""
    for probe in chain(PROBES, islice(_words(tokenizer), 8)):
        plain = _ids(tokenizer, probe, special=False)
        whole = _ids(tokenizer, probe, special=True)
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return tuple(whole[:start])

    whole = _ids(tokenizer, "", special=True)
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and whole[:1] == [bos] else ()


def _words(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield tokens that are words. The vocabulary, which is slow to get, is read only when asked
    for."""
    yield from (token for token in tokenizer.get_vocab() if token.isalnum())
