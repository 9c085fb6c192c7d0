"""Records to tokens and labels, data sets to sites, and the embedded text."""

import json
import shutil
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from flwr_datasets.partitioner import IidPartitioner
from pydantic import ValidationError

from fluvial.data import (
    IGNORE_INDEX,
    DataConfig,
    DataError,
    Example,
    Question,
    SiteTexts,
    Tokenized,
    stdlib,
    tokenize,
)
from fluvial.data.faults import Faults
from fluvial.data.forms import detect_form
from fluvial.data.partition import Dirichlet, Iid, Natural, Shards, alike, split
from fluvial.data.record_reader import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from fluvial.data.rows import Number
from fluvial.data.sources import Source, read_source
from fluvial.errors import ConfigError
from fluvial.runs.config import parse

QA = {"prompt": "Question: capital of France?", "completion": " Paris."}
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "farewell"},
]


def tokens_of(tokenizer: Any, form: Any, *records: dict[str, Any], **options: Any) -> Tokenized:
    named = [(f"record {number}", record) for number, record in enumerate(records)]
    return tokenize(named, form, tokenizer, **({"max_length": 512} | options))


def one(tokenizer: Any, form: Any, record: dict[str, Any], **options: Any) -> Example:
    (example,) = tokens_of(tokenizer, form, record, **options).examples
    assert len(example.input_ids) == len(example.labels)
    assert all(
        label in (IGNORE_INDEX, token)
        for token, label in zip(example.input_ids, example.labels, strict=True)
    )

    return example


def learned(tokenizer: Any, example: Example) -> str:
    """The text of the labels."""
    text: str = tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])
    return text


def whole(tokenizer: Any, example: Example) -> str:
    text: str = tokenizer.decode(list(example.input_ids))
    return text


def test_prompt_and_completion_learn_the_answer_and_eos(tokenizer: Any) -> None:
    example = one(tokenizer, "prompt_completion", QA)
    assert whole(tokenizer, example) == "<s>Question: capital of France? Paris.</s>"
    assert learned(tokenizer, example) == " Paris.</s>"
    assert (
        list(example.input_ids)[: len(tokenizer(QA["prompt"])["input_ids"])]
        == tokenizer(QA["prompt"])["input_ids"]
    )


def test_a_completion_that_ends_in_eos_gets_no_second_one(tokenizer: Any) -> None:
    assert (
        learned(tokenizer, one(tokenizer, "prompt_completion", QA | {"completion": "x</s>"}))
        == "x</s>"
    )


def test_alpaca_with_and_without_input(tokenizer: Any) -> None:
    record = {"instruction": "Add {them}.", "output": "5"}
    for given, template in (
        ({"input": "2 3"}, ALPACA_WITH_INPUT),
        ({"input": ""}, ALPACA_WITHOUT_INPUT),
        ({}, ALPACA_WITHOUT_INPUT),
    ):
        prompt = template.format(instruction="Add {them}.", input="2 3")
        made = tokens_of(tokenizer, "alpaca", record | given)
        assert whole(tokenizer, made.examples[0]) == f"<s>{prompt}5</s>"
        assert learned(tokenizer, made.examples[0]) == "5</s>"
        assert made.questions == [Question(prompt, "5")]

    assert "### Input" not in ALPACA_WITHOUT_INPUT


def test_every_assistant_turn_of_a_chat_is_learned_and_nothing_else(tokenizer: Any) -> None:
    example = one(tokenizer, "messages", {"messages": CHAT})
    assert whole(tokenizer, example) == (
        "<s>system\nbe brief</s>\n<s>user\nhello</s>\n<s>assistant\n"
        "good day</s>\n<s>user\nbye</s>\n"
        "<s>assistant\nfarewell</s>\n"
    )
    assert learned(tokenizer, example) == "good day</s>\nfarewell</s>\n"


def test_the_last_turn_of_the_assistant_is_a_question_after_all_others(tokenizer: Any) -> None:
    """In the tokens that training begins with, also where loss is on all."""
    for loss_on in ("answer", "all"):
        made = tokens_of(tokenizer, "messages", {"messages": CHAT}, loss_on=loss_on)
        (question,) = made.questions
        assert question.prompt.endswith("<s>user\nbye</s>\n<s>assistant\n")
        assert not question.prompt.startswith("<s>")  # a BOS that no person wrote
        assert question.prompt_ids[0] == tokenizer.bos_token_id
        assert question.answer == "farewell"
        start = len(question.prompt_ids)
        assert list(question.asked) == list(made.examples[0].input_ids)[:start]
        assert tokenizer.decode(list(made.examples[0].input_ids)[start:]) == "farewell</s>\n"

    for turns in (CHAT[:4], CHAT[2:3]):
        assert not tokens_of(tokenizer, "messages", {"messages": turns}).questions


def test_a_chat_that_opens_with_the_assistant_learns_that_turn_too(tokenizer: Any) -> None:
    example = one(tokenizer, "messages", {"messages": [CHAT[2], CHAT[3], CHAT[4]]})
    assert learned(tokenizer, example) == "good day</s>\nfarewell</s>\n"


def test_sharegpt_roles_are_translated(tokenizer: Any) -> None:
    turns = [
        ("system", "be brief"),
        ("human", "hello"),
        ("gpt", "good day"),
        ("user", "bye"),
        ("assistant", "farewell"),
    ]
    record = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    assert one(tokenizer, "sharegpt", record) == one(tokenizer, "messages", {"messages": CHAT})


@pytest.mark.parametrize(
    ("form", "record"),
    [
        ("prompt_completion", QA),
        ("messages", {"messages": CHAT}),
        ("alpaca", {"instruction": "i", "output": "o"}),
        ("text", {"text": "some text"}),
    ],
)
def test_loss_on_all_learns_every_token(tokenizer: Any, form: str, record: dict[str, Any]) -> None:
    example = one(tokenizer, form, record, loss_on="all")
    assert list(example.labels) == list(example.input_ids)
    assert list(example.input_ids) == list(one(tokenizer, form, record).input_ids)


def test_label_tokens_leave_out_the_first_position() -> None:
    assert Example([1, 2, 3], [1, 2, 3]).label_tokens == 2
    assert Example([1, 2, 3], [1, IGNORE_INDEX, IGNORE_INDEX]).label_tokens == 0
    assert Example([], []).label_tokens == 0


def test_what_is_truncated_is_counted(tokenizer: Any) -> None:
    full = one(tokenizer, "prompt_completion", QA)
    made = tokens_of(
        tokenizer,
        "prompt_completion",
        QA,
        {"prompt": "a", "completion": "b"},
        max_length=len(full.input_ids) - 2,
    )
    assert (made.records, made.truncated_records, made.truncated_tokens) == (2, 1, 2)
    assert list(made.examples[0].input_ids) == list(full.input_ids)[:-2]
    assert list(made.examples[0].labels) == list(full.labels)[:-2]
    assert len(made.questions) == 2


def test_a_record_without_a_label_left_is_named(tokenizer: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=r"1 of 2 records is longer than data.max_length=8, .*: record 1 \(\d+ tokens\)",
    ):
        tokens_of(
            tokenizer, "prompt_completion", {"prompt": "", "completion": "x"}, QA, max_length=8
        )

    with pytest.raises(
        ConfigError, match="record 0: the conversation has no turn of the assistant"
    ):
        tokens_of(tokenizer, "messages", {"messages": CHAT[:2]})


def test_text_windows_lose_nothing(tokenizer: Any) -> None:
    text = "The river carries the water of many small streams. äöü 重み\n" * 7
    everything = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    for length in (8, 13, 64, len(everything) + 5):
        made = tokens_of(tokenizer, "text", {"text": text}, max_length=length)
        found = [token for example in made.examples for token in example.input_ids]
        # a last window of one token has nothing to predict
        assert found == (everything[:-1] if len(everything) % length == 1 else everything)
        assert {len(example.input_ids) for example in made.examples[:-1]} <= {length}
        assert all(list(example.labels) == list(example.input_ids) for example in made.examples)
        assert made.truncated_tokens == 0


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("text", {"body": "x"}, r"record 0: field 'text' is missing; form 'text' needs it"),
        ("text", {"text": None}, "record 0: field 'text' must be text, and is null"),
        ("text", {"text": {"a": 1}}, "record 0: field 'text' must be text, and is an object"),
        (
            "text",
            {"text": "\ud800"},
            "record 0: field 'text' holds half of a surrogate pair .* at character 1",
        ),
        (
            "prompt_completion",
            {"prompt": "a", "completion": True},
            "field 'completion' .* is true or false; put it in",
        ),
        (
            "alpaca",
            {"instruction": ["a"], "output": "b"},
            "field 'instruction' must be text, and is a list",
        ),
        (
            "alpaca",
            {"instruction": "a", "input": True, "output": "b"},
            "field 'input' must be text",
        ),
        (
            "messages",
            {"messages": "hi"},
            "record 0: .*: the conversation must be a list of turns, and is text",
        ),
        (
            "messages",
            {"messages": "[{'role': 'user'}]"},
            r"record 0: .*: the text is no JSON \(.* at character 3\); write",
        ),
        ("messages", {"messages": "[]"}, "must be a list of turns, and is an empty list"),
        ("messages", {"messages": []}, "must be a list of turns, and is an empty list"),
        (
            "messages",
            {"messages": ["a"]},
            "turn 1 must be an object with 'role' and 'content', and is text",
        ),
        (
            "messages",
            {"messages": [{"role": "user"}]},
            "turn 1 needs the texts 'role' and 'content'",
        ),
        (
            "messages",
            {"messages": [{"role": "bing", "content": "x"}]},
            "turn 1: 'role' is none of the known roles",
        ),
        (
            "messages",
            {"messages": [CHAT[1], {"role": "assistant", "content": None}]},
            "turn 2: 'content' .* is null",
        ),
        (
            "messages",
            {"messages": [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "turn 2 has 'tool_calls', which is not supported",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, CHAT[2]]},
            "turn 1: 'content' is a list with a part that is not",
        ),
        ("messages", {"messages": CHAT, "tools": [{"name": "x"}]}, "the record has 'tools'"),
        ("messages", {"messages": CHAT, "functions": [{}]}, "the record has 'functions'"),
        *(
            (
                "messages",
                {"messages": [CHAT[1], {"role": "assistant", "content": empty}]},
                r"turn 2: the answer is empty \('content'\), .* remove the turn or the record",
            )
            for empty in ("", " \n", "\u200b", [], [{"type": "text", "text": ""}])
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": " "}]},
            r"turn 2: the answer is empty \('value'\)",
        ),
        *(
            (
                "messages",
                {"messages": [CHAT[1], CHAT[2] | {key: "step by step"}]},
                f"turn 2 has '{key}', which is not supported",
            )
            for key in ("reasoning", "reasoning_content", "thinking", "refusal")
        ),
        (
            "messages",
            {"messages": [CHAT[1], CHAT[2] | {"train": False}]},
            "turn 2 has 'train', .* write \"weight\": 0 on a turn of the assistant",
        ),
        *(
            (
                "messages",
                {"messages": [CHAT[1], CHAT[2] | {"weight": weight}]},
                "turn 2: 'weight' must be 0 .no loss on the turn. or 1",
            )
            for weight in (0.5, 2, "0", True, Number("-1"), Number("1e999"))
        ),
        (
            "messages",
            {"messages": [CHAT[1] | {"weight": 1}, CHAT[2]]},
            "turn 1 has 'weight' 1 and the role 'user'; only a turn of the assistant",
        ),
        (
            "messages",
            {"messages": [CHAT[1], CHAT[2] | {"weight": 0}]},
            "no turn of the assistant of a weight of 1 to learn",
        ),
        (
            "messages",
            {"messages": [CHAT[1] | {"name": 5}, CHAT[2]]},
            "turn 1: 'name' must be text",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "bing", "value": "x"}]},
            "turn 1: 'from' is none of the known roles human, user",
        ),
    ],
)
def test_a_record_of_another_form_is_named(
    tokenizer: Any, form: str, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tokens_of(tokenizer, form, record)


@pytest.mark.parametrize(
    ("form", "weights", "question"),
    [("messages", (0, 1), True), ("messages", (1, 0), False), ("sharegpt", (0.0, 1.0), True)],
)
def test_a_turn_of_weight_0_has_no_loss(
    tokenizer: Any, form: str, weights: tuple[float, float], question: bool
) -> None:
    """A last turn of weight 0, which may be a wrong answer, is no question either."""
    given = dict(zip(("good day", "farewell"), weights, strict=True))
    names = ("role", "content") if form == "messages" else ("from", "value")
    turns = [
        dict(zip(names, turn.values(), strict=True))
        | ({"weight": given[turn["content"]]} if turn["content"] in given else {"weight": None})
        for turn in CHAT
    ]
    record = {"messages" if form == "messages" else "conversations": turns}

    made = tokens_of(tokenizer, form, record)
    (example,) = made.examples
    (whole,) = tokens_of(tokenizer, "messages", {"messages": CHAT}).examples
    assert example.input_ids == whole.input_ids
    for content, weight in given.items():
        assert (content in learned(tokenizer, example)) is (weight == 1)
        assert content in learned(tokenizer, whole)
    assert bool(made.questions) is question

    everything = one(tokenizer, form, record, loss_on="all")
    for content, weight in (*given.items(), ("be brief", 1), ("bye", 1)):
        assert (content in learned(tokenizer, everything)) is (weight == 1)


def test_an_empty_turn_of_weight_0_and_empty_fields_of_no_use_are_read(tokenizer: Any) -> None:
    empty = {"role": "assistant", "content": "", "weight": 0, "tool_calls": None, "audio": None}
    asked = CHAT[1] | {"weight": 0.0}  # as some sets of conversations have it on each turn
    record = {"messages": [asked, empty, CHAT[1], CHAT[2] | {"weight": Number("1")}]}
    assert learned(tokenizer, one(tokenizer, "messages", record)).startswith("good day")
    with pytest.raises(ConfigError, match=r"turn 1 \(role user\) has the weight 0, and data"):
        one(tokenizer, "messages", record, loss_on="all")


def test_a_field_of_a_turn_that_is_not_read_is_noted(tmp_path: Path) -> None:
    turns = [CHAT[1] | {"id": 1, "mood": "glad"}, CHAT[2] | {"mood": "", "toxic": True}]
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"messages": turns, "system": "be brief"}) + "\n") * 3)
    source = Source("data.source", str(path), "train", DataConfig(source=str(path)).reading())
    assert read_source(source, Faults()).notes == [
        f"{path}: the field 'mood' of 3 turns is no part of the text",
        f"{path}: the field 'system' of 3 records is no part of the text",
        f"{path}: the field 'toxic' of 3 turns is no part of the text",
    ]

    row = {"instruction": "a", "output": "b", "history": [["c", "d"]], "system": "s"}
    path.write_text((json.dumps(row) + "\n") * 2)
    assert read_source(source, Faults()).notes == [
        f"{path}: the field 'history' of 2 records is no part of the text",
        f"{path}: the field 'system' of 2 records is no part of the text",
    ]
    renamed = DataConfig(source=str(path), columns={"input": "system"}).reading()
    assert read_source(replace(source, reading=renamed), Faults()).notes == [
        f"{path}: the field 'history' of 2 records is no part of the text"
    ]


class Speaking:
    """A tokenizer with another chat template, or with none, or without EOS."""

    def __init__(self, tokenizer: Any, **changes: Any) -> None:
        self._tokenizer = tokenizer
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        return self._changes[name] if name in self._changes else getattr(self._tokenizer, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._tokenizer(*arguments, **options)

    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(
            *arguments, chat_template=self._changes["chat_template"], **options
        )


FORGETFUL = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<s>{{ m.role }}\n"
    "{{ m.content }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_all_is_learned(
    tokenizer: Any,
) -> None:
    forgetful = Speaking(tokenizer, chat_template=FORGETFUL)
    with pytest.raises(
        ConfigError, match=r"record 0: .* renders turn 3 differently .*data.loss_on='all'"
    ):
        one(forgetful, "messages", {"messages": CHAT})

    assert "farewell" in learned(
        tokenizer, one(forgetful, "messages", {"messages": CHAT}, loss_on="all")
    )


def test_a_template_that_refuses_the_conversation_names_the_record(tokenizer: Any) -> None:
    strict = Speaking(tokenizer, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        ConfigError, match=r"record 0: the chat template refuses .*: roles must alternate"
    ):
        one(strict, "messages", {"messages": CHAT})


def test_a_tokenizer_without_template_or_eos_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="^the tokenizer has no chat template"):
        one(Speaking(tokenizer, chat_template=None), "messages", {"messages": CHAT})
    with pytest.raises(ConfigError, match="no EOS token"):
        one(Speaking(tokenizer, eos_token_id=None), "text", {"text": "x"})


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (["text", "id"], "text"),
        (["prompt", "completion"], "prompt_completion"),
        (["messages"], "messages"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["id", "conversations"], "sharegpt"),
    ],
)
def test_the_form_is_found_by_the_fields(columns: list[str], form: str) -> None:
    assert detect_form(columns, "data") == form


def test_no_form_or_several_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"data: fields \['answer', 'question'\] fit no form. Set data.form.*alpaca: ",
    ):
        detect_form(["question", "answer"], "data")

    with pytest.raises(ConfigError, match="fit prompt_completion and messages"):
        detect_form(["messages", "prompt", "completion"], "data")


def table(rows: int = 60) -> Any:
    """Records of four unequal clinics and three classes."""
    import datasets

    clinics = ["north"] * 30 + ["south"] * 16 + ["east"] * 10 + ["west"] * 4

    return datasets.Dataset.from_dict(
        {
            "id": list(range(rows)),
            "clinic": (clinics * (rows // 60 + 1))[:rows],
            "kind": [number % 3 for number in range(rows)],
            "text": [f"note {number} of a river" for number in range(rows)],
        }
    )


PARTITIONS = [
    Natural(column="clinic"),
    Iid(sites=7),
    Dirichlet(column="kind", sites=3, alpha=1.0, min_records=2),
    Shards(column="kind", sites=5, shards_per_site=2),
]


def classes(partition: Any, rows: int = 60) -> list[str] | None:
    """The text of the partition's column."""
    column = getattr(partition, "column", None)
    return None if column is None else list(map(str, table(rows)[column]))


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda partition: partition.by)
def test_parts_are_disjoint_cover_all_and_follow_the_seed(partition: Any) -> None:
    parts = split(classes(partition), 60, partition, 3)
    assert sorted(record for part in parts.values() for record in part) == list(range(60))
    assert list(parts) == sorted(parts)
    assert split(classes(partition), 60, partition, 3) == parts
    other = split(classes(partition), 60, partition, 4)
    assert (other == parts) == isinstance(partition, Natural)


def test_natural_sites_bear_the_values_of_the_column() -> None:
    clinic = Natural(column="clinic")
    parts = split(classes(clinic), 60, clinic, 0)
    assert {name: len(part) for name, part in parts.items()} == {
        "east": 10,
        "north": 30,
        "south": 16,
        "west": 4,
    }
    assert parts["west"] == [56, 57, 58, 59]
    assert list(split(classes(clinic), 60, Natural(column="clinic", largest=2), 0)) == [
        "north",
        "south",
    ]


@pytest.mark.parametrize(("count", "sites", "seed"), [(60, 7, 0), (8, 8, 5), (461, 3, 2**32 - 1)])
def test_even_parts_are_those_of_flwr_datasets(count: int, sites: int, seed: int) -> None:
    dataset = datasets.Dataset.from_dict({"record": range(count)}).shuffle(seed=seed)
    partitioner = IidPartitioner(sites)
    partitioner.dataset = dataset
    expected = [list(partitioner.load_partition(number)["record"]) for number in range(sites)]
    assert list(split(None, count, Iid(sites=sites), seed).values()) == expected


def test_iid_shares_are_equal_and_shards_are_skewed() -> None:
    assert sorted(len(part) for part in split(None, 60, Iid(sites=7), 0).values()) == [
        8,
        8,
        8,
        9,
        9,
        9,
        9,
    ]
    partition = Shards(column="kind", sites=6, shards_per_site=1)
    kinds = classes(partition)
    assert kinds is not None
    shards = split(kinds, 60, partition, 0)
    assert all(len({kinds[number] for number in part}) == 1 for part in shards.values())
    assert list(split(None, 60, Iid(sites=11), 0)) == [f"site-{number:02}" for number in range(11)]


def test_shards_leave_out_less_than_one_record_for_each_shard() -> None:
    partition = Shards(column="kind", sites=5, shards_per_site=2)
    parts = list(split(classes(partition, 59), 59, partition, 0).values())
    assert {len(part) for part in parts} == {10}
    assert len({record for part in parts for record in part}) == 50


@pytest.mark.parametrize(
    "partition", [PARTITIONS[0], PARTITIONS[2], PARTITIONS[3]], ids=lambda partition: partition.by
)
def test_a_missing_column_is_answered_with_the_columns(
    partition: Any, tmp_path: Path, tokenizer: Any
) -> None:
    wrong = partition.model_copy(update={"column": "ward"})
    source = save("jsonl", tmp_path, table())
    with pytest.raises(
        ConfigError,
        match=r"data.partition.column='ward': .*notes.jsonl' has the columns "
        r"id, clinic, kind, text",
    ):
        texts(source, tokenizer, partition=wrong.model_dump())


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (
            Dirichlet(column="kind", sites=10, alpha=0.1, min_records=10),
            r"min_records=10 of the 60 records .* raise alpha, or lower min_records or sites",
        ),
        (
            Shards(column="kind", sites=50, shards_per_site=2),
            "50 x 2 = 100 shards, and there are only 60 records; lower sites or shards_per_site",
        ),
    ],
    ids=lambda value: getattr(value, "by", ""),
)
def test_a_split_that_cannot_be_made_is_refused(partition: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"data.partition: by = '{partition.by}' .*{message}"):
        split(classes(partition), 60, partition, 0)


def test_names_that_are_the_same_number_are_alike() -> None:
    sites = {"1": 3, "1.0": 4, "01": 5, "10": 6, "a": 7, "9" * 40: 8, "9" * 39 + "8": 9}
    (remark,) = alike(sites)
    assert "'1' (3 records) and '1.0' (4 records) and '01' (5 records) differ only in" in remark


def save(kind: str, folder: Path, dataset: Any) -> Path:
    """`dataset` in one of the forms that `data.source` takes."""
    path = folder / f"notes.{kind}"
    if kind == "jsonl":
        dataset.to_json(path)
    elif kind == "json":
        path.write_text(json.dumps(dataset.to_list()))
    elif kind == "csv":
        dataset.to_csv(path)
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "txt":
        path.write_text("\n".join(dataset["text"]) + "\n")
    elif kind == "folder":
        path = folder / "notes"
        path.mkdir()
        dataset.select(range(40)).to_json(path / "a.jsonl")
        dataset.select(range(40, 60)).to_json(path / "b.jsonl")
    else:
        path = folder / "saved"
        dataset.save_to_disk(path)

    return path


def texts(source: Path | str, tokenizer: Any, *, seed: int = 0, **changes: Any) -> SiteTexts:
    settings: dict[str, Any] = {"source": str(source), "partition": {"by": "iid", "sites": 2}}
    return SiteTexts(DataConfig(**(settings | changes)), tokenizer, seed=seed)


def found(sites: SiteTexts, tokenizer: Any) -> Counter[str]:
    """Every text of every site, train and held out."""
    return Counter(
        tokenizer.decode(list(example.input_ids), skip_special_tokens=True)
        for name in sites.names
        for example in [*sites.load(name).train, *sites.load(name).heldout]
    )


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt", "folder", "saved"])
def test_every_source_gives_every_record_once(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    sites = texts(save(kind, tmp_path, table()), tokenizer)
    assert sites.names == ("site-0", "site-1")
    assert found(sites, tokenizer) == Counter(table()["text"])
    assert sum(sites.load(name).records for name in sites.names) == 60


def test_a_saved_set_has_the_digits_of_its_types(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "score": datasets.List(datasets.Value("float32"))}
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "score": [[0.1], []]}, features=features)
    made.select([1, 0]).save_to_disk(tmp_path / "d")
    config = DataConfig(source=str(tmp_path / "d"))
    source = Source("data.source", config.source, "train", config.reading())
    rows = [entry.row for entry in read_source(source, Faults()).entries]
    assert [row.fields for row in rows] == [
        {"text": "b", "score": []},
        {"text": "a", "score": [Number("0.1")]},
    ]
    assert [row.place.number for row in rows] == [1, 2]


def test_the_sample_is_of_a_site_that_has_a_question(tmp_path: Path, tokenizer: Any) -> None:
    """Conversations that end with a user ask for no answer."""
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It"}]
    for name, kept in (("a", turns + turns[:1]), ("b", turns)):
        lines = [json.dumps({"messages": kept})] * 4
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    settings: dict[str, Any] = {"partition": {"by": "file"}, "chat_template": "plain"}
    settings["heldout_share"] = 0.5
    both = texts(tmp_path, tokenizer, **settings)
    assert [len(both.load(name).questions) for name in both.names] == [0, 2]
    assert both.sample() is both.load("b")
    assert both.sample().questions[0].answer == "It"

    first = texts(
        tmp_path / "a.jsonl", tokenizer, **settings | {"partition": {"by": "iid", "sites": 2}}
    )
    assert first.sample() is first.load(first.names[0])


def test_a_saved_dict_is_read_by_split(tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    parts = {"train": table().select(range(50)), "test": table().select(range(50, 60))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    sites = texts(tmp_path / "d", tokenizer, heldout_split="test")
    assert sum(len(sites.load(name).train) for name in sites.names) == 50
    assert sum(len(sites.load(name).heldout) for name in sites.names) == 10
    refused: list[dict[str, Any]] = [{"split": "validation"}, {"heldout_split": "validation"}]

    for wrong in refused:
        with pytest.raises(ConfigError, match="has the splits train, test, not 'validation'"):
            texts(tmp_path / "d", tokenizer, **wrong)


def test_records_to_train_on_are_never_the_held_out_ones(tmp_path: Path, tokenizer: Any) -> None:
    source = save("jsonl", tmp_path, table())
    refused: list[dict[str, Any]] = [
        {"heldout_split": "train"},
        {"heldout_split": "train", "heldout_source": str(source)},
    ]
    for wrong in refused:
        with pytest.raises(ValidationError, match="these are the records to train on"):
            texts(source, tokenizer, **wrong)

    for partition in ({"by": "iid", "sites": 2}, {"by": "file"}):
        with pytest.raises(
            ConfigError, match=r"data.heldout_split='test': .*notes.jsonl' has no splits"
        ):
            texts(source, tokenizer, heldout_split="test", partition=partition)


def test_a_split_is_refused_where_no_source_has_any(tmp_path: Path, tokenizer: Any) -> None:
    """A saved `Dataset` is whole; its rows would be trained on and held out."""
    import datasets

    saved = save("saved", tmp_path, table())
    lines = save("jsonl", tmp_path, table())
    for source in (saved, lines):
        for name in ("split", "heldout_split"):
            wrong: dict[str, Any] = {name: "test"}
            with pytest.raises(ConfigError, match=rf"data\.{name}='test': .*has no splits"):
                texts(source, tokenizer, **wrong)

    parts = {"test": table().select(range(50)), "train": table().select(range(50, 60))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    assert texts(tmp_path / "d", tokenizer, split="test").sample().records == 25
    # The split of the held-out records.
    beside = texts(lines, tokenizer, split="test", heldout_source=str(tmp_path / "d"))
    assert len(beside.sample().heldout) == 25


def test_the_held_out_share_is_cut_off_by_the_seed(tmp_path: Path, tokenizer: Any) -> None:
    source = save("jsonl", tmp_path, table())
    first = texts(source, tokenizer, heldout_share=0.2).load("site-0")
    assert (len(first.train), len(first.heldout)) == (24, 6)
    assert not {tuple(e.input_ids) for e in first.train} & {
        tuple(e.input_ids) for e in first.heldout
    }
    assert texts(source, tokenizer, heldout_share=0.2).load("site-0") == first
    assert texts(source, tokenizer, heldout_share=0.2, seed=1).load("site-0") != first
    few = texts(source, tokenizer, heldout_share=0.2, max_heldout=2).load("site-0")
    assert few.heldout == first.heldout[:2]


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    source = save("jsonl", tmp_path, table())
    for share, kept, cut in ((0.1, 4, 0), (0.9, 0, 4)):
        with pytest.raises(
            ConfigError,
            match=f"site 'west' has 4 records; data.heldout_share={share} leaves {kept} to train "
            f"on and {cut} held out",
        ):
            texts(
                source,
                tokenizer,
                partition={"by": "column", "column": "clinic"},
                heldout_share=share,
            )


def test_a_site_with_one_record_is_refused_without_talk_of_shares(
    tmp_path: Path, tokenizer: Any
) -> None:
    records = [{"clinic": name, "text": f"{name} {n}"} for n in range(9) for name in ("a", "b")]
    source = tmp_path / "records.jsonl"
    lonely = {"clinic": "c", "text": "alone"}
    source.write_text("\n".join(json.dumps(row) for row in [*records, lonely]))
    partition = {"by": "column", "column": "clinic"}
    with pytest.raises(ConfigError, match="site 'c' has 1 record, and one") as raised:
        texts(source, tokenizer, partition=partition)
    assert "heldout_share" not in str(raised.value)


def test_more_sites_to_keep_than_there_are_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    source = save("jsonl", tmp_path, table())
    partition = {"by": "column", "column": "clinic", "largest": 99}
    with pytest.raises(ConfigError, match=r"data.partition.largest=99: there are only \d sites"):
        texts(source, tokenizer, partition=partition)


def test_named_sites_take_part_alone(tmp_path: Path, tokenizer: Any) -> None:
    records = [
        {"clinic": name, "text": f"{name} {n}"} for n in range(9) for name in ("a", "b", "d")
    ]
    source = tmp_path / "records.jsonl"
    lonely = {"clinic": "c", "text": "alone"}
    source.write_text("\n".join(json.dumps(row) for row in [*records, lonely]))
    partition = {"by": "column", "column": "clinic"}
    every = [{"clinic": name, "text": f"apart {name}"} for name in ("a", "b", "c", "d")]
    apart = tmp_path / "apart.jsonl"
    apart.write_text("\n".join(json.dumps(row) for row in every))

    read = texts(source, tokenizer, partition=partition, sites=["d", "a"])
    assert read.names == ("a", "d")
    read = texts(
        source, tokenizer, partition=partition, sites=["d", "a"], heldout_source=str(apart)
    )
    assert read.names == ("a", "d")
    assert not read.check()

    with pytest.raises(ConfigError, match="data.sites: there is no site 'x'; the sites are a, b"):
        texts(source, tokenizer, partition=partition, sites=["a", "x"])


def test_named_sites_of_the_embedded_text_take_part_alone(tokenizer: Any) -> None:
    read = SiteTexts(DataConfig(sites=("xml", "email")), tokenizer, seed=0)
    assert read.sample_from == "public"  # text that comes with Fluvial
    assert read.names == ("email", "xml")
    with pytest.raises(ConfigError, match="data.sites: there is no site 'north'; the sites are ar"):
        SiteTexts(DataConfig(sites=("north",)), tokenizer, seed=0)
    with pytest.raises(ConfigError, match="'xml' is listed twice"):
        parse({"data": {"sites": ["xml", "xml"]}}, "test")


def test_a_held_out_source_is_split_over_the_sites(tmp_path: Path, tokenizer: Any) -> None:
    source = save("jsonl", tmp_path, table())
    apart = table().select([0, 1, 30, 46, 56]).to_list()
    for row in apart:
        row["text"] = f"apart {row['clinic']}"
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("\n".join(json.dumps(row) for row in apart))
    options: dict[str, Any] = {
        "partition": {"by": "column", "column": "clinic"},
        "heldout_source": str(heldout),
    }
    sites = texts(source, tokenizer, **options)

    for name in sites.names:
        data = sites.load(name)
        decoded = {
            tokenizer.decode(list(example.input_ids), skip_special_tokens=True)
            for example in data.heldout
        }
        assert decoded == {f"apart {name}"}

    assert len(sites.load("north").train) == 30
    heldout.write_text(
        "\n".join(json.dumps(row) for row in apart if row["clinic"] not in ("west", "south"))
    )
    with pytest.raises(
        ConfigError, match=r"heldout_source has no records of site 'south' \(2 sites lack some\)"
    ):
        texts(source, tokenizer, **options)


def test_files_are_sites(tmp_path: Path, tokenizer: Any) -> None:
    folder = save("folder", tmp_path, table())
    sites = texts(folder, tokenizer, partition={"by": "file"})
    assert sites.names == ("a", "b")
    assert [sites.load(name).records for name in sites.names] == [40, 20]
    assert found(sites, tokenizer) == Counter(table()["text"])
    shutil.copy(folder / "a.jsonl", folder / "a.json")

    with pytest.raises(ConfigError, match="holds two files for site 'a'"):
        texts(folder, tokenizer, partition={"by": "file"})


def test_columns_are_renamed(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"question": f"q{number}", "answer": f"a{number}", "id": number} for number in range(20)
    ]
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    columns = {"prompt": "question", "completion": "answer"}
    data = texts(tmp_path / "qa.json", tokenizer, columns=columns).load("site-0")
    assert [question.prompt[0] + question.answer[0] for question in data.questions] == ["qa"]
    assert all(learned(tokenizer, example).startswith("a") for example in data.train)

    with pytest.raises(
        ConfigError,
        match=r"qa.json \(data.source\): data.columns: prompt = 'ask', but .* columns "
        r"'question', 'answer', 'id'",
    ):
        texts(tmp_path / "qa.json", tokenizer, columns={"prompt": "ask"})


def test_every_bad_record_is_named_by_file_and_line(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "p", "completion": "c"} for _ in range(20)]
    lines = [json.dumps(row) for row in rows]
    lines[4] = '{"prompt": "p", "completion": null}'
    lines[7] = '{"prompt": "p", "completion": 7}'
    lines[11] = '{"prompt": "p"}'
    (tmp_path / "qa.jsonl").write_text("\n".join(lines))

    with pytest.raises(DataError) as caught:
        texts(tmp_path / "qa.jsonl", tokenizer)
    name = tmp_path / "qa.jsonl"
    assert str(caught.value).splitlines() == [
        "3 faults in the data:",
        f"{name}, line 5: field 'completion' must be text, and is null; write a text, or remove "
        "the record",
        f"{name}, line 8: field 'completion' must be text, and is a number; put it in quotes, or "
        "set data.numbers = "
        '"text" to take it as it is written',
        f"{name}, line 12: field 'completion' is missing; form 'prompt_completion' needs it; add "
        "it, or remove the "
        "record",
    ]


def test_sources_that_cannot_be_read_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.json").write_text("{not json")
    (tmp_path / "notes.doc").write_text("x")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "mixed").mkdir()

    for name in ("a.csv", "b.txt"):
        (tmp_path / "mixed" / name).write_text("text\nx\n")
    for name, message in (
        ("none.jsonl", "data.source: there is no file or folder .*none.jsonl"),
        ("empty.jsonl", "empty.jsonl: is empty"),
        ("broken.json", r"broken.json, line 1 \(.*\) is not JSON"),
        (
            "notes.doc",
            "must hold files of one kind among .jsonl, .json, .csv, .parquet, .txt, .tsv",
        ),
        ("nothing", r"folder .*nothing' holds no .jsonl, .json"),
        ("mixed", "must hold files of one kind"),
    ):
        with pytest.raises(ConfigError, match=message):
            texts(tmp_path / name, tokenizer)

    with pytest.raises(
        ConfigError, match=r"data.source: 'nobody/no-such-data' is no file .* hub cannot be reached"
    ):
        texts("nobody/no-such-data", tokenizer)


def test_pooled_is_one_site_with_the_data_of_all(tmp_path: Path, tokenizer: Any) -> None:
    source = save("jsonl", tmp_path, table())
    sites = texts(source, tokenizer)
    pooled = sites.pooled()
    assert pooled.train == [example for name in sites.names for example in sites.load(name).train]
    assert pooled.heldout == [
        example for name in sites.names for example in sites.load(name).heldout
    ]


def test_public_text_comes_from_its_own_source(tmp_path: Path, tokenizer: Any) -> None:
    source = save("jsonl", tmp_path, table())
    with pytest.raises(
        ConfigError, match=r"data.public_source: a codec that learns from public text needs some"
    ):
        texts(source, tokenizer).public()

    (tmp_path / "public.txt").write_text("".join(f"public {number}\n" for number in range(20)))
    public = texts(source, tokenizer, public_source=str(tmp_path / "public.txt")).public()
    assert sum(len(examples) for examples in public.values()) == 20
    assert len(public) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"partition": {"by": "iid", "sites": 3}, "form": "text"},
            "form, partition: without effect, because source='stdlib'",
        ),
        ({"heldout_share": 0.2}, "heldout_share: without effect, because source='stdlib'"),
        (
            {"source": "a.csv", "heldout_source": "b.csv", "heldout_share": 0.2},
            "heldout_share: without effect beside",
        ),
        (
            {"source": "a.csv", "heldout_split": "test", "heldout_share": 0.2},
            "heldout_share: without effect beside",
        ),
        ({"sauce": "a.csv"}, "Extra inputs are not permitted"),
        (
            {"source": "a.csv", "partition": {"by": "iid", "column": "x"}},
            "Extra inputs are not permitted",
        ),
        (
            {"source": "a.csv", "partition": {"by": "luck"}},
            "does not match any of the expected tags",
        ),
    ],
)
def test_settings_without_effect_or_sense_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**settings)


def _file(document: stdlib.Document) -> str:
    return document.name.rpartition("#")[0]


def test_the_groups_of_the_standard_library_share_no_file() -> None:
    groups = {name: stdlib.site_text(name) for name in stdlib.site_names()}
    files = {
        name: {_file(document) for document in [*text.train, *text.heldout]}
        for name, text in groups.items()
    }
    files["public"] = {
        _file(document) for documents in stdlib.public_packages().values() for document in documents
    }
    files["pretrain"] = {_file(document) for document in stdlib.pretraining_documents()}
    seen = Counter(file for group in files.values() for file in group)
    assert max(seen.values()) == 1
    assert len(files) == 10
    assert len(seen) > 200


def test_held_out_files_of_a_site_are_not_trained_on() -> None:
    for name in stdlib.site_names():
        text = stdlib.site_text(name)
        train, heldout = (
            {_file(document) for document in part} for part in (text.train, text.heldout)
        )
        assert train
        assert heldout
        assert not train & heldout
        size = sum(len(document.text) for document in text.heldout)
        share = size / (size + sum(len(document.text) for document in text.train))
        assert 0.02 < share < stdlib.HELD_OUT_SHARE + stdlib.LARGEST_HELD_OUT, name
        assert stdlib.site_text(name) == text


def test_documents_join_to_the_files_they_were_cut_from() -> None:
    text = stdlib.site_text("archives")
    library = Path(sysconfig.get_path("stdlib"))
    for file in ("tarfile.py", "gzip.py"):
        parts = [
            document.text for document in [*text.train, *text.heldout] if _file(document) == file
        ]
        assert "".join(parts) == (library / file).read_text(encoding="utf-8")
        assert all(0 < len(part) <= stdlib.CHUNK_CHARS for part in parts)


def test_a_python_without_sources_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.setattr(stdlib, "_library", lambda: tmp_path)
    message = (
        "needs the library sources of this Python .* only 0 of 40000 characters are there. "
        "Install them"
    )
    for read, what in (
        (lambda: stdlib.site_text("xml"), "site 'xml'"),
        (stdlib.public_packages, "the public text"),
        (stdlib.pretraining_documents, "the pre-training text"),
        (lambda: SiteTexts(DataConfig(), tokenizer, seed=0).load("xml"), "site 'xml'"),
    ):
        with pytest.raises(ConfigError, match=f"data.source='stdlib': {what} {message}"):
            read()

    with pytest.raises(ConfigError, match="has no site 'nowhere'; its sites are archives, asyncio"):
        stdlib.site_text("nowhere")


def test_the_embedded_text_needs_no_settings(tokenizer: Any) -> None:
    sites = SiteTexts(DataConfig(), tokenizer, seed=0)
    assert sites.names == stdlib.site_names()
    data = sites.load("archives")
    assert min(len(data.train), len(data.heldout)) > 20
    assert {len(example.input_ids) <= 128 for example in data.train} == {True}
    assert sites.load("archives") is data


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"text": "a", "client": "x"}\n{"text" "b"}\n', r"line 2 \(.*\) is not JSON"),
        ("", "is empty"),
        (
            '{"text": "a", "client": "x"}\n{"text": "b"}\n',
            r"broken.jsonl, line 2: data.partition.column='client': the record has no such field",
        ),
        ('{"question": "a", "client": "x"}\n', "fit no form"),
    ],
)
def test_broken_files_are_named_with_their_line(
    content: str, text: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=text):
        texts(path, tokenizer, partition={"by": "column", "column": "client"})


def test_an_empty_answer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"record 7: the answer is empty.*remove the record"):
        tokenize(
            [("record 7", {"prompt": "a", "completion": " "})],
            "prompt_completion",
            tokenizer,
            max_length=32,
        )
