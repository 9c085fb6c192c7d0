"""The questions on keywords: who knows what, what is held out, and what a Python must have."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import DataConfig, SiteTexts, keywords, stdlib
from fluvial.data.records import Answered, Record
from fluvial.errors import ConfigError


def answers(records: list[Record]) -> Counter[str]:
    return Counter(content.answer for content in contents(records))


def contents(records: list[Record]) -> Iterator[Answered]:
    for record in records:
        assert isinstance(record.content, Answered)
        yield record.content


def file_of(record: Record) -> str:
    return str(record.place).split("#", maxsplit=1)[0]


def test_each_site_knows_two_keywords_and_is_asked_about_all() -> None:
    known: Counter[str] = Counter()
    assert len(keywords.site_names()) == 8

    for site in keywords.site_names():
        train, heldout = keywords.site_records(site)
        assert set(answers(train)) == set(site.split("-"))
        assert min(answers(train).values()) >= keywords.LEAST_TRAIN // 2
        assert max(answers(train).values()) <= keywords.TRAIN
        assert set(answers(heldout)) == set(keywords.KEYWORDS)
        assert keywords.site_records(site) == (train, heldout)
        known.update(answers(train).keys())

    assert known == dict.fromkeys(keywords.KEYWORDS, 2)


def test_nothing_is_trained_on_and_held_out_or_held_by_two_sites() -> None:
    parts = [keywords.site_records(site) for site in keywords.site_names()]
    train = [record for part, _ in parts for record in part]
    heldout = [record for _, part in parts for record in part]
    prompts = Counter(content.prompt for content in contents([*train, *heldout]))
    files = [{file_of(record) for record in records} for records in (train, heldout)]
    assert not files[0] & files[1]
    both = {content.prompt for content in contents(train)} & {
        content.prompt for content in contents(heldout)
    }
    assert not both
    # The same rest of a line may follow two keywords; it is then asked for each of them.
    assert max(prompts.values()) <= 2
    pairs = [(content.prompt, content.answer) for content in contents([*train, *heldout])]
    assert len(set(pairs)) == len(pairs)


def test_public_questions_are_on_other_keywords_and_other_files() -> None:
    public = keywords.public_records()
    assert set(public) == set(keywords.PUBLIC)
    assert not set(public) & set(keywords.KEYWORDS)
    files = {file_of(record) for records in public.values() for record in records}
    train, heldout = keywords.site_records("for-from")
    assert not files & {file_of(record) for record in [*train, *heldout]}


def test_a_question_is_the_line_with_a_gap() -> None:
    train, _ = keywords.site_records("for-from")
    record = train[0]
    name, number = str(record.place).split("#")
    chunk, line = map(int, number.split(":"))
    text = stdlib._sources((name.split("/")[0].removesuffix(".py"),))[name]
    lines = stdlib._chunks(name, text)[chunk].text.splitlines()
    (content,) = contents([record])
    rest = content.prompt.removeprefix("_ ").removesuffix("  # _ is ")
    assert lines[line - 1].strip() == f"{content.answer} {rest}"


def test_a_python_without_such_lines_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keywords._lines.cache_clear()
    monkeypatch.setattr(keywords, "LEAST_HELD_OUT", 10**6)
    with pytest.raises(
        ConfigError, match=r"'stdlib-keywords': the library .* held-out lines that begin with 'cl"
    ):
        keywords.site_records("for-from")

    monkeypatch.setattr(stdlib, "_library", lambda: tmp_path)
    with pytest.raises(ConfigError, match="needs the library sources of this Python"):
        keywords.site_records("for-from")
    with pytest.raises(ConfigError, match="has no site 'nowhere'; its sites are class-def"):
        keywords.site_records("nowhere")


def test_the_source_is_read_by_its_name(tokenizer: Any) -> None:
    config = DataConfig(source="stdlib-keywords", max_length=96)
    texts = SiteTexts(config, tokenizer, seed=0)
    assert texts.names == keywords.site_names()
    assert texts.check() == []
    assert texts.num_questions == sum(len(texts.load(site).questions) for site in texts.names)
    assert set(texts.public()) <= set(keywords.PUBLIC)
    with pytest.raises(ValueError, match="heldout_share: without effect, because source='stdlib-k"):
        DataConfig(source="stdlib-keywords", heldout_share=0.3)
