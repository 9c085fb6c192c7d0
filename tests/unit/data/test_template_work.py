"""Templates that would hang a site or exhaust its memory are refused at once."""

import copy
import time
from typing import Any

import pytest

from fluvial.data import template_work
from fluvial.data.chat import chat_prompt
from fluvial.data.templates import NAMED
from fluvial.errors import ConfigError

TURNS: list[Any] = [
    {"role": role, "content": f"{role} says {number} " + "words and more words " * 100}
    for number in range(20)
    for role in ("user", "assistant")
]
LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"


def large(start: str, step: str) -> str:
    """A template that takes a step a hundred times."""
    loop = "{% for i in range(100) %}"
    return f"{{% set n = namespace(x={start}) %}}{loop}{{% set n.x = {step} %}}{END}{{{{ n.x }}}}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 3000000000 }}",
        "{{ [0] * 3000000000 }}",
        "{{ 10 ** (10 ** 10) }}",
        LOOP + LOOP + END + END,
        LOOP + "a word of the template, written again and again, " * 3 + END,
        "{% macro m() %}" + LOOP + END + "{% endmacro %}" + LOOP + "{{ m() }}" + END,
        large("'xy'", "n.x ~ n.x"),
        large("'xy'", "n.x + n.x"),
        large("[1]", "[n.x, n.x]"),
        large("3", "n.x * n.x"),
        "{{ 'x' | center(3000000000) }}",
        "{{ 'x'.ljust(3000000000) }}",
        "{{ '%3000000000d' | format(1) }}",
        "{{ '%3000000000d' % 1 }}",
        "{{ '{:3000000000}'.format(1) }}",
        "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
        "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
        "{{ (['x' * 99999] * 99999) | join }}",
        "{{ ('x\n' * 9999) | indent(99999) }}",
        "{{ [1] | tojson(indent=3000000000) }}",
        "{{ ['x'] | map('center', 3000000000) | list }}",
        "{{ lipsum(n=1000000) }}",
    ],
)
def test_a_template_of_too_much_work_is_refused_at_once(
    template: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_work, "MOST", 100_000)
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match=r"refuses the conversation: (it takes more|lipsum)"):
        chat_prompt([{"role": "user", "content": "x"}], changed, "change it")
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("name", [*NAMED, "generation"])
def test_a_long_conversation_is_rendered_as_transformers_does(name: str, tokenizer: Any) -> None:
    changed = copy.copy(tokenizer)
    changed.chat_template = (
        "{% for m in messages %}{% generation %}{{ loop.index ~ m['content'] + eos_token }}"
        "{% endgeneration %}{% endfor %}"
        if name == "generation"
        else NAMED[name][1]
    )
    expected = changed.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    template_work.check_work(
        changed.chat_template, TURNS, changed.special_tokens_map, add_generation_prompt=True
    )
    compiled = template_work._compiled(changed.chat_template)
    tokens = changed.special_tokens_map
    assert compiled.render(messages=TURNS, add_generation_prompt=True, **tokens) == expected
