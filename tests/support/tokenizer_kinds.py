"""Small tokenizers of the kinds that model folders bring along, each with a vocabulary that can be
read."""

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[CLS]", "[SEP]"]


def wrapped(tokenizer: Tokenizer, template: str | None = None) -> Any:
    """`tokenizer` as transformers loads it, with `template` as its post-processor."""
    if template is not None:
        found = [(token, SPECIAL.index(token)) for token in SPECIAL if token in template]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=found
        )

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def vocabulary(*tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate([*SPECIAL, *tokens])}


def byte_level(template: str | None = None, *, prefix_space: bool = False) -> Any:
    """Byte-level BPE as GPT-2's: a space is written as U+0120; `he` and `he` behind a space are
    merged."""
    words = vocabulary(*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "\u0120he")
    tokenizer = Tokenizer(models.BPE(words, [("h", "e"), ("\u0120", "he")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()

    return wrapped(tokenizer, template)


def prefix_space(template: str | None = None, *, scheme: str | None = None) -> Any:
    """Like SentencePiece in Llama 2: each text gets a space (U+2581) before it, also one that has a
    space there.

    With `scheme` the space is put by the pre-tokenizer Metaspace, which adds none where there is
    one.
    """
    letters = [chr(number) for number in range(33, 127)]
    words = vocabulary("\u2581", "\n", *letters, "he", "\u2581he", "\u2581\u2581")
    tokenizer = Tokenizer(
        models.BPE(words, [("h", "e"), ("\u2581", "he"), ("\u2581", "\u2581")], unk_token="<unk>")
    )

    if scheme is None:
        space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(space)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)

    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer, template)


def words(template: str | None = None) -> Any:
    """Whole words as BERT's: lower case, no spaces, punctuation apart."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary("he", "says", "yes", ":"), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return wrapped(tokenizer, template)


def characters(template: str | None = None) -> Any:
    """One token for each character."""
    tokenizer = Tokenizer(
        models.WordLevel(vocabulary(*map(chr, range(32, 127))), unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    tokenizer.decoder = decoders.Fuse()

    return wrapped(tokenizer, template)
