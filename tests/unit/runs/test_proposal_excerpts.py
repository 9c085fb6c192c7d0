"""Lengths that `fluvial init` counts on the first characters of long records."""

from collections.abc import Sequence

import pytest

from fluvial.data.records import Answered, Chat, Record, Text
from fluvial.data.templates import with_template
from fluvial.data.tokenise import Tokenizing
from fluvial.models import encoding
from fluvial.models.hf import PreTrainedTokenizerBase
from fluvial.models.pretrained import EMBEDDED, ModelConfig
from fluvial.models.tokenizers import load_tokenizer
from fluvial.runs.proposal import excerpts
from fluvial.runs.proposal.excerpts import Counted, counted, excerpt

SENTENCE = "The ward was told of each case. "
CONTENTS: list[Text | Answered | Chat] = [
    Text(40 * SENTENCE),
    Answered(40 * SENTENCE, "lungs"),
    Answered("What happened?", 40 * SENTENCE),
    Chat(
        [
            {"role": "user", "content": 40 * SENTENCE},
            {"role": "assistant", "content": "The ward. "},
        ]
    ),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return with_template(load_tokenizer(ModelConfig(name_or_path=EMBEDDED)), "plain")


@pytest.fixture
def characters(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The characters of each text that is tokenised."""
    lengths = list[int]()
    ids = encoding._ids

    def noted(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
        lengths.append(len(text))
        return ids(tokenizer, text, special=special)

    monkeypatch.setattr(encoding, "_ids", noted)
    return lengths


def counts(
    contents: Sequence[Text | Answered | Chat], tokenizer: PreTrainedTokenizerBase
) -> list[Counted]:
    """Return the counts of records with these contents."""
    records = [Record(number, content) for number, content in enumerate(contents)]
    return counted(records, Tokenizing(tokenizer, max_length=10**7))[0]


def test_a_record_of_a_megabyte_is_read_in_part(
    tokenizer: PreTrainedTokenizerBase, characters: list[int]
) -> None:
    long = Answered(SENTENCE * (10**6 // len(SENTENCE)), "lungs")
    (found,) = counts([long], tokenizer)
    assert max(characters) <= excerpts.MOST
    assert found.is_estimated
    per_sentence = (counts([CONTENTS[1]], tokenizer)[0].tokens - found.learned) / 40
    assert found.tokens == pytest.approx(per_sentence * (10**6 // len(SENTENCE)), rel=0.05)


def test_a_sample_of_much_text_is_read_in_part(
    tokenizer: PreTrainedTokenizerBase, characters: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evenly spaced records are read, whole."""
    monkeypatch.setattr(excerpts, "MOST_IN_ALL", 1000)
    found = counts([Text(SENTENCE + str(number)) for number in range(200)], tokenizer)
    assert sum(characters) <= 1100  # with what shows the special tokens
    assert 20 <= len(found) <= 32
    assert not any(each.is_estimated for each in found)


@pytest.mark.parametrize("content", CONTENTS)
def test_an_excerpt_is_counted_as_the_whole(
    content: Text | Answered | Chat,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole: Counted = counts([content], tokenizer)[0]
    monkeypatch.setattr(excerpts, "MOST", 512)
    part: Counted = counts([content], tokenizer)[0]
    assert part.is_estimated
    assert not whole.is_estimated
    assert part.tokens == pytest.approx(whole.tokens, rel=0.2)
    assert part.learned == pytest.approx(whole.learned, rel=0.2)


def test_a_short_text_beside_a_long_one_stays_whole() -> None:
    record = Record(1, Answered(40_000 * "a", "lungs"))
    cut = excerpt(record)
    assert cut.content == Answered(excerpts.MOST // 2 * "a", "lungs")
    assert excerpt(cut) is cut
