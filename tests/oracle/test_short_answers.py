"""Greedy answers, computed many at once: those of plain transformers one by one, whatever the
others are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fluvial
from fluvial.data import keywords
from fluvial.data.records import Answered
from fluvial.models.generation import AT_ONCE, SHORT, continuations

EMBEDDED_FOLDER = Path(fluvial.__file__).parent / "assets" / "tiny"


def embedded(dtype: torch.dtype, *, tuned: bool) -> Any:
    """The embedded model, with a random adapter on top if it is tuned."""
    model: Any = AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype=dtype).eval()
    if not tuned:
        return model

    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def questions() -> list[str]:
    """The held-out questions of two sites of the quick start."""
    prompts = []
    for site in keywords.site_names()[:2]:
        contents = [record.content for record in keywords.site_records(site)[1]]
        prompts += [each.prompt for each in contents if isinstance(each, Answered)]
    return prompts


@pytest.mark.parametrize("tuned", [False, True])
def test_short_answers_are_those_of_plain_generation(tuned: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    model = embedded(torch.float32, tuned=tuned)
    prompts = questions()
    assert len(prompts) > AT_ONCE
    context = 20
    found = continuations(model, tokenizer, prompts, max_new_tokens=SHORT, context=context)
    cut = 0

    for prompt, text in zip(prompts, found, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        room = max(0, min(SHORT, context - length))
        cut += room < SHORT
        expected = ""
        if room:
            output = model.generate(
                **inputs,
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            expected = tokenizer.decode(output[0, length:], skip_special_tokens=True)
        assert text == expected

    assert 0 < cut < len(prompts)
    assert len(set(found)) > 10


@pytest.mark.parametrize(("new_tokens", "count"), [(4, 64), (SHORT + 2, 24)])
def test_an_answer_does_not_depend_on_the_other_prompts(new_tokens: int, count: int) -> None:
    """In bfloat16, where equal logits are frequent and rounding follows the shape of a batch."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    model = embedded(torch.bfloat16, tuned=True)
    prompts = questions()[:count]
    answers = continuations(model, tokenizer, prompts, max_new_tokens=new_tokens)
    for some in (slice(None, None, -2), slice(1, 2)):
        found = continuations(model, tokenizer, prompts[some], max_new_tokens=new_tokens)
        assert found == answers[some]
