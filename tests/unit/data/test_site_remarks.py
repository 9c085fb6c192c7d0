"""Remarks of `check` on characters that a tokenizer does not know, and on a date in a template."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
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
