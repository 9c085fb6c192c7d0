"""What a model is given to go on from: special tokens before a prompt, none between prompt and
answer."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import IGNORE_INDEX, tokenize
from fluvial.data.multiple_choice import Choice
from fluvial.models.encoding import Encoder
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.targets import LoraSettings
from fluvial.training.choice_prompts import prepare
from tests.support.tokenizer_kinds import byte_level, characters, prefix_space, words

G = "\u0120"
S = "\u2581"
BOTH = "<s> $A </s>"

# Kind, prompt, answer, tokens of the prompt, tokens of the answer: written out by hand.
CASES: dict[str, tuple[Any, str, str, str, str]] = {
    "bytes": (byte_level, "a", " he", "a", f"{G}he </s>"),
    "bytes, BOS": (lambda: byte_level("<s> $A"), "a", " he", "<s> a", f"{G}he </s>"),
    "bytes, BOS and EOS": (lambda: byte_level(BOTH), "a", " he", "<s> a", f"{G}he </s>"),
    "bytes, EOS": (lambda: byte_level("$A </s>"), "a", "he", "a", "he </s>"),
    "bytes, the space is shared": (lambda: byte_level(BOTH), "a ", "he", f"<s> a {G}", "he </s>"),
    "bytes with a space before": (
        lambda: byte_level(BOTH, prefix_space=True),
        "a",
        "he",
        f"<s> {G} a",
        f"{G}he </s>",
    ),
    "bytes, no text": (byte_level, "", "he", "<s>", "he </s>"),
    "space": (prefix_space, "a", " he", f"{S} a", f"{S} {S}he </s>"),
    "space, none in the answer": (prefix_space, "a", "he", f"{S} a", f"{S}he </s>"),
    "space, BOS and EOS": (lambda: prefix_space(BOTH), "a", " he", f"<s> {S} a", f"{S} {S}he </s>"),
    "space, it is shared": (
        lambda: prefix_space(BOTH),
        "a ",
        "he",
        f"<s> {S} a {S}",
        f"{S}he </s>",
    ),
    "metaspace": (
        lambda: prefix_space(BOTH, scheme="always"),
        "a",
        "he",
        f"<s> {S} a",
        f"{S}he </s>",
    ),
    "metaspace, first": (
        lambda: prefix_space(BOTH, scheme="first"),
        "a",
        " he",
        f"<s> {S} a",
        f"{S}he </s>",
    ),
    "words": (lambda: words("[CLS] $A [SEP]"), "He says: ", "Yes", "[CLS] he says :", "yes </s>"),
    "words, BOS in the text": (
        lambda: words(BOTH),
        "<s>he says:",
        "yes",
        "<s> he says :",
        "yes </s>",
    ),
    "characters": (characters, "ab", "he", "a b", "h e </s>"),
    "characters, EOS": (lambda: characters("$A </s>"), "ab", "he", "a b", "h e </s>"),
    "characters, EOS in the answer": (lambda: characters(BOTH), "ab", "h</s>", "<s> a b", "h </s>"),
}


def names(tokenizer: Any, ids: Sequence[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids)))


@pytest.mark.parametrize("case", CASES)
def test_prompt_answer_and_mask_are_those_written_by_hand(case: str) -> None:
    make, prompt, answer, before, after = CASES[case]
    tokenizer = make()
    record = {"prompt": prompt, "completion": answer}
    (example,) = tokenize(
        [("record", record)], "prompt_completion", tokenizer, max_length=64
    ).examples
    learned = [label for label in example.labels if label != IGNORE_INDEX]
    masked = [
        token
        for token, label in zip(example.input_ids, example.labels, strict=True)
        if label == IGNORE_INDEX
    ]
    assert (names(tokenizer, masked), names(tokenizer, learned)) == (before, after)
    assert names(tokenizer, example.input_ids) == f"{before} {after}"
    assert Encoder.of(tokenizer).prompt(prompt) == masked


@pytest.mark.parametrize(
    "template", [None, "<s> $A", "$A </s>", BOTH, "[CLS] $A [SEP]", "<s> [CLS] $A </s> [SEP]"]
)
@pytest.mark.parametrize("kind", [byte_level, prefix_space, words, characters])
def test_what_stands_before_a_text_is_found_for_every_kind(kind: Any, template: str | None) -> None:
    tokenizer = kind(template)
    before = (template or "$A").partition("$A")[0]
    assert names(tokenizer, Encoder.of(tokenizer).prefix) == before.strip()


@pytest.mark.parametrize("template", ["<s> $A", BOTH])
def test_plain_text_ends_in_one_eos(template: str) -> None:
    tokenizer = byte_level(template)
    (example,) = tokenize([("record", {"text": "a he"})], "text", tokenizer, max_length=64).examples
    assert names(tokenizer, example.input_ids) == f"<s> a {G}he </s>"
    assert list(example.labels) == list(example.input_ids)


@pytest.mark.parametrize("template", [None, "$A </s>", BOTH, "[CLS] $A [SEP]"])
@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_a_choice_is_scored_without_what_follows_a_text(template: str | None, scoring: Any) -> None:
    tokenizer = byte_level(template)
    bare = byte_level()
    choice = Choice("q", "Which?", ("he", "she", "it", "they"), 0)
    found = prepare([choice], tokenizer, context=None, scoring=scoring).prompts[0]
    wanted = prepare([choice], bare, context=None, scoring=scoring).prompts[0]
    assert found.endings == wanted.endings
    assert found.prefix == (*Encoder.of(tokenizer).prefix, *wanted.prefix)

    if scoring == "letter":
        assert [names(tokenizer, ending) for ending in found.endings] == [
            f"{G} {letter}" for letter in "ABCD"
        ]


def test_a_prompt_that_is_cut_keeps_what_the_tokenizer_puts_first() -> None:
    tokenizer = characters("<s> [CLS] $A [SEP]")
    choice = Choice("q", "Which of these is it?", ("a", "b", "c", "d"), 0)
    whole = prepare([choice], tokenizer, context=None).prompts[0]
    cut = prepare([choice], tokenizer, context=len(whole.prefix) - 4).prompts[0]
    assert names(tokenizer, cut.prefix[:2]) == "<s> [CLS]"
    assert cut.prefix[2:] == whole.prefix[8:]  # an ending has two tokens, a space and a letter


def test_generation_goes_on_from_the_prompt_and_not_from_an_eos(
    tiny_model: Path, tmp_path: Path, tokenizer: Any
) -> None:
    from tokenizers import processors

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    closing = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.backend_tokenizer.post_processor, opening = (
        closing,
        tokenizer.backend_tokenizer.post_processor,
    )

    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.backend_tokenizer.post_processor = opening

    pools = [
        ModelPool(ModelConfig(name_or_path=str(path)), LoraSettings())
        for path in (tiny_model, folder)
    ]
    assert pools[1].tokenizer("a")["input_ids"][-1] == 2
    prompts = ["The river", "def mean"]
    answers = [pool.generate(pool.base_state(), prompts, max_new_tokens=6) for pool in pools]
    assert answers[0] == answers[1]


def test_the_vocabulary_is_not_read_where_a_probe_tells_the_prefix(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a quarter of a second at 150,000 tokens, and every list of records has an
    encoder."""

    def refuse(_: Any) -> None:
        raise AssertionError("the vocabulary was read")

    monkeypatch.setattr(type(tokenizer), "get_vocab", refuse)
    assert Encoder.of(tokenizer).prefix == (tokenizer.bos_token_id,)
