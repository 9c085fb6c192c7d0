"""Packing: which records share a sequence, and what is known of them."""

import random
from pathlib import Path
from typing import Any

import pytest

from fluvial.data import IGNORE_INDEX, DataConfig, Example, SiteTexts
from fluvial.data.packing import pack
from fluvial.errors import ConfigError
from fluvial.runs.config import parse


def record(number: int, length: int) -> Example:
    """A record of tokens that no other number has; its first half is a prompt."""
    ids = [100 * number + place for place in range(length)]
    half = length // 2
    return Example(ids, [IGNORE_INDEX] * half + ids[half:])


def split(sequence: Example) -> list[Example]:
    """The records of a packed sequence."""
    ends = [sum(sequence.lengths[: number + 1]) for number in range(len(sequence.lengths))]
    return [
        Example(sequence.input_ids[end - length : end], sequence.labels[end - length : end])
        for end, length in zip(ends, sequence.lengths, strict=True)
    ]


def test_every_record_is_whole_in_one_sequence() -> None:
    draw = random.Random(0)
    records = [record(number, draw.randint(2, 40)) for number in range(200)]
    sequences = pack(records, 40)
    found = sorted((each for sequence in sequences for each in split(sequence)), key=first_token)
    assert found == sorted(records, key=first_token)
    assert all(len(sequence.input_ids) == sum(sequence.lengths) <= 40 for sequence in sequences)
    total = sum(len(each.input_ids) for each in records)
    assert len(sequences) <= 1.1 * total / 40, "little room is left"
    assert pack(records, 40) == sequences


def first_token(example: Example) -> int:
    return example.input_ids[0]


def test_a_record_goes_where_it_leaves_the_least_room() -> None:
    lengths = (9, 6, 3, 2, 4)
    sequences = pack([record(number, length) for number, length in enumerate(lengths)], 10)
    assert [sequence.lengths for sequence in sequences] == [(9,), (6, 4), (3, 2)]


def test_no_record_predicts_the_first_token_of_the_next() -> None:
    records = [Example([7, 8, 9], [7, 8, 9]), Example([4, 5], [4, 5])]
    (sequence,) = pack(records, 8)
    assert sequence.labels == [IGNORE_INDEX, 8, 9, IGNORE_INDEX, 5]
    assert sequence.label_tokens == sum(each.label_tokens for each in records) == 3


@pytest.mark.parametrize(
    ("start", "end", "lengths"),
    [(0, None, (3, 2)), (0, 4, (3, 1)), (0, 3, (3,)), (1, 4, (2, 1)), (3, 5, (2,)), (0, 2, (2,))],
)
def test_a_cut_keeps_the_bounds_of_records(start: int, end: int | None, lengths: Any) -> None:
    (sequence,) = pack([Example([7, 8, 9], [7, 8, 9]), Example([4, 5], [4, 5])], 8)
    cut = sequence.cut(start, end)
    assert cut.lengths == lengths
    assert len(cut.input_ids) == sum(lengths)


def test_training_is_packed_and_measuring_is_not(tokenizer: Any, three_sites: Path) -> None:
    table = {"source": str(three_sites), "max_length": 64, "public_source": str(three_sites)}
    table["partition"] = {"by": "column", "column": "client"}
    plain, packed = (
        SiteTexts(DataConfig.model_validate(table | {"packing": on}), tokenizer, seed=0)
        for on in (False, True)
    )
    assert packed.check() == plain.check()
    for name in plain.names:
        assert packed.load(name).heldout == plain.load(name).heldout
        train = packed.load(name).train
        assert len(train) < len(plain.load(name).train)
        assert packed.num_train[name] == len(train)
        tokens = {tuple(each.input_ids) for sequence in train for each in split(sequence)}
        assert tokens == {tuple(each.input_ids) for each in plain.load(name).train}

    assert sum(map(len, packed.public().values())) < sum(map(len, plain.public().values()))


def test_split_learning_refuses_packing(run_config: dict[str, Any]) -> None:
    table = run_config | {"method": {"name": "flglm"}}
    table["data"] = run_config["data"] | {"packing": True}
    with pytest.raises(ConfigError, match=r"data.packing: method 'flglm' sends each record's"):
        parse(table, "test")
