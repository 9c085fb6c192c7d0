"""Ends of answers: by a chat template's mark, by its text, and special tokens within answers."""

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fluvial.data.chat import chat_prompt, encode_chat
from fluvial.data.examples import IGNORE_INDEX
from fluvial.data.records import Chat
from fluvial.models.ends import End, Rendered, answer_text, end_in, end_of, until
from fluvial.models.generation import continuations
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.streaming import Sampling, stream

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS: list[Any] = [
    {"role": "user", "content": "who"},
    {"role": "assistant", "content": "river"},
]


@pytest.fixture
def marked(tokenizer: Any) -> Any:
    """The tokenizer of the tiny models with the marks of ChatML, neither of which is its EOS."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    changed.chat_template = CHATML
    return changed


def test_the_mark_of_the_template_ends_an_answer_beside_eos(marked: Any) -> None:
    mark = marked.convert_tokens_to_ids("<|im_end|>")
    model = cast(Any, SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7, 2])))
    _, question = encode_chat("a", Chat(TURNS), marked, "answer")
    assert question is not None
    ends = {mark, marked.eos_token_id, 7}
    for prompt in (
        question.asked,
        chat_prompt(TURNS[:1], marked, ""),
        pickle.loads(pickle.dumps(question)).asked,
    ):
        assert end_of(marked, model, prompt).ids == ends
    assert end_of(marked, model, "a text").ids == ends - {mark}


def test_a_mark_of_plain_text_is_cut_off(tokenizer: Any, marked: Any) -> None:
    end = end_in(" [end]\n", tokenizer)
    assert end == End(text="[end]")
    ids = tokenizer("the river [end] and", add_special_tokens=False)["input_ids"]
    assert answer_text(tokenizer, ids, end) == ("the river ", True)
    assert answer_text(tokenizer, ids[:2], end)[1] is False

    closed = end_in('"</s>\n', tokenizer)  # the same text may stand within an answer
    ids = tokenizer('say "a""', add_special_tokens=False)["input_ids"]
    assert answer_text(tokenizer, [*ids, tokenizer.eos_token_id], closed) == ('say "a"', True)


def test_special_tokens_of_an_answer_stay_and_those_around_it_go(marked: Any) -> None:
    ids = marked("a<|im_start|>b<s><pad></s>c", add_special_tokens=False)["input_ids"]
    assert answer_text(marked, ids, End(frozenset({marked.eos_token_id}))) == (
        "a<|im_start|>b",
        True,
    )


def test_pieces_of_a_text_end_at_a_mark_over_several() -> None:
    pieces = ["ab", "c[", "en", "d]", "x"]
    assert "".join(until(pieces, End(text="[end]"))) == "abc"
    assert "".join(until(pieces, End(text="[ends]"))) == "".join(pieces)
    assert list(until(pieces, End())) == pieces


@pytest.mark.parametrize("new_tokens", [6, 12])  # computed again, and by steps
def test_generation_stops_at_the_end_of_its_own_prompt(tiny_model: Path, new_tokens: int) -> None:
    pool = ModelPool(ModelConfig(name_or_path=str(tiny_model), device="cpu"), None)
    tokenizer = pool.tokenizer
    prompt = tokenizer("The river carries")["input_ids"]
    with pool.model({}) as borrowed:
        model = cast(Any, borrowed)
        new = model.generate(
            input_ids=cast(Any, tokenizer)("The river carries", return_tensors="pt")["input_ids"],
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        end = End(frozenset({new[3]}))
        expected = tokenizer.decode(new[: new.index(new[3])])
        asked = Rendered(prompt, end)
        plain, ended = continuations(
            model, tokenizer, [prompt, asked], max_new_tokens=new_tokens, context=None
        )
        assert (ended, ended.cut) == (expected, False)
        assert (plain[: len(expected)], plain.cut) == (expected, True)
        assert plain != expected
        pieces = stream(model, tokenizer, asked, Sampling(max_new_tokens=new_tokens))
        assert "".join(pieces) == expected


HEADER = "{% for m in messages %}<|im_start|>{{ m.role }}: @{{ m.content }}</s>\n{% endfor %}"


def learned_and_asked(tokenizer: Any, turns: list[Any]) -> tuple[str, str]:
    example, question = encode_chat("a", Chat(turns), tokenizer, "answer")
    assert question is not None
    learned = [label for label in example.labels if label != IGNORE_INDEX]
    return tokenizer.decode(learned), tokenizer.decode(question.prompt_ids)


def test_a_template_that_ignores_generation_learns_and_asks_after_its_header(marked: Any) -> None:
    marked.chat_template = HEADER.replace("@", "")
    turns = [*TURNS, *TURNS]
    learned, asked = learned_and_asked(marked, turns)
    assert "assistant" not in learned
    assert learned.split() == ["river</s>", "river</s>"]
    assert asked.rstrip().endswith("<|im_start|>assistant:")
    assert marked.decode(chat_prompt(turns[:-1], marked, "")) == asked


def test_a_header_with_more_than_the_prompt_is_learned_and_given_to_a_question(marked: Any) -> None:
    """As the empty thoughts that Qwen3 writes before an answer; a text would never match them."""
    thoughts = "{% if m.role == 'assistant' %}<think></think>\n{% endif %}"
    marked.chat_template = (
        HEADER.replace("@", thoughts)
        + "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    learned, asked = learned_and_asked(marked, TURNS)
    assert learned.strip().startswith("<think></think>")
    assert asked.endswith("<|im_start|>assistant: <think></think>\n")
