"""Records to train on and held-out records of two forms, read alike by `data.read_as`."""

import json
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import SiteTexts
from fluvial.data.config import DataConfig
from fluvial.data.faults import DataError

ROWS = [(f"Who had case {n}?", f"ward {n}") for n in range(8)]


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chats(*before: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "conversations": [
                *before,
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
            ]
        }
        for question, answer in ROWS
    ]


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Any]:
    pairs = [{"prompt": q, "completion": a, "references": [a.upper()]} for q, a in ROWS]
    return {
        "source": written(tmp_path / "bern.jsonl", chats()),
        "heldout_source": written(tmp_path / "asked.jsonl", pairs),
        "chat_template": "plain",
    }


def texts(table: dict[str, Any], tokenizer: Any, **own: Any) -> SiteTexts:
    config = DataConfig.model_validate({"by_site": {"bern": {**table, **own}}})
    return SiteTexts(config, tokenizer, seed=0)


def test_two_forms_at_a_site_are_remarked_with_the_remedy(
    table: dict[str, Any], tokenizer: Any
) -> None:
    (note,) = texts(table, tokenizer).notes
    assert note.startswith("site 'bern': the records to train on are conversations in a chat")
    assert "those held out are prompts with completions" in note
    assert 'by data.by_site.bern.read_as = "prompt_completion"' in note
    same = {**table, "heldout_source": table["source"]}
    assert not texts(same, tokenizer).notes

    whole = SiteTexts(DataConfig(**table), tokenizer, seed=0).notes
    assert "by data.read_as = " in whole[-1]


def test_alpaca_records_are_a_kind_of_their_own(
    table: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    """Their prompt has a template too."""
    alpaca = [{"instruction": question, "output": answer} for question, answer in ROWS]
    own = {**table, "source": written(tmp_path / "a.jsonl", alpaca), "chat_template": None}
    config = DataConfig.model_validate({"by_site": {"bern": own, "rome": own}})
    (note,) = SiteTexts(config, tokenizer, seed=0).notes
    assert note.startswith("sites 'bern', 'rome': the records to train on are Alpaca records")
    assert note.endswith("give both one form")


@pytest.mark.parametrize("form", ["prompt_completion", "messages"])
def test_both_are_read_alike(table: dict[str, Any], tokenizer: Any, form: str) -> None:
    """The same question has the same tokens, whichever file it stands in."""
    if form == "prompt_completion":
        del table["chat_template"]
    read = texts(table, tokenizer, read_as=form)
    assert not read.notes
    read.check()
    assert not any(key.endswith("read_as") for key in read.idle())
    data = read.load("bern")
    assert data.train == data.heldout
    rendered = tokenizer.decode(data.train[0].input_ids)
    assert ("Assistant:" in rendered) == (form == "messages")
    assert data.questions[0].references == (ROWS[0][1].upper(),)


def test_what_read_as_cannot_read_or_does_not_change(
    table: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    long = written(tmp_path / "long.jsonl", chats({"from": "system", "value": "Be brief."}))
    with pytest.raises(DataError) as caught:
        texts(table, tokenizer, source=long, read_as="prompt_completion", chat_template=None)
    told = str(caught.value)
    assert " times: data.by_site.bern.read_as = 'prompt_completion' reads" in told
    assert "long.jsonl, lines 1, 2, 3" in told
    same = {**table, "heldout_source": table["source"]}
    idle = texts(same, tokenizer, read_as="messages")
    idle.check()
    assert idle.idle()["data.by_site.bern.read_as"] == "no record of it has another form"
