"""The decoder's layers of models with more than one tower."""

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from fluvial.models.layer_lists import layer_lists, num_layers, text_config

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def test_the_decoder_of_a_model_of_text_and_images_is_that_of_the_text() -> None:
    config = Gemma3Config(text_config=SMALL, vision_config=TOWER, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config)

    lists = [name for name, module in model.named_modules() if name.endswith("layers")]
    assert len(lists) == 2, "both towers have three layers"
    assert num_layers(model) == 3
    assert text_config(model).vocab_size == 64
    ((path, layers),) = layer_lists(model)
    assert path == "model.language_model.layers"
    assert len(layers) == 3
