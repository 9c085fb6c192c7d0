"""Remarks of `check` on what a tokenizer does not know or cannot write, and on what a chat template
writes or leaves out."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fluvial.data import SiteTexts
from fluvial.data.config import DataConfig


def of_letters(letters: str, **special: str) -> PreTrainedTokenizerFast:
    vocab = {token: n for n, token in enumerate(["<s>", "</s>", "<unk>", *letters])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    rows = {"bern": ["ab", "aü", "üb", "ba"], "rome": ["ab", "ba", "aa", "bb"]}
    by_site: dict[str, Any] = {}
    for name, texts in rows.items():
        lines = [json.dumps({"prompt": text, "completion": "a"}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        by_site[name] = {"source": str(tmp_path / f"{name}.jsonl")}
    return DataConfig.model_validate({"by_site": by_site, "heldout_share": 0.25})


def remarks(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    every = SiteTexts(config, tokenizer, seed=0).check()
    return [remark for remark in every if "does not know" in remark]


def test_records_with_unknown_characters_are_counted_by_site(config: DataConfig) -> None:
    (remark,) = remarks(config, of_letters("ab"))
    assert "each of which becomes '<unk>': 2 of 4 at site 'bern';" in remark
    assert "rome" not in remark
    assert not remarks(config, of_letters("abü"))


def test_an_unknown_token_that_also_ends_a_text_counts_nothing(config: DataConfig) -> None:
    """As that of GPT-2, which knows every byte."""
    assert not remarks(config, of_letters("abü", unk_token="</s>"))


def test_a_template_that_writes_the_date_is_remarked_where_any_site_has_conversations(
    config: DataConfig, tmp_path: Path
) -> None:
    """Also where it is not the first site."""
    tokenizer = of_letters("ab")
    tokenizer.chat_template = (
        "{% set day = strftime_now('%d') %}{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    words = "the chat template writes today's date"
    for has_chats in (False, True):
        if has_chats:
            turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "a"}]
            line = json.dumps({"messages": turns})
            (tmp_path / "rome.jsonl").write_text("\n".join([line] * 4))
        found = SiteTexts(config, tokenizer, seed=0).check()
        assert any(words in remark for remark in found) == has_chats


def test_expected_answers_that_the_tokenizer_cannot_write_are_counted_by_site(
    config: DataConfig, tokenizer: Any, tmp_path: Path
) -> None:
    def found(made: Any) -> list[str]:
        every = SiteTexts(config, made, seed=0).check()
        return [remark for remark in every if "cannot write" in remark]

    lower = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="</s>",
    )
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert not found(lower)

    lines = [{"prompt": "ab", "completion": " Ab "}] * 4
    (tmp_path / "rome.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (remark,) = found(lower)
    assert "it changes letters, accents or spaces: 1 of 1 at site 'rome'; no model" in remark
    assert not found(tokenizer)

    several = [{"prompt": "ab", "completion": "Ab", "references": ["ab"]}] * 4
    (tmp_path / "rome.jsonl").write_text("\n".join(map(json.dumps, several)))
    assert not found(lower)  # one of several references is enough


def test_a_template_that_ends_no_answer_is_remarked(config: DataConfig, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "a"}]
    for site in ("rome", "bern"):
        lines = [json.dumps({"messages": turns})] * 4
        (tmp_path / f"{site}.jsonl").write_text("\n".join(lines))

    tokenizer = of_letters("ab")
    for end, is_told, ids in (("", True, set()), ("ba", False, set()), ("</s>", False, {1})):
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }}"
            f"{{% if m.role == 'assistant' %}}{end}{{% endif %}}{{% endfor %}}"
        )
        texts = SiteTexts(config, tokenizer, seed=0)
        found = [each for each in texts.check() if "the chat template writes no end" in each]
        assert len(found) == is_told
        assert all("1 of 1 at site 'bern', 1 of 1 at site 'rome'" in each for each in found)
        assert texts.end_ids() == ids


def test_the_end_of_pairs_is_eos(config: DataConfig) -> None:
    assert SiteTexts(config, of_letters("ab"), seed=0).end_ids() == {1}
