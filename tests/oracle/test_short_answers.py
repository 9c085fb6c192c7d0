"""Short greedy answers, computed many at once, are those of plain transformers one by one."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fluvial
from fluvial.data import keywords
from fluvial.data.records import Answered
from fluvial.models.generation import AT_ONCE, SHORT, continuations

EMBEDDED_FOLDER = Path(fluvial.__file__).parent / "assets" / "tiny"


@pytest.mark.parametrize("tuned", [False, True])
def test_short_answers_are_those_of_plain_generation(tuned: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype=torch.float32).eval()
    if tuned:
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(target_modules="all-linear")).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)

    prompts = []
    for site in keywords.site_names()[:2]:
        contents = [record.content for record in keywords.site_records(site)[1]]
        prompts += [each.prompt for each in contents if isinstance(each, Answered)]
    assert len(prompts) > AT_ONCE
    context = 20
    found = list(continuations(model, tokenizer, prompts, max_new_tokens=SHORT, context=context))
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
